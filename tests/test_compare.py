"""The page that compares two runs: what it shows, of whom, and what it says if it cannot."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

import util
from lab import __main__ as driver
from lab.compare import compare
from lab.runs import CourseError, Stage

JUDGE = {"mean": 0.5, "low": 0.4, "high": 0.6, "kinds": {"sql": 0.25}}


def make(root, name, inputs=(), steps=6, slope=0.1, weights=b"", files=None, **changes):
    """Writes a finished stage with made-up metrics; every weight file is another one."""
    config = asdict(util.Config("smoke", root=str(root), **changes))
    data = {"eval.json": "a hash"} if name == "report" else {}
    with Stage(root, name, config, inputs, data) as stage:
        for step in range(steps):
            metrics = {
                "step": step + 1,
                "steps": steps,
                "loss": 1 / (1 + slope * step),
                "skipped": 0,
            }
            if name == "rlhf":
                metrics |= {"reward": slope * step, "own_metric": slope + step**2}
            stage.log(metrics | {"seconds": 0.5, "tokens_per_second": step})
        (stage.folder / "model.safetensors").write_bytes(weights or str((root, slope)).encode())
        for file, value in (files or {}).items():
            (stage.folder / file).write_text(json.dumps(value))


def result(mean):
    judge = JUDGE | {"mean": mean}
    model = dict(questions=8, judge=judge, judge_greedy=judge, reward=1.0, kl=2.0, length=3.0)
    model |= {"metrics": {"polite": judge | {"mean": mean / 2}}, "metrics_greedy": None}
    models = {name: model | {"eos": 1.0, "distinct_2": 0.5} for name in ("actor", "rlhf")}
    best = {"best_of": models["actor"] | {"n": 4}, "critic": {"accuracy": 0.75, "kinds": {}}}
    return {"rows": 8, "models": models} | best


@pytest.fixture
def runs(tmp_path):
    """Two courses: the same base model, and policies with other parameters and curves."""
    for name, more in (("one", {}), ("two", dict(kl_coef=0.05, actor_lr=0.5))):
        root, slope = tmp_path / name, 2 if more else 0.1
        make(root, "base", weights=b"the same", steps=3)
        make(root, "actor", ["base"], slope=slope, **more)
        make(root, "rlhf", ["actor"], slope=slope, steps=6 + 60 * len(more), **more)
    return tmp_path


class Page(HTMLParser):
    """The sections of a page: {title: (its text, the labels of its pictures)}."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.title, self.tag, self.links = {}, None, "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tag, given = tag, dict(attributes)
        self.links += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        if tag == "svg":
            self.sections[self.title][1].append(given["aria-label"])
        if tag == "h2":
            self.title = None

    def handle_data(self, text):
        if self.tag == "h2" and self.title is None:
            self.title = text
            self.sections[text] = ([], [])
        elif self.title and self.tag in ("td", "th", "p"):
            self.sections[self.title][0].append(text)


def shown(first, second, out):
    page = Page(compare(first, second, out))
    assert all(link.startswith("#") for link in page.links), "the page needs no other file"
    return page.sections


def test_all_stages_that_both_have(runs):
    make(runs / "one", "critic", ["actor"])
    sections = shown(runs / "one", runs / "two", runs / "page.html")
    assert list(sections) == [
        "0_download: model/base", "1_actor: model/actor", "3_rlhf: model/rlhf",
    ]  # fmt: skip


def test_only_the_parameters_that_the_stage_reads_and_that_differ(runs):
    sections = shown(runs / "one", runs / "two", runs / "page.html")
    actor, rlhf = sections["1_actor: model/actor"][0], sections["3_rlhf: model/rlhf"][0]
    row = actor.index("actor_lr")
    assert actor[row : row + 4] == ["actor_lr", "0.001", "0.5", "peak learning rate of SFT"]
    assert "kl_coef" not in actor and "actor_lr" not in rlhf
    assert rlhf[rlhf.index("kl_coef") :][1:3] == ["0.2", "0.05"]
    assert "root" not in rlhf, "another folder is no difference"
    assert "Also different: model/actor." in rlhf


