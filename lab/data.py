"""Data in: JSON or JSON lines from anywhere, one row format out."""

import json
from pathlib import Path

from lab.runs import CourseError

FIELDS = ("prompt", "response", "chosen", "rejected")


def read_rows(path, needs=("prompt",)):
    """The rows of a file, each a dict with at least the fields `needs`.

    One JSON object a line, or one JSON list. A prompt without the dialogue frame gets it.
    """
    path = Path(path)
    if not path.exists():
        raise CourseError(f"{path} is not there: `python -m lab world` writes the embedded data.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CourseError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    rows = parse_list(path, text) if text.lstrip().startswith("[") else parse_lines(path, text)
    if not rows:
        raise CourseError(f"{path} holds no rows.")
    for line, row in rows:
        if not isinstance(row, dict):
            raise CourseError(f"{path}, line {line}: a row must be an object with a prompt.")
        for name in needs:
            if not isinstance(row.get(name), str):
                raise CourseError(f"{path}, line {line}: the field {name!r} must be a text.")
    return [{**row, "prompt": framed(row["prompt"])} for _, row in rows]


def parse_lines(path, text):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append((number, parse(path, number, line)))
    return rows


def parse_list(path, text):
    rows = parse(path, 1, text, kind=list)
    return [(number, row) for number, row in enumerate(rows, 1)]


def parse(path, number, text, kind=dict):
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CourseError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
    if not isinstance(value, kind):
        raise CourseError(f"{path}, line {number}: a row must be an object with a prompt.")
    return value


def framed(prompt):
    """The course's dialogue frame, unless the prompt has one already."""
    prompt = prompt.strip()
    return prompt if prompt.endswith("Assistant:") else f"Human: {prompt} Assistant:"
