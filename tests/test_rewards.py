"""Named, weighted and summed rewards, several reward models, and custom rewards and losses."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import util
from lab import CourseError, rewards, world

SMALL = dict(
    device="cpu", pretrain_documents=200, pretrain_steps=3, steps=2, rollout=8, minibatch=4,
    ppo_epochs=2, sft_share=0.2, preference_share=0.3, prompt_share=0.1,
    validation_rows=8, actor_batch=16, critic_batch=24, max_new_tokens=12, test_rows=8,
    eval_batch=8, norm_prompts=4, norm_answers=2, ensemble=2,
)  # fmt: skip
P, A = ["p", "q"], ["one two", "three"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A course with two reward models."""
    folder = tmp_path_factory.mktemp("finished")
    world.write(world.World(rows=200, eval_rows=24), folder / "dataset")
    for stage in ("base", "actor", "critic"):
        list(getattr(util, f"train_{stage}")(small(folder)))
    return folder


def small(root, **changes):
    return util.Config("smoke", root=str(root), **(SMALL | changes))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Writes a module into the current folder; it is removed from sys.modules afterwards."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def no_model():
    raise AssertionError("no model was asked for")


# ------------------------------------------------------------------------------------------- parse


def weights(text):
    terms = rewards.parse(text, lambda: len).terms
    assert all(callable(reward) for _, reward in terms.values())
    return {name: weight for name, (weight, _) in terms.items()}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model", {"model": 1}),
        ("-length", {"length": -1}),
        ("+ length", {"length": 1}),
        (
            "model - 0.01*length + 0.5*sentiment",
            {"model": 1, "length": -0.01, "sentiment": 0.5},
        ),
        ("  model-0.01  *  length  ", {"model": 1, "length": -0.01}),
        ("2*model+3.*length", {"model": 2, "length": 3}),
        ("1e-3*length - 2.5e2*sentence", {"length": 1e-3, "sentence": -250}),
        ("0*model + repetition", {"model": 0, "repetition": 1}),
    ],
)
def test_a_sum_is_read_as_it_is_written(text, expected):
    assert weights(text) == expected
    assert list(weights(text)) == list(expected), "in the order of the text"


@pytest.mark.parametrize(
    "text",
    [
        "model length",
        "model -",
        "* length",
        "0.5",
        "0.5*",
        "model * 2",
        "model + + length",
        "length b",
    ]
    + ["model - (length)", "model / 2", "2 * 3 * length", "", "   ", "model, length", "1e*length"],
)
def test_what_is_not_clear_is_refused(text):
    with pytest.raises(CourseError, match="cannot be parsed at .*write a sum like"):
        rewards.parse(text, lambda: len)


def test_a_name_stands_once():
    with pytest.raises(CourseError, match="names length twice: combine the two weights"):
        rewards.parse("length - 0.5*length", no_model)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(
        CourseError, match="'lenght' is not known; did you mean 'length'.*module.function"
    ):
        rewards.parse("lenght", no_model)
    with pytest.raises(CourseError, match="choose from: length, repetition, sentence, sentiment"):
        rewards.parse("xyz", no_model)


def test_the_models_are_loaded_only_where_they_are_named():
    assert rewards.parse("length", no_model)(P, A) == [2, 1]


def test_a_reward_of_ones_own_lies_in_the_folder_one_stands_in(here):
    here("own_rewards_a", "def shout(p, r):\n    return [text.count('o') for text in r]\n")
    total = rewards.parse("2*own_rewards_a.shout - length", no_model)
    assert total.parts(P, A) == {"own_rewards_a.shout": [2.0, 0.0], "length": [2.0, 1.0]}
    assert total(P, A) == [2.0, -1.0]


def test_the_search_path_stays_as_it_was(here):
    here("own_rewards_b", "def zero(p, r):\n    return [0] * len(r)\n")
    before = list(sys.path)
    rewards.named("reward", "own_rewards_b.zero", {})
    with pytest.raises(CourseError):
        rewards.named("reward", "own_rewards_b.one", {})
    assert sys.path == before


