"""Reads data of any format: files, folders, data sets of the hub and functions in, rows out."""

import difflib
import gzip
import importlib.util
import json
import random
import re
import textwrap
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lab import CourseError
from lab.formats import SOURCES, Problem, as_row, framed
from lab.hub import reason_of

LAYOUT = ": write one JSON object per line, or one JSON list of objects."
NUL = "the text contains NUL characters", ": remove them, or save the file as UTF-8."


# ------------------------------------------------------------------------------------------------
# Sources


# A source has the part "train" and perhaps the part "eval". A part is a list of files, or a
# function without arguments that returns the records.
EVALS = ("eval", "test", "validation", "valid", "dev")  # names of parts for evaluation
SPLIT = re.compile(rf"(?<![a-z])(train|{'|'.join(EVALS)})(?![a-z])")
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
TEXTS = (".json", ".jsonl", ".txt")
INSIDE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def parts_of(text, root=".", seed=0):
    """Returns {"train": a part, "eval": perhaps a part} of a source.

    A source is a file, a folder, a name in lab/formats.py or a name on the hub, perhaps with
    ":split" behind it. Paths start at `root`, or else at the current folder.
    """
    known = SOURCES.get(text, text)
    parted = re.fullmatch(r"(.+?):([\w.-]+(?:\[.*\])?)", known)  # the split may be train[:1000]
    name, split = parted.groups() if parted else (known, "")
    for path, part in ((known, ""), (name, split)):
        for place in (Path(root) / path, Path(path).expanduser()):
            if path and place.is_dir():
                return folder_parts(place, part)
            if path and place.exists():
                return {"train": [place]}
    if split and re.fullmatch(r"[\w.]+", name) and is_module(name):
        return function_parts(name, split, seed)
    if known[0] in "./~\\" or known.lower().removesuffix(".gz").endswith((*TABLES, *TEXTS)):
        raise CourseError(f"{text} does not exist: name a file, a folder or a data set on the hub.")
    return hub_parts(text, name, split)


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a package before a dot does not exist
        return False


def function_parts(module, function, seed):
    from lab.rewards import named

    rows = named("data", f"{module}.{function}", {})
    return {part: lambda part=part: rows(part, seed) for part in ("train", "eval")}


def folder_parts(folder, split):
    """The parts of a folder: a saved data set, or data files whose names may say train or test."""
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        import datasets

        return set_parts(datasets.load_from_disk(str(folder)), folder, split)
    found = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        wanted = path.name.removesuffix(".gz").endswith((*TABLES, *TEXTS))
        if wanted and path.name not in INSIDE and not any(p[0] == "." for p in inner.parts):
            part = SPLIT.search(inner.as_posix().lower())
            found.setdefault(part[1] if part else "", []).append(path)
    if not found:
        raise CourseError(f"{folder} contains no data files: JSON, CSV, TSV, Parquet or Arrow.")
    if found.keys() == {""} and not split:
        return {"train": found[""]}
    if not split and "train" not in found:
        return {"train": sum(found.values(), [])}
    train, evals = pick(found, split, folder)
    return {"train": found[train]} | ({"eval": found[evals]} if evals else {})


@lru_cache(maxsize=4)
def hub_parts(text, name, split):
    """The parts of a data set on the hub, named owner/name or owner/name/config."""
    import datasets

    owner, _, rest = name.partition("/")
    short, _, config = rest.partition("/")
    path = f"{owner}/{short}" if short else owner
    datasets.disable_progress_bars()
    try:
        sets = datasets.load_dataset(path, config or None)
        if "[" in split:  # a slice like train[:1000]
            sets[split] = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the hub, its cache and its file formats raise many types
        raise CourseError(
            f"{text} is no file or folder here, and no data set loads from the hub under this name "
            f"({reason_of(error)})."
        ) from None
    return set_parts(sets, text, split)


def set_parts(sets, name, split):
    """The parts of a data set that is loaded, or of a dict of them."""
    sets = sets if isinstance(sets, dict) else {"train": sets}
    train, evals = pick(sets, split, name)
    parts = {"train": train} | ({"eval": evals} if evals else {})
    return {part: lambda chosen=chosen: sets[chosen] for part, chosen in parts.items()}


