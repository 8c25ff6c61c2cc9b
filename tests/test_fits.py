"""python -m lab fits: counts that are exact, estimates that grow and shrink as they must."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import shape_of
from transformers import AutoModelForCausalLM

import util
from lab import __main__ as driver
from lab import fits, memory
from util import Config

KNOWN = {  # the numbers of weights that their authors give
    "facebook/opt-125m": 125_239_296,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}
GIVEN = dict(preset="colab", max_prompt=12, max_new_tokens=6, rollout=8, minibatch=4)
CARD = fits.Machine("a card", 16e9, 1e12, 1e11, "fp16")
PROCESSOR = fits.Machine("a processor", None, 1e12, 1e11, "float32", gpu=False)


def counter(stage, family="llama", machine=PROCESSOR, layers=2, **changes):
    shape = shape_of(family, 61)
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = ["full_attention"] * layers
    function, own = fits.STAGES[stage]
    cfg = fits.config_of(util, GIVEN | changes, own)
    return fits.Counter(util, function, cfg, shape, machine)


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_models_have_their_number_of_weights_without_the_hub(name):
    shape = fits.shape_of(name, Config("colab"))
    assert sum(p.numel() for p in fits.causal(shape, None).parameters()) == KNOWN[name]


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("stage, models", [("1_actor SFT", 1), ("3_rlhf DPO", 2)])
def test_weights_gradients_and_moments_are_exact(family, stage, models):
    found = counter(stage, family)
    real = AutoModelForCausalLM.from_config(found.shape, dtype=torch.float32)
    size, fixed = sum(p.nbytes for p in real.parameters()), found.count("weights")
    assert fixed["weights"] == models * size
    assert (fixed["gradients"], fixed["moments"]) == (size, 2 * size)


def test_a_clone_with_few_layers_tells_what_all_layers_need():
    few, whole = counter("1_actor SFT", layers=6), counter("1_actor SFT", layers=6)
    whole.known["update", 4, False] = whole.run("update", whole.shape, 4, False)
    assert few.updating(4) == pytest.approx(whole.updating(4), rel=0.01)


def kept(loss_of):
    """The bytes that torch keeps for the backward pass."""
    blocks = {}

    def note(x):
        blocks[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        told = loss_of()
    del told
    return sum(blocks.values())


def test_a_dry_update_holds_what_a_real_one_keeps(monkeypatch):
    found = counter("1_actor SFT")
    model = AutoModelForCausalLM.from_config(found.shape, dtype=torch.float32).train()
    four = lambda *_: [x % 61 for x in fits.token_tensors(found.cfg, range(4), range(4))]  # noqa: E731
    real = [x.bool() if i % 2 else x for i, x in enumerate(four())]
    monkeypatch.setattr(util, "encode_pairs", lambda *_: real)
    rows = fits.rows_of(4)
    util.sft_loss(model, None, found.cfg, rows)  # compares the fast path, once
    needed = kept(lambda: util.sft_loss(model, None, found.cfg, rows))
    weights = sum(p.nbytes for p in model.parameters())
    assert needed - weights < found.updating(4) - found.held() - memory.OVERHEAD < 2 * needed


@pytest.mark.parametrize("stage", ["1_actor SFT", "2_critic", "3_rlhf PPO", "3_rlhf DPO"])
def test_more_rows_and_longer_ones_need_more_and_pieces_less(stage):
    base, longer = counter(stage), counter(stage, max_new_tokens=12)
    assert base.updating(1) < base.updating(4)
    assert base.updating(4) < longer.updating(4)
    assert base.per_row("update", "flops") < longer.per_row("update", "flops")


@pytest.mark.parametrize("stage", ["1_actor SFT", "3_rlhf PPO"])
def test_adapters_and_checkpointing_save_memory_and_shards_divide_it(stage):
    base = counter(stage, max_prompt=60)
    fixed, small = base.count("weights"), base.changed({"lora_rank": 1})
    assert small.held() < base.held()
    assert small.count("weights")["gradients"] < fixed["gradients"] / 4
    again = base.changed({"gradient_checkpointing": True})
    assert again.updating(4) < base.updating(4)
    assert again.per_row("update", "flops") > 1.1 * base.per_row("update", "flops")
    states = fixed["weights"] + fixed["moments"] + fixed["gradients"]
    assert base.held(2) - base.held(4) == pytest.approx(states / 4)


def test_half_precision_copies_weights_and_halves_frozen_ones():
    whole, half = counter("3_rlhf PPO", "qwen2"), counter("3_rlhf PPO", "qwen2", CARD)
    assert half.count("weights")["weights"] < whole.count("weights")["weights"]
    packed = counter("3_rlhf GRPO, RLOO", machine=replace(CARD, precision="bf16"), lora_rank=1)
    assert packed.changed({"load_in_4bit": True}).least() < packed.least()


def test_rows_are_halved_until_they_fit_and_the_cheapest_change_is_named():
    found = counter("1_actor SFT", machine=replace(CARD), max_prompt=100)
    found.machine.room = found.updating(1, several=True) + 1
    estimate = found.estimate()
    assert (estimate.rows, fits.verdict(found, estimate, 1)) == (1, "yes")
    found.machine.room = found.changed({"gradient_checkpointing": True}).least() + 1
    assert fits.verdict(found, found.estimate(), 1).startswith("no; gradient_checkpointing=True: ")
    found.machine.room = 1
    assert fits.verdict(found, found.estimate(), 1) == "no"


def test_a_token_takes_as_long_as_reading_the_weights():
    slow, fast = (
        counter("4_test", machine=replace(PROCESSOR, flops=1e18, bandwidth=x)) for x in (1e9, 2e9)
    )
    assert slow.estimate().seconds == pytest.approx(2 * fast.estimate().seconds, rel=0.01)


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and nothing else."""
    shape_of("llama", 61).save_pretrained(tmp_path / "only")
    return tmp_path / "only"


def test_the_command_prints_every_stage_of_a_folder_with_a_config(folder, capsys):
    pairs = ("max_prompt=12", "max_new_tokens=6", "rollout=8", "minibatch=4", "actor_batch=2")
    line = ["fits", str(folder), "--gpu", "16"] + [x for p in pairs for x in ("--set", p)]
    assert driver.main(line) == 0
    said = capsys.readouterr().out
    for name in fits.STAGES:
        assert re.search(rf"^{re.escape(name)} .* yes$", said, re.M), name
    assert "T4 (16 GB), fp16. Prompts of 12 tokens, answers of 6." in said
    assert "2 of 2" in said and "4 of 4" in said


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("nowhere/model", "nowhere/model does not load"),
        ("tiny --gpu 0", "--gpu must be above 0"),
        ("tiny --set kl_coeff=1", "did you mean 'kl_coef'"),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(line, sentence, capsys):
    assert driver.main(["fits", *line.split()]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_tiny_is_the_model_that_the_course_trains():
    cfg = Config("tiny")
    shape = fits.shape_of("tiny", cfg)
    assert (shape.hidden_size, shape.num_hidden_layers) == (cfg.hidden_size, cfg.layers)


def test_other_algorithms_keep_their_own_settings():
    given = {"preset": "colab", "algorithm": "rloo", "answers": 8}
    assert fits.config_of(util, given, {"algorithm": "ppo"}).answers == 1
    assert fits.config_of(util, {"preset": "colab"}, {"algorithm": "grpo"}).answers == 4
