"""Trains on every device of this machine (CPU and GPU, if any), one after the other."""

import math

import pytest
import torch

import util
from lab import models
from tests.conftest import random_model

GPUS = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = [*GPUS, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
WORDS = "apple bread cloud dream eagle flute grape horse island jewel".split()


@pytest.fixture
def course(tokenizer, write_rows, tmp_path):
    """A small course with a base model; returns a function that makes its config for a device."""
    rows = [
        {"prompt": f"What is {a} {b}?", "response": f"A {a}.", "chosen": f"It is {b}.",
         "rejected": f"No {a}."}
        for a in WORDS for b in WORDS
    ]  # fmt: skip
    write_rows(rows)
    base = tmp_path / "mine"
    models.save(random_model("llama", len(tokenizer), initializer_range=0.1), tokenizer, base)

    def config(device, **changes):
        small = dict(
            root=str(tmp_path), base_model=str(base), fallback=False, device=device, steps=2,
            rollout=8, minibatch=8, max_new_tokens=8, validation_rows=8, norm_prompts=4,
            sft_share=0.4, preference_share=0.4, prompt_share=0.2, warmup=0.0,
        )  # fmt: skip
        return util.Config("smoke", **small | changes)

    list(util.train_base(config("cpu")))
    return config


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo"])
def test_all_devices_take_turns_in_one_process_and_agree(course, algorithm, monkeypatch):
    """The CPU runs first and last, and a GPU learns the same as the CPU."""
    made = []
    whole = util.Optimiser.__init__

    def noted(self, *args, **more):
        whole(self, *args, **more)
        made.append({str(p.device) for model in self.models for p in model.parameters()})

    monkeypatch.setattr(util.Optimiser, "__init__", noted)
    found = {}
    for device in ("cpu", *DEVICES):
        cfg, where = course(device, algorithm=algorithm), str(torch.device(device))
        history = [list(train(cfg)) for train in (util.train_actor, util.train_critic)]
        history.append(list(util.train_rlhf(cfg)))
        assert [devices for devices in made if devices != {where}] == [], where
        made.clear()
        found[device] = losses(history[0]), losses(history[1])
        assert all(math.isfinite(x) for x in losses(history[2]))
    for device, (actor, critic) in found.items():
        assert actor == pytest.approx(found["cpu"][0], abs=2e-3), device
        assert critic == pytest.approx(found["cpu"][1], abs=2e-3), device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_ppo_in_every_precision_on_every_device(course, device, precision, rank):
    cfg = course(device, precision=precision, lora_rank=rank)
    for train in (util.train_actor, util.train_critic):
        list(train(cfg))
    history = list(util.train_rlhf(cfg))
    assert all(math.isfinite(step["loss"]) for step in history)
    assert abs(history[0]["kl"]) < 0.05, "policy and reference are still the same"


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_and_scoring_agree_on_every_device(tokenizer, device):
    model = random_model("llama", len(tokenizer), initializer_range=0.1).to(device)
    cfg = util.Config("smoke", device=device)
    prompts = [f"Human: {a} {b}? Assistant:" for a in WORDS for b in WORDS[:3]]
    tokens = util.encode_prompts(tokenizer, prompts, cfg, model.device)
    how = util.sampling(cfg, model, tokenizer)
    ids, mask, sampled = util.generate(model, *tokens, **how, generator=util.rng_for(cfg, "x"))
    with torch.no_grad():
        scored, _ = util.response_logprobs(model, *tokens, ids, mask)
    assert torch.allclose(scored, sampled, atol=1e-3)
    home = random_model("llama", len(tokenizer), initializer_range=0.1)
    there = util.encode_prompts(tokenizer, prompts, cfg, "cpu")
    expected = util.generate(home, *there, **how, generator=util.rng_for(cfg, "x"))[0]
    same = (ids[:, : expected.shape[1]].cpu() == expected[:, : ids.shape[1]]).float().mean()
    assert same > 0.95, "the same random numbers choose the same tokens"