@pytest.mark.parametrize(
    "name, said",
    [
        ("own_rewards_c.polite", "No module named 'own_rewards_c'"),
        ("own_rewards_d.polite", "has no attribute 'polite'"),
        ("own_rewards_d.NUMBER", "is not a function"),
    ],
)
def test_what_is_not_there_is_named(name, said, here):
    here("own_rewards_d", "NUMBER = 3\n")
    with pytest.raises(CourseError, match=said) as error:
        rewards.parse(f"model + {name}", lambda: len)
    assert name in str(error.value)


# --------------------------------------------------------------------------------------------- sum


def test_a_sum_weighs_and_adds():
    total = rewards.Sum({"a": (2.0, lambda p, r: [1, 2]), "b": (-0.5, lambda p, r: (4, 8.0))})
    assert total.parts(P, A) == {"a": [1.0, 2.0], "b": [4.0, 8.0]}
    assert total.add({"a": [1.0, 2.0], "b": [4.0, 8.0]}) == [0.0, 0.0]
    assert total(P, A) == [0.0, 0.0]
    scores, parts = util.ask(total, P, A)
    assert scores.tolist() == [0.0, 0.0] and parts == total.parts(P, A)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0, 3.0], []])
@pytest.mark.parametrize("place", [0, 1])
def test_every_term_must_give_a_number_for_each_answer(wrong, place):
    terms = [lambda p, r: [0.0, 0.0], lambda p, r: wrong]
    total = rewards.Sum({"a": (1.0, terms[place]), "b": (1.0, terms[1 - place])})
    with pytest.raises(CourseError, match="a finite number for each of 2 answers"):
        util.ask(total, P, A)


def test_the_error_of_a_reward_of_ones_own_names_its_line(here):
    here("own_rewards_e", "def broken(p, r):\n    return [1 / 0 for text in r]\n")
    with pytest.raises(CourseError, match=r"own_rewards_e\.py, line 2: ZeroDivisionError"):
        util.ask(rewards.parse("own_rewards_e.broken", no_model), P, A)


# ------------------------------------------------------------------------------------------ shipped


def test_length_counts_words():
    assert rewards.length(P, ["", "one", " one\n two  three "] * 1) == [0, 1, 3]


def test_repetition_is_the_share_of_pairs_said_before():
    texts = ["a b c d", "a b a b", "no No NO no", "once", ""]
    assert rewards.repetition(P, texts) == pytest.approx([0, 1 / 3, 2 / 3, 0, 0])


@pytest.mark.parametrize(
    "text, whole",
    [
        ("It is.", 1), ("Is it?", 1), ("No!", 1), ('He said "no."', 1), ("(It is.)", 1),
        ("它是一座农场。", 1), ("是吗？", 1), ("不！", 1), ("“好。”", 1),
        ("It is", 0), ("它是", 0), ("", 0), ("It is,", 0), ('"', 0), ("3.5", 0),
    ],
)  # fmt: skip
def test_a_sentence_ends_like_one(text, whole):
    assert rewards.sentence(["p"], [text]) == [whole]


def test_friendly_words_are_worth_more_than_unfriendly_ones():
    kind, plain, rude = rewards.sentiment(
        P,
        [
            "What a wonderful, lovely day, thank you!",
            "It is a table.",
            "You are horrible, I hate you.",
        ],
    )
    assert 1 >= kind > 0.5 > plain > -0.5 > rude >= -1


# ----------------------------------------------------------------------------------------- ensemble


