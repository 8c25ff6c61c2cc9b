"""The setup cell of the notebooks in a fake Colab: it finds the course, installs what is missing
and nothing else."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lab import CourseError, colab, models
from lab.config import Config
from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parents[1]
NEEDS = ["pip>=1", "numpy>=1.26", "jupyter>=999", "a-package-of-the-course>=2"]

# Runs cells in IPython, with a module google.colab if the first argument is "colab".
SESSION = """
import builtins, json, os, sys, types
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

cells, address = json.load(sys.stdin)
builtins.input = lambda question: address
if sys.argv[1] == "colab":
    mount = lambda path: Path(path, "MyDrive").mkdir(parents=True, exist_ok=True)
    sys.modules["google"] = types.ModuleType("google")
    sys.modules["google.colab"] = types.ModuleType("google.colab")
    sys.modules["google.colab"].drive = types.SimpleNamespace(mount=mount)
sys.path[:] = [os.getcwd(), *filter(None, sys.path)]  # the folder where the kernel started
shell = InteractiveShell.instance()
for cell in cells:
    shell.run_cell(cell).raise_error()
    print("in", os.getcwd())
"""

# Stands in for pip: notes its arguments and constraints, and "installs" the package.
PIP = """
import json, os, sys
from pathlib import Path

args = sys.argv[1:]
constraints = Path(args[args.index("-c") + 1]).read_text()
with open(os.environ["PIP_LOG"], "a") as file:
    file.write(json.dumps([args, constraints]) + "\\n")
