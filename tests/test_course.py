"""Runs the whole course headless with the preset `smoke`: its files, and the same files twice."""

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from warm import Warm

from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parent.parent
SECRETS = {
    name: prefix + secrets.token_hex(16)
    for name, prefix in {
        "HF_TOKEN": "hf_", "OPENAI_API_KEY": "sk-", "WANDB_API_KEY": "", "MY_PASSWORD": "",
        "token": "hf_",  # this one is a file in HF_HOME
    }.items()
}  # fmt: skip


def course(root, env):
    """Runs all five notebooks with papermill, each in a kernel of its own."""
    line = [sys.executable, "-m", "lab", "course", "--preset", "smoke", "--set", f"root={root}"]
    return subprocess.run(line, cwd=HOME, env=env, capture_output=True, text=True, timeout=600)


def figures(root):
    """All metrics of a course, without times and memory."""
    found = {}
    for stage in ("base", "actor", "critic", "rlhf"):
        lines = (root / "model" / stage / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[stage] = [
            {k: v for k, v in row.items() if "second" not in k and "memory" not in k}
            for row in rows
        ]
    report = json.loads((root / "model" / "report" / "report.json").read_text())
    return found | {"report": {k: v for k, v in report.items() if k != "seconds"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in which the course ran once, on a machine whose environment holds secrets."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(HOME / "dataset", root / "dataset")
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text(SECRETS["token"])
    done = course(root, os.environ | SECRETS | {"HF_HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "printed.txt").write_text(done.stdout)
    (root / "errors.txt").write_text(done.stderr)
    return root


def test_every_stage_leaves_a_whole_artifact(root):
    for stage in ("base", "actor", "critic", "rlhf", "report"):
        record = json.loads((root / "model" / stage / "stage.json").read_text())
        for name, size in record["files"].items():
            assert (root / "model" / stage / name).stat().st_size == size
        assert record["config"]["preset"] == "smoke"
    left = [p.name for p in (root / "model").iterdir() if p.name.startswith(".")]
    assert all(name.endswith(".lock") for name in left), left
    assert not list((root / "model").rglob("*.bin")) and not list(
        (root / "model").rglob("*.p*k*l*")
    )


def test_metrics_are_whole_and_plausible(root):
    found = figures(root)
    assert [row["step"] for row in found["base"]] == list(range(1, 13))
    assert found["base"][-1]["loss"] < found["base"][0]["loss"]
    assert abs(found["critic"][0]["loss"] - math.log(2)) < 1e-5
    assert len(found["rlhf"]) == 2
    for row in found["rlhf"]:
        assert row["ratio_error"] < 1e-3 and row["updates"] == 4
        assert all(math.isfinite(value) for value in row.values())
    assert abs(found["rlhf"][0]["kl"]) < 1e-3, "the policy starts as the reference"


def test_the_report_has_the_agreed_form(root):
    report = json.loads((root / "model" / "report" / "report.json").read_text())
    assert report["rows"] == 24 and set(report["models"]) == {"base", "actor", "rlhf"}
    for model in report["models"].values():
        for judge in (model["judge"], model["judge_greedy"]):
            assert judge["low"] <= judge["mean"] <= judge["high"]
            assert set(judge["kinds"]) == {"sql", "feelings", "harmful", "unknown"}
        numbers = [model[name] for name in ("reward", "kl", "length", "distinct_2", "eos")]
        assert all(math.isfinite(number) for number in numbers)
    assert abs(report["models"]["actor"]["kl"]) < 1e-3
    assert 0 <= report["critic"]["accuracy"] <= 1
    assert set(report["seconds"]) == {"base", "actor", "critic", "rlhf"}
    page = (root / "model" / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("</html>", "")


def test_the_result_is_printed(root):
    printed = (root / "printed.txt").read_text()
    assert "24 held-out questions" in printed and "report.html" in printed


def test_samples_can_be_read_along(root):
    lines = (root / "model" / "rlhf" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"step", "temperature", "prompt", "response", "reward", "kl"} == set(rows[0])
    first, last = ([r for r in rows if r["step"] == step] for step in (0, rows[-1]["step"]))
    assert [r["prompt"] for r in first] == [r["prompt"] for r in last], "the same prompts"
    assert {row["temperature"] for row in last} == {0.0, 1.0}
    assert all(abs(row["kl"]) < 1e-3 for row in first), "nothing has been learned yet"
    assert any(row["kl"] > 0 for row in last)


def test_models_load_with_plain_transformers(root):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    for stage, kind in (
        ("rlhf", AutoModelForCausalLM),
        ("critic", AutoModelForSequenceClassification),
    ):
        model = kind.from_pretrained(root / "model" / stage)
        tokenizer = AutoTokenizer.from_pretrained(root / "model" / stage)
        assert (
            model(**tokenizer("Human: Hello? Assistant:", return_tensors="pt"))
            .logits.isfinite()
            .all()
        )


def test_no_secret_of_the_machine_is_printed_or_written(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 30 and root / "model" / "notebooks" / "4_test.ipynb" in files
    for path in files:
        data = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in data], path


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A warm process without a network. It writes every attempt to connect to the file `tried`."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in offline}
    tried = tmp_path_factory.mktemp("network") / "tried.txt"
    server = Warm(kept | {"PYTHONPATH": str(HOME / "tests" / "blocked"), "TRIED": str(tried)})
    server.tried = tried
    yield server
    server.close()


def test_a_second_run_without_a_network_gives_the_same_numbers(root, tmp_path, cut_off):
    first = figures(root)
    given = dict(preset="smoke", root=str(root))
    for notebook in NOTEBOOKS.values():
        assert cut_off.run(notebook, tmp_path / "said.txt", **given) is None
    assert not cut_off.tried.exists(), cut_off.tried.read_text()
    assert figures(root) == first


def test_without_a_network_means_that_a_notebook_cannot_reach_one(tmp_path, cut_off):
    """Checks that the fixture really blocks the network, on which the test above relies."""
    call = "import socket; socket.create_connection(('192.0.2.1', 80))"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(call)])
    nbformat.write(book, tmp_path / "call.ipynb")
    error = cut_off.run(str(tmp_path / "call.ipynb"), tmp_path / "said.txt")
    assert error.startswith("OSError: no network in this test: ('192.0.2.1'")
    assert "192.0.2.1" in cut_off.tried.read_text()


def test_a_stage_out_of_order_names_the_notebook(root, tmp_path, cut_off):
    shutil.copytree(root / "dataset", tmp_path / "dataset")
    given = dict(preset="smoke", root=str(tmp_path))
    error = cut_off.run("2_critic.ipynb", tmp_path / "said.txt", **given)
    assert error.startswith("CourseError: ") and "1_actor.ipynb" in error
    assert not (tmp_path / "model" / "critic").exists()


def test_an_unknown_parameter_is_an_error_under_plain_papermill(root, tmp_path):
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'kl_coef'"):
        papermill.execute_notebook(
            HOME / "3_rlhf.ipynb",
            tmp_path / "out.ipynb",
            {"kl_coeff": 0.1, "root": str(root), "preset": "smoke"},
            kernel_name="python3",
            cwd=HOME,
            progress_bar=False,
        )


def test_the_notebook_of_rlhf_knows_how_exact_fp16_is(root, tmp_path, cut_off):
    for part in ("dataset", "model"):
        shutil.copytree(root / part, tmp_path / part)
    shutil.rmtree(tmp_path / "model" / "rlhf")
    given = dict(preset="smoke", root=str(tmp_path), precision="fp16", lora_rank=4)
    assert cut_off.run("3_rlhf.ipynb", tmp_path / "said.txt", **given) is None
    assert (tmp_path / "model" / "rlhf" / "adapter" / "adapter_config.json").exists()


def test_ppo_raises_a_reward_of_ones_own(root, tmp_path):
    """The reward counts the letter e, and the whole loop learns to write more of it."""
    import util

    shutil.copytree(root / "dataset", tmp_path / "dataset")
    shutil.copytree(root / "model", tmp_path / "model")
    cfg = util.Config(
        "smoke",
        root=str(tmp_path),
        steps=12,
        rollout=48,
        minibatch=24,
        policy_lr=3e-3,
        kl_coef=0.01,
    )
    seen = []

    def letters(prompts, responses):
        seen.extend(zip(prompts, responses))
        return [10 * response.count("e") / max(1, len(response)) for response in responses]

    rewards = [step["reward"] for step in util.train_rlhf(cfg, reward=letters)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert all(prompt.endswith("Assistant:") for prompt, _ in seen)