def test_the_rules_of_an_ensemble():
    table = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    members = [lambda p, r, row=row: row.tolist() for row in table]
    spread = ((1 - 4) ** 2 + (3 - 4) ** 2 + (8 - 4) ** 2) / 3
    for rule, k, expected in (
        ("mean", 9.0, [4.0, 5.0]),
        ("min", 9.0, [1.0, 5.0]),
        ("cautious", 0.0, [4.0, 5.0]),
        ("cautious", 1.0, [4.0 - spread**0.5, 5.0]),
        ("cautious", 2.5, [4.0 - 2.5 * spread**0.5, 5.0]),
    ):
        assert rewards.Ensemble(members, rule, k)(P, A) == pytest.approx(expected), (rule, k)


def test_two_reward_models_are_two_models_of_plain_transformers(finished):
    folder = finished / "model" / "critic"
    folders = [folder, folder / "member-1"]
    first, second = (load_file(path / "model.safetensors") for path in folders)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["score.weight"], second["score.weight"])
    for path in folders:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True
        )
        assert not any(told[name] for name in ("missing_keys", "unexpected_keys"))
        assert model.config.num_labels == 1 and model.config.reward_std > 0
    record = json.loads((folder / "stage.json").read_text())
    assert {"model.safetensors", "member-1/model.safetensors"} <= set(record["files"])


def test_a_damaged_member_is_noticed(finished, tmp_path):
    (tmp_path / "dataset").symlink_to(finished / "dataset")
    (tmp_path / "model").mkdir()
    for name in ("base", "actor"):
        (tmp_path / "model" / name).symlink_to(finished / "model" / name)
    list(util.train_critic(small(tmp_path, critic_batch=60)))
    weights = tmp_path / "model" / "critic" / "member-1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CourseError, match="model/critic is damaged"):
        util.load_reward(small(tmp_path))


def test_both_reward_models_judge(finished):
    cfg = small(finished)
    folder = finished / "model" / "critic"
    one, other = (util.RewardModel(path, cfg) for path in (folder, folder / "member-1"))
    table = np.array([one(P, A), other(P, A)])
    assert np.abs(table[0] - table[1]).max() > 1e-4
    for rule, expected in (
        ("mean", table.mean(0)),
        ("min", table.min(0)),
        ("cautious", table.mean(0) - 2 * table.std(0)),
    ):
        reward = util.load_reward(small(finished, ensemble_rule=rule, ensemble_k=2.0))
        assert reward(P, A) == pytest.approx(expected.tolist(), abs=1e-5)


def test_all_models_of_a_reward_are_found(finished):
    reward = util.load_reward(small(finished, reward="model - 0.1*length"))
    found = rewards.models_in(reward)
    members = reward.terms["model"][1].members
    assert [id(m) for m in found] == [id(member.model) for member in members] and len(found) == 2
    assert rewards.models_in(members[0]) == [members[0].model]
    assert rewards.models_in(lambda p, r: [0]) == rewards.models_in(None) == []


# ---------------------------------------------------------------------------------------- a rollout


@pytest.fixture
def begin(finished, tmp_path):
    """A course that is ready for 3_rlhf."""
    root = tmp_path / "course"
    (root / "model").mkdir(parents=True)
    for name in ("dataset", "model/base", "model/actor", "model/critic"):
        (root / name).symlink_to(finished / name)
    return root


def test_the_parts_of_a_reward_stand_in_the_metrics(begin, monkeypatch):
    seen, whole = [], util.make_rollout

    def listens(*args, **how):
        seen.append((whole(*args, **how), *asked))
        return seen[-1][0]

    def asks(*args):
        asked[:] = args[2], *ask(*args)
        return asked[1:]

    asked, ask = [], util.ask
    monkeypatch.setattr(util, "ask", asks)
    monkeypatch.setattr(util, "make_rollout", listens)
    cfg = small(begin, reward="model - 0.5*length + 2*sentence", steps=1, ppo_epochs=1)
    (metrics,) = util.train_rlhf(cfg)
    ((rollout, texts, scores, parts),) = seen
    assert rollout.responses == texts
    assert metrics["reward_length"] == pytest.approx(sum(len(t.split()) for t in texts) / 8)
    assert metrics["reward_sentence"] == pytest.approx(sum(parts["sentence"]) / 8)
    model = np.array(parts["model"])
    assert metrics["reward_model"] == pytest.approx(model.mean(), rel=1e-5)  # equal to six digits
    columns = parts["model"], parts["length"], parts["sentence"]
    assert scores.tolist() == pytest.approx([m - 0.5 * n + 2 * s for m, n, s in zip(*columns)])
    line = json.loads((begin / "model" / "rlhf" / "metrics.jsonl").read_text())
    assert {"reward_model", "reward_length", "reward_sentence"} <= set(line)


