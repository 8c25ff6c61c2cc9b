"""`make record` writes tables and pictures between the markers of the pages, and nothing else."""

import json
import shutil

import pytest

from lab import CourseError, record

KINDS = ("feelings", "harmful", "sql", "unknown")


def judged(mean):
    kinds = dict.fromkeys(KINDS, mean)
    return {
        "mean": mean,
        "low": mean - 0.01,
        "high": mean + 0.01,
        "kinds": kinds,
        "intervals": {kind: [mean - 0.02, mean + 0.02] for kind in KINDS},
    }


def summary(mean, greedy):
    return {
        "judge": judged(mean),
        "judge_greedy": judged(greedy) if greedy is not None else None,
        "questions": 24,
        "reward": 0.5,
        "kl": 1.0,
        "length": 12.0,
        "eos": 1.0,
        "distinct_2": 0.2,
    }


@pytest.fixture
def home(root, tmp_path, monkeypatch):
    """The pages of the repository in a folder of their own, and a report beside them."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "README.zh-CN.md", "docs/algorithms.md"):
        shutil.copy(root / name, tmp_path / name)
    models = {
        "base": summary(0.01, 0.0),
        "actor": summary(0.34, 0.12),
        "rlhf": summary(0.95, 1.0),
    }
    folder = tmp_path / "model" / "report"
    folder.mkdir(parents=True)
    report = {
        "rows": 24,
        "models": models,
        "best_of": summary(0.8, None) | {"n": 4},
        "critic": {"accuracy": 0.917},
        "seconds": {"base": 80, "actor": 10, "critic": 20, "rlhf": 11},
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    rows = [
        {
            "model": model,
            "temperature": temperature,
            "kind": kind,
            "prompt": f"Human: I am {kind} | 1? Assistant:",
            "response": f"{model} | says {temperature}",
            "judge": 0.5,
        }
        for model in models
        for temperature in (1.0, 0.0)
        for kind in KINDS
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    runs = [
        {"seed": seed, "name": name, "judge": 0.9, "greedy": 1.0, "KL": 1.0, "seconds": 9.0}
        for seed in (0, 1)
        for name in ("actor", "ppo", "ppo, LoRA")
    ]
    (tmp_path / "docs" / "algorithms.json").write_text(json.dumps(runs), encoding="utf-8")
    monkeypatch.setattr(record, "HOME", tmp_path)
    monkeypatch.setattr(record, "read_record", lambda *_: {"peak_memory_mb": 900})
    return tmp_path


def test_pages_show_the_last_run_in_both_languages(home):
    record.pages(home)
    for name in ("README.md", "README.zh-CN.md"):
        page = (home / name).read_text(encoding="utf-8")
        assert "> I am feelings | 1?" in page and "rlhf \\| says 0.0" in page, "greedy answers"
        assert "0.34" in page and "92%" in page and "2.0" in page, "table, pairs, minutes"
        assert "| ppo | 0.900, 0.900 | 1.000, 1.000 |" in page and "| ppo, LoRA" not in page
    assert "ppo, LoRA" in (home / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in ("judged", "four_models", "course"):
        assert "<svg" in (home / "docs" / f"{name}.svg").read_text(encoding="utf-8")


def test_recording_twice_changes_nothing_more(home):
    files = ("README.md", "README.zh-CN.md", "docs/algorithms.md", "docs/judged.svg")
    record.pages(home)
    first = [(home / name).read_bytes() for name in files]
    record.pages(home)
    assert [(home / name).read_bytes() for name in files] == first


def test_text_outside_the_markers_stays(home):
    page = home / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n", encoding="utf-8")
    record.fill(page, "x", "new\n")
    assert page.read_text(encoding="utf-8") == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    page.write_text("<!-- x -->\nold\n", encoding="utf-8")
    with pytest.raises(CourseError, match="page.md has no place for the x: .*<!-- /x -->"):
        record.fill(page, "x", "new\n")
