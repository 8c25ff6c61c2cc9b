"""The alerts of 3_rlhf, and the watchdog of 2_critic: a score that no reward contains."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import util
from lab import CourseError, alerts, notebook, push, splits, world
from lab.runs import Stage, read_record

CFG = util.Config("tiny")


def honest(steps=36, **metrics):
    """The metrics of a run like the recorded one: most of the gain comes in the first steps."""
    history = []
    for step in range(steps):
        gain, noise = 1 - 0.6**step, 0.05 * math.sin(7 * step)
        line = {
            "step": step + 1, "reward": 1.1 * gain + noise, "watchdog": gain - 2 * noise,
            "kl": gain + noise, "entropy": 0.14 - 0.04 * gain, "length": 12.5 + 3.8 * gain,
            "empty": 0.0, "eos": 1.0, "repetition": 0.01, "sameness": 0.05 + 0.05 * gain,
            "clip_fraction": 0.05 * (1 - gain), "zero_deviation": 0.5 * gain,
            "explained_variance": -2.0 if step < 4 else 0.4, "value_loss": 0.45 - 0.4 * gain,
        }  # fmt: skip
        history.append(line | {name: of(step / steps) for name, of in metrics.items()})
    return history


def names_in(history, cfg=CFG):
    """The rules that raise an alert at any step."""
    return {name for end in range(len(history)) for name in alerts.raised(history[: end + 1], cfg)}


PLANTED = {  # rule: {metric: a function of the progress from 0 to 1}
    "kl": {"kl": lambda x: 20 * x},
    "watchdog": {"watchdog": lambda x: 4 * x * (1 - x), "reward": lambda x: x},
    "entropy": {"entropy": lambda x: 0.14 * (1 - x) ** 3},
    "scatter": {"entropy": lambda x: 0.14 + 0.3 * x},
    "long": {"length": lambda x: 12 + 25 * x},
    "short": {"length": lambda x: 12 - 11 * x},
    "empty": {"empty": lambda x: x},
    "endless": {"eos": lambda x: 1 - x},
    "repetition": {"repetition": lambda x: 0.6 * x},
    "sameness": {"sameness": lambda x: x},
    "values": {"explained_variance": lambda x: -0.5},
    "value_loss": {"value_loss": lambda x: 0.4 + 30 * x**2},
    "clip": {"clip_fraction": lambda x: 0.6 * x},
    "groups": {"zero_deviation": lambda x: 1.0},
}


def test_every_rule_has_a_planted_failure():
    assert list(PLANTED) == [rule.name for rule in alerts.RULES]


def test_an_honest_run_raises_no_alert():
    assert names_in(honest()) == set() and names_in(honest(120)) == set()


def test_the_recorded_runs_of_the_real_model_raise_no_alert(root):
    for run in json.loads((root / "docs" / "real.json").read_text(encoding="utf-8")):
        assert names_in(run["curves"]) == set(), run["seed"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_rule_notices_its_failure_and_no_other_does(name):
    assert names_in(honest(**PLANTED[name])) == {name}
    (alert,) = [
        found[name]
        for end in range(1, 37)
        if name in (found := alerts.raised(honest(**PLANTED[name])[:end], CFG))
    ][-1:]
    rule = next(rule for rule in alerts.RULES if rule.name == name)
    assert alert["name"] == name and rule.cause in alert["sentence"]
    assert alert["sentence"].endswith(rule.change) and math.isfinite(alert["number"])


@pytest.mark.parametrize(
    "watchdog, reward, exploited",
    [
        (lambda x: 4 * x * (1 - x), lambda x: x, True),  # it falls, the reward does not
        (lambda x: min(x, 0.4), lambda x: x, True),  # it stays, the reward goes on
        (lambda x: -x, lambda x: x, True),  # it falls from the first step on
        (lambda x: x, lambda x: x, False),
        (lambda x: 0.1 * x, lambda x: 10 * x, False),  # the scales do not matter
        (lambda x: 4 * x * (1 - x), lambda x: 4 * x * (1 - x), False),  # both fall
        (lambda x: -x, lambda x: -x, False),
    ],
)
def test_the_watchdog_must_confirm_what_the_reward_gains(watchdog, reward, exploited):
    found = names_in(honest(watchdog=watchdog, reward=reward))
    assert found == ({"watchdog"} if exploited else set())


def test_a_reward_that_only_wavers_has_gained_nothing():
    wavers = {"reward": lambda x: 0.2 * math.sin(50 * x), "watchdog": lambda x: 0.0}
    assert names_in(honest(**wavers)) == set()


def test_a_rule_without_its_metrics_does_not_apply():
    for metrics in ({}, {"loss": 0.6, "accuracy": 0.7}, {"reward": None, "watchdog": None}):
        assert names_in([{"step": step + 1} | metrics for step in range(40)]) == set()
    holes = [line | {"kl": None, "entropy": None} for line in honest()]
    assert names_in(holes) == set(), "numbers that were not finite"


def test_kl_limit_moves_and_ends_the_rule():
    history = honest(kl=lambda x: 20 * x)
    assert names_in(history, CFG.changed(kl_limit=30)) == set()
    assert names_in(history, CFG.changed(kl_limit=0)) == set()
    limits = [row["alert"] for row in alerts.table(CFG.changed(kl_limit=0))]
    assert limits[0] == "off" and limits.count("off") == 1


# ------------------------------------------------------------------------------------- told


def lines(root, stage=".rlhf.partial"):
    path = Path(root) / "model" / stage / "alerts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_alert_is_told_once_until_it_was_quiet_for_some_steps(tmp_path, capsys):
    highs = {5, 6, 8, 20}
    history = [{"step": i, "kl": 11.0 if i in highs else 1.0} for i in range(1, 25)]
    with Stage(tmp_path, "rlhf", {}) as stage:
        for end in range(1, 25):
            alerts.tell(stage, history[:end], CFG)
        told = lines(tmp_path)
        (stage.folder / "model.safetensors").write_bytes(b"weights")
    assert [(line["step"], line["name"], line["number"]) for line in told] == [
        (5, "kl", 11.0), (20, "kl", 11.0),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [f"rlhf: {x['sentence']}" for x in told]


def test_only_the_named_alerts_stop_a_run(tmp_path):
    history = honest(6) + [{"step": 7, "kl": 11.0, "empty": 0.9}]
    with Stage(tmp_path, "rlhf", {}) as stage:
        for names in ("", "watchdog", "clip, groups"):
            alerts.tell(stage, history, CFG.changed(stop_on_alert=names))
        for names in ("kl", "watchdog, kl", "all"):
            with pytest.raises(CourseError, match=rf"KL is 11.*stop_on_alert = '{names}'"):
                alerts.tell(stage, history, CFG.changed(stop_on_alert=names))
        with pytest.raises(CourseError, match="KL is 11.*90% of the answers are empty"):
            alerts.tell(stage, history, CFG.changed(stop_on_alert="all"))


def test_stop_on_alert_takes_names_and_true_or_false():
    for given, means in ((True, "all"), ("true", "all"), (False, ""), ("", ""), ("kl", "kl")):
        assert util.Config("tiny", stop_on_alert=given).stop_on_alert == means
    with pytest.raises(CourseError, match="stop_on_alert = 'watchdgo'.*did you mean 'watchdog'"):
        util.Config("tiny", stop_on_alert="kl, watchdgo")


# --------------------------------------------------------------------------------- the watchdog

SMALL = dict(
    device="cpu", sft_share=0.1, preference_share=0.4, prompt_share=0.1, validation_rows=8,
    pretrain_documents=200, pretrain_steps=3, max_new_tokens=12, critic_batch=24, steps=4,
    rollout=8, minibatch=8, ppo_epochs=1, checkpoint_minutes=0, eval_batch=200,
)  # fmt: skip


def small(root, **changes):
    return util.Config("smoke", root=str(root), tracker="none", **(SMALL | changes))


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with base, actor and critic, and the pairs that each scorer has learned from."""
    folder, seen = tmp_path_factory.mktemp("course"), {}
    world.write(world.World(rows=800, eval_rows=24), folder / "dataset")
    scores = util.pair_scores

    def noted(model, tokenizer, rows, cfg):
        seen.setdefault(id(model), []).extend(map(key, rows))
        return scores(model, tokenizer, rows, cfg)

    for stage in ("base", "actor"):
        list(getattr(util, f"train_{stage}")(small(folder)))
    with mock.patch.object(util, "pair_scores", noted):
        list(util.train_critic(small(folder)))
    return folder, list(seen.values())


