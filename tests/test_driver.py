"""python -m lab: help, parameters, what it tells while a notebook runs and when one fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import nbformat
import pytest

from lab import __main__ as driver
from lab import world
from lab.runs import NOTEBOOKS
from util import Config


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder in the place of the repository."""
    monkeypatch.setattr(driver, "HOME", tmp_path)
    return tmp_path


@pytest.fixture
def calls(home, monkeypatch):
    """Notebooks are not run: their names and parameters are noted."""
    noted = []

    def note(path, copy, given, **how):
        noted.append((path.stem, given))

    monkeypatch.setattr("papermill.execute_notebook", note)
    return noted


def notebook(path, source, parameters="seed = 0"):
    cells = [nbformat.v4.new_code_cell(text) for text in (parameters, source)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def listed(capsys, command):
    with pytest.raises(SystemExit) as stop:
        driver.main([command, "--help"])
    assert stop.value.code == 0
    return re.findall(r"^  (\w+) ", capsys.readouterr().out.split("parameters:")[1], re.M)


# ------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("command, stage", [(c, stage) for c, (_, stage) in driver.STAGES.items()])
def test_the_help_of_a_stage_lists_what_it_reads(capsys, command, stage):
    stages = {f.name: f.metadata["stages"] for f in fields(Config)}
    assert listed(capsys, command) == [n for n, s in stages.items() if "all" in s or stage in s]


def test_the_help_of_course_lists_every_parameter_once(capsys):
    assert listed(capsys, "course") == [f.name for f in fields(Config)]


def test_the_help_of_world_lists_its_fields(capsys):
    assert listed(capsys, "world") == [f.name for f in fields(world.World)]


def test_the_help_of_chat_lists_what_it_reads_and_says_that_questions_stand_alone(capsys):
    stages = {f.name: f.metadata["stages"] for f in fields(Config)}
    with pytest.raises(SystemExit):
        driver.main(["chat", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "every question stands alone" in said
    assert "{base,actor,rlhf}" in said and "--temperature T" in said
    assert listed(capsys, "chat") == [n for n, s in stages.items() if "all" in s]


def test_plain_help_does_not_wait_for_torch():
    code = "import sys; from lab.__main__ import parser; parser().format_help(); "
    code += "sys.exit('torch' in sys.modules or 'util' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=driver.HOME).returncode == 0


# ------------------------------------------------------------------------------------------------
# Parameters


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("actor --set actor_lrr=1e-3", "did you mean 'actor_lr'"),
        ("course --set checkpoint_every=25", "did you mean 'checkpoint_minutes'"),
        ("course --config my.yaml", "did you mean 'kl_coef'"),
        ("course --preset smoky", "did you mean 'smoke'"),
        ("course --set actor_lr=high", "actor_lr = 'high' is impossible"),
        ("course --set gamma=2", "gamma = 2.0 is impossible"),
        ("actor --set kl_coef=0.1", "actor does not read kl_coef"),
        ("actor --set seed", "NAME=VALUE"),
        ("actor --config nowhere.yaml", "nowhere.yaml cannot be read"),
        ("actor --config list.yaml", "list.yaml must hold"),
        ("world --set rowz=10", "did you mean 'rows'"),
        ("world --set rows=ten", "rows = 'ten' is impossible"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_and_nothing_runs(
    home, calls, capsys, monkeypatch, line, sentence
):
    monkeypatch.chdir(home)
    (home / "my.yaml").write_text("kl_cof: 0.1\n")
    (home / "list.yaml").write_text("- 1\n")
    assert driver.main(line.split()) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not calls and not (home / "model").exists()


def test_values_arrive_with_their_types(home, calls):
    text = "policy_lr: 2e-5\nsteps: '7'\nwhiten: no\nkl_coef: 1\nlam: null\n"
    (home / "my.yaml").write_text(text)
    line = ["rlhf", "--config", str(home / "my.yaml"), "--set", "steps=8", "--set", "whiten=true"]
    assert driver.main(line) == 0
    assert calls == [("3_rlhf", {"policy_lr": 2e-5, "steps": 8, "whiten": True, "kl_coef": 1.0})]
    assert [type(v) for v in calls[0][1].values()] == [float, int, bool, float]


def test_course_gives_each_notebook_what_it_reads(calls):
    given = ["seed=3", "weight_decay=0", "actor_lr=1e-4", "kl_coef=0.1", "test_rows=50"]
    pairs = [part for pair in given for part in ("--set", pair)]
    assert driver.main(["course", "--preset", "smoke", *pairs]) == 0
    common = {"preset": "smoke", "seed": 3}
    assert calls == [
        ("0_download", common | {"weight_decay": 0.0}),
        ("1_actor", common | {"weight_decay": 0.0, "actor_lr": 1e-4}),
        ("2_critic", common | {"weight_decay": 0.0}),
        ("3_rlhf", common | {"weight_decay": 0.0, "kl_coef": 0.1}),
        ("4_test", common | {"test_rows": 50}),
    ]


def test_a_file_for_the_whole_course_serves_one_stage(home, calls):
    (home / "my.yaml").write_text("kl_coef: 0.1\nactor_epochs: 2\nroot: elsewhere\n")
    assert driver.main(["actor", "--config", str(home / "my.yaml")]) == 0
    assert calls == [("1_actor", {"actor_epochs": 2, "root": "elsewhere"})]
    assert (home / "elsewhere" / "model" / "notebooks").is_dir()


def test_the_lesson_is_run_quickly_and_tells_what_it_found(home, calls, capsys):
    folder = home / "model" / "overoptimisation"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"sentences": ["PPO turns at d = 1.2."]}')
    assert driver.main(["overoptimise", "--quick", "--set", "seed=1"]) == 0
    assert calls == [("overoptimisation", {"seed": 1, "quick": True})]
    assert "PPO turns at d = 1.2." in capsys.readouterr().out


def test_nothing_given_means_nothing_passed(calls):
    assert driver.main(["course"]) == 0
    assert calls == [(name.removesuffix(".ipynb"), {}) for name in NOTEBOOKS.values()]


def test_world_writes_what_it_was_told(tmp_path):
    sizes = ["--set", "rows=20", "--set", "eval_rows=8", "--set", "seed=5", "--set", "flip=0.5"]
    assert driver.main(["world", *sizes, "--out", str(tmp_path / "a")]) == 0
    world.write(world.World(rows=20, eval_rows=8, seed=5, flip=0.5), tmp_path / "b")
    for name in ("train.json", "eval.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ------------------------------------------------------------------------------------------------
# Running


RUNS = """
import json, pathlib
here = pathlib.Path("model")
(here / ".actor.partial").mkdir()
with open(here / ".actor.partial" / "metrics.jsonl", "w") as file:
    for step in (1, 2):
        print(json.dumps({"step": step, "steps": 2, "loss": 0.5 / step, "seed": seed}), file=file)
(here / ".actor.partial").rename(here / "actor")
(here / "actor" / "stage.json").write_text('{"peak_memory_mb": 321}')
"""


def test_a_notebook_runs_beside_its_folder_and_is_summed_up(home, capfd):
    notebook(home / "1_actor.ipynb", RUNS)
    assert driver.main(["actor", "--set", "seed=4"]) == 0
    said = capfd.readouterr()  # of the kernel as well
    assert re.match(r"1_actor +2/2 steps  loss 0.250 .* s  peak memory 321 MB\n$", said.out)
    assert said.err == ""
    assert json.loads((home / "model/actor/metrics.jsonl").read_text().split("\n")[0])["seed"] == 4
    copy = nbformat.read(home / "model" / "notebooks" / "1_actor.ipynb", 4)
    assert all(cell.execution_count for cell in copy.cells)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("raise ValueError('the ground is wet\\nand more')", "ValueError: the ground is wet"),
        ("import os; os._exit(1)", "DeadKernelError: Kernel died"),
    ],
)
def test_a_notebook_that_fails_is_one_sentence_and_ends_the_course(home, capfd, source, reason):
    notebook(home / "0_download.ipynb", source)
    assert driver.main(["course"]) == 1
    copy = home / "model" / "notebooks" / "0_download.ipynb"
    said = f"0_download.ipynb stopped. {reason}\nThe notebook up to the error: {copy}\n"
    assert capfd.readouterr().err == said
    assert copy.exists()


def test_progress_tells_of_this_run_only(home):
    partial = home / "model" / ".rlhf.partial"
    partial.mkdir(parents=True)
    metrics = partial / "metrics.jsonl"
    metrics.write_text('{"step": 9, "steps": 9, "reward": 1.0}\n')
    os.utime(metrics, (0, 0))
    record = home / "model" / "rlhf" / "stage.json"
    progress = driver.Progress("3_rlhf.ipynb", metrics, record)
    progress.began -= 1
    assert re.fullmatch(r"3_rlhf +1 s", progress.line())
    metrics.write_text('{"step": 3, "steps": 9, "reward": -0.5, "kl": 0.25}\n')
    assert "  3/9 steps  reward -0.500  kl 0.250  " in re.sub(" {3,}", "  ", progress.line())
    metrics.write_text('{"step": 4, "steps": 9, "rewa')  # half a line: what was known stays
    assert "3/9 steps" in progress.line()


# ------------------------------------------------------------------------------------------------
# The result


def scores(mean):
    kinds = {"sql": mean - 0.1, "unknown": mean + 0.1}
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "kinds": kinds}


def model(mean, judged=True, greedy=True):
    rest = {"reward": None, "kl": 1.25, "length": 17.5, "distinct_2": 0.625, "eos": 1.0}
    judge = {"judge": scores(mean), "judge_greedy": scores(mean + 0.05) if greedy else None}
    return (judge if judged else dict.fromkeys(judge)) | rest


@pytest.fixture
def printed(home, calls, capsys):
    """Runs `test` with a finished report; returns what it prints, below the name of each line."""

    def run(report):
        folder = home / "model" / "report"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
        assert driver.main(["test"]) == 0
        said = capsys.readouterr().out
        assert str(folder / "report.html") in said
        said = said.replace(str(home), "")
        assert max(map(len, said.splitlines())) <= 100
        tables = [re.split(r"\n", part) for part in said.strip().split("\n\n")]
        lines = [{re.split(r"  +", x)[0]: re.split(r"  +", x)[1:] for x in part} for part in tables]
        return said, lines[1:]

    return run


def test_the_table_shows_sampled_beside_greedy(printed):
    models = {
        name: model(mean) for name, mean in zip(("base", "actor", "rlhf"), (0.11, 0.47, 0.83))
    }
    best = model(0.6, greedy=False) | {"n": 4, "questions": 250}
    said, (table, kinds, _) = printed(
        {"rows": 600, "models": models, "best_of": best, "critic": {"accuracy": 0.93}}
    )
    assert "600 held-out questions" in said and "93%" in said
    assert table["model"][:3] == ["questions", "sampled", "greedy"]
    assert table["base"][:3] == ["600", "0.11 (0.09-0.13)", "0.16 (0.14-0.18)"]
    assert table["rlhf"] == [
        "600", "0.83 (0.81-0.85)", "0.88 (0.86-0.90)", "-", "1.25", "17.5", "0.62", "100%",
    ]  # fmt: skip
    assert table["best of 4"][:3] == ["250", "0.60 (0.58-0.62)", "-"]
    assert kinds["kind"] == ["base", "actor", "rlhf", "best of 4"]
    assert kinds["sql"] == ["0.01 / 0.06", "0.37 / 0.42", "0.73 / 0.78", "0.50"]
    assert kinds["unknown"] == ["0.21 / 0.26", "0.57 / 0.62", "0.93 / 0.98", "0.70"]


def test_the_table_without_a_judge_shows_what_there_is(printed):
    models = {name: model(0, judged=False) for name in ("base", "actor", "rlhf")}
    said, (table, *rest) = printed({"rows": 600, "models": models, "critic": None})
    assert table["model"] == ["questions", "reward", "KL", "length", "distinct-2", "ended"]
    assert table["actor"] == ["600", "-", "1.25", "17.5", "0.62", "100%"]
    assert "kind" not in said and "reward model" not in said and "metrics" not in said


def test_the_table_shows_metrics_and_perplexity(printed):
    def numbers(mean):
        return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}

    own = {"metrics": {"whole": numbers(0.4), "mood": numbers(-0.5)}}
    own["metrics_greedy"] = {"whole": numbers(0.6), "mood": numbers(12.0)}
    models = {name: model(0, judged=False) | own for name in ("base", "actor", "rlhf")}
    models["rlhf"]["perplexity"] = 1234.56
    best = models["base"] | {"n": 4, "metrics_greedy": None}
    report = {"rows": 600, "models": models, "best_of": best}
    said, (table, whole, mood) = printed(report)
    assert table["model"][-1] == "perplexity"
    assert [table[name][-1] for name in ("base", "rlhf")] == ["-", "1,234.6"]
    assert "The mean of whole, with" in said and "The mean of mood, with" in said
    assert whole["model"] == ["sampled", "greedy"]
    assert whole["rlhf"] == ["0.40 (0.38 to 0.42)", "0.60 (0.58 to 0.62)"]
    assert whole["best of 4"] == ["0.40 (0.38 to 0.42)", "-"]
    assert mood["base"] == ["-0.50 (-0.52 to -0.48)", "12.0 (12.0 to 12.0)"]