def test_parts_of_pieces_are_those_of_the_whole(finished):
    cfg = small(finished, reward="length")
    crew = util.load_crew(cfg)
    prompts = [row["prompt"] for row in util.load_rows(cfg, "prompt")[:8]]

    def roll(size):
        rng = util.rng_for(cfg, "test")
        return util.make_rollout(crew, prompts, cfg.changed(eval_batch=size), rng)

    assert roll(3).parts == pytest.approx(roll(8).parts)


# ----------------------------------------------------------------------------------- a reader


READER = """
import csv

def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def no_list(path):
    return [{"prompt": "fine"}, {"prompt": ""}, {"prompt": ""}]

def no_rows(path):
    return []
"""


def as_csv(folder, name, rows):
    lines = ["prompt,response", *(f"{a},{b}" for a, b in rows)]
    (folder / "dataset").mkdir(exist_ok=True)
    (folder / "dataset" / name).write_text("\n".join(lines))


def test_rows_come_through_a_reader_of_ones_own(here, tmp_path):
    here("own_reader_a", READER)
    as_csv(tmp_path, "train.json", [(f"How are you {i}?", "fine") for i in range(10)])
    as_csv(tmp_path, "eval.json", [(f"And now {i}?", "yes") for i in range(4)])
    cfg = util.Config("smoke", root=str(tmp_path), reader="own_reader_a.read", sft_share=0.5)
    rows = util.load_rows(cfg, "sft", needs=("prompt", "response"))
    assert len(rows) == 5 and {row["response"] for row in rows} == {"fine"}
    assert all(row["prompt"].startswith("Human: How are you") for row in rows), "framed"
    assert [row["prompt"] for row in util.load_eval_rows(cfg)][0] == "Human: And now 0? Assistant:"


def test_rows_of_a_reader_are_checked_like_any_other(here, tmp_path):
    here("own_reader_b", READER)
    as_csv(tmp_path, "train.json", [("a", "b"), ("c", ""), ("d", "")])
    as_csv(tmp_path, "eval.json", [("a", "b")])

    def cfg(name):
        return util.Config("smoke", root=str(tmp_path), reader=f"own_reader_b.{name}")

    with pytest.raises(CourseError, match=r"train.json, row 2 .*: the field 'response' is empty"):
        util.load_rows(cfg("read"), "sft", needs=("prompt", "response"))
    with pytest.raises(CourseError, match="train.json, row 1 .*: the field 'chosen' is missing"):
        util.load_rows(cfg("read"), "preference", needs=("prompt", "chosen", "rejected"))
    with pytest.raises(CourseError, match="eval.json, row 1.*also in the training rows"):
        util.load_eval_rows(cfg("read"))
    with pytest.raises(CourseError, match=r"eval.json, row 2 .*: the field 'prompt' is empty"):
        util.load_eval_rows(cfg("no_list"))
    with pytest.raises(CourseError, match="contains no rows"):
        util.load_eval_rows(cfg("no_rows"))
    with pytest.raises(CourseError, match="reader = 'own_reader_b.reed' cannot be imported"):
        util.load_eval_rows(cfg("reed"))


# ------------------------------------------------------------------------------------ a loss


LOSS = """
import util

def reinforce(crew, rollout, cfg, rows):
    tokens, old = rollout.minibatch(rows, crew.policy.device)
    logprobs, _ = util.response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    loss = -util.masked_mean(logprobs * old["advantages"], tokens[3])
    return loss, int(tokens[3].sum()), {"surprise": -logprobs.detach().mean()}
"""


