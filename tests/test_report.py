"""Metrics, perplexity, figures and the report: what they show is what was measured."""

import copy
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers.processors import TemplateProcessing

import util
from lab import CourseError, report


def answers(judge, count=8):
    return [
        {
            "prompt": "Human: Hi Assistant:", "response": "a b a b", "kind": "x",
            "judge": judge and float(i % 2), "reward": float(i), "kl": 0.5, "length": 4,
            "eos": True,
        }
        for i in range(count)
    ]  # fmt: skip


def measured(**metrics):
    """Answers to rows without a judge, with the given lists of metrics."""
    columns = [dict(zip(metrics, values)) for values in zip(*metrics.values())]
    return [row | {"metrics": own} for row, own in zip(answers(None, len(columns)), columns)]


def pairs():
    return pd.DataFrame(
        {"kind": ["x"] * 9, "flaw": ["bad"] * 9, "chosen": np.arange(9.0), "rejected": [3.5] * 9}
    )


def models(judge=True, greedy=True):
    """Four models; the last one, best of 4, has fewer questions and no greedy answers."""
    rows = answers(judge)
    found = {n: report.summarise(rows, rows if greedy else ()) for n in ("base", "actor", "rlhf")}
    return found | {"best of 4": report.summarise(rows[:4])}


def texts(figure):
    """Every text of a figure, in the order in which it is drawn."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_fontsize"))]


# --------------------------------------------------------------------------------------- numbers


def test_the_interval_holds_the_mean_and_shrinks_with_more_rows():
    few, many = report.interval([0, 1] * 10), report.interval([0, 1] * 1000)
    assert few["low"] < few["mean"] == 0.5 < few["high"]
    assert many["high"] - many["low"] < 0.2 * (few["high"] - few["low"])
    # a mean of n coins lies within 1.96 * 0.5 / sqrt(n), 95 times in 100
    assert many["high"] - 0.5 == pytest.approx(1.96 * 0.5 / 2000**0.5, rel=0.15)


@pytest.mark.parametrize("mean, count, low, high", [(0.5, 100, 0.404, 0.596), (1.0, 10, 0.722, 1)])
def test_the_interval_of_a_share_is_wilsons(mean, count, low, high):
    assert report.share_interval(mean, count) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 120, 1000])
def test_the_interval_of_answers_that_are_all_alike_has_a_width(value, count):
    found = report.interval([value] * count)
    assert found["low"] <= found["mean"] == value <= found["high"]
    assert 0 <= found["low"] < found["high"] <= 1
    assert found["high"] - found["low"] == pytest.approx(3.84 / (count + 3.84), rel=1e-3)


def test_distinct_2_counts_neighbouring_words():
    assert report.distinct_2(["a b c"]) == 1
    assert report.distinct_2(["a b", "a b", "b a", "c"]) == pytest.approx(2 / 3)
    assert report.distinct_2([""]) == 0


def test_the_critic_is_right_where_the_chosen_answer_scores_higher():
    found = report.critic_summary(pairs())
    assert found["accuracy"] == 5 / 9 and found["kinds"] == {"x": 5 / 9}
    assert found["margin"] == pytest.approx(0.5) and found["pairs"] == 9
    assert found["interval"][0] < 5 / 9 < found["interval"][1] and found["calibration_error"] > 0
    assert report.by_flaw(pairs())["right"].tolist() == [5 / 9]
    assert report.critic_summary(None) is None


def test_a_tie_is_half_right():
    tied = pairs().assign(chosen=0.0, rejected=0.0)
    assert report.critic_summary(tied)["accuracy"] == 0.5
    assert report.by_flaw(tied)["right"].tolist() == [0.5]
    assert report.calibrated(tied)["actual"].tolist() == [0.5]
    assert "50% right" in report.score_histogram(tied).axes[0].get_title()


def test_calibration_has_fixed_bins_with_their_counts():
    logit = np.log(np.array([0.55, 0.95, 0.95, 0.95]) / np.array([0.45, 0.05, 0.05, 0.05]))
    table = report.calibrated(
        pd.DataFrame({"chosen": logit * [1, 1, 1, -1], "rejected": np.zeros(4)})
    )
    assert table["predicted"].tolist() == ["0.5 to 0.6", "0.9 to 1.0"]
    assert table["pairs"].tolist() == [1, 3]
    assert table["actual"].tolist() == pytest.approx([1, 2 / 3])
    assert table["mean of the predicted"].tolist() == pytest.approx([0.55, 0.95])


@pytest.mark.parametrize(
    "probability, name", [(0.6, "0.6 to 0.7"), (0.7, "0.7 to 0.8"), (1, "0.9 to 1.0")]
)
def test_the_edge_of_a_bin_belongs_to_the_next_one(probability, name):
    margin = 100.0 if probability == 1 else np.log(probability / (1 - probability))
    table = report.calibrated(pd.DataFrame({"chosen": [margin], "rejected": [0.0]}))
    assert table["predicted"].tolist() == [name]


def test_the_result_table_says_how_many_questions_each_model_answered():
    table = report.result_table(models())
    assert table.index.name == "model" and table["questions"].tolist() == ["8"] * 3 + ["4"]
    assert table["judge, greedy"].tolist() == ["0.50"] * 3 + ["-"]
    assert "judge, sampled" not in report.result_table(models(judge=None))


def test_a_cell_shows_no_minus_zero_and_a_dash_for_what_is_missing():
    values = [-0.0, -1e-9, 0.12345, 3, float("nan"), None, "text"]
    assert list(map(report.cell, values)) == ["0", "-1e-09", "0.123", "3", "-", "-", "text"]


# ------------------------------------------------------------------------- metrics and perplexity

OWN = """
def letters(prompts, responses):
    return [len(text) for text in responses]

