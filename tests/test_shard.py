"""Sharded models: the same metrics and files as whole ones, and half the weights in each process."""

import json
import os
import shutil
import signal

import pytest
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
UNEVEN = {"actor_batch": 13, "micro_batch": 3}  # 7 and 6 rows: 3 pieces each, of other sizes


def note_sizes():
    """Notes which share of each trained model this process holds: at rest, and then inside each
    layer, forward and backward. Returns a list with a list of shares for each model."""
    prepare, found = models.trainable, []

    def bytes_of(model):
        tensors = [sharding.here(p.detach()).untyped_storage() for p in model.parameters()]
        return sum({x.data_ptr(): x.nbytes() for x in tensors if x.nbytes()}.values())

    def trainable(model, cfg, **how):
        total = bytes_of(model)
        model = prepare(model, cfg, **how)
        sizes = [bytes_of(model) / total]
        found.append(sizes)

        def look(*_):
            sizes.append(bytes_of(model) / total)

        for layer in sharding.layers(model):
            inside = next(m for m in layer.modules() if type(m).__name__ == "Linear")
            inside.register_forward_hook(look)
            inside.register_full_backward_hook(look)
        return model

    models.trainable = trainable
    return found


@pytest.fixture(scope="module", params=FEW)
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
        model = random_model(family, len(tokenizer), num_hidden_layers=6, init_std=0.06)
        model.save_pretrained(own)
        tokenizer.save_pretrained(own)
        train(folder, "base", base_model=str(own))

        def every_stage(folder=folder, more=UNEVEN | {"watchdog": 0.1, "shard": family == "opt"}):
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


def test_sharded_models_give_the_metrics_and_weights_of_whole_ones(courses):
    for stage in courses["stages"]:
        assert_same(metrics(courses["sharded"], stage), metrics(courses["whole"], stage))
        for found in (courses["sharded"] / "model" / stage).rglob("*.safetensors"):
            weights = load_file(found)
            expected = load_file(courses["whole"] / found.relative_to(courses["sharded"]))
            assert weights.keys() == expected.keys()
            for name, x in expected.items():
                assert (weights[name] - x).abs().max() < 2e-4, (found, name)
        assert read_record(courses["sharded"], "critic")["processes"] == 2


def test_each_process_holds_half_the_weights(courses):
    for rank in (0, 1):
        path = courses["sharded"] / f"sizes-{rank}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        assert len(found) >= 4  # the actor, two reward models and the watchdog
        for rest, *inside in found:
            assert 0.45 < rest < 0.55
            assert inside and rest < max(inside) < 0.85
