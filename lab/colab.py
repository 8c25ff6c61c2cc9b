"""Prepares a machine of Google Colab: installs what it lacks and changes nothing that it has."""

import importlib.metadata
import subprocess
import sys
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from lab import CourseError

DRIVE = Path("/content/drive")


def prepare(drive=False):
    """Installs the missing packages and says what it did. Outside Colab it does nothing.

    `drive` says that the course must be in Google Drive.
    """
    if "google.colab" not in sys.modules:
        return
    home = Path.cwd()
    kept = home.is_relative_to(DRIVE)
    if drive and not kept:
        raise CourseError(
            f"DRIVE = True, but this session already uses the course in {home}: choose Runtime > "
            "Restart session, then run this cell again."
        )
    wanted = requirements(home)
    refuse_old(wanted)
    missing = [need for need in wanted if version_of(need.name) is None]
    if missing:
        install(missing)
    names = ", ".join(f"{need.name} {version_of(need.name)}" for need in missing)
    place = "kept in your Google Drive" if kept else "lost with this session unless DRIVE = True"
    print(f"The course is in {home} ({place}). Installed: {names or 'nothing was missing'}.")


def requirements(home):
    """Returns the requirements in pyproject.toml, without Jupyter: Colab takes its place."""
    with open(home / "pyproject.toml", "rb") as file:
        needs = map(Requirement, tomllib.load(file)["project"]["dependencies"])
        return [need for need in needs if need.name != "jupyter"]


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_old(needs):
    """Raises if a package is older than the course needs: to replace it is the user's decision."""
    old = {need: version_of(need.name) for need in needs}
    old = {need: have for need, have in old.items() if have and not need.specifier.contains(have)}
    if old:
        has = ", ".join(f"{need.name} {have}" for need, have in old.items())
        news = " ".join(f'"{need}"' for need in old)
        raise CourseError(
            f"Colab has {has}, which is too old for the course. Run %pip install {news}, choose "
            "Runtime > Restart session, then run this cell again."
        )


def install(needs):
    """Installs packages. The versions of all others are constraints, so pip cannot change them."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(f"{name}=={version}" for name, version in installed().items()))
        file.flush()
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "-c", file.name, *map(str, needs)], capture_output=True, text=True
        )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        names = " ".join(f'"{need}"' for need in needs)
        raise CourseError(
            f"pip could not install what Colab lacks ({reason.rstrip('.')}). Run this cell again, "
            f"or run %pip install {names}."
        )
    importlib.invalidate_caches()


def installed():
    """Returns {name: version} of the packages that Python finds."""
    found = {}
    for package in importlib.metadata.distributions():
        name, version = (package.metadata.get(field) or "" for field in ("Name", "Version"))
        with suppress(InvalidVersion):  # remains of a broken installation
            found.setdefault(canonicalize_name(name), Version(version))
    return found