def asked(prompts, responses):
    return [float(prompt.endswith("Assistant:")) for prompt in prompts]

def fails(prompts, responses):
    return [1 / 0]
"""


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own_metrics", "other_metrics"):
        (tmp_path / f"{name}.py").write_text(OWN)
        monkeypatch.delitem(sys.modules, name, raising=False)


def evaluated(tokenizer, model, **values):
    """The answers of `evaluate` and of `best_of` to six questions, in two parts each."""
    cfg = util.Config("smoke", device="cpu", max_new_tokens=6, best_of=2, eval_batch=4, **values)
    crew = util.Crew(tokenizer, model, model, lambda prompts, texts: list(map(len, texts)))
    rows = [{"prompt": f"Human: What is {i}? Assistant:"} for i in range(6)]
    rng = util.rng_for(cfg, "test")
    return util.evaluate(crew, rows, cfg, rng), util.best_of(crew, rows, cfg, rng)


def test_every_answer_carries_every_metric_by_its_last_name(own_metrics, tokenizer, text_model):
    named = " own_metrics.letters,other_metrics.asked , "
    for results in evaluated(tokenizer, text_model, metric=named):
        lengths = [len(x["response"]) for x in results]
        assert [x["metrics"] for x in results] == [{"letters": n, "asked": 1.0} for n in lengths]
        summary = report.summarise(results)
        assert summary["metrics"]["letters"]["mean"] == pytest.approx(np.mean(lengths))
    assert all("metrics" not in x for part in evaluated(tokenizer, text_model) for x in part)


@pytest.mark.parametrize(
    "metric, told",
    [
        ("own_metrics.letters, other_metrics.letters", "has two functions named letters"),
        ("own_metrics.letters, own_metrics.lost", "'own_metrics.lost' cannot be imported"),
        ("own_metrics.asked, own_metrics.fails", "The metric fails failed .*line 9: ZeroDivision"),
        ("letters", "To use a function of your own, write module.function"),
    ],
)
def test_a_metric_that_cannot_be_used_is_named(own_metrics, tokenizer, text_model, metric, told):
    with pytest.raises(CourseError, match=told):
        evaluated(tokenizer, text_model, metric=metric)


@pytest.fixture
def perplexity(tmp_path):
    """Perplexity of a text for a course whose models read at most 26 tokens."""

    def measure(model, tokenizer, text, name="plain.txt", **values):
        (tmp_path / "plain.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        how = dict(
            root=str(tmp_path), device="cpu", max_prompt=20, max_new_tokens=6, plain_text=name
        )
        return util.perplexity(model, tokenizer, util.Config("smoke", **how | values))

    return measure


TEXT = "The farmer has a table of farms. It is spring, and nobody knows the owner.\n" * 9


def with_bos(tokenizer):
    """The tokenizer with an eos before every text, as OPT has it."""
    tokenizer = copy.deepcopy(tokenizer)
    ends = [("</s>", tokenizer.eos_token_id)]
    bos = TemplateProcessing(single="</s> $A", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = bos
    return tokenizer


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("front", [0, 1])
def test_the_perplexity_is_that_of_transformers(perplexity, make_model, tokenizer, family, front):
    model = make_model(family, len(tokenizer))
    ids = tokenizer(TEXT)["input_ids"]
    count = math.ceil(len(ids) / (26 - front))
    length, losses = len(ids) // count, []
    assert count > 4 and len(ids) % count, "several blocks, and tokens that are left out"
    for i in range(count):
        block = torch.tensor([[1] * front + ids[i * length : (i + 1) * length]])
        losses.append(model(input_ids=block, labels=block).loss.item())
    tokenizer = with_bos(tokenizer) if front else tokenizer
    for batch in (3, 100):
        found = perplexity(model, tokenizer, TEXT, eval_batch=batch)
        assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_a_blind_guess_has_the_perplexity_of_the_vocabulary(perplexity, make_model, tokenizer):
    model = make_model("opt", len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    for text in (TEXT, "two words", "\ufefftwo </s> words"):
        assert perplexity(model, tokenizer, text) == pytest.approx(len(tokenizer), rel=1e-5)


def test_control_words_in_a_plain_text_are_text(perplexity, text_model, tokenizer):
    ids = tokenizer("a</s>b")["input_ids"]
    assert ids[1] == tokenizer.eos_token_id and len(ids) == 3, "a plain tokenizer reads an eos"
    logprobs = text_model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wrong = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).mean().neg().exp().item()
    assert perplexity(text_model, tokenizer, "a</s>b") != pytest.approx(wrong, rel=1e-3)


@pytest.mark.parametrize(
    "text, name, told",
    [
        ("a b", "lost.txt", r"plain_text cannot be read: there is no file .*lost.txt and no file "),
        ("a", "plain.txt", "'plain.txt' holds fewer than two tokens: choose a longer text"),
        ("", "plain.txt", "holds fewer than two tokens"),
        (b"caf\xe9", "plain.txt", "plain.txt is not UTF-8 text: save the file as UTF-8"),
    ],
)
def test_a_plain_text_that_cannot_be_used_is_named(
    perplexity, text_model, tokenizer, text, name, told
):
    with pytest.raises(CourseError, match=told):
        perplexity(text_model, tokenizer, text, name)


def test_a_plain_text_may_lie_beside_the_notebooks(perplexity, text_model, tokenizer, root):
    name = "requirements.txt"
    beside = perplexity(text_model, tokenizer, "another text", name)
    assert beside == perplexity(text_model, tokenizer, (root / name).read_bytes())


# --------------------------------------------------------------------------------------- figures


def history(n=200):
    step = np.arange(1, n + 1)
    noise = np.random.default_rng(0).normal(0, 0.05, n)
    return pd.DataFrame(
        {"step": step, "loss": 5 * np.exp(-step / 20) + 0.5 + noise, "lr": 1 - step / n}
    )


def test_the_thick_curve_does_not_lag_and_the_learning_rate_has_none():
    table = history()
    shown = {"loss": ("Loss", "nats", "log"), "lr": ("Learning rate", "per step")}
    loss, rate = report.curves(table, shown).axes
    assert loss.get_yscale() == "log" and rate.get_yscale() == "linear"
    assert len(loss.lines) == 2 and len(rate.lines) == 1
    assert rate.lines[0].get_ydata().tolist() == table["lr"].tolist()
    ramp = np.arange(100.0)  # a straight line is its own centred mean, also near its ends
    middle = report.centred_mean(ramp, 11)
    known = ~np.isnan(middle)
    assert middle[known] == pytest.approx(ramp[known]) and known.sum() > 90


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"step": [1]}),
        pd.DataFrame({"step": [1, 2], "loss": [np.nan, np.nan]}),
        pd.DataFrame({"step": [1, 2], "loss": [0.0, -1.0]}),
        pd.DataFrame({"step": [1], "loss": [0.7]}),
    ],
)
def test_curves_of_what_is_not_there_yet_are_empty_and_draw(table):
    figure = report.curves(table, {"loss": ("Loss", "nats", "log")})
    figure.canvas.draw()
    known = table["loss"].count() if "loss" in table else 0
    assert len(figure.axes[0].lines[0].get_ydata()) == known


@pytest.mark.parametrize("low, high", [(0.45, 0.7), (0.3, 9), (0.001, 90)])
def test_a_log_axis_has_at_least_two_ticks_within_the_curve(low, high):
    table = pd.DataFrame({"step": [1, 2], "loss": [high, low]})
    ax = report.curves(table, {"loss": ("Loss", "nats", "log")}).axes[0]
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2


def test_the_strip_shows_every_number_of_every_answer_and_no_minus_zero():
    rows = {"reward": [-0.001] * 11, "value": list(range(11))}
    shown = {"good": (["a"] * 11, rows), "bad": (["b", "$x"], {"reward": [-1, 2]})}
    found = texts(report.token_strip(shown))
    assert "-0.00" not in found and found.count("0.00") == 12  # eleven rewards and the first value
    assert {"good", "bad", "10.00", "-1.00", "2.00", r"\$x"} <= set(found)


def test_the_bars_of_the_next_token_hold_all_of_the_probability():
    before, after = [0.7, 0.2, 0.05, 0.05], [0.1, 0.8, 0.05, 0.05]
    ax = report.next_token_bars(["a", "b", "c", "d"], before, after, top=2).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a", "all others"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([0.2, 0.7, 0.1, 0.8, 0.1, 0.1])


def test_the_clip_plot_draws_the_loss_it_is_given():
    def loss(ratio, advantage):
        return -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)

    figure = report.clip_plot(loss, 0.2)
    assert "+1: it has no gradient between 1.2" in figure.get_label()
    assert "-1: it has no gradient between 0.50 and 0.80" in figure.get_label()
    linear = report.clip_plot(lambda ratio, advantage: -ratio * advantage, 0.2)
    assert linear.get_label().count("gradient everywhere") == 2


def test_value_curves_have_a_line_per_model_and_the_reward():
    figure = report.value_curves(["a", "b"], {"before": [0, 0], "after": [0.5, 1]}, reward=1.0)
    assert [line.get_label() for line in figure.axes[0].lines][:2] == ["before", "after"]
    assert figure.axes[0].lines[2].get_ydata() == [1.0, 1.0]


@pytest.mark.parametrize("draw", [report.judged_bars, report.headline])
def test_the_judges_axis_goes_from_0_to_1_and_holds_every_label(draw):
    figure = draw(models())
    figure.canvas.draw()
    for ax in figure.axes:
        assert ax.get_ylim() == (0, 1)
        box = ax.get_window_extent()
        assert all(box.y0 <= t.get_window_extent().y0 for t in ax.texts)
        assert all(t.get_window_extent().y1 <= box.y1 for t in ax.texts)
    assert len(figure.axes[0].patches) == 7, "three models sampled and greedy, one sampled only"
    assert "actor: sampled 0.50, greedy 0.50" in figure.get_label()


def test_rows_without_a_judge_get_the_bars_of_their_rewards():
    for draw in (report.judged_bars, report.headline):
        assert "Mean rewards: base 3.50" in draw(models(judge=None)).get_label()


METRICS = {
    "whole": [0.0, 1.0, 1.0, 1.0],
    "parts": [0.25, 0.5, 0.5, 0.75],
    "words": [8.0, 12.0, 9.0, 11.0],
    "mood": [-1.0, -0.5, -0.5, 0.0],
    "never": [0.0] * 4,
}


def with_metrics(*names):
    """Three models with metrics and greedy answers, and best of 4 without greedy answers."""
    rows = measured(**{name: METRICS[name] for name in names})
    found = {name: report.summarise(rows, rows[:2]) for name in ("base", "actor", "rlhf")}
    return found | {"best of 4": report.summarise(rows[2:])}


def test_the_summary_has_every_metric_sampled_and_greedy_with_an_interval():
    found = with_metrics("whole", "words")
    assert "metrics" not in report.summarise(answers(None)) and "perplexity" not in found["base"]
    assert list(found["rlhf"]["metrics"]) == ["whole", "words"]
    assert found["rlhf"]["metrics"]["whole"]["mean"] == 0.75
    assert found["rlhf"]["metrics_greedy"]["words"]["mean"] == 10
    assert found["best of 4"]["metrics_greedy"] is None
    for model in found.values():
        for own in model["metrics"].values():
            assert own["low"] <= own["mean"] <= own["high"]


@pytest.mark.parametrize("value, interval", [(0.0, "0.00 (0.00 to "), (1.0, " to 1.00)")])
def test_a_metric_that_is_the_same_for_all_answers_has_an_interval(value, interval):
    models = {"rlhf": report.summarise(measured(same=[value] * 20), measured(same=[value] * 20))}
    own = models["rlhf"]["metrics"]["same"]
    assert 0 <= own["low"] < own["high"] <= 1 and own == models["rlhf"]["metrics_greedy"]["same"]
    assert interval in report.metric_table(models)["rlhf"].iloc[0]
    assert report.judged_bars(models).axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize("names", [list(METRICS)[:1], list(METRICS)[:3], list(METRICS)])
@pytest.mark.parametrize("draw", [report.judged_bars, report.headline])
def test_rows_without_a_judge_get_the_bars_of_their_metrics(names, draw):
    figure = draw(with_metrics(*names))
    figure.canvas.draw()
    titles = [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes]
    assert titles == names
    for name, ax in zip(names, figure.axes):
        assert len(ax.patches) == 7, "three models sampled and greedy, one sampled only"
        low, high = ax.get_ylim()
        values = METRICS[name]
        assert ((low, high) == (0, 1)) == (min(values) >= 0 and max(values) <= 1)
        assert low <= min(0, *values) or low < min(bar.get_height() for bar in ax.patches)
        box = ax.get_window_extent()
        assert all(box.y0 <= t.get_window_extent().y0 for t in ax.texts)
        assert all(t.get_window_extent().y1 <= box.y1 for t in ax.texts)
        assert f"{name}. base: sampled" in figure.get_label()


def test_the_metric_table_has_a_column_for_each_model():
    table = report.metric_table(with_metrics("whole", "words"))
    assert list(table) == ["base", "actor", "rlhf", "best of 4"] and table.index.name == "metric"
    assert list(table.index) == [
        "whole, sampled", "whole, greedy", "words, sampled", "words, greedy",
    ]  # fmt: skip
    assert table["base"].str.match(r"[\d.]+ \([\d.]+ to [\d.]+\)").all()
    assert table["best of 4"].tolist()[1::2] == ["-", "-"]
    assert table["rlhf"]["words, sampled"].startswith("10.0 (")


def test_the_details_show_the_perplexity_of_the_models_that_have_one():
    found = models(judge=None)
    name = "perplexity of the plain text"
    assert name not in report.detail_table(found).index
    found["actor"]["perplexity"] = 1234.56
    assert report.detail_table(found).loc[name].tolist() == ["-", "1,234.6", "-", "-"]


def test_a_judge_keeps_the_picture_and_the_metrics_have_their_table():
    rows = [row | {"metrics": {"whole": 1.0}} for row in answers(True)]
    found = {"base": report.summarise(rows, rows)}
    assert report.judged_bars(found).get_label().startswith("The judge's scores.")
    titles = [title for title, *_ in report.parts(found, {"base": rows}, pd.DataFrame(), None)]
    assert "Metrics" in titles and "Reward and judge" in titles


def test_answers_stand_side_by_side_and_ten_of_them_if_there_is_one_kind():
    told = {name: answers(None, 12) for name in ("base", "rlhf")}
    table = report.side_by_side(told["base"], told)
    assert list(table) == ["prompt", "base", "rlhf"] and len(table) == 10
    kinds = [row | {"kind": "xyz"[i % 3]} for i, row in enumerate(told["base"])]
    table = report.side_by_side(kinds, told)
    assert table["kind"].tolist() == ["x"] * 3 + ["y"] * 3 + ["z"] * 3


def test_metrics_stand_beside_the_answer_that_they_measure():
    rows = measured(whole=[0.0] * 11, words=list(range(11)))
    better = [row | {"metrics": {"whole": 1.0, "words": 5.0}} for row in rows]
    table = report.side_by_side(rows, {"base": rows, "rlhf": better})
    assert list(table) == ["prompt", "model", "answer", "whole", "words"] and len(table) == 20
    assert table["model"].tolist() == ["base", "rlhf"] * 10
    assert table["prompt"].tolist()[:2] == [rows[0]["prompt"], ""]
    assert table["whole"].tolist() == [0, 1] * 10 and table["words"].tolist()[2:4] == [1, 5]


def test_a_saved_report_without_intervals_by_kind_can_be_drawn():
    old = json.loads(json.dumps(models()))
    for model in old.values():
        for judge in (model["judge"], model["judge_greedy"]):
            if judge:
                judge |= {"kinds": {"x": 0.4, "y": 0.6}}
                judge.pop("intervals")
    figure = report.judged_bars(old)
    assert len(figure.axes) == 3 and "svg" in report.svg(report.headline(old))


def test_a_headline_is_the_same_text_every_time():
    assert report.svg(report.headline(models())) == report.svg(report.headline(models()))


@pytest.mark.parametrize("rewards", [[-1.0, 1.0] * 20, [0.5] * 40, list(range(40))])
def test_reward_and_judge_stand_in_bins_that_hold_answers(rewards):
    told = [row | {"reward": r} for row, r in zip(answers(True, 40), rewards)]
    figure = report.reward_against_judge({"actor": told, "rlhf": told})
    figure.canvas.draw()
    assert len(figure.axes) == 4
    for ax in figure.axes[2:]:
        counts = [int(text.get_text()) for text in ax.texts]
        assert sum(counts) == 40 and min(counts) > 0
        for line in ax.lines:  # an interval of one bin, or its mean: nothing across the bins
            assert len(set(np.atleast_1d(line.get_xdata()))) == 1
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights) == 40


def test_a_metric_between_0_and_1_takes_the_place_of_the_judge():
    rows = measured(words=[3.0] * 8, whole=[0.0, 1.0] * 4)
    figure = report.reward_against_judge({"actor": rows, "rlhf": rows})
    assert "actor: mean of whole 0.50" in figure.get_label()
    titles = [title for title, *_ in report.parts(with_metrics("whole"), {"actor": rows}, 0, None)]
    assert "Reward and whole" in titles
    for told in (measured(words=[3.0] * 8), answers(True)):
        assert report.stand_in({"actor": told}) is None


def test_reward_and_judge_say_when_there_is_nothing_to_show():
    figure = report.reward_against_judge({"actor": answers(None)})
    assert texts(figure) and "No answer has both" in " ".join(texts(figure))


def test_every_figure_is_transparent_narrow_and_described():
    found = [
        report.curves(history(), {"loss": ("Loss", "nats")}),
        report.token_strip({"one": (["a"] * 30, {"reward": range(30)})}),
        report.value_curves(["a"], {"before": [1.0]}),
        report.next_token_bars(["a", "b"], [0.5, 0.5], [0.1, 0.9]),
        report.clip_plot(lambda ratio, advantage: -ratio * advantage, 0.2),
        report.score_histogram(pairs()),
        report.calibration(pairs()),
        report.judged_bars(models()),
        report.judged_bars(models(judge=None)),
        report.headline(models()),
        report.reward_against_judge({"actor": answers(True), "rlhf": answers(True)}),
    ]
    for figure in found:
        assert isinstance(figure, Figure) and figure.get_label().endswith((".", "0"))
        assert figure.get_figwidth() <= 7.4 and figure.get_facecolor()[3] == 0
        assert all(ax.get_facecolor()[3] == 0 for ax in figure.axes)


# --------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("judge", [True, None])
def test_a_report_is_written_with_and_without_a_judge(judge, tmp_path):
    told = {name: answers(judge) for name in ("base", "actor", "rlhf")}
    found = models(judge)
    assert (found["rlhf"]["judge"] is None) == (judge is None)
    beside = report.side_by_side(told["base"], told)
    result = {"rows": 8, "models": found}
    parts = report.parts(found, told, beside, pairs())
    assert parts[3][1] is beside and all(len(part) == 3 for part in parts)
    report.write_report(tmp_path, result, parts)
    assert json.loads((tmp_path / "report.json").read_text()) == result
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == (4 if judge else 3) == page.count('alt="')
    assert page.count("<details>") == 2 == page.count("</details>")
    assert page.count("<h2>") == len(parts) and "best of 4" in page
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page
    assert page.count('class="scroll') == page.count("<table>") == 5
    assert 'alt=""' not in page and "{" not in page.split("</style>")[1]


def test_a_report_without_a_reward_model_leaves_its_parts_out():
    told = {name: answers(True) for name in ("base", "actor", "rlhf")}
    titles = [title for title, *_ in report.parts(models(), told, pd.DataFrame(), None)]
    assert len(titles) == 6 and not any("reward model" in title for title in titles)


def test_what_a_model_wrote_is_text_and_not_part_of_the_page(tmp_path):
    evil = "<script>document.title = 'gotcha'</script>"
    table = pd.DataFrame({"answer": [evil]})
    report.write_report(tmp_path, {}, [(evil, evil), ("table", table, evil)])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 4