def trained(root, loss=None, **changes):
    """The metrics and the weights of a short run."""
    cfg = small(root, reward="length", **changes)
    history = list(util.train_rlhf(cfg, algorithm=loss))
    return history, load_file(root / "model" / "rlhf" / "model.safetensors")


def test_a_loss_of_ones_own_trains_by_its_name(begin, here):
    here("own_losses_a", LOSS)
    history, weights = trained(begin, algorithm="own_losses_a.reinforce")
    before = load_file(begin / "model" / "actor" / "model.safetensors")
    assert any(not torch.equal(before[name], weights[name]) for name in before)
    assert all(row["surprise"] > 0 and np.isfinite(row["loss"]) for row in history)
    assert "explained_variance" not in history[0], "there is no value model"
    record = json.loads((begin / "model" / "rlhf" / "stage.json").read_text())
    assert record["config"]["algorithm"] == "own_losses_a.reinforce"


def test_a_loss_of_ones_own_trains_as_a_function(begin, here):
    here("own_losses_b", LOSS)
    function = rewards.named("algorithm", "own_losses_b.reinforce", {})
    history, _ = trained(begin, function)
    assert all(row["surprise"] > 0 for row in history)
    assert "explained_variance" not in history[0], "there is no value model"
    record = json.loads((begin / "model" / "rlhf" / "stage.json").read_text())
    assert record["config"]["algorithm"] == "own_losses_b.reinforce"


def test_a_shipped_loss_given_as_a_function_keeps_its_name(begin):
    history, _ = trained(begin, util.ppo_minibatch_loss)
    assert "explained_variance" in history[0], "PPO has its value model"
    trained(begin, util.grpo_minibatch_loss, answers=4, rollout=8)
    record = json.loads((begin / "model" / "rlhf" / "stage.json").read_text())
    assert record["config"]["algorithm"] == "grpo"
    known = util.LOSSES
    assert rewards.name_of(util.grpo_minibatch_loss, known, "rloo") == "rloo", "the loss of both"


@pytest.mark.parametrize("handed", [True, False], ids=["function", "name"])
def test_a_loss_of_ones_own_has_the_distance_from_the_mean_as_advantages(
    handed, begin, here, monkeypatch
):
    here("own_losses_c", LOSS)
    seen, whole = [], util.make_rollout
    monkeypatch.setattr(
        util, "make_rollout", lambda *a, **k: seen.append(whole(*a, **k)) or seen[-1]
    )
    name = "own_losses_c.reinforce"
    if handed:
        trained(begin, rewards.named("algorithm", name, {}), kl_in="loss")
    else:
        trained(begin, algorithm=name, kl_in="loss")
    for rollout in seen:
        right = (rollout.scores - rollout.scores.mean())[:, None] * rollout.mask
        assert torch.allclose(rollout.advantages, right, atol=1e-6) and right.any()


def test_figures_of_a_loss_of_ones_own_may_be_plain_numbers(begin, here):
    here("own_losses_d", LOSS.replace("-logprobs.detach().mean()", "2.5"))
    history, _ = trained(begin, algorithm="own_losses_d.reinforce")
    assert [row["surprise"] for row in history] == pytest.approx([2.5, 2.5])


@pytest.mark.parametrize(
    "name, said",
    [
        ("rlo", "did you mean 'rloo'"),
        ("own_losses_e.reinforce", "cannot be imported"),
        ("sft", "choose from: ppo, grpo, rloo, dpo"),
    ],
)
def test_an_algorithm_that_is_not_there_is_named(name, said, begin, here):
    with pytest.raises(CourseError, match=f"algorithm = '{name}'.*{said}"):
        trained(begin, algorithm=name)
    assert not (begin / "model" / "rlhf").exists()