info = Path(__file__).parents[1] / "a_package_of_the_course-2.5.dist-info"
info.mkdir()
(info / "METADATA").write_text("Name: a-package-of-the-course\\nVersion: 2.5\\n")
"""


def setup_cell(name="0_download.ipynb"):
    book = json.loads((HOME / name).read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    return "\n\n".join(code[:2])  # the course, then what the notebook imports


class Machine:
    """A machine of Colab whose /content is a temporary folder."""

    def __init__(self, folder):
        self.content, self.log = folder / "content", folder / "pip.log"
        self.drive, self.local = self.content / "drive" / "MyDrive", self.content / "course"
        self.repository, self.site = folder / "repository", folder / "site"
        for path in (self.content, self.site / "pip"):
            path.mkdir(parents=True)
        (self.site / "pip" / "__init__.py").touch()
        (self.site / "pip" / "__main__.py").write_text(PIP)
        self.put(self.repository)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(self.repository)]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "course"]):
            subprocess.run([*git, *command], check=True)

    def put(self, home):
        """Writes a small course: what the cell imports, and the real lab/colab.py."""
        for name in ("lab/data", "lab/notebook", "lab/world", "util", "pandas"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / f"{name}.py").touch()
        (home / "lab" / "__init__.py").write_text((HOME / "lab" / "__init__.py").read_text())
        code = (HOME / "lab" / "colab.py").read_text()
        (home / "lab" / "colab.py").write_text(code.replace("/content", str(self.content)))
        needs = f"[project]\ndependencies = {json.dumps(NEEDS)}\n"
        (home / "pyproject.toml").write_text(needs)

    def run(self, *cells, kind="colab", address="", cwd=None):
        """Starts a session, runs the setup cell with each text replaced; returns the result."""
        cell = setup_cell().replace("/content", str(self.content))
        cells = [cell.replace("DRIVE = False", f"DRIVE = {drive}") for drive in cells]
        env = os.environ | {
            "PYTHONPATH": str(self.site),
            "PIP_LOG": str(self.log),
            "IPYTHONDIR": str(self.site / "ipython"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        call = [sys.executable, "-c", SESSION, kind]
        sent = json.dumps([cells, address])
        return subprocess.run(
            call, input=sent, capture_output=True, text=True, env=env, cwd=cwd or self.content
        )

    def installed(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_cell_is_the_same_in_all_notebooks_apart_from_imports():
    heads = {setup_cell(name).split("%load_ext")[0] for name in NOTEBOOKS.values()}
    assert len(heads) == 1


def test_the_course_is_cloned_once_and_only_what_is_missing_is_installed(machine):
    done = machine.run(False, False, address=f"file://{machine.repository}")
    assert done.returncode == 0, done.stdout + done.stderr
    place = f"The course is in {machine.local} (lost with this session unless DRIVE = True)."
    assert f"{place} Installed: a-package-of-the-course 2.5.\n" in done.stdout
    assert f"{place} Installed: nothing was missing.\n" in done.stdout
    assert done.stdout.count(f"in {machine.local}\n") == 2
    ((args, constraints),) = machine.installed()
    assert args[-1] == "a-package-of-the-course>=2"
    assert not [arg for arg in args if "numpy" in arg or "jupyter" in arg or "upgrade" in arg]
    pinned = {one.name: str(one.specifier) for one in map(Requirement, constraints.splitlines())}
    for name in ("torch", "numpy", "transformers", "pandas"):
        assert pinned[name] == f"=={importlib.metadata.version(name)}"


def test_a_course_beside_the_notebook_is_used(machine):
    home = machine.content / "somewhere"
    machine.put(home)
    done = machine.run(False, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {home}\n" in done.stdout and not machine.local.exists()
    assert len(machine.installed()) == 1


def test_drive_keeps_the_course_and_its_models_for_the_next_session(machine):
    home = machine.drive / "course"
    done = machine.run(True, address=f"file://{machine.repository}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"The course is in {home} (kept in your Google Drive)" in done.stdout
    (home / "model" / "base").mkdir(parents=True)
    (home / "util.py").write_text("print('edited')")

    done = machine.run(True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "edited" in done.stdout and f"in {home}\n" in done.stdout
    assert (home / "model" / "base").exists() and len(machine.installed()) == 1


def test_a_course_in_drive_is_used_if_drive_is_mounted_already(machine):
    machine.put(machine.drive / "course")
    done = machine.run(False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {machine.drive / 'course'}\n" in done.stdout and not machine.local.exists()


def test_a_session_that_began_outside_drive_must_be_restarted(machine):
    done = machine.run(False, True, address=f"file://{machine.repository}")
    assert done.returncode and "Restart session" in done.stderr + done.stdout


def test_an_address_that_cannot_be_cloned_stops_the_cell(machine):
    done = machine.run(False, address=f"file://{machine.content}/nothing")
    assert done.returncode and "nothing' does not appear to be a git rep" in done.stdout
    assert not machine.log.exists()


def test_outside_colab_nothing_is_installed_or_said(machine):
    machine.put(machine.local)
    done = machine.run(False, kind="jupyter", cwd=machine.local)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"in {machine.local}\n" and not machine.log.exists()


# ------------------------------------------------------------------------------------ one process


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder with a pyproject.toml, in Colab; returns a function that writes its needs."""
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.chdir(tmp_path)

    def needs(*names):
        (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {json.dumps(names)}\n")

    return needs


@pytest.mark.parametrize(
    "errors, reason",
    [
        ("WARNING: x\nERROR: first\nERROR: No matching distribution.\n", "(No matching distrib"),
        ("Killed\n", "(exit code 1)"),
    ],
)
def test_a_failure_of_pip_is_a_sentence(errors, reason, course, monkeypatch):
    course("a-package-of-the-course>=2")
    failed = subprocess.CompletedProcess([], 1, "", errors)
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CourseError, match="pip could not install") as error:
        colab.prepare()
    assert reason in str(error.value) and '%pip install "a-package-of' in str(error.value)


def test_a_package_that_is_too_old_is_left_alone(course, monkeypatch):
    course("numpy>=999", "a-package-of-the-course>=2")
    monkeypatch.setattr(colab, "install", lambda needs: pytest.fail("installed"))
    with pytest.raises(CourseError, match='numpy .* too old.*%pip install "numpy>=999"'):
        colab.prepare()


def test_this_environment_lacks_nothing(monkeypatch, capsys):
    """The names in the real pyproject.toml are those of the packages."""
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(colab, "install", lambda needs: pytest.fail(str(needs)))
    colab.prepare()
    assert "nothing was missing" in capsys.readouterr().out


def test_remains_of_a_broken_installation_are_no_constraints(tmp_path, monkeypatch):
    for name, text in (("a-1.dist-info", ""), ("b-x.dist-info", "Name: b\nVersion: x\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = colab.installed()
    assert "numpy" in found and not {"a", "b"} & set(found)


def test_a_package_of_colab_that_peft_refuses_is_named(make_model, monkeypatch):
    def refuse(*_):
        raise ImportError("Found an incompatible version of torchao")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(CourseError, match="lora_rank = 2 .* version of torchao.*uninstall"):
        models.trainable(make_model(), Config("smoke", lora_rank=2))
