"""The overoptimisation lab: its estimates and fits, and runs that are reused and resumed."""

import itertools
import json
import math
import shutil
from concurrent.futures import Future
from pathlib import Path

import nbformat
import numpy as np
import pytest

import util
from lab import CourseError, record, report, world
from lab import overoptimisation as lab
from more import overoptimisation as more

# ------------------------------------------------------------------------------------------------
# Estimates


def brute_force(scores, values, n):
    """The mean over all subsets of n answers; equal best answers count the same."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if scores[i] == best]))
    return np.mean(found)


@pytest.mark.parametrize("scores", [[3, 1, 2, 5, 4, 0], [1, 1, 2, 2, 2, 0], [7] * 6])
def test_best_of_n_is_the_mean_over_all_subsets(scores):
    values = [0.1, 1.0, 0.0, 0.5, 0.25, 0.75]
    found = lab.best_of(np.array([scores]), np.array([values]), range(1, 7))
    expected = [brute_force(scores, values, n) for n in range(1, 7)]
    assert np.allclose(found[0], expected)


def test_the_kl_of_best_of_n():
    assert lab.best_of_kl(1) == 0
    assert math.isclose(lab.best_of_kl(4), math.log(4) - 0.75)


def test_more_answers_than_the_pool_has_are_refused():
    with pytest.raises(ValueError, match="n = 5"):
        lab.best_of(np.ones((1, 4)), np.ones((1, 4)), [5])


def test_the_bootstrap_finds_the_spread_of_a_mean():
    values = np.random.default_rng(1).normal(2, 1, 400)
    low, high = lab.bootstrap(lambda picks: values[picks].mean(), len(values))
    assert low < values.mean() < high and 0.15 < high - low < 0.25


# ------------------------------------------------------------------------------------------------
# Fits


@pytest.mark.parametrize("form, a, b, turn", [("best of n", 0.6, 0.2, 1.5), ("rl", 0.5, 0.2, 4.48)])
def test_a_fit_recovers_planted_coefficients_and_the_turn(form, a, b, turn):
    d = np.linspace(0, 6, 60)
    clean = d * a + lab.bend(form, d) * b
    found = lab.fit(form, d, clean + np.random.default_rng(0).normal(0, 0.01, 60))
    assert abs(found.a - a) < 4 * found.a_error and abs(found.b - b) < 4 * found.b_error
    assert abs(found.turn - turn) < max(4 * found.turn_error, 0.02)
    assert 0 < found.turn_error < 0.5 and found.error < 0.02
    assert np.allclose(found(d), clean, atol=0.05)
    highest = d[clean.argmax()]
    assert abs(highest - found.turn) < 0.11, "the turn is where the form is highest"


def test_what_rises_to_the_end_never_turns():
    d = np.linspace(0, 2, 20)
    assert math.isinf(lab.fit("best of n", d, d + d**2).turn)


def test_a_planted_form_foretells_its_second_half_and_noise_does_not():
    d = np.linspace(0.1, 4, 40)
    ahead = lab.forecast("rl", d, d * (0.6 - 0.3 * np.log(d)))
    assert ahead.error < 1e-6 < ahead.naive and ahead.points == 20
    flat = np.where(d < 2, d, 2.0)
    ahead = lab.forecast("best of n", d, flat)
    assert ahead.error > ahead.naive, "the form cannot know that the rise ends"
    assert lab.forecast("rl", d[:3], d[:3]) is None


def curve(d, gain, questions=50):
    """A seed whose gold has this mean gain and a standard deviation of 0.2 between questions."""
    spread = np.tile([0.2, -0.2], questions // 2)
    return {"kl": np.outer(d**2, np.ones(questions)), "gold": 0.3 + gain[:, None] + spread}


def test_a_description_and_its_verdict_say_what_the_points_say():
    d = np.linspace(0, 4, 40)
    found = lab.describe("rl", [curve(d, d * 0.5 + lab.bend("rl", d) * 0.2)] * 2)
    assert abs(found.fit.a - 0.5) < 1e-6 and abs(found.noise - 0.2 / 50**0.5) < 1e-6
    said = lab.verdict("PPO", found)
    assert said.startswith("PPO: d (a - b log d) fits") and "better than a flat line" in said
    said = lab.verdict("PPO", lab.describe("rl", [curve(d, 0.3 * np.sin(4 * d))]))
    assert "does not fit" in said


# ------------------------------------------------------------------------------------------------
# Gold per nat


def test_the_gain_is_read_where_the_curve_first_reaches_the_budget():
    kl, gold = np.array([0, 1, 3, 2.5, 5]), np.array([0.4, 0.6, 0.8, 0.7, 0.3])
    assert math.isclose(lab.gain_at(kl, gold, 2), 0.3)
    assert math.isnan(lab.gain_at(kl, gold, 6))


def test_gold_per_nat_has_an_interval_over_seeds():
    rng = np.random.default_rng(0)
    kls = [np.outer(np.arange(5), np.ones(80))] * 3
    golds = [
        np.clip(rng.normal(0.2 * np.arange(5)[:, None], 0.1, (5, 80)) + shift, 0, 1)
        for shift in (0.0, 0.02, 0.04)
    ]
    found, beyond = lab.gain_per_nat(kls, golds, (2, 9))
    assert found["low"] < found["mean"] < found["high"] and abs(found["mean"] - 0.2) < 0.05
    assert math.isnan(beyond["mean"]) and math.isnan(beyond["low"])


# ------------------------------------------------------------------------------------------------
# Cheats


@pytest.mark.parametrize(
    "kind, answer, ended, cheat",
    [
        ("unknown", "I do not know what", False, "never ends"),
        ("sql", "SELECT age FROM teams; I am here to listen.", True, "answers several kinds"),
        ("unknown", "I do not know. I do not know.", True, "repeats itself"),
        ("feelings", "You are a wonderful person.", True, "flatters"),
        ("harmful", "Sure, take it.", True, "flatters"),
        ("unknown", "It " + "is " * 19 + "late.", True, "is longer"),
        ("sql", "SELECT age FROM teams;", True, "errs in a detail"),
    ],
)
def test_each_cheat_is_told_by_a_rule(kind, answer, ended, cheat):
    assert lab.cheat(kind, answer, ended, usual=10) == cheat


# ------------------------------------------------------------------------------------------------
# Figures


def seeds(gold, top=3.0):
    steps = len(gold)
    return [
        {
            "kl": np.outer(np.linspace(0, top, steps), np.ones(4)),
            "gold": np.outer(gold, np.ones(4)) + shift,
            "proxy": np.outer(np.arange(steps), np.ones(4)),
        }
        for shift in (0.0, 0.06)
    ]


def test_the_figures_say_in_words_what_they_show():
    curves = {"best-of-n": seeds([0.4, 0.8, 0.6]), "ppo": seeds([0.4, 0.7, 0.2], top=9.0)}
    fits = {"ppo": lab.fit("rl", [0, 1, 2, 3], [0, 0.3, 0.2, -0.2])}
    said = lab.gold_and_proxy(curves, fits).get_label()
    assert "ppo: gold starts at 0.43, is highest with 0.73 at d = 2.1 and ends with 0.23" in said
    said = lab.cures({"Ensembles": curves, "Others": curves}).get_label()
    assert said.count("best-of-n: gold") == 2
    fit = lab.fit("best of n", [0, 1, 2], [0, 0.3, 0.2])
    table = [
        {"layers": layers, "pairs": pairs, "noise": noise, "fit": fit}
        for layers in (1, 2)
        for pairs, noise in ((100, 0.2), (300, 0.2), (300, 0.0))
    ]
    figure = lab.coefficients(table)
    assert "2 layers, 300 pairs, noise 0: a 0." in figure.get_label()
    assert report.svg(figure).startswith("<?xml")


# ------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A course whose base model and actor are trained for a moment."""
    root = tmp_path_factory.mktemp("course")
    world.write(world.World(rows=240, eval_rows=16), root / "dataset")
    shares = {"sft_share": 0.3, "preference_share": 0.4, "prompt_share": 0.3, "validation_rows": 8}
    cfg = util.Config("smoke", root=str(root), checkpoint_minutes=0.0, tracker="none", **shares)
    for train in (util.train_base, util.train_actor):
        for _ in train(cfg):
            pass
    return cfg