def key(row):
    return row["prompt"], row["chosen"], row["rejected"]


@pytest.fixture
def again(course, tmp_path):
    """A folder with the inputs of 3_rlhf."""
    for name in ("model", "dataset"):
        shutil.copytree(course[0] / name, tmp_path / name)
    return tmp_path


def test_the_watchdog_and_the_critic_never_see_each_others_pairs(course):
    folder, (critic, watchdog) = course
    every = set(map(key, util.preference_rows(small(folder))))
    assert set(critic) | set(watchdog) == every and len(watchdog) < len(critic) / 2
    assert not {prompt for prompt, *_ in critic} & {prompt for prompt, *_ in watchdog}


def test_it_is_a_plain_model_with_a_scale_of_its_own(course):
    place = course[0] / "model" / "critic"
    critic, watchdog = map(AutoModelForSequenceClassification.from_pretrained,
                           (place, place / "watchdog"))  # fmt: skip
    assert watchdog.config.num_labels == 1 and watchdog.config.reward_std > 0
    assert watchdog.config.reward_mean != critic.config.reward_mean
    assert not torch.equal(watchdog.score.weight, critic.score.weight)
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert 0 < sum("watchdog_accuracy" in step for step in steps) < len(steps)


def test_the_pairs_are_split_by_seed_and_prompt_and_people_are_for_the_critic():
    rows = [{"prompt": f"{i % 400}", "chosen": "a", "rejected": f"{i}"} for i in range(800)]
    by = [{"prompt": f"{i}", "chosen": "b", "rejected": "c", "by": "person"} for i in range(400)]
    learn, watch = splits.apart(CFG, rows + by)
    assert 100 < len(watch) < 220 and set(map(key, by)) <= set(map(key, learn))
    assert splits.apart(CFG, rows + by) == (learn, watch)
    assert splits.apart(CFG, (rows + by)[::-1])[1] == watch[::-1], "the order does not matter"
    assert splits.apart(CFG.changed(seed=1), rows)[1] != splits.apart(CFG, rows)[1]
    assert splits.apart(CFG.changed(watchdog=0), rows) == (rows, [])


