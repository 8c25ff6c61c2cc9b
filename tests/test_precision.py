"""Half precision and devices: rounding, the checks for errors, where models are placed."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import util
from lab import CourseError, checks, models
from tests.conftest import random_model, run_loop

PRECISIONS = ["float32", "bf16", "fp16"]
PROMPTS = [f"Human: What is {word}? Assistant:" for word in "a bb ccc dddd eeeee".split()]


def config(**changes):
    small = dict(device="cpu", steps=1, rollout=20, minibatch=20, max_new_tokens=12, warmup=0.0)
    return util.Config("smoke", **small | changes)


def crew_of(tokenizer, family="gpt2"):
    policy, value = (random_model(family, len(tokenizer), initializer_range=0.1) for _ in range(2))
    value.score = torch.nn.Linear(16, 1)
    reward = lambda prompts, responses: [0.0] * len(prompts)  # noqa: E731
    return util.Crew(tokenizer, policy, policy, reward, value)


# ------------------------------------------------------------------------------------------------
# The ratio of the first update


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", ["none", "temperature", "dropout", "sampling"])
def test_rounding_passes_and_anything_else_stops_the_run(tokenizer, monkeypatch, fault, precision):
    cfg, crew = config(precision=precision, micro_batch=3), crew_of(tokenizer)
    score, sample = util.response_logprobs, util.make_rollout

    def hot(*tokens, temperature, **how):
        return score(*tokens, temperature=1.5, **how)

    def dropping(*tokens, **how):
        logprobs, entropy = score(*tokens, **how)
        return F.dropout(logprobs, 0.1), entropy

    def other_sampling(*args, **how):
        rollout = sample(*args, **how)
        rollout.sampled = 1.2 * rollout.sampled
        return rollout

    wrong = {
        "none": ("make_rollout", sample),
        "sampling": ("make_rollout", other_sampling),
        "temperature": ("response_logprobs", hot),
        "dropout": ("response_logprobs", dropping),
    }
    monkeypatch.setattr(util, *wrong[fault])
    if fault == "none":
        (metrics,) = run_loop(crew, cfg, PROMPTS * 4)
        assert metrics["ratio_error"] <= metrics["ratio_error_q99"]
        return
    with pytest.raises(CourseError, match="first ratios of a rollout are off by .* on average"):
        run_loop(crew, cfg, PROMPTS * 4)


def test_in_half_precision_ratios_compare_scoring_with_scoring(tokenizer, monkeypatch):
    cfg, crew = config(precision="bf16", micro_batch=4), crew_of(tokenizer)
    seen, whole = [], util.make_rollout
    monkeypatch.setattr(
        util, "make_rollout", lambda *a, **k: seen.append(whole(*a, **k)) or seen[-1]
    )
    (metrics,) = run_loop(crew, cfg, PROMPTS * 4)
    assert metrics["ratio_error"] < seen[0].sampling_error / 3
    rollout = whole(crew, PROMPTS * 4, config(), util.rng_for(cfg, "test"))
    assert rollout.sampled is rollout.logprobs or torch.equal(rollout.sampled, rollout.logprobs)


def test_single_tokens_that_rounding_hits_hard_are_said_once():
    told = []
    optimiser, rollout = SimpleNamespace(state={}, say=told.append), SimpleNamespace()
    rollout.sampling_error, stats = 0.03, {"ratio_error": 0.03, "ratio_error_q99": 0.35}
    for _ in range(3):
        checks.check_ratios(rollout, stats, "bf16", optimiser)
    assert len(told) == 1 and "0.35" in told[0] and "precision = float32" in told[0]
    assert json.loads(json.dumps(optimiser.state)) == optimiser.state, "a stopped run knows it"


def test_a_quantile_knows_the_mask():
    x = torch.tensor([[5.0, 1, 9], [2, 3, 9]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert util.masked_quantile(x, mask, 1.0) == 5
    assert util.masked_quantile(x, mask, 0.75) == 3
    assert util.masked_quantile(x, mask & False, 0.99) == 0


def test_of_several_pieces_the_worst_quantile_counts(tokenizer):
    cfg = config()
    model = random_model("opt", len(tokenizer))
    optimiser = util.Optimiser(cfg, [(model, 1e-3)], 1, batch=4)

    def loss_of(rows):
        x = torch.tensor(float(rows[0]))
        loss = model.get_input_embeddings().weight.sum()
        return loss, len(rows), {"ratio_error_q99": x, "ratio_error": x}

    stats = optimiser.combine([optimiser.backward([1, 2, 3, 6], loss_of, 1)])
    assert stats["ratio_error_q99"] == 6 and stats["ratio_error"] == 3


# ------------------------------------------------------------------------------------------------
# Precision everywhere


class Products(TorchDispatchMode):
    """Records the dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **kwargs or {})


