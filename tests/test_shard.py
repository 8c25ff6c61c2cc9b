"""Sharded models give the metrics and files of whole ones; each of two processes holds half."""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from test_processes import assert_same, config, metrics, together, train

import util
from lab import CourseError, models, processes, sharding
from lab.runs import read_record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")
RUNS = {  # of 3_rlhf
    "ppo": {},
    "grpo": {"algorithm": "grpo", "kl_in": "loss"},
    "dpo": {"algorithm": "dpo", "gradient_checkpointing": True},
}
FEW = {"llama": ["ppo"], "opt": ["grpo", "dpo"]}
# 7 and 6 rows: 3 pieces each, of other sizes
SMALL = {"actor_batch": 13, "micro_batch": 3, "max_new_tokens": 8, "minibatch": 9}


def note_sizes():
    """Notes which share of each trained model this process holds, in a list for each model: at
    rest; half of it with two layers gathered and what no layer has; and then inside each layer in
    updates, forward and backward."""
    prepare, found = models.trainable, []

    def bytes_of(model):
        tensors = [sharding.here(p.detach()).untyped_storage() for p in model.parameters()]
        return sum({x.data_ptr(): x.nbytes() for x in tensors if x.nbytes()}.values())

    def trainable(model, cfg, **how):
        total = bytes_of(model)
        layers = sharding.layers(model)
        gathered = total - bytes_of(layers) + 2 * bytes_of(layers[0])
        model, most = prepare(model, cfg, **how), 0.5 + 0.5 * gathered / total
        sizes = [bytes_of(model) / total, most]
        found.append(sizes)

        def look(*_):
            sizes.append(bytes_of(model) / total)

        for layer in layers:
            inside = next(m for m in layer.modules() if type(m).__name__ == "Linear")
            inside.register_forward_hook(lambda *_: look() if torch.is_grad_enabled() else None)
            inside.register_full_backward_hook(look)
        return model

    models.trainable = trainable
    return found


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def courses(request, tmp_path_factory, root, tokenizer):
    """A course whose models were whole, and one whose models were sharded over two processes."""
    folders, family = {}, request.param
    for kind in ("whole", "sharded"):
        folder = folders[kind] = tmp_path_factory.mktemp(f"{family}-{kind}")
        (folder / "dataset").mkdir()
        for name in ("train.json", "eval.json"):
            lines = (root / "dataset" / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "dataset" / name).write_text("".join(lines[:90]), encoding="utf-8")
        own = folder / "own"
        model = random_model(family, len(tokenizer), num_hidden_layers=4, dropout=0.0)
        model.save_pretrained(own)
        tokenizer.save_pretrained(own)
        train(folder, "base", base_model=str(own))

        def every_stage(folder=folder, more=SMALL | {"shard": family == "opt"}):
            sizes = note_sizes() if processes.joined() > 1 else []
            train(folder, "actor", **more)
            train(folder, "critic", ensemble=2, **more)
            for name in FEW[family]:
                train(folder, "rlhf", **more | RUNS[name])
                if processes.first():
                    (folder / "model" / "rlhf").rename(folder / "model" / name)
                processes.any_of(False)  # all wait for it
            if sizes:
                path = folder / f"sizes-{processes.rank()}.json"
                path.write_text(json.dumps(sizes), encoding="utf-8")

        if kind == "whole":
            every_stage()
            continue
        with pytest.MonkeyPatch.context() as patch:
            if family == "llama":  # as accelerate launch asks for it
                patch.setenv("ACCELERATE_USE_FSDP", "true")
                patch.setenv("FSDP_VERSION", "2")
                patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
            assert together(2, every_stage) == [0, 0]
    return {"stages": ["actor", "critic", *FEW[family]]} | folders


def figures(folder, stage):
    """Its metrics, without the rounding between sampling and scoring."""
    return [
        {name: x for name, x in line.items() if "ratio_error" not in name}
        for line in metrics(folder, stage)
    ]