def test_too_few_pairs_for_a_watchdog_are_all_for_the_critic():
    said, few = [], [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    assert splits.apart(CFG, few, said.append) == (few, [])
    same = [{"prompt": "one", "chosen": "a", "rejected": f"{i}"} for i in range(400)]
    assert splits.apart(CFG, same, said.append) == (same, [])
    assert len(said) == 2 and all("there will be no watchdog" in text for text in said)


def rewards(history):
    return [{k: v for k, v in line.items() if "second" not in k and k != "watchdog"}
            | {"peak_memory_mb": 0} for line in history]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_it_watches_and_no_reward_contains_it(algorithm, again):
    cfg = small(again, algorithm=algorithm, rollout=8)
    watched = list(util.train_rlhf(cfg))
    alone = list(util.train_rlhf(cfg.changed(watchdog=0)))
    assert all(math.isfinite(line["watchdog"]) for line in watched)
    assert not any("watchdog" in line for line in alone)
    assert rewards(watched) == rewards(alone)


def test_its_metric_is_its_mean_score(course):
    cfg = small(course[0])
    crew = util.load_crew(cfg)
    rollout = mock.Mock(
        prompts=["Human: Hi. Assistant:"] * 64, responses=[f"{i}." for i in range(64)]
    )
    scores = crew.watchdog(rollout.prompts, rollout.responses)
    assert util.watched(crew, rollout) == pytest.approx(sum(scores[::2]) / 32, abs=1e-5)
    assert crew.watchdog.model in util.rlhf_optimiser(crew, cfg).frozen, "it moves with the others"


def test_without_a_reward_model_there_is_no_watchdog(again):
    shutil.rmtree(again / "model" / "critic")
    cfg = small(again, algorithm="rloo", reward="length", steps=1)
    (line,) = util.train_rlhf(cfg)
    assert "watchdog" not in line
    (line,) = util.train_rlhf(cfg, reward=lambda prompts, responses: [0.0] * len(prompts))
    assert "watchdog" not in line


@pytest.mark.parametrize("changes", [{"ensemble": 2}, {"lora_rank": 2}], ids=["ensemble", "lora"])
def test_it_works_beside_an_ensemble_and_with_adapters(changes, again):
    cfg = small(again, **changes, steps=1)
    list(util.train_critic(cfg))
    assert len(util.load_critics(cfg)) == changes.get("ensemble", 1)
    (line,) = util.train_rlhf(cfg)
    assert math.isfinite(line["watchdog"])


def test_dpo_does_not_learn_from_its_pairs(again):
    seen, logprobs = [], util.pair_logprobs

    def noted(model, tokenizer, rows, cfg):
        seen.extend(map(key, rows))
        return logprobs(model, tokenizer, rows, cfg)

    cfg = small(again, algorithm="dpo", dpo_batch=64)
    with mock.patch.object(util, "pair_logprobs", noted):
        list(util.train_rlhf(cfg))
    _, theirs = splits.apart(cfg, util.preference_rows(cfg))
    assert theirs and not set(map(key, theirs)) & set(seen)


# ------------------------------------------------------------------------------------- resumed


def test_a_resumed_run_raises_the_same_alerts(again):
    cfg = small(again, kl_limit=1e-6, policy_lr=1e-2, kl_estimator="k3")
    list(util.train_rlhf(cfg))
    whole = lines(again, "rlhf")
    assert "kl" in [line["name"] for line in whole]
    shutil.rmtree(again / "model" / "rlhf")
    for count in (3, 4):
        run = util.train_rlhf(cfg)
        for _ in range(count):  # after a resume, the steps of the first run come first
            next(run)
        run.close()
    list(util.train_rlhf(cfg))
    assert lines(again, "rlhf") == whole


def test_an_alert_stops_the_run_and_it_can_go_on(again, capsys):
    cfg = small(again, kl_limit=1e-6, policy_lr=1e-2, kl_estimator="k3", stop_on_alert="kl")
    with pytest.raises(CourseError, match="KL is .* stop_on_alert = 'kl'"):
        list(util.train_rlhf(cfg))
    assert not (again / "model" / "rlhf").exists() and lines(again)
    history = list(util.train_rlhf(cfg.changed(stop_on_alert="")))
    assert len(history) == cfg.steps and "resuming" in capsys.readouterr().out
    told = lines(again, "rlhf")
    assert notebook.raised(again).to_dict("records") == told and "kl" in [x["name"] for x in told]


def test_the_model_card_of_a_critic_names_its_watchdog(course):
    card = push.card_of(course[0], "critic", "ada/critic", read_record(course[0], "critic"))
    assert "folder watchdog" in card