def test_a_curve_for_each_metric_that_changes(runs):
    pictures = shown(runs / "one", runs / "two", runs / "page.html")["3_rlhf: model/rlhf"][1]
    titles = [label.split(":")[0] for label in pictures]
    assert titles == ["Loss", "Reward", "own metric"]
    assert pictures[1] == "Reward: A from 0 to 0.5, B from 0 to 250."
    text = (runs / "page.html").read_text(encoding="utf-8")
    assert "standard deviations" in text, "the unit of the reward"
    assert {"#0072b2", "#d55e00"} <= set(re.findall("#[0-9a-f]{6}", text))


def test_equal_weights_are_said_and_not_drawn(runs):
    text, pictures = shown(runs / "one", runs / "two", runs / "p")["0_download: model/base"]
    assert not pictures and "All parameters of this stage are equal." in text
    assert any("the same weights" in line for line in text)


@pytest.mark.parametrize("place", ["", "model", "model/rlhf"])
def test_a_run_is_a_course_a_model_folder_or_a_stage(runs, place):
    sections = shown(runs / "one" / place, runs / "two", runs / "page.html")
    assert "3_rlhf: model/rlhf" in sections
    assert len(sections) == (1 if place.endswith("rlhf") else 3)


def test_a_renamed_stage_is_found_by_its_record(runs):
    (runs / "two" / "model" / "rlhf").rename(runs / "kept")
    assert list(shown(runs / "one", runs / "kept", runs / "p")) == ["3_rlhf: model/rlhf"]


def test_results_side_by_side(runs):
    for name, mean in (("one", 0.25), ("two", 0.75)):
        make(runs / name, "report", ["rlhf"], steps=0, files={"report.json": result(mean)})
    text, _ = shown(runs / "one", runs / "two", runs / "page.html")["4_test: model/report"]
    cells = iter(text[: text.index("metric")])
    first = [next(cells) for cell in cells if cell in ("actor", "rlhf", "best of 4")]
    assert first == ["A", "B"] * 3
    assert text.index("0.25 (0.40 to 0.60)") < text.index("0.75 (0.40 to 0.60)")
    assert "The reward model of A is right about 75.0% of its pairs." in text
    at = text.index("polite, sampled")
    assert text[at + 1 : at + 3] == ["A", "0.12 (0.40 to 0.60)"], "your own metrics"


def test_a_report_of_another_version_is_said(runs):
    for name in ("one", "two"):
        make(runs / name, "report", ["rlhf"], steps=0, files={"report.json": result(0.5)})
    make(runs / "two", "rlhf", ["actor"], slope=3)
    text, _ = shown(runs / "one", runs / "two", runs / "page.html")["4_test: model/report"]
    assert "The report of B was made from another version of model/rlhf." in text


def test_names_of_folders_and_metrics_are_text(runs):
    evil = runs / "<b>two & more"
    (runs / "two").rename(evil)
    path = evil / "model" / "rlhf" / "metrics.jsonl"
    path.write_text(path.read_text().replace("own_metric", "<script>x"))
    page = compare(runs / "one", evil, runs / "page.html").read_text(encoding="utf-8")
    assert "<b>two" not in page and "<script>" not in page and "&lt;b&gt;two &amp; more" in page


def test_the_command_writes_the_page_and_says_where(runs, capsys):
    out = runs / "page.html"
    assert driver.main(["compare", str(runs / "one"), str(runs / "two"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.exists()


def test_errors_are_sentences(runs, capsys):
    (runs / "empty").mkdir()
    make(runs / "other", "base")
    for first, second, told in (
        ("empty", "two", "There is no run in .*empty: give the folder of a course"),
        ("nowhere", "two", "There is no run in .*nowhere"),
        ("one/model/rlhf", "other", "no stage in common: .*rlhf has rlhf; .*other has base"),
        ("one", "one", "the same run twice"),
    ):
        call = ["compare", str(runs / first), str(runs / second), "--out", str(runs / "page.html")]
        assert driver.main(call) == 2
        assert re.search(told, capsys.readouterr().err)
    assert not (runs / "page.html").exists()


@pytest.mark.parametrize("name", ["stage.json", "metrics.jsonl"])
def test_half_a_file_is_a_sentence(runs, name):
    (runs / "two" / "model" / "rlhf" / name).write_text('{"step": 1')
    with pytest.raises(CourseError, match=f"{name} cannot be read"):
        compare(runs / "one", runs / "two", runs / "page.html")
    with pytest.raises(CourseError, match="page.html cannot be written"):
        compare(runs / "one" / "model" / "rlhf", runs / "one", runs / "no" / "page.html")
