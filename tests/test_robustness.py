"""Problems during training: memory runs out, a loss is nan, answers degenerate."""

import copy
import errno
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import util
from lab import CourseError, checks, errors, memory
from tests.conftest import rollout_of

ROWS = [
    {"prompt": f"Human: {question} Assistant:", "response": good, "chosen": good, "rejected": bad}
    for question, good, bad in (
        ("How are you?", "fine", "it is much too long to be an answer"),
        ("Tell me all that you know about farms.", "I will tell you all of it", "no"),
        ("x", "y", "z and more of it"),
        ("What is a boat?", "It floats on the sea", "ask another day"),
        ("Who won?", "I do not know", "the Tigers, everyone knows that, and by far"),
        ("Why?", "because", "hm"),
        ("Show the age of all farms.", "SELECT age FROM farms", "SELECT"),
        ("And now?", "now we wait", "nothing"),
    )
]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."


@pytest.fixture
def cfg():
    return util.Config("smoke", device="cpu", max_prompt=30, max_new_tokens=8)


@pytest.fixture
def crew(tokenizer, make_model):
    """Policy and reference differ a little. The reward is the length of an answer."""
    models = (make_model("opt", len(tokenizer), seed=seed, init_std=0.05) for seed in range(3))
    policy, reference, value = models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        value_model = AutoModelForSequenceClassification.from_config(value.config)
    value_model.config.num_labels = 1
    value_model.score = torch.nn.Linear(value.config.hidden_size, 1, bias=False)

    def reward(prompts, responses):
        return [len(text) / 10 for text in responses]

    return util.Crew(tokenizer, policy, reference, reward, value_model.eval())


def roll(crew, cfg, size=None):
    prompts = [row["prompt"] for row in ROWS]
    return rollout_of(crew, prompts, cfg.changed(kl_coef=0.1, eval_batch=size or len(prompts)))


# -------------------------------------------------------------------------------------- in pieces


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_rollout_in_pieces_is_the_rollout_in_one(crew, cfg, size):
    whole, pieces = roll(crew, cfg), roll(crew, cfg, size)
    assert whole.responses == pieces.responses
    for one, other in zip(whole.tokens, pieces.tokens):
        assert torch.equal(one, other)
    for name in ("logprobs", "ref_logprobs", "values", "scores", "advantages", "returns"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-4), name


# If a loss is a mean over tokens, a piece is weighted by its tokens, otherwise by its rows.
VARIANTS = {
    "token": dict(loss_mean="token"),
    "answer": dict(loss_mean="answer"),
    "kl in the loss": dict(loss_mean="token", kl_in="loss", kl_estimator="k3", entropy_coef=0.1),
    "kl in the loss of answers": dict(
        loss_mean="answer", kl_in="loss", kl_estimator="k2", entropy_coef=0.1
    ),
    "kl in the reward": dict(loss_mean="token", kl_in="reward", entropy_coef=0.1),
}
GROUPS = {"grpo": dict(answers=4), "rloo": dict(answers=4)}


def loss_of_pairs(crew, cfg, monkeypatch):
    """The rows and the loss function that DPO passes to its optimiser."""
    taken = []

    class Takes(util.Optimiser):
        def step(self, rows, loss_of, progress):
            taken.append((rows, loss_of))
            return {}

    steps = {"steps": lambda count, optimiser: range(count), "samples": list, "append": print}
    stage = SimpleNamespace(say=print, **steps)
    with monkeypatch.context() as patch:
        patch.setattr(util, "Optimiser", Takes)
        patch.setattr(util, "load_rows", lambda *_, **__: ROWS)
        list(util.dpo_loop(crew, cfg, stage))
    ((rows, loss_of),) = taken
    assert sorted(rows) == list(range(len(ROWS)))
    return rows, loss_of


def ragged(rollout, cfg):
    """Cuts the answers of a rollout to 1 to 8 tokens and moves some ratios beyond the clip."""
    prompt_ids, prompt_mask, ids, whole = rollout.tokens
    mask = torch.arange(8) < torch.tensor([8, 1, 5, 2, 7, 3, 1, 8])[:, None]
    assert whole.shape == mask.shape and whole.all(), "nothing but the cut ends an answer here"
    rollout.tokens = prompt_ids, prompt_mask, ids.masked_fill(~mask, 0), mask
    for name in ("logprobs", "ref_logprobs", "values"):
        setattr(rollout, name, getattr(rollout, name) * mask)
    rollout.scores = torch.arange(8.0).flip(0) / 4
    rollout.advantages, rollout.returns = util.ADVANTAGES[cfg.algorithm](rollout, cfg)
    rng = torch.Generator().manual_seed(1)
    rollout.logprobs = rollout.logprobs + 0.3 * torch.randn(8, 8, generator=rng) * mask
    rollout.values = rollout.values + 0.3 * torch.randn(8, 8, generator=rng) * mask
    return rollout