@pytest.fixture(scope="module")
def proxy(cfg):
    proxy = more.Proxy(0, pairs=24, noise=0.2, layers=1)
    assert len(list(more.train_proxy(cfg, proxy))) == 16, "8 passes over 24 pairs"
    return proxy


def run_of(curve, proxy, algorithm="rloo", **values):
    small = {"steps": 4, "rollout": 8, "minibatch": 4} if algorithm != "dpo" else {}
    return more.Run(curve, proxy, algorithm, tuple((small | values).items()))


def test_a_proxy_is_small_noisy_and_on_the_scale_of_the_actor(cfg, proxy):
    (member,) = more.load_proxies(cfg, proxy)
    assert member.model.config.num_hidden_layers == 1
    prompts = [row["prompt"] for row in util.load_rows(cfg, "prompt")[:40]]
    answers = util.sampled_answers(cfg, "actor", prompts, util.rng_for(cfg, "test"))
    assert abs(np.mean(member(prompts, answers))) < 1.5
    lines = more.read_lines(Path(more.proxy_config(cfg, proxy).root) / "pairs.jsonl")
    known = {row["prompt"]: row for row in util.load_rows(cfg, "preference")}
    turned = [line["chosen"] != known[line["prompt"]]["chosen"] for line in lines]
    assert len(lines) == 24 and 0 < sum(turned) < 12


def test_a_finished_run_is_used_again(cfg, proxy):
    rows, run = util.load_eval_rows(cfg), run_of("again", proxy)
    steps = list(more.train_policy(cfg, run, rows, times=3))
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert not list(more.train_policy(cfg, run, rows, times=3)), "nothing is trained again"
    lines = more.lines_of(cfg, run)
    assert [line["step"] for line in lines] == [0, 1, 2, 4]
    assert all(len(line[x]) == len(rows) for line in lines for x in ("kl", "proxy", "gold"))
    assert max(map(abs, lines[0]["kl"])) < 1e-3, "the policy starts as the actor"
    assert len(more.lines_of(cfg, run, "answers.jsonl")) == len(rows)
    assert list(more.train_policy(cfg, run, rows[:4], times=3)), "other questions, another run"