@pytest.fixture
def course(tokenizer, write_rows, tmp_path):
    """A small course with an actor and a critic."""
    rows = [
        {"prompt": p, "response": "It is.", "chosen": "It is so.", "rejected": f"No {i}."}
        for i, p in enumerate(PROMPTS * 4)
    ]
    for i, row in enumerate(rows):
        row["prompt"] = row["prompt"].replace("What", f"Number {i}: what")
    write_rows(rows)
    base = tmp_path / "mine"
    models.save(random_model("gpt2", len(tokenizer), initializer_range=0.1), tokenizer, base)
    cfg = config(
        root=str(tmp_path), base_model=str(base), fallback=False, sft_share=0.4,
        preference_share=0.4, prompt_share=0.2, validation_rows=2, norm_prompts=2, steps=1,
        rollout=4, minibatch=4,
    )  # fmt: skip
    for stage in (util.train_base, util.train_actor, util.train_critic):
        list(stage(cfg))
    return cfg


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whatever_asks_a_model_asks_in_the_precision_of_the_parameters(course, precision):
    cfg = course.changed(precision=precision)
    tokenizer, actor = util.load_pair(cfg, "actor")
    critic = util.load_scorer(util.artifact(cfg.root, "critic"), cfg)
    reward = util.RewardModel(util.artifact(cfg.root, "critic"), cfg)
    rows, rng = util.load_rows(cfg, "preference")[:3], util.rng_for(cfg, "test")
    crew = util.Crew(tokenizer, actor, actor, reward)
    sft = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
    asked = {
        "evaluate": lambda: util.evaluate(crew, rows, cfg, rng),
        "samples": lambda: list(util.sample_answers(crew, [rows[0]["prompt"]], cfg, 0)),
        "score_scale": lambda: util.score_scale(critic, cfg),
        "validation_loss": lambda: util.validation_loss(actor, tokenizer, sft, cfg),
        "evaluate_critic": lambda: util.evaluate_critic(critic, tokenizer, rows, cfg),
        "reward": lambda: reward([PROMPTS[0]], ["It is so."]),
        "copying": lambda: util.copying(actor, tokenizer, [(PROMPTS[0], "It is")], cfg),
    }
    wanted = models.HALF.get(precision, torch.float32)
    for name, work in asked.items():
        with Products() as seen:
            work()
        assert seen.dtypes == {wanted}, name


