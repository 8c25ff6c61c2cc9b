"""python -m lab address URL: the repository's address, in the notebooks and the READMEs.

With it a Colab user opens a notebook with one click and types nothing.
"""

import re
from pathlib import Path

from lab import CourseError
from lab.errors import NOTEBOOKS

READMES = ("README.md", "README.zh-CN.md")
COLAB = "https://colab.research.google.com"
PART = r"[A-Za-z0-9._~-]+"
# Only letters that mean nothing to a shell, to Python or to JSON: the setup cell runs `git clone`.
URL = re.compile(rf"https://[A-Za-z0-9.-]+(:\d+)?(/{PART})+")
GITHUB = re.compile(rf"https://github\.com/({PART})/({PART})")
LINE = re.compile(rb'(?m)^(\s*"ADDRESS = \\")([^"\\]*)(\\")')


def write_address(url, home):
    """Writes the address into all files below `home` and returns the paths that have changed.

    An empty address removes the one that is there. If one file cannot take the address, no file
    changes.
    """
    url = checked(url)
    changed = {}
    lessons = sorted(path.relative_to(home) for path in Path(home).glob("more/*.ipynb"))
    for name in (*NOTEBOOKS.values(), *lessons):
        path, old = contents(home, name)
        new, count = LINE.subn(rb"\g<1>" + url.encode() + rb"\g<3>", old)
        if count != 1:
            raise CourseError(
                f'{path} has {count} lines that begin with ADDRESS = "..." instead of one: put '
                'ADDRESS = "" into its setup cell.'
            )
        changed[path] = old, new
    for name in READMES:
        path, old = contents(home, name)
        changed[path] = old, between_markers(path, old.decode(), "badges", badges(url)).encode()
    changed = {path: new for path, (old, new) in changed.items() if new != old}
    for path, new in changed.items():
        path.write_bytes(new)
    return list(changed)


def checked(url):
    """The address without a slash at its end; raises if it cannot be one."""
    url = url.strip().rstrip("/")
    if url and not URL.fullmatch(url):
        raise CourseError(
            f"{url!r} cannot be the address of a repository: it must look like "
            'https://github.com/OWNER/REPOSITORY. Use "" to remove the address.'
        )
    if url.startswith("https://github.com/") and not GITHUB.fullmatch(url):
        raise CourseError(
            f"{url!r} is not a repository on GitHub: it must look like "
            "https://github.com/OWNER/REPOSITORY."
        )
    return url


def contents(home, name):
    """The path and the bytes of a file; bytes keep its line ends as they are."""
    path = Path(home) / name
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise CourseError(f"{path} cannot be read ({error.strerror}).") from None


def badges(url):
    """The Markdown for a README: Colab links of a repository on GitHub, and how to clone it."""
    if not url:
        return ""
    lines = []
    if found := GITHUB.fullmatch(url):
        owner, repository = found[1], found[2].removesuffix(".git")
        links = [
            f"[![Open {notebook} in Colab]({COLAB}/assets/colab-badge.svg)]"
            f"({COLAB}/github/{owner}/{repository}/blob/main/{notebook})"
            for notebook in NOTEBOOKS.values()
        ]
        names = [notebook.removesuffix(".ipynb") for notebook in NOTEBOOKS.values()]
        lines = [names, ["---"] * len(names), links]
        lines = [f"| {' | '.join(cells)} |" for cells in lines] + [""]
    return "\n".join([*lines, "```", f"git clone {url}", "```"])


def between_markers(path, text, name, new):
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    parts = re.split(f"({re.escape(begin)}|{re.escape(end)})", text)
    if parts[1::2] != [begin, end]:
        raise CourseError(
            f"{path} has no place for the {name}: put one line {begin} and below it one line {end} "
            "where they should appear."
        )
    new = new.rstrip("\n")
    return f"{parts[0]}{begin}\n{new}{chr(10) * bool(new)}{end}{parts[4]}"