def losses(crew, cfg, name, monkeypatch):
    """(models, rows, loss or losses) of one method of the course."""
    if name == "sft":

        def sft(rows):
            return util.sft_loss(crew.policy, crew.tokenizer, cfg, rows)

        return [crew.policy], ROWS, sft
    if name == "critic":  # two members, each with its own order of rows
        members = [crew.value_model, copy.deepcopy(crew.value_model)]

        def critic(batch):
            return util.critic_loss(members, crew.tokenizer, cfg, batch)

        return members, list(zip(ROWS, ROWS[3:] + ROWS[:3])), critic
    if name == "dpo":
        rows, loss_of = loss_of_pairs(crew, cfg, monkeypatch)
        return [crew.policy], rows, loss_of
    rollout = ragged(roll(crew, cfg), cfg)
    values = crew.value_model if name == "ppo" else None
    learners = [model for model in (crew.policy, values) if model is not None]
    crew = replace(crew, value_model=values)
    losses = util.losses_of(crew, rollout, cfg, util.LOSSES[name])
    return learners, list(range(len(ROWS))), losses


CUTS = [("sft", "token"), ("critic", "token")]
CUTS += [(name, variant) for name in ("ppo", "grpo", "rloo") for variant in VARIANTS]
CUTS += [("dpo", "token"), ("dpo", "nll"), ("dpo", "ipo")]
PAIRS = {
    "nll": dict(dpo_nll=0.5, dpo_smoothing=0.1),
    "ipo": dict(dpo_loss="ipo"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name, variant", CUTS, ids=[" ".join(cut) for cut in CUTS])
def test_an_update_in_pieces_has_the_gradient_of_the_update_in_one(
    crew, name, variant, dtype, monkeypatch
):
    """Pieces of 8, 4, 3 and 1 rows give the same gradient, also for answers of unequal lengths."""
    given = dict(dpo_batch=8) | (VARIANTS | PAIRS)[variant]
    algorithm = name if name in util.LOSSES or name == "dpo" else "ppo"
    sizes = dict(device="cpu", max_prompt=30, max_new_tokens=8, algorithm=algorithm, rollout=8)
    cfg = util.Config("smoke", **sizes, **GROUPS.get(name, {}), **given)
    crew.value_model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    for model in (crew.policy, crew.reference, crew.value_model):
        model.to(dtype)
    models, rows, loss_of = losses(crew, cfg, name, monkeypatch)
    optimiser = util.Optimiser(cfg, [(model, 1e-3) for model in models], 10, batch=8)
    stats, gradients = {}, {}
    for size in (8, 4, 3, 1):
        stats[size] = optimiser.combine([optimiser.backward(rows, loss_of, size)])
        parameters = [p for group in optimiser.parameters for p in group if p.grad is not None]
        gradients[size] = torch.cat([p.grad.double().flatten() for p in parameters])
    assert gradients[8].norm() > 0
    for size in (4, 3, 1):
        off = (gradients[8] - gradients[size]).norm() / gradients[8].norm()
        assert off <= 1e-6, size
        for key in stats[size].keys() - {"ratio_error_q99"}:  # the worst piece sets it
            assert stats[size][key] == pytest.approx(stats[8][key], rel=1e-5, abs=1e-6), key


def test_micro_batch_is_how_many_rows_go_through_at_once(crew, cfg):
    seen = []

    def loss_of(rows):
        seen.append(len(rows))
        return util.sft_loss(crew.policy, crew.tokenizer, cfg, rows)

    small = util.Config("smoke", device="cpu", micro_batch=3)
    for config in (cfg, small):
        util.Optimiser(config, [(crew.policy, 1e-3)], 10, batch=8).step(ROWS, loss_of, 0)
    assert seen == [1, 8, 3, 3, 2], "where it is not given, one row is measured first"


def test_out_of_memory_halves_the_rows_until_they_fit_and_says_so(crew, cfg):
    tried, said = [], []

    def loss_of(rows):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return util.sft_loss(crew.policy, crew.tokenizer, cfg, rows)

    optimiser = util.Optimiser(cfg, [(crew.policy, 1e-3)], 10, batch=8, say=said.append)
    optimiser.step(ROWS, loss_of, 0)
    assert tried == [1, 8, 4, 2, 2, 2, 2]
    assert "4 rows at once" in said[0] and "2 rows at once" in said[1] and len(said) == 2
    assert optimiser.state["micro_batch"] == 2, "what fits is kept, and survives a stop"
    optimiser.step(ROWS, loss_of, 1)
    assert tried[7:] == [2, 2, 2, 2]


def never_fits(size):
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_where_one_row_is_too_much_it_is_an_error_or_the_cpu():
    state, said, left = {"rows": 4}, [], []
    with pytest.raises(torch.OutOfMemoryError):
        memory.halving(never_fits, state, "rows", said.append)
    assert state == {"rows": 1} and len(said) == 2

    def fits_on_the_cpu(size):
        return size if left else never_fits(size)

    def leave():
        left.append(True)
        state["rows"] = 4

    assert memory.halving(fits_on_the_cpu, state, "rows", said.append, leave) == 4
    assert "continuing on the CPU" in said[-1]


def test_other_errors_are_no_reason_to_try_again():
    def broken(size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.halving(broken, {"rows": 4}, "rows", print)


def test_leaving_the_gpu_takes_moments_and_sizes_along(crew, cfg):
    optimiser = util.Optimiser(cfg, [(crew.policy, 1e-3)], 10, batch=8, frozen=[crew.reference])
    optimiser.step(ROWS, lambda rows: util.sft_loss(crew.policy, crew.tokenizer, cfg, rows), 0)
    moments = [s["exp_avg"].clone() for s in optimiser.adamw.state.values()]
    optimiser.state["micro_batch"] = 1
    optimiser.leave_gpu()
    assert optimiser.state["micro_batch"] == 8
    after = [s["exp_avg"] for s in optimiser.adamw.state.values()]
    assert all(map(torch.equal, moments, after)) and moments


# ---------------------------------------------------------------------------- without gradients


def tight_from_the_start(monkeypatch):
    """Memory runs out as soon as more than three rows are read."""
    whole = util.pad

    def pad(sequences, *more):
        if len({*map(tuple, sequences)}) > 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return whole(sequences, *more)

    monkeypatch.setattr(util, "pad", pad)


def tight_in_the_middle(monkeypatch):
    """Memory runs out at the third token if more than three answers are being generated."""
    whole, tokens = util.pick, []

    def pick(logits, *more):
        tokens.append(1)
        if len(logits) > 3 and len(tokens) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return whole(logits, *more)

    monkeypatch.setattr(util, "pick", pick)


TIGHT = [tight_from_the_start, tight_in_the_middle]


def alike(found, expected):
    """Asserts equal texts, and numbers that differ by rounding only."""
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            alike(one, other)
    elif isinstance(expected, dict):
        alike(list(found.items()), list(expected.items()))
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


def passes(crew, cfg):
    """{name: function} for every pass without gradients."""
    critic = crew.value_model

    def scale():
        crew.value_model.score.weight.data.fill_(0.1)
        return util.score_scale(critic, cfg)

    def rewards():
        reward = util.RewardModel.__new__(util.RewardModel)
        reward.model, reward.tokenizer, reward.cfg = critic, crew.tokenizer, cfg
        reward.mean, reward.std = 0.0, 1.0
        return reward([row["prompt"] for row in ROWS], [row["response"] for row in ROWS])

    def evaluate():
        return util.evaluate(crew, ROWS, cfg, util.rng_for(cfg, "test"))

    def samples():
        return list(util.sample_answers(crew, [row["prompt"] for row in ROWS], cfg, 0))

    return {
        "score_scale": scale,
        "evaluate": evaluate,
        "samples": samples,
        "validation_loss": lambda: util.validation_loss(crew.policy, crew.tokenizer, ROWS, cfg),
        "evaluate_critic": lambda: util.evaluate_critic(critic, crew.tokenizer, ROWS, cfg),
        "the reward model": rewards,
    }


CASES = [("score_scale", TIGHT), ("evaluate", TIGHT), ("samples", TIGHT)]
CASES += [(name, TIGHT[:1]) for name in ("validation_loss", "evaluate_critic", "the reward model")]


@pytest.mark.parametrize("name, tight", [(name, how) for name, hows in CASES for how in hows])
def test_out_of_memory_without_gradients_halves_the_rows_and_changes_nothing(
    crew, cfg, name, tight, monkeypatch, capsys
):
    monkeypatch.setattr(util, "load_pair", lambda *_: (crew.tokenizer, crew.policy))
    monkeypatch.setattr(util, "load_rows", lambda *_: ROWS)
    work = passes(crew, cfg.changed(norm_prompts=8, norm_answers=2))[name]
    expected = work()
    capsys.readouterr()
    tight(monkeypatch)
    found = work()
    assert "memory ran out: continuing with" in capsys.readouterr().out
    alike(found, expected)


def test_the_reference_of_dpo_survives_little_memory_as_well(crew, cfg, monkeypatch, capsys):
    taken = []
    for tight in (False, True):
        if tight:
            tight_from_the_start(monkeypatch)
        _, loss_of = loss_of_pairs(crew, cfg.changed(algorithm="dpo", dpo_batch=8), monkeypatch)
        taken.append(loss_of([0])[2]["margin"].item())
    assert "memory ran out" in capsys.readouterr().out
    assert taken[0] == pytest.approx(taken[1], abs=1e-5)


# --------------------------------------------------------------------------- nan and infinity


def spoilt(crew, cfg, when):
    """The SFT loss, but nan at the calls in `when`."""
    calls = []

    def loss_of(rows):
        if len(rows) > 1:  # the first call measures a single row
            calls.append(1)
        loss, weight, stats = util.sft_loss(crew.policy, crew.tokenizer, cfg, rows)
        return loss * (math.nan if len(calls) in when else 1), weight, stats

    return loss_of


def test_a_loss_that_is_no_number_changes_nothing_and_is_counted(crew, cfg):
    said, loss_of = [], spoilt(crew, cfg, {1, 3})
    optimiser = util.Optimiser(cfg, [(crew.policy, 1e-3)], 10, batch=8, say=said.append)
    weights = [p.detach().clone() for p in crew.policy.parameters()]
    assert optimiser.step(ROWS, loss_of, 0)["skipped"] == 1
    assert all(map(torch.equal, weights, crew.policy.parameters()))
    assert not optimiser.adamw.state, "the moments as well stay as they are"
    assert optimiser.step(ROWS, loss_of, 1)["skipped"] == 1
    assert not all(map(torch.equal, weights, crew.policy.parameters()))
    assert optimiser.step(ROWS, loss_of, 2)["skipped"] == 2
    assert len(said) == 2 and "step 1" in said[0] and "step 3" in said[1]
    assert all(p.isfinite().all() for p in crew.policy.parameters())


def test_a_gradient_that_is_no_number_counts_as_well(crew, cfg):
    def loss_of(rows):
        first = next(crew.policy.parameters())
        return (first * 0).abs().sqrt().sum(), 1, {}  # the loss is 0 and its gradient is nan

    optimiser = util.Optimiser(cfg, [(crew.policy, 1e-3)], 10, batch=8)
    assert optimiser.step([1], loss_of, 0)["skipped"] == 1


def test_the_third_in_a_row_stops(crew, cfg):
    optimiser = util.Optimiser(cfg, [(crew.policy, 1e-3)], 10, batch=8)
    loss_of = spoilt(crew, cfg, {1, 2, 4, 5, 6})
    for step in range(5):
        optimiser.step(ROWS, loss_of, step)
    with pytest.raises(CourseError, match="Step 6.*third time in a row.*learning rate"):
        optimiser.step(ROWS, loss_of, 5)


@pytest.mark.parametrize(
    "scores",
    [[1.0, math.nan], [1.0, math.inf], [1.0], [1.0] * 3, []],
    ids=["nan", "inf", "one", "three", "none"],
)
def test_a_reward_must_be_a_number_for_each_answer(scores):
    with pytest.raises(CourseError, match="a finite number for each of 2 answers"):
        util.ask(lambda prompts, responses: scores, ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_a_reward_may_come_as_any_row_of_numbers(kind):
    scores, parts = util.ask(lambda p, r: kind([1, 2.5]), ["a", "b"], ["c", "d"])
    assert scores.tolist() == [1.0, 2.5] and parts == {}


# ------------------------------------------------------------------------------------- the machine


def test_errors_of_the_machine_are_sentences_and_others_are_left_alone():
    full = OSError(errno.ENOSPC, "No space left on device", "model/x")
    assert "disk is full (model/x)" in errors.explained(full)
    assert "disk is full" in errors.explained(Exception("I/O error (os error 28)"))
    assert "permission" in errors.explained(PermissionError(errno.EACCES, "no", "model"))
    assert "Memory ran out" in errors.explained(torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert errors.explained(ValueError("wrong")) is None
    assert errors.explained(ConnectionError(errno.ECONNREFUSED, "refused")) is None


def test_texts_that_are_cut_and_rows_that_repeat_are_counted(tokenizer):
    said = []
    cfg = util.Config("smoke", max_prompt=6, max_new_tokens=4)
    checks.warn_about_texts(said.append, tokenizer, [*ROWS, ROWS[0]], ["response"], cfg)
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) > 6 for row in [*ROWS, ROWS[0]]]
    assert said[0].startswith(f"{sum(prompts)} of 9 texts in 'prompt'") and "beginning" in said[0]
    assert "max_new_tokens" in said[1] and "end" in said[1]
    assert said[2].startswith("1 of 9 rows are copies")
    roomy = util.Config("smoke", max_prompt=500, max_new_tokens=500)
    checks.warn_about_texts(said.append, tokenizer, ROWS, ["response"], roomy)
    assert len(said) == 3, "nothing to say, nothing said"


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "my gpu"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name):
    with pytest.raises(CourseError, match=f"device = '{name}' is not available here.*cpu"):
        util.pick_device(util.Config("smoke", device=name))