def gpu(monkeypatch, capability, bf16):
    monkeypatch.setattr(models, "pick_device", lambda cfg: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_auto_is_what_the_device_multiplies_fast(monkeypatch):
    cfg = config(precision="auto")
    for known, expected in (
        ({}, "float32"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert models.precision(cfg) == expected, known
    for capability, bf16, expected in (
        ((8, 0), True, "bf16"),  # A100
        ((7, 5), False, "fp16"),  # T4
        ((6, 1), False, "float32"),  # half precision is slower than float32 here
    ):
        gpu(monkeypatch, capability, bf16)
        assert models.precision(cfg) == expected
        assert models.precision(config(precision="float32")) == "float32", "what is given wins"
    assert util.Config("colab").precision == "auto" and util.Config().precision == "float32"


def test_a_frozen_model_lies_in_half_on_a_gpu_and_says_the_same_bits(tokenizer, monkeypatch):
    """The model stays on the CPU and only reports a GPU as its device."""
    cfg = config(precision="bf16")
    whole, half = (random_model("llama", len(tokenizer), tie_word_embeddings=True) for _ in "ab")
    monkeypatch.setattr(type(half), "device", property(lambda model: torch.device("cuda:0")))
    models.frozen(half, cfg)
    monkeypatch.undo()
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.embed_tokens.weight"] == kinds["model.norm.weight"] == torch.float32
    assert not any(p.requires_grad for p in half.parameters())
    tokens = util.encode_pairs(tokenizer, PROMPTS, ["It is so."] * 5, cfg, "cpu")
    with torch.no_grad(), models.autocast(cfg, whole):
        assert torch.equal(*(util.response_logprobs(m, *tokens)[0] for m in (whole, half)))
    assert models.frozen(whole, cfg).lm_head.weight.dtype == torch.float32, "not on the CPU"


# ------------------------------------------------------------------------------------------------
# Generation restores the state of the model


def test_after_an_exception_every_part_is_in_its_mode_again(tokenizer, pad_left, monkeypatch):
    model = random_model("gpt2", len(tokenizer)).train()
    model.transformer.h[0].eval()  # modules may have different modes
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = [module.training for module in model.modules()]
    ids, mask = pad_left([[5, 6, 7], [8]])

    def too_much(*args):
        assert not model.training and not any(m.training for m in model.modules())
        raise torch.OutOfMemoryError("out of memory")

    how = dict(max_new_tokens=4, eos_token_id=1, pad_token_id=0)
    util.generate(model, ids, mask, **how)
    assert [module.training for module in model.modules()] == before
    monkeypatch.setattr(util, "pick", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        util.generate(model, ids, mask, **how)
    assert [module.training for module in model.modules()] == before
    assert model.is_gradient_checkpointing


# ------------------------------------------------------------------------------------------------
# Devices


class NoDoubles(TorchDispatchMode):
    """Imitates a device without float64, such as Apple's. Random numbers come from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        drawn = function._schema.name in ("aten::rand", "aten::clamp")
        if isinstance(out, torch.Tensor) and not drawn:
            assert out.dtype != torch.float64, function
        return out


def test_generation_needs_no_float64_where_there_is_none(text_model, tokenizer, monkeypatch):
    assert models.finest_dtype(torch.device("mps")) == torch.float32
    assert models.finest_dtype(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(models, "finest_dtype", lambda device: torch.float32)
    cfg = config()
    ids, mask = util.encode_prompts(tokenizer, PROMPTS, cfg, "cpu")
    with NoDoubles():
        how = util.sampling(cfg, text_model, tokenizer)
        out = util.generate(text_model, ids, mask, **how, generator=util.rng_for(cfg, "x"))
        again, _ = util.response_logprobs(text_model, ids, mask, *out[:2])
    assert torch.allclose(again, out[2], atol=1e-4)


def test_the_largest_random_number_never_leaves_the_vocabulary():
    """0.9999999999 rounds to 1 in float32, which is beyond the last possible token."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    uniforms = torch.tensor([1 - 2**-24])
    assert util.pick(logits, uniforms, 1.0, 0, 1.0)[0].item() == 1


def test_one_place_decides_the_device(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    for name, found in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        assert util.pick_device(config(device=name)) == torch.device(found)
        assert current[-1] == torch.device(found), "what starts kernels by itself starts them there"


def test_everything_is_loaded_where_the_parameters_say_and_nothing_moves_it(course, monkeypatch):
    """A stub replaces the second device; it records each move of a model and moves nothing."""
    there, moved = torch.device("cuda:1"), []
    monkeypatch.setattr(models, "find_device", lambda name: there)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda module, *where, **_: moved.append(where) or module
    )
    crew = util.load_crew(course.changed(device="cuda:1"))
    assert crew.policy and len(moved) >= 4, "policy, reference, reward model, value model"
    assert all(where == (there,) for where in moved), moved
