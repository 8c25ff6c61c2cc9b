"""The lessons: parameters cells show true values, every number that an exercise claims can be
reproduced, and every broken function is caught."""

import ast
import importlib
import inspect
import json
import re

import pytest
from warm import HOME, Warm

from bench import claims
from lab import world
from lab.config import Config
from lab.runs import NOTEBOOKS

NAMES = [name.removesuffix(".ipynb") for name in NOTEBOOKS.values()]
SHOWN = re.compile(r"(\w+) = None  # (.+?) \(colab: (.+?)\): \S.*")
CLAIM = re.compile(r"<!-- claim: (\w+) -->")
MODULES = sorted(path.stem for path in (HOME / "bench").glob("claims_*.py"))


def cells(name, kind):
    book = json.loads((HOME / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


def texts(name, kind):
    return ["".join(cell["source"]) for cell in cells(name, kind)]


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_shows_five_true_values(name):
    tagged = [c for c in cells(name, "code") if "parameters" in c["metadata"].get("tags", [])]
    lines = [line for line in "".join(tagged[0]["source"]).splitlines() if " = None" in line]
    assert len(lines) == 5
    for line in lines:
        field, tiny, colab = SHOWN.fullmatch(line).groups()
        for preset, shown in (("tiny", tiny), ("colab", colab)):
            value = getattr(Config(preset), field)
            assert (shown.strip('"') if type(value) is str else ast.literal_eval(shown)) == value


# ----------------------------------------------------------------------------------------- claims


@pytest.fixture(scope="module")
def registered():
    for module in MODULES:
        importlib.import_module(f"bench.{module}")
    return claims.CLAIMS


@pytest.mark.parametrize("name", NAMES)
def test_exercises_name_the_claims_that_are_registered(name, registered):
    named = [claim for text in texts(name, "markdown") for claim in CLAIM.findall(text)]
    assert len(named) == len(set(named))
    assert set(named) == {key for key, claim in registered.items() if claim.notebook == name}


@pytest.mark.parametrize("name", NAMES)
def test_every_folded_answer_names_a_claim(name):
    book = "\n".join(texts(name, "markdown"))
    answers = re.findall(r"<summary>Answer</summary>\n\n(.*?)</details>", book, flags=re.DOTALL)
    assert "**Predict, then run.**" in book and len(answers) >= 4
    assert len(answers) == book.count("<summary>Answer</summary>")
    assert all(CLAIM.search(answer) for answer in answers)
    assert sum(len(CLAIM.findall(answer)) for answer in answers) == len(CLAIM.findall(book))


def test_the_runner_reads_every_module_of_claims(registered):
    source = inspect.getsource(claims.main)
    assert MODULES and all(module in source for module in MODULES)
    assert all(claim.notebook in NAMES and claim.low <= claim.high for claim in registered.values())


def test_the_runner_fails_when_a_number_lies_outside_its_range(monkeypatch, tmp_path, capsys):
    right = claims.Claim("0_download", "two", 2, 2, lambda course: 2)
    monkeypatch.setattr(claims, "CLAIMS", {"right": right})
    assert claims.main(["--root", str(tmp_path)]) == 0
    monkeypatch.setattr(claims, "CLAIMS", {"right": right, "wrong": right._replace(high=3, low=3)})
    assert claims.main(["--root", str(tmp_path)]) == 1
    assert "WRONG 0_download wrong" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- break it

BROKEN = NAMES[1:4]  # the notebooks that break a function of util.py
SMALL = dict(
    preset="smoke", device="cpu", base_model="tiny", pretrain_steps=40, sft_share=0.5,
    preference_share=0.4, prompt_share=0.1, validation_rows=4, max_new_tokens=40, critic_lr=5e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each notebook prints in a small course on the embedded world."""
    root = tmp_path_factory.mktemp("lessons")
    (root / "dataset").mkdir()
    for split, count in (("train", 600), ("eval", 24)):
        rows = [json.dumps(row) + "\n" for row in world.rows(world.World(), split, count)]
        (root / "dataset" / f"{split}.json").write_text("".join(rows))
    server, printed = Warm(), {}
    for name in NAMES[:4]:
        file = root / f"{name}.txt"
        assert server.run(f"{name}.ipynb", file, root=str(root), **SMALL) is None
        printed[name] = file.read_text()
    server.close()
    return printed


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_caught(name, said):
    blocks = sum(text.count("notebook.break_it(") for text in texts(name, "code"))
    assert 0 < blocks <= said[name].count("Caught: ")
    assert "Not noticed" not in said[name]