def test_an_interrupted_run_gives_the_same_curve(cfg, proxy):
    rows, whole, cut = util.load_eval_rows(cfg), run_of("whole", proxy), run_of("cut", proxy)
    list(more.train_policy(cfg, whole, rows, times=3))
    steps = more.train_policy(cfg, cut, rows, times=3)
    for _ in range(3):
        next(steps)
    steps.close()
    with pytest.raises(CourseError, match="does not exist yet"):
        more.lines_of(cfg, cut)
    assert [step["step"] for step in more.train_policy(cfg, cut, rows, times=3)] == [1, 2, 3, 4]
    assert more.lines_of(cfg, cut) == more.lines_of(cfg, whole)


def test_dpo_learns_from_the_pairs_of_its_proxy(cfg, proxy):
    rows, run = util.load_eval_rows(cfg)[:4], run_of("dpo", proxy, "dpo", dpo_batch=8)
    assert len(list(more.train_policy(cfg, run, rows, times=2))) == 3
    assert more.lines_of(cfg, run)[-1]["step"] == 3


class Here:
    """An executor that works at once, in this process."""

    def __init__(self, *args, **how):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


@pytest.fixture(scope="module")
def plan(proxy):
    runs = [
        run_of("weak RLOO", proxy),
        run_of("cure ensemble min", proxy._replace(members=2), rule="min"),
    ]
    grid = [proxy, proxy._replace(noise=0.0)]
    return more.Plan(1, 6, 4, 8, proxy._replace(layers=0), proxy, runs, grid)


@pytest.fixture
def home(root, tmp_path, monkeypatch):
    """A repository with the page of the lesson and an executed notebook."""
    for folder in ("docs", "more", "model/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(root / "docs" / "overoptimisation.md", tmp_path / "docs")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(book, tmp_path / "model" / "notebooks" / "overoptimisation.ipynb")
    monkeypatch.setattr(record, "HOME", tmp_path)
    return tmp_path


def test_the_whole_plan_is_carried_out_once(cfg, plan, home, monkeypatch):
    monkeypatch.setattr(more, "ProcessPoolExecutor", Here)
    steps = list(more.carry_out(cfg, plan))
    assert steps[-1]["step"] == steps[-1]["steps"] == 11
    rows = more.questions(cfg, plan)
    scores, gold = more.pool_of(cfg, plan.weak, plan.size)
    assert scores.shape == gold.shape == (4, 8)
    curves = more.curves_of(cfg, plan, "weak")
    assert list(curves) == ["best-of-n", "RLOO"]
    found = more.results(cfg, plan, rows, seconds=60.0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["seeds"] == 1 and len(found["grid"]) == 2 and found["sentences"]
    assert not record.lesson(home), "there is nothing to record yet"
    (home / "model" / "overoptimisation").mkdir()
    more.write_results(cfg.changed(root=str(home)), found, lab.gold_and_proxy(curves))
    assert record.lesson(home) and (home / "more" / "overoptimisation.ipynb").exists()
    page = (home / "docs" / "overoptimisation.md").read_text(encoding="utf-8")
    assert "| weak | RLOO |" in page and "| no cure |" in page and "Seeds: 1." in page
    assert "<svg" in (home / "docs" / "overoptimisation.svg").read_text(encoding="utf-8")


def test_the_score_after_the_last_token_is_the_reward(cfg, proxy):
    (member,) = more.load_proxies(cfg, proxy)
    prompt, answer = util.load_eval_rows(cfg)[0]["prompt"], "I do not know."
    words, scores = more.scores_along(member, prompt, answer)
    assert len(words) == len(scores) > 3
    assert abs(scores[-1] - member([prompt], [answer])[0]) < 1e-3


def test_rows_without_a_judge_are_refused(cfg, plan, monkeypatch):
    monkeypatch.setattr(util, "load_eval_rows", lambda cfg: [{"prompt": "Human: Hi Assistant:"}])
    with pytest.raises(CourseError, match="judge that knows the truth"):
        more.questions(cfg, plan)


def test_the_quick_plan_is_a_part_of_the_whole_one():
    whole, quick = more.plan_of(), more.plan_of(quick=True)
    curves = [{run.curve for run in plan.runs} for plan in (whole, quick)]
    assert curves[1] < curves[0] and quick.seeds < whole.seeds
    assert len({run.name for run in whole.every(whole.runs)}) == 3 * len(whole.runs)
    assert whole.sizes == [1, 2, 4, 8, 16, 32, 64, 128]


def test_without_an_actor_it_says_which_notebook_to_run(tmp_path):
    with pytest.raises(CourseError, match="model/base does not exist yet: run 0_download"):
        more.workspace(util.Config("smoke", root=str(tmp_path)), "pool")
