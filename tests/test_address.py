"""python -m lab address: the repository's address in notebooks and READMEs."""

import json
import shutil
from pathlib import Path

import pytest

from lab import CourseError
from lab import __main__ as driver
from lab.address import READMES, badges, write_address
from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parents[1]
SETUP = 'ADDRESS = ""  # of the course\'s git repository'
README = "# Title\n\n<!-- badges -->\n<!-- /badges -->\n\nText with a | and äöü.\n"
GITHUB = "https://github.com/someone/rlhf-course"


def book(*sources):
    cells = [
        {"cell_type": "code", "id": f"cell-{i:02}", "metadata": {}, "execution_count": None,
         "outputs": [], "source": source.splitlines(keepends=True)}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    rest = {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps({"cells": cells} | rest, indent=1, ensure_ascii=False) + "\n"


@pytest.fixture
def home(tmp_path):
    """A repository with the five notebooks and both READMEs."""
    for name in NOTEBOOKS.values():
        text = book(f"import os\n\n{SETUP}\nprint('ä')", "# A comment on ADDRESS = x\n")
        (tmp_path / name).write_bytes(text.encode())
    for name in READMES:
        (tmp_path / name).write_bytes(README.encode())
    return tmp_path


def contents(home):
    return {path.name: path.read_bytes() for path in home.iterdir()}


def test_only_the_line_of_the_address_changes_and_goes_back(home):
    before = contents(home)
    changed = write_address(GITHUB, home)
    after = contents(home)
    assert {path.name for path in changed} == set(before)
    for name in NOTEBOOKS.values():
        old, new = before[name].splitlines(), after[name].splitlines()
        lines = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        expected = old[lines and old.index(lines[0][0])]
        assert len(lines) == 1 and lines[0][0] == expected
        assert lines[0][1] == expected.replace(rb"= \"\"", rb"= \"" + GITHUB.encode() + rb"\"")
        source = "".join(json.loads(after[name])["cells"][0]["source"])
        assert f'ADDRESS = "{GITHUB}"' in source
        compile(source, name, "exec")
    assert write_address(GITHUB, home) == [] and contents(home) == after, "twice is once"
    write_address("https://git.example.org/a/b.git", home)
    write_address("", home)
    assert contents(home) == before


def test_every_notebook_gets_its_badge(home):
    write_address(GITHUB + ".git/", home)
    for name in READMES:
        text = (home / name).read_text(encoding="utf-8")
        for notebook in NOTEBOOKS.values():
            link = "https://colab.research.google.com/github/someone/rlhf-course/blob/main/"
            assert text.count(f"({link}{notebook})") == 1
        assert f"git clone {GITHUB}.git\n" in text
        assert text.startswith("# Title\n\n<!-- badges -->\n")
        assert text.endswith("<!-- /badges -->\n\nText with a | and äöü.\n")


def test_other_hosts_get_the_clone_line_only():
    url = "https://gitlab.com/group/part/course"
    assert badges(url) == f"```\ngit clone {url}\n```"


@pytest.mark.parametrize(
    "url",
    [
        "github.com/a/b",
        "http://github.com/a/b",
        "git@github.com:a/b.git",
        "https://github.com",
        "https://github.com/a",
        "https://github.com/a/b/tree/main",
        "https://example.org/a b",
        'https://example.org/a"; import os',
        "https://example.org/$(rm -r x)",
        "https://example.org/a\\nb",
        "https://example.org/a`b`",
        "https://example.org/{a}",
    ],
)
def test_an_impossible_address_is_an_error_and_changes_nothing(home, url, monkeypatch, capsys):
    before = contents(home)
    monkeypatch.setattr(driver, "HOME", home)
    assert driver.main(["address", url]) == 2
    said = capsys.readouterr().err
    assert "https://github.com/OWNER/REPOSITORY" in said and said.count("\n") == 1
    assert contents(home) == before


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("README.zh-CN.md", "# Title\n", "no place for the badges"),
        ("README.md", "<!-- /badges -->\n<!-- badges -->\n", "no place for the badges"),
        ("README.md", README + README, "no place for the badges"),
        ("README.md", None, "cannot be read"),
        ("4_test.ipynb", book("import os\n"), "has 0 lines"),
        ("4_test.ipynb", book(SETUP, SETUP), "has 2 lines"),
        ("4_test.ipynb", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_take_the_address_keeps_all_as_they_are(home, name, text, sentence):
    (home / name).unlink() if text is None else (home / name).write_text(text, encoding="utf-8")
    before = contents(home)
    with pytest.raises(CourseError, match=sentence) as found:
        write_address(GITHUB, home)
    assert name in str(found.value)
    assert contents(home) == before


def test_the_command_names_what_it_changed(home, monkeypatch, capsys):
    monkeypatch.setattr(driver, "HOME", home)
    assert driver.main(["address", GITHUB]) == 0
    assert capsys.readouterr().out.split() == [
        str(home / name) for name in (*NOTEBOOKS.values(), *READMES)
    ]
    assert driver.main(["address", GITHUB]) == 0
    assert "Nothing to change" in capsys.readouterr().out


def test_the_files_of_this_repository_can_take_an_address(tmp_path):
    for name in (*NOTEBOOKS.values(), *READMES):
        shutil.copy(HOME / name, tmp_path / name)
    write_address("", tmp_path)
    before = contents(tmp_path)
    assert write_address(GITHUB, tmp_path)
    write_address("", tmp_path)
    assert contents(tmp_path) == before