def pick(found, split, name):
    """Returns the names of the split for training and of the one for evaluation, or None."""
    if split and split not in found:
        known = ", ".join(filter(None, found))
        raise CourseError(
            f"{name} has no split {split!r}; it has: {known or 'one without a name'}."
        )
    train = split or next((one for one in found if one.startswith("train")), next(iter(found)))
    stem = re.match(r"\w*", train)[0]
    others = [stem.replace("train", word, 1) for word in EVALS] if "train" in stem else []
    return train, next((one for one in others if one in found), None)


# ------------------------------------------------------------------------------------------------
# Files


@contextmanager
def reading(path):
    """Turns errors of opening or reading a file into a CourseError."""
    try:
        yield
    except FileNotFoundError:
        message = f"{path} does not exist: run `python -m lab world` to write the embedded data."
        raise CourseError(message) from None
    except (OSError, EOFError) as error:  # EOFError: a .gz file that is cut off
        why = getattr(error, "strerror", None) or str(error)
        message = f"{path} cannot be read ({why}): it must be a file that you may read."
        raise CourseError(message) from None


def entries(path):
    """Yields (place, record) for every record of a file, with a Problem for each unreadable one."""
    kind = path.name.removesuffix(".gz").lower()
    if kind.endswith(TABLES):
        return ((f"row {i}", record) for i, record in enumerate(table_records(path, kind), 1))
    return paragraphs(path) if kind.endswith(".txt") else json_entries(path)


def text_file(path):
    """Opens a text file. Bytes that are not UTF-8 are kept, so that an error can say where."""
    opened = gzip.open if path.name.endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8", errors="surrogateescape")


def table_records(path, kind):
    """Returns the records of a table; an empty cell of a CSV file is a field that is not there."""
    if not path.is_file():
        open(path).close()  # raises the error that says why
    try:
        if kind.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if kind.endswith(".arrow"):
            import datasets

            return datasets.Dataset.from_file(str(path)).to_list()
        import pandas as pd

        with text_file(path) as file:
            head = file.readline()
        mark = max("\t,;" if kind.endswith(".tsv") else ",;\t", key=head.count)
        how = dict(dtype=str, keep_default_na=False, encoding="utf-8-sig", sep=mark)
        cells = pd.read_csv(path, **how).to_dict("records")
        return [{name: text or None for name, text in row.items()} for row in cells]
    except OSError:
        raise
    except Exception as error:  # pandas and pyarrow raise many types
        hint = ": save the file as UTF-8." if isinstance(error, UnicodeDecodeError) else "."
        raise CourseError(f"{path} cannot be read ({reason_of(error)}){hint}") from None


def paragraphs(path):
    """Yields every paragraph of a plain text as a record with the field `text`."""
    with text_file(path) as file:
        whole = file.read().lstrip("\ufeff")
    for i, part in enumerate(re.split(r"\n\s*\n", whole), 1):
        if part.strip():
            yield f"paragraph {i}", {"text": part.strip()}


def json_entries(path):
    """Yields (place, record) of a file that holds JSON lines or one JSON list."""
    decode, layout = json.JSONDecoder(parse_constant=no_constant).decode, ""
    # surrogateescape keeps bytes that are not UTF-8, so that `parsed` can report their line.
    with text_file(path) as file:
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


# ------------------------------------------------------------------------------------------------
# Rows


class Table(NamedTuple):
    """The rows of a part of a source, and what was left out."""

    name: str
    rows: list  # dicts in the course's shape, each with a prompt in its frame
    places: list  # where each row was found, like "line 7"
    shapes: Counter  # how many records had which shape
    dropped: list  # (place, Problem) of each record that cannot be used

    @property
    def count(self):
        """How many records the source has, also those that were left out."""
        return self.shapes.total() + len(self.dropped)

    def without(self, prompts):
        """Returns the table without the rows of some prompts."""
        kept = [i for i, row in enumerate(self.rows) if row["prompt"] not in prompts]
        rows, places = ([column[i] for i in kept] for column in (self.rows, self.places))
        return self._replace(rows=rows, places=places)

    def fitting(self, rows, needs, say=None):
        """Returns whether each row has all fields in `needs`, as texts that are not empty.

        `rows` are the table's rows, perhaps with more fields. Raises if too few rows fit.
        """
        found = [problem_of(row, needs) for row in rows]
        problems = [(place, problem) for place, problem in zip(self.places, found) if problem]
        sort_out(self.name, len(rows), problems, say)
        return [problem is None for problem in found]


