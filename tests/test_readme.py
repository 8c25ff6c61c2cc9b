"""Runs the code of README and docs/ as it is printed there."""

import json
import re
import shutil
from pathlib import Path

import pytest

import util

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
SMALL = dict(
    device="cpu", steps=2, rollout=6, minibatch=3, sft_share=0.2, preference_share=0.3,
    prompt_share=0.1, validation_rows=8, critic_batch=24, pretrain_steps=3, pretrain_documents=400,
)  # fmt: skip


def block(begins):
    """The only Python block that contains this text."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if begins in code]
    return code


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with 300 rows, trained up to the critic."""
    folder = tmp_path_factory.mktemp("readme")
    data = Path(__file__).resolve().parents[1] / "dataset"
    (folder / "dataset").mkdir()
    for name, count in (("train", 300), ("eval", 30)):
        lines = (data / f"{name}.json").read_text(encoding="utf-8").splitlines()[:count]
        (folder / "dataset" / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cfg = util.Config("smoke", root=str(folder), **SMALL)
    for train in (util.train_base, util.train_actor, util.train_critic):
        list(train(cfg))
    return folder


@pytest.fixture
def here(course, tmp_path, monkeypatch):
    """A copy of the course as the current folder, for running code of the README."""
    shutil.copytree(course, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(here, **values):
    return list(util.train_rlhf(util.Config("smoke", root=str(here), **{**SMALL, **values})))


def test_reinforce_is_short_and_learns(here):
    code = block("def reinforce")
    assert len(code.splitlines()) < 20
    (here / "my_losses.py").write_text(code, encoding="utf-8")
    before = (here / "model" / "actor" / "model.safetensors").read_bytes()
    history = train(here, algorithm="my_losses.reinforce", ppo_epochs=1, resume=False)
    assert len(history) == 2 and all(abs(row["policy_loss"]) < 100 for row in history)
    assert (here / "model" / "rlhf" / "model.safetensors").read_bytes() != before


def test_a_reward_a_metric_and_a_reader_of_ones_own(here):
    (here / "mine.py").write_text(block("def polite"), encoding="utf-8")
    history = train(here, reward="model - 0.01*length + 0.5*mine.polite", resume=False)
    assert {"reward_model", "reward_length", "reward_mine.polite"} <= set(history[0])

    (metric,) = re.findall(r'--set "metric=(.+?)"', TEXT)
    cfg = util.Config("smoke", root=str(here), metric=metric, reader="mine.read", **SMALL)
    rows = [json.loads(line) for line in (here / "dataset" / "eval.json").open(encoding="utf-8")]
    for name, asked in (("eval", rows[:5]), ("train", rows[5:9])):
        lines = ["prompt,chosen,rejected"]
        lines += [f'"{row["prompt"]}","{row["chosen"]}","{row["rejected"]}"' for row in asked]
        (here / "dataset" / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    read = util.load_eval_rows(cfg)
    assert [row["prompt"] for row in read] == [row["prompt"] for row in rows[:5]]
    tokenizer, actor = util.load_pair(cfg, "actor")
    crew = util.Crew(tokenizer, actor, actor, util.load_reward(cfg))
    results = util.evaluate(crew, read, cfg, util.rng_for(cfg, "test"))
    assert all(set(r["metrics"]) == {"polite", "words"} for r in results)
    assert [r["metrics"]["words"] for r in results] == [len(r["response"].split()) for r in results]


def test_a_reward_without_a_model_needs_no_critic(here):
    shutil.rmtree(here / "model" / "critic")
    assert len(train(here, algorithm="rloo", rollout=6, answers=3, reward="sentence")) == 2
    assert len(train(here, value_init="actor", reward="sentence", resume=False)) == 2


@pytest.mark.parametrize(
    "page",
    ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", *PAGES[1:]],
    ids=lambda page: Path(page).name,
)
def test_links_lead_to_files(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not lost


def test_the_readme_in_chinese_has_the_same_parts():
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    for pattern in (r"^#+ ", r"<!-- /?\w+ -->", r"\]\(([^)]+)\)", r"^\| `"):
        one, other = (re.findall(pattern, page, re.M) for page in pages)
        assert one and one == other, pattern
