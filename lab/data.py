"""Data in: JSON or JSON lines from anywhere, one row format out."""

import difflib
import json
import re
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lab import CourseError

LAYOUT = ": a file holds one JSON object a line, or one JSON list of objects."
NUL = "there are NUL characters", ": remove them, or save the file as UTF-8."


class Trouble(NamedTuple):
    """What stands where a good row should, what to do, and on which line of its text."""

    what: str
    remedy: str
    line: int | None = None


def read_rows(path, needs=("prompt",), reader=None):
    """The rows of a file, each a dict with at least the texts `needs`, none of them empty.

    One JSON object a line, or one JSON list; or what `reader(path)` makes of any other format. A
    prompt without the dialogue frame gets it.
    """
    path, rows, troubles, needs = Path(path), [], {}, dict.fromkeys(("prompt", *needs))
    with reading(path):
        found = (
            ((f"row {i}", row) for i, row in enumerate(reader(path), 1))
            if reader
            else entries(path)
        )
        for place, row in found:
            trouble = row if isinstance(row, Trouble) else trouble_of(row, needs)
            if trouble:
                troubles.setdefault(trouble.what, []).append((place, trouble.remedy))
            else:
                rows.append(row)
                row["prompt"] = framed(row["prompt"])
    for what, ((place, remedy), *more) in troubles.items():
        first = f" (the first of {len(more) + 1})" if more else ""
        raise CourseError(f"{path}, {place}{first}: {what}{remedy}")
    if not rows:
        raise CourseError(f"{path} holds no rows{LAYOUT}")
    return rows


@contextmanager
def reading(path):
    """What keeps a file from being read, in a sentence."""
    try:
        yield
    except FileNotFoundError:
        message = f"{path} is not there: `python -m lab world` writes the embedded data."
        raise CourseError(message) from None
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}): it must be a file you may read."
        raise CourseError(message) from None


def entries(path):
    """(place, row) for every row of a file; where one cannot be read, a Trouble in its stead."""
    decode, layout = json.JSONDecoder(parse_constant=no_constant).decode, ""
    # Bytes that are no UTF-8 come as surrogates, which `parsed` finds: so their line is known.
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff")
            layout = layout or line.lstrip()[:1]
            if layout == "[":
                found = parsed(decode, line + file.read())
                if isinstance(found, Trouble):
                    known = f"line {number + (found.line or 0) - 1}"
                    yield known if found.line else "somewhere in the list", found
                else:
                    yield from ((f"row {i}", row) for i, row in enumerate(found, 1))
            elif line.strip():
                yield f"line {number}", parsed(decode, line.rstrip("\r\n"))


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def parsed(decode, text):
    """The value that a text of JSON holds, or a Trouble."""
    try:
        text.encode()
        return decode(text)
    except UnicodeEncodeError as error:
        wide = text.startswith(("\udcff\udcfe", "\udcfe\udcff"))
        what = "this is UTF-16 text" if wide else "this is not UTF-8 text"
        line = text.count("\n", 0, error.start) + 1
        return Trouble(what, ": save the file as UTF-8.", line)
    except json.JSONDecodeError as error:
        if "\0" in text:
            return Trouble(*NUL, text.count("\n", 0, text.index("\0")) + 1)
        reason = f" ({error.msg}: column {error.colno})"
        return Trouble("this is not valid JSON", reason + LAYOUT, error.lineno)
    except RecursionError:
        return Trouble("brackets are nested too deeply", ": a row is one flat object.")
    except ValueError as error:  # from `no_constant`, or more digits than Python takes
        what = "a number is too long" if "digits" in str(error) else str(error)
        return Trouble(what, ": write null, or a text in quotes.")


def trouble_of(row, needs):
    """What keeps a row from being used; None if nothing does."""
    if not isinstance(row, dict):
        return Trouble("a row must be an object", ' like {"prompt": "..."}.')
    texts = "".join([*row, *(value for value in row.values() if isinstance(value, str))])
    if "\0" in texts:
        return Trouble(*NUL)
    try:
        texts.encode()
    except UnicodeEncodeError:
        return Trouble("half a character, like \\ud800", ": remove it, no tokenizer takes it.")
    for name in needs:
        if name not in row:
            near = difflib.get_close_matches(name, row, n=1)
            there = textwrap.shorten(", ".join(row), 80, placeholder=" ..") or "none"
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {there}."
            return Trouble(f"the field {name!r} is missing", hint)
        if not isinstance(row[name], str):
            return Trouble(f"the field {name!r} must be a text", ': write it as "...".')
        if not row[name].strip():
            return Trouble(f"the field {name!r} is empty", ": fill it, or remove such rows.")
    if {"chosen", "rejected"} <= needs.keys() and row["chosen"].strip() == row["rejected"].strip():
        return Trouble("chosen and rejected are equal", ": remove such rows, they teach nothing.")
    return None


def framed(prompt):
    """The course's dialogue frame, unless the prompt has one already."""
    prompt = prompt.strip()
    return prompt if prompt.endswith("Assistant:") else f"Human: {prompt} Assistant:"


def turns(prompt):
    """A prompt in the course's frame as messages for a chat template."""
    parts = re.split(r"(?:^|\s)(Human|Assistant):", prompt)
    if parts[0].strip():  # words before the first turn tell the model who it is
        parts = ["", "System", parts[0], *parts[1:]]
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    said = zip(parts[1::2], parts[2::2])
    said = [{"role": roles[who], "content": text.strip()} for who, text in said if text.strip()]
    return said or [{"role": "user", "content": ""}]


def repeated(rows):
    """How many rows are exact copies of an earlier one."""
    return len(rows) - len({json.dumps(row, sort_keys=True) for row in rows})


def check_no_overlap(train, evals, path):
    """Raises if a prompt of the evaluation, read from `path`, is also one of the training."""
    known = {row["prompt"] for row in train}
    both = [number for number, row in enumerate(evals, 1) if row["prompt"] in known]
    if both:
        raise CourseError(
            f"{path}, row {both[0]} (the first of {len(both)}): this prompt is also in the "
            "training rows: remove it from one of the two, a test on trained rows proves nothing."
        )


def with_pairs(rows):
    """The rows that hold both answers of a pair."""
    pairs = [(row.get("chosen"), row.get("rejected")) for row in rows]
    fine = [all(isinstance(text, str) and text.strip() for text in pair) for pair in pairs]
    return [row for row, keep in zip(rows, fine) if keep]