def read_table(part, name, reader=None, most=0, seed=0):
    """Returns the Table of a part of a source: all records, or a random sample of `most`."""
    if callable(part):
        records = part()
        chosen = sample(len(records), most, seed)
        if hasattr(records, "select"):  # a data set of the hub's library
            records = records.select(chosen).to_list()
        else:
            records = [records[i] for i in chosen]
        return recognised(name, [(f"row {i + 1}", row) for i, row in zip(chosen, records)])
    found = []
    for path in part:
        where = "" if len(part) == 1 else f"{path.name}, "
        with reading(path):
            rows = enumerate(reader(path), 1) if reader else ()
            rows = ((f"row {i}", row) for i, row in rows) if reader else entries(path)
            found += [(where + place, row) for place, row in rows]
    name = str(part[0]) if len(part) == 1 else name
    return recognised(name, [found[i] for i in sample(len(found), most, seed)])


def sample(count, most, seed):
    """Returns the indices of `most` of `count` records in their order; 0 means all."""
    if not 0 < most < count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), most))


def recognised(name, found):
    """Returns the Table of (place, record) pairs; raises if most of them cannot be used."""
    table = Table(name, [], [], Counter(), [])
    damaged = [(place, record) for place, record in found if isinstance(record, Problem)]
    if damaged:
        raise CourseError(first_of(name, damaged))
    for place, record in found:
        shape, row = as_row(record)
        if isinstance(row, dict):  # null means that a field is not there
            row = {field: value for field, value in row.items() if value is not None}
        problem = row if isinstance(row, Problem) else problem_of(row, ("prompt",))
        if problem:
            table.dropped.append((place, problem._replace(absent=False)))
        else:
            table.shapes[shape] += 1
            table.rows.append(row | {"prompt": framed(row["prompt"])})
            table.places.append(place)
    if not found:
        raise CourseError(f"{name} contains no rows{LAYOUT}")
    sort_out(name, len(found), table.dropped)
    return table


def sort_out(name, count, problems, say=None):
    """Says how many of `count` rows are left out and why; raises if no row is left.

    It also raises if more than half of the rows have a defect. A field that is not there is none:
    the row may serve another stage.
    """
    defects = [pair for pair in problems if not pair[1].absent]
    if len(problems) == count:
        raise CourseError(first_of(name, problems))
    if 2 * len(defects) > count - len(problems) + len(defects):
        raise CourseError(first_of(name, defects))
    if problems and say:
        counts = Counter(problem.what for _, problem in problems)
        first = {problem.what: place for place, problem in reversed(problems)}
        why = "; ".join(f"{n}: {what} (first: {first[what]})" for what, n in counts.items())
        say(f"{len(problems)} of {count} rows of {name} are left out. {why}.")


def first_of(name, problems):
    """Returns the sentence about the first problem, and how many rows have the same one."""
    place, problem = problems[0]
    same = sum(other.what == problem.what for _, other in problems)
    first = f" (the first of {same})" if same > 1 else ""
    return f"{name}, {place}{first}: {problem.what}{problem.remedy}"


def read_rows(path, needs=("prompt",), reader=None, say=None):
    """Returns the rows of a file as dicts. Every field in `needs` is a text that is not empty.

    `reader(path)` reads the file if you give one. Prompts get the dialogue frame
    "Human: ... Assistant:" if they lack it. `say` is told which rows are left out.
    """
    table = read_table([Path(path)], str(path), reader)
    sort_out(table.name, table.count, table.dropped, say)
    fit = table.fitting(table.rows, dict.fromkeys(("prompt", *needs)), say)
    return [row for row, fits in zip(table.rows, fit) if fits]


def problem_of(row, needs):
    """Returns the Problem of a row; None if the row can be used."""
    if not isinstance(row, dict):
        return Problem("a row must be an object", ' like {"prompt": "..."}.')
    texts = "".join([*map(str, row), *(value for value in row.values() if isinstance(value, str))])
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
            return Problem(f"the field {name!r} is missing", hint, absent=True)
        if not isinstance(row[name], str):
            what = f"the field {name!r} must be a text"
            return Problem(what, ': write it as "...".')
        if not row[name].strip():
            return Problem(f"the field {name!r} is empty", ": fill it in, or remove such rows.")
    if {"chosen", "rejected"} <= {*needs} and row["chosen"].strip() == row["rejected"].strip():
        return Problem("chosen and rejected are equal", ": remove such rows; they teach nothing.")
    return None


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


def write_rows(folder, **parts):
    """Writes parts of rows, for example train and eval, as JSON lines; returns the paths."""
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(lines, encoding="utf-8")
    return paths
