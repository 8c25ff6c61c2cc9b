"""Reads and checks data files: JSON or JSON Lines in, a list of dicts out."""

import difflib
import json
import re
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lab import CourseError

LAYOUT = ": write one JSON object per line, or one JSON list of objects."
NUL = "the text contains NUL characters", ": remove them, or save the file as UTF-8."


class Problem(NamedTuple):
    """Why a row cannot be used and what to do about it."""

    what: str
    remedy: str
    line: int | None = None  # the line of the text in which it was found


def read_rows(path, needs=("prompt",), reader=None):
    """Returns the rows of a file as dicts. Every field in `needs` is a text that is not empty.

    The file holds one JSON object per line or one JSON list; `reader(path)` reads any other format.
    Prompts get the dialogue frame "Human: ... Assistant:" if they lack it.
    """
    path, rows, problems, needs = Path(path), [], {}, dict.fromkeys(("prompt", *needs))
    with reading(path):
        found = (
            ((f"row {i}", row) for i, row in enumerate(reader(path), 1))
            if reader
            else entries(path)
        )
        for place, row in found:
            problem = row if isinstance(row, Problem) else problem_of(row, needs)
            if problem:
                problems.setdefault(problem.what, []).append((place, problem.remedy))
            else:
                rows.append(row)
                row["prompt"] = framed(row["prompt"])
    for what, ((place, remedy), *more) in problems.items():
        first = f" (the first of {len(more) + 1})" if more else ""
        raise CourseError(f"{path}, {place}{first}: {what}{remedy}")
    if not rows:
        raise CourseError(f"{path} contains no rows{LAYOUT}")
    return rows


@contextmanager
def reading(path):
    """Turns errors of opening or reading a file into a CourseError."""
    try:
        yield
    except FileNotFoundError:
        message = f"{path} does not exist: run `python -m lab world` to write the embedded data."
        raise CourseError(message) from None
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}): it must be a file that you may read."
        raise CourseError(message) from None


def entries(path):
    """Yields (place, row) for every row of a file, with a Problem for each unreadable row."""
    decode, layout = json.JSONDecoder(parse_constant=no_constant).decode, ""
    # surrogateescape keeps bytes that are not UTF-8, so that `parsed` can report their line.
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff")
            layout = layout or line.lstrip()[:1]
            if layout == "[":
                found = parsed(decode, line + file.read())
                if isinstance(found, Problem):
                    known = f"line {number + (found.line or 0) - 1}"
                    yield known if found.line else "somewhere in the list", found
                else:
                    yield from ((f"row {i}", row) for i, row in enumerate(found, 1))
            elif line.strip():
                yield f"line {number}", parsed(decode, line.rstrip("\r\n"))


def no_constant(name):
    raise ValueError(f"{name} is not valid JSON")


def parsed(decode, text):
    """Parses JSON; returns the value, or a Problem."""
    try:
        text.encode()
        return decode(text)
    except UnicodeEncodeError as error:
        wide = text.startswith(("\udcff\udcfe", "\udcfe\udcff"))
        what = "this is UTF-16 text" if wide else "this is not UTF-8 text"
        line = text.count("\n", 0, error.start) + 1
        return Problem(what, ": save the file as UTF-8.", line)
    except json.JSONDecodeError as error:
        if "\0" in text:
            return Problem(*NUL, text.count("\n", 0, text.index("\0")) + 1)
        reason = f" ({error.msg}: column {error.colno})"
        return Problem("this is not valid JSON", reason + LAYOUT, error.lineno)
    except RecursionError:
        return Problem("brackets are nested too deeply", ": write each row as one flat object.")
    except ValueError as error:  # from `no_constant`, or more digits than Python accepts
        what = "a number is too long" if "digits" in str(error) else str(error)
        return Problem(what, ": write null, or a text in quotes.")


def problem_of(row, needs):
    """Returns the Problem of a row; None if the row can be used."""
    if not isinstance(row, dict):
        return Problem("a row must be an object", ' like {"prompt": "..."}.')
    texts = "".join([*row, *(value for value in row.values() if isinstance(value, str))])
    if "\0" in texts:
        return Problem(*NUL)
    try:
        texts.encode()
    except UnicodeEncodeError:
        what = "the text contains half of a surrogate pair, like \\ud800"
        return Problem(what, ": remove it, because no tokenizer accepts it.")
    for name in needs:
        if name not in row:
            near = difflib.get_close_matches(name, row, n=1)
            there = textwrap.shorten(", ".join(row), 80, placeholder=" ..") or "no fields"
            rename = f"{near[0]!r}: rename it to {name!r}." if near else f"{there}."
            hint = f"; the row has {rename}"
            return Problem(f"the field {name!r} is missing", hint)
        if not isinstance(row[name], str):
            return Problem(f"the field {name!r} must be a text", ': write it as "...".')
        if not row[name].strip():
            return Problem(f"the field {name!r} is empty", ": fill it in, or remove such rows.")
    if {"chosen", "rejected"} <= needs.keys() and row["chosen"].strip() == row["rejected"].strip():
        return Problem("chosen and rejected are equal", ": remove such rows; they teach nothing.")
    return None


def framed(prompt):
    """Puts a prompt into the dialogue frame "Human: ... Assistant:", unless it has one."""
    prompt = prompt.strip()
    return prompt if prompt.endswith("Assistant:") else f"Human: {prompt} Assistant:"


def turns(prompt):
    """Splits a prompt in the course's frame into messages for a chat template."""
    parts = re.split(r"(?:^|\s)(Human|Assistant):", prompt)
    if parts[0].strip():  # words before the first turn are the system prompt
        parts = ["", "System", parts[0], *parts[1:]]
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    said = zip(parts[1::2], parts[2::2])
    said = [{"role": roles[who], "content": text.strip()} for who, text in said if text.strip()]
    return said or [{"role": "user", "content": ""}]


def repeated(rows):
    """Counts the rows that are exact copies of an earlier row."""
    return len(rows) - len({json.dumps(row, sort_keys=True) for row in rows})


def check_no_overlap(train, evals, path):
    """Raises if a prompt of the evaluation rows, read from `path`, is in the training rows."""
    known = {row["prompt"] for row in train}
    both = [number for number, row in enumerate(evals, 1) if row["prompt"] in known]
    if both:
        raise CourseError(
            f"{path}, row {both[0]} (the first of {len(both)}): this prompt is also in the "
            "training rows. Remove it from one of them: a test on training rows proves nothing."
        )


def with_pairs(rows):
    """Returns the rows that have a chosen and a rejected answer."""
    pairs = [(row.get("chosen"), row.get("rejected")) for row in rows]
    fine = [all(isinstance(text, str) and text.strip() for text in pair) for pair in pairs]
    return [row for row, keep in zip(rows, fine) if keep]