@pytest.mark.parametrize(
    "reward, needs",
    [
        ("model", True),
        ("length - 0.5*model", True),
        ("length", False),
        ("my_models.polite", False),
        ("model_of_mine.polite - length", False),
    ],
)
def test_the_critic_is_needed_only_where_it_is_named(reward, needs):
    cfg = util.Config("smoke", algorithm="rloo", rollout=8, reward=reward)
    assert ("critic" in cfg.starts_from()) == needs
    assert cfg.starts_from(len) == ["actor"], "a reward that is handed over needs no critic"


# ----------------------------------------------------------------------------- KL in the loss


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
def test_the_kl_in_the_loss_is_one_that_acts(algorithm):
    """The gradient of k1 is zero on average, so as a loss it is neither the default nor allowed."""
    assert util.Config(algorithm=algorithm, kl_in="loss").kl_estimator == "k3"
    assert util.Config(algorithm=algorithm).kl_estimator == "k1"
    with pytest.raises(CourseError, match="kl_estimator = 'k1' is impossible: with kl_in = loss"):
        util.Config(algorithm=algorithm, kl_in="loss", kl_estimator="k1")


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_pulls_towards_the_reference(estimator):
    """Checks the expected gradient: the sum over a small vocabulary, weighted by the policy."""
    logits = torch.tensor([0.9, -0.3, 0.1, -1.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.4, 0.7, 0.2, 0.1], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    probs = policy.detach().exp()
    terms = [
        p * util.kl_loss(policy[i].view(1, 1), reference[i].view(1, 1), mask, estimator=estimator)
        for i, p in enumerate(probs)
    ]
    (slope,) = torch.autograd.grad(sum(terms), logits)
    before = (policy.exp() * (policy - reference)).sum()
    moved = (logits - 0.1 * slope).log_softmax(-1)
    assert (moved.exp() * (moved - reference)).sum() < before - 1e-3
    with pytest.raises(CourseError, match="gradient of zero on average"):
        util.kl_loss(policy[:1, None], reference[:1, None], mask, estimator="k1")


# ------------------------------------------------------------------- functions of one's own, again


def test_the_code_of_a_function_tells_it_apart():
    def scaled(weight):
        return lambda prompts, responses: [weight * len(r) for r in responses]

    class Polite:
        def __call__(self, prompts, responses):
            return [float("please" in r) for r in responses]

    codes = {rewards.code_of(f) for f in (scaled(1.0), scaled(2.0), Polite(), rewards.length)}
    assert len(codes) == 4
    assert rewards.code_of(scaled(1.0)) == rewards.code_of(scaled(1.0))
    assert rewards.code_of(Polite()) == rewards.code_of(Polite())


@pytest.mark.parametrize("what", ["reward", "algorithm"])
def test_a_stopped_run_goes_on_with_the_same_function_only(what, begin):
    """Functions without a name of their own are compared by their code."""
    cfg = small(begin, algorithm="rloo", answers=4, rollout=8, steps=3, checkpoint_minutes=0)

    def given(weight):
        def reward(prompts, responses):
            return [weight * len(r) for r in responses]

        def loss(crew, rollout, cfg, rows):
            value, count, stats = util.grpo_minibatch_loss(crew, rollout, cfg, rows)
            return weight * value, count, stats

        return {"reward": reward} | ({"algorithm": loss} if what == "algorithm" else {})

    def stopped(functions):
        steps = util.train_rlhf(cfg, **functions)
        next(steps), next(steps)
        steps.close()

    stopped(given(1.0))
    with pytest.raises(CourseError, match=f"code of {what} has changed"):
        next(util.train_rlhf(cfg, **given(1.0) | {what: given(2.0)[what]}))
    assert len(list(util.train_rlhf(cfg, **given(1.0)))) == 3
    record = json.loads((begin / "model" / "rlhf" / "stage.json").read_text())
    assert "reward" in record["config"]["reward"], "its name, not that of the reward model"