def test_sharded_models_give_the_metrics_and_weights_of_whole_ones(courses):
    for stage in courses["stages"]:
        assert_same(figures(courses["sharded"], stage), figures(courses["whole"], stage))
        for found in (courses["sharded"] / "model" / stage).rglob("*.safetensors"):
            weights = load_file(found)
            expected = load_file(courses["whole"] / found.relative_to(courses["sharded"]))
            assert weights.keys() == expected.keys()
            for name, x in expected.items():
                if not name.endswith("k_proj.bias"):  # attention ignores it: its gradient is noise
                    assert (weights[name] - x).abs().max() < 5e-5, (found, name)
        assert read_record(courses["sharded"], "critic")["processes"] == 2


def test_each_process_holds_half_the_weights(courses):
    for rank in (0, 1):
        path = courses["sharded"] / f"sizes-{rank}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        assert len(found) >= 4  # the actor, two reward models and the policy
        for rest, most, *inside in found:
            assert 0.48 < rest < 0.52
            assert rest < min(inside) and max(inside) <= most + 0.001 < 0.95


# ------------------------------------------------------------------------------------------------
# Stops and errors


@pytest.fixture
def place(courses, tmp_path):
    """A course with base and actor."""
    (tmp_path / "model").mkdir()
    for name in ("dataset", "model/base", "model/actor"):
        shutil.copytree(courses["whole"] / name, tmp_path / name)
    return tmp_path


one_family = pytest.mark.parametrize("courses", ["llama"], indirect=True)


@one_family
def test_a_stopped_run_goes_on_with_whole_or_with_sharded_models(place):
    def until(step, shard):
        for line in util.train_actor(config(place, actor_epochs=3, shard=shard)):
            if line["step"] == step:
                os.kill(os.getpid(), signal.SIGTERM)

    train(place, "actor", actor_epochs=3)
    expected = metrics(place, "actor")
    assert together(2, lambda: until(2, True)) == [130, 130]
    assert together(1, lambda: until(4, False)) == [130]
    assert together(2, lambda: train(place, "actor", actor_epochs=3, shard=True)) == [0, 0]
    assert_same(metrics(place, "actor"), expected)


@one_family
def test_a_process_without_rows_takes_part_in_every_pass(place):
    few = {"actor_batch": 1, "sft_share": 0.1}
    train(place, "actor", **few)
    expected = metrics(place, "actor")
    assert together(2, lambda: train(place, "actor", shard=True, **few)) == [0, 0]
    assert_same(metrics(place, "actor"), expected)


@one_family
def test_an_error_between_passes_is_raised_in_all(place, capfd):
    def reward(prompts, responses):
        return [math.nan if processes.rank() else 1.0 for _ in prompts]

    cfg = config(place, shard=True, steps=1, value_init="actor")
    assert together(2, lambda: list(util.train_rlhf(cfg, reward))) == [2, 2]
    assert capfd.readouterr().err.count("finite number") == 2


@one_family
def test_where_a_process_dies_in_a_pass_the_others_stop_with_a_sentence(place, capfd):
    def killed():
        def die(layer, _):
            if processes.rank() == 1 and layer.training:
                os.kill(os.getpid(), signal.SIGKILL)

        prepare = models.sharded

        def shard(model, cfg):
            sharding.layers(model)[2].register_forward_pre_hook(die)  # before it is gathered
            return prepare(model, cfg)

        models.sharded = shard
        train(place, "actor", shard=True)

    start = time.monotonic()
    assert together(2, killed) == [2, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    assert "Another process of this training has stopped" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# What is not sharded


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which the course does not use"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version to 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "set fsdp_offload_params to false",
        ),
    ],
)
def test_other_engines_of_accelerate_get_a_sentence(told, sentence, monkeypatch):
    for name, value in (told | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match=sentence):
        processes.start("cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"load_in_4bit": True, "lora_rank": 2}, "4 bits cannot be sharded"),
        ({"precision": "fp16"}, "does not work with fp16"),
    ],
)
def test_what_cannot_be_sharded_gets_a_sentence(changes, sentence, model, monkeypatch):
    monkeypatch.setattr(processes, "joined", lambda: 2)
    with pytest.raises(CourseError, match=sentence):
        models.sharded(model, util.Config(shard=True, **changes))


def test_one_process_keeps_whole_models(model):
    assert models.sharded(model, util.Config(shard=True)) is model
    assert not sharding.is_sharded(model)
