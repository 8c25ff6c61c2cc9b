"""The report, with and without a judge; what a model wrote stays text."""

import json

import numpy as np
import pandas as pd
import pytest

from lab import notebook, report
from lab.runs import Stage


def answers(judge, count=8):
    return [
        {
            "prompt": "Human: Hi Assistant:", "response": "a b a b", "kind": "x",
            "judge": judge and float(i % 2), "reward": float(i), "kl": 0.5, "length": 4,
            "eos": True,
        }
        for i in range(count)
    ]  # fmt: skip


def pairs():
    return pd.DataFrame(
        {"kind": ["x"] * 9, "flaw": ["bad"] * 9, "chosen": np.arange(9.0), "rejected": [3.5] * 9}
    )


def test_the_interval_holds_the_mean_and_shrinks_with_more_rows():
    few, many = report.interval([0, 1] * 10), report.interval([0, 1] * 1000)
    assert few["low"] < few["mean"] == 0.5 < few["high"]
    assert many["high"] - many["low"] < 0.2 * (few["high"] - few["low"])
    # a mean of n coins lies within 1.96 * 0.5 / sqrt(n), 95 times in 100
    assert many["high"] - 0.5 == pytest.approx(1.96 * 0.5 / 2000**0.5, rel=0.15)


def test_distinct_2_counts_neighbouring_words():
    assert report.distinct_2(["a b c"]) == 1
    assert report.distinct_2(["a b", "a b", "b a", "c"]) == pytest.approx(2 / 3)
    assert report.distinct_2([""]) == 0


def test_the_critic_is_right_where_the_chosen_answer_scores_higher():
    assert report.critic_summary(pairs()) == {"accuracy": 5 / 9, "kinds": {"x": 5 / 9}}
    assert report.by_flaw(pairs())["right"].tolist() == [5 / 9]


@pytest.mark.parametrize("judge", [True, None])
def test_a_report_is_written_with_and_without_a_judge(judge, tmp_path):
    models = {
        n: report.summarise(answers(judge), answers(judge)) for n in ("base", "actor", "rlhf")
    }
    assert (models["rlhf"]["judge"] is None) == (judge is None)
    told = {name: answers(judge) for name in models}
    beside = report.side_by_side(told["base"], told)
    result = {"rows": 8, "models": models}
    report.write_report(tmp_path, result, report.parts(models, told, beside, pairs()))
    assert json.loads((tmp_path / "report.json").read_text()) == result
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == (4 if judge else 3)
    assert ("judge" in report.result_table(models)) == bool(judge)


def test_what_a_model_wrote_is_text_and_not_part_of_the_page(tmp_path):
    evil = "<script>document.title = 'gotcha'</script>"
    table = pd.DataFrame({"answer": [evil]})
    report.write_report(tmp_path, {}, [(evil, evil), ("table", table)])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 3


@pytest.mark.parametrize(
    "rows, shown",
    [
        ([{"kl": -3.8e-6}, {"kl": 9.5e-7}, {"kl": 0.5824}], ["0", "0", "0.582"]),
        ([{"reward": 1.0}], None),
    ],
)
def test_samples_do_not_show_what_is_rounding(tmp_path, rows, shown):
    """At the start policy and reference are one model: their KL is 0 but for the last bits."""
    with Stage(tmp_path, "rlhf", {}) as stage:
        stage.samples(rows)
    table = notebook.samples(tmp_path)
    assert ("kl" in table) == bool(shown)
    assert shown is None or [f"{x:.3g}" for x in table["kl"]] == shown
