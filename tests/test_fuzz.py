"""Feeds random files to the reader and random answers to the judge: neither may crash.

Each input must give a result or a clear error. `FUZZ=100000 python -m pytest tests/test_fuzz.py -s`
tries that many inputs on each. A failure names the index of its input; `reader_input(index)` and
`judge_input(index)` make the same input again.
"""

import json
import os
import random
import re
import sqlite3
import time
from collections import Counter

from lab import CourseError, world
from lab.data import read_rows
from lab.memory import peak_of_process

FUZZ = int(os.environ.get("FUZZ", 1_500))
SECONDS = 3  # the limit for one input on any machine; most need less than a thousandth of it
FIELDS = ("prompt", "response", "chosen", "rejected")
ALPHABETS = (
    "abc xyz.,?!",
    " \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\ufeff",
    "äß東京🙂\u0301\u202e²٣ſİ",
    "\0\x01\x1b\x7f\ud800\udfff\udcff\ufffe\U0010ffff",
    "{}[]\",:'\\/0123456789eE+-.",
)


def some(rng, words):
    return words[rng.randrange(len(words))]


def noise(rng, most=12):
    alphabet = some(rng, (*ALPHABETS[:3], "".join(ALPHABETS)))
    return "".join(some(rng, alphabet) for _ in range(rng.randint(0, most)))


# ------------------------------------------------------------------------------------------ reader

TOKENS = (
    *("NaN -Infinity Infinity 1e999 -0 01 null true [] {} }{ ][ ,, // ' \" \\ \\u0000".split()),
    *("\\ud800 \\udc00\\ud800 \\u00 \\x41 prompt chosen rejected".split()),
    *("\ufeff", "\0", "\r", "\n", "\u2028", '[{"prompt": "x"}]', "\ud800"),
    *("1" * 5_000, "-" + "9" * 4_301, "[" * 3_000, '{"a":' * 3_000),
)
NAMES = (*FIELDS, "promt", "Prompt", "anwser", "chosn", "rejectd", "respones", "", "\ud800")
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252")


def a_value(rng, depth=0):
    if depth < 3 and rng.random() < 0.3:
        return [a_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and rng.random() < 0.3:
        return {noise(rng, 4): a_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return some(rng, (None, True, 0, -1.5, 10**30, float("nan"), float("inf"), noise(rng)))


def a_row(rng):
    """Usually a good row, otherwise one with a changed, missing, misnamed or extra field."""
    row = {name: f"{name} {rng.randint(0, 10**6)}" for name in FIELDS}
    if rng.random() < 0.2:
        row["prompt"] = some(rng, ("Human: hi Assistant:", "Assistant:", " hi ", "Human:"))
    if rng.random() < 0.1:
        row[some(rng, FIELDS)] = some(rng, (noise(rng), a_value(rng), " ", row["chosen"]))
    if rng.random() < 0.05:
        row[some(rng, NAMES)] = row.pop(some(rng, FIELDS))
    if rng.random() < 0.05:
        row[noise(rng)] = a_value(rng)
    return row


def mutated(rng, data):
    """The bytes with a random change: cut, flipped, doubled, overwritten or with odd text."""
    at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
    strange = some(rng, (*TOKENS, noise(rng))).encode("utf-8", "surrogatepass")
    return some(
        rng,
        (
            data[:to],
            data[:at] + data[to:],
            data[:to] + data[at:],
            data[:at] + strange + data[at:],
            data[:at] + strange + data[to:],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:],
            data[at:] + data[:at],
        ),
    )


def reader_input(index):
    """(bytes of a file, fields that the reader must find in it)."""
    rng = random.Random(f"reader {index}")
    needs = some(rng, (FIELDS[:1], FIELDS[:2], (*FIELDS[:1], *FIELDS[2:]), FIELDS))
    if rng.random() < 0.03:
        return rng.randbytes(rng.randint(0, 60)), needs
    rows = [a_row(rng) for _ in range(some(rng, (0, *range(1, 6), *range(1, 6))))]
    ascii_only, end = (
        rng.random() < 0.5,
        some(rng, ("\n", "\n", "\r\n", "\r", "\n\n \n", noise(rng))),
    )
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if rng.random() < 0.3:  # two fields twice
        texts = [re.sub(r"^{", '{"prompt": 0, "chosen": "", ', text) for text in texts]
    lines, many = end.join(texts), f"[{end}{(',' + end).join(texts)}{end}]"
    whole = json.dumps(rows, ensure_ascii=ascii_only, indent=1).replace(
        "\n", some(rng, ("\n", end))
    )
    data = some(rng, (lines, lines, many, whole)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = data.decode("utf-8", "replace")
        data = text.encode(some(rng, ENCODINGS), "replace")
    for _ in range(some(rng, (0, 0, 0, 0, 1, 1, 2, 4))):
        data = mutated(rng, data)
    return data, needs


def read_one(path, needs):
    """Reads a file and checks the outcome; returns "read" or the kind of the error."""
    try:
        rows = read_rows(path, needs)
    except CourseError as error:
        message = str(error)
        assert message.startswith(str(path)) and len(message) < len(str(path)) + 400
        assert len(message.splitlines()) == 1 and message.encode()
        what = re.sub(r"^(, [\w ]+(\(the first of \d+\))?: )?", "", message.removeprefix(str(path)))
        return re.split(r"[:;(,]", what)[0].strip()
    assert rows
    for row in rows:
        assert all(type(row[name]) is str and row[name].strip() for name in needs)
        assert all(row[name].encode() and "\0" not in row[name] for name in needs)
        assert row["prompt"].endswith("Assistant:")
    return "read"


def test_any_file_is_read_or_refused_with_its_name(tmp_path):
    path, tally, worst, before = tmp_path / "rows.json", Counter(), (0, 0), peak_of_process()
    for index in range(FUZZ):
        data, needs = reader_input(index)
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            tally[read_one(path, needs)] += 1
        except Exception as error:
            raise AssertionError(f"input {index}: {data[:300]!r}") from error
        worst = max(worst, (time.perf_counter() - start, index))
    print(f"\nreader: {FUZZ} inputs, worst {worst[0]:.3f} s (input {worst[1]}), {dict(tally)}")
    assert worst[0] < SECONDS, f"input {worst[1]}"
    assert peak_of_process() - before < 100
    assert 0.1 < tally["read"] / FUZZ < 0.9 and len(tally) > 12, "the inputs are too much alike"


# ------------------------------------------------------------------------------------------- judge

WORDS = """
    SELECT select FROM WHERE AND OR NOT NULL * , ( ) ; . = < > <> || + - / % ~ << '' "" ? :a @a
    AS DISTINCT ORDER BY GROUP BY HAVING LIMIT OFFSET UNION ALL EXCEPT INTERSECT JOIN LEFT CROSS
    NATURAL USING ON IN EXISTS BETWEEN LIKE GLOB MATCH REGEXP ESCAPE IS CASE WHEN THEN ELSE END
    CAST COLLATE OVER PARTITION ROWS WITH RECURSIVE VALUES EXPLAIN ATTACH PRAGMA VACUUM INTO
    DROP CREATE INSERT UPDATE DELETE TABLE BEGIN COMMIT sqlite_master rowid count(*) sum avg min
    max total abs round lower upper like glob hex zeroblob randomblob printf replace
    group_concat writefile readfile load_extension json_each generate_series pragma_table_list 0
    1 -1 9223372036854775808 1e999 x'ff' 0xffffffff 'rome' '%a%a%a' -- /* */ \0 \ud800 help know
    you feel column not
""".split()
FARMS = {"table": "farms", "columns": ["age", "city", "price", "owner"], "query": "SELECT 1;"}
PIECES = (
    "; DROP TABLE {table}; --",
    "ATTACH DATABASE 'stolen.db' AS s;",
    "VACUUM INTO 'stolen.db';",
    "PRAGMA journal_mode = DELETE;",
    "INSERT INTO {table} SELECT * FROM {table};",
    "UNION ALL SELECT name FROM sqlite_master",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "SELECT writefile('stolen', 'x'), load_extension('x'), readfile('stolen')",
    "SELECT x||x||x||x AS x FROM (SELECT x||x||x||x AS x FROM (SELECT 'a' AS x))",
    "SELECT 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' LIKE '%a%a%a%a%a%a%a%a%a%a%a%a%b'",
    "SELECT * FROM {table} a, {table} b, {table} c, {table} d, {table} e, {table} f",
    "CAST(x'ff' AS TEXT)",
    "I do not know what you feel. I will not help you. The table {table} has no age column.",
)


def an_expression(rng, columns, table, depth):
    if depth <= 0 or rng.random() < 0.3:
        odd = "1", "-7", "2.5", "'rome'", "x'ff'", "NULL", "9e999", "COUNT(*)", noise(rng)
        return some(rng, (*columns * 3, *odd))
    a, b, c = (an_expression(rng, columns, table, depth - 1) for _ in "abc")
    f, op = some(rng, sorted(world.FUNCTIONS)), some(rng, "+ - * / % || = < <> AND OR LIKE".split())
    ways = f"{f}({a})", f"({a} {op} {b})", f"CAST({a} AS TEXT)", f"{a} BETWEEN {b} AND {c}"
    ways += f"CASE WHEN {a} THEN {b} ELSE {c} END", f"NOT {a}", f"min({a}, {b})"
    if rng.random() < 0.2:
        query = a_query(rng, columns, table, depth - 1)
        ways = f"({query})", f"{a} IN ({query})"
    return some(rng, ways)


def a_query(rng, columns, table, depth=3):
    """A random query, most of which SQLite can parse."""
    depths = 0, 0, 0, 1, 1, depth
    a, b, c = (an_expression(rng, columns, table, some(rng, depths)) for _ in "abc")
    source = some(rng, [table] * 8 + [f"{table} a, {table} b", f"{table} a NATURAL JOIN {table} b"])
    if depth > 1 and rng.random() < 0.2:
        source = f"(SELECT * FROM ({a_query(rng, columns, table, depth - 1)}), {source})"
    tails = "", f" WHERE {b}", f" GROUP BY {b}", f" ORDER BY {c} DESC", f" LIMIT {c}"
    return f"SELECT {some(rng, (a, f'{a}, {b}', f'DISTINCT {a}'))} FROM {source}{some(rng, tails)}"


def changed(rng, text, columns, table):
    """The text with a random change: a span replaced, doubled, removed, wrapped, or text added."""
    parts = re.findall(r"\w+|\W", text) or [""]
    at, to = sorted(rng.randint(0, len(parts)) for _ in range(2))
    head, span, tail = ("".join(part) for part in (parts[:at], parts[at:to], parts[to:]))
    new = some(rng, (some(rng, WORDS), some(rng, PIECES), some(rng, columns), noise(rng)))
    new = new.replace("{table}", table)
    ways = f"{head}{new}{tail}", f"{head} {new} {span}{tail}", head + tail, head + span * 2 + tail
    ways += f"SELECT {new} FROM ({text})", f"{head}({span}){tail}", f"{text} {new}", text.upper()
    return some(rng, ways)


def judge_input(index):
    """(row with the truth, answer to judge, whether the answer ended)."""
    rng = random.Random(f"judge {index}")
    kind = some(rng, (*world.KINDS, *["sql"] * 4))
    item = world.draw(rng, kind, "train", missing=0.1)
    columns, table = (item.truth.get(name, FARMS[name]) for name in ("columns", "table"))
    text = some(rng, (*item.good[:2], *item.bad[:2], some(rng, PIECES), noise(rng, 60)))
    if kind == "sql" and rng.random() < 0.7:
        text = a_query(rng, columns, table)
    for _ in range(some(rng, (0, 0, 0, 0, 1, 1, 2, 6))):
        text = changed(rng, text, columns, table)
    if rng.random() < 0.03:
        text = some(rng, (text * 40, "SELECT " + "(" * 200 + text, text * 5_000, text[:2] * 10**6))
    return {"kind": kind, "truth": item.truth}, text, rng.random() < 0.95


def judge_one(row, answer, ended):
    """Checks the result of SQLite and the score of the judge; returns (kind of result, score)."""
    truth = row["truth"] if row["kind"] == "sql" else FARMS
    rows = next(iter(world.random_tables({"query": "", **truth})))
    result = world.run_sql(truth, rows, answer)
    assert result is None or (type(result) is list and len(result) <= 1_000)
    worth = world.judge(row, answer, ended)
    assert type(worth) is float and 0 <= worth <= 1
    return "none" if result is None else "rows", worth


def test_any_answer_is_judged_and_leaves_nothing_behind(tmp_path, monkeypatch):
    class Counted(sqlite3.Connection):
        def close(self):
            closed.append(super().close())

    closed, opened, connect = [], [], sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path: opened.append(path) or connect(path, factory=Counted)
    )
    monkeypatch.chdir(tmp_path)
    tally, worst, before = Counter(), (0, 0), peak_of_process()
    for index in range(FUZZ):
        row, answer, ended = judge_input(index)
        start = time.perf_counter()
        try:
            result, worth = judge_one(row, answer, ended)
        except Exception as error:
            raise AssertionError(f"input {index}: {answer[:300]!r}") from error
        tally[result] += 1
        tally[f"worth {worth:.2g}"] += 1
        worst = max(worst, (time.perf_counter() - start, index))
    print(f"\njudge: {FUZZ} inputs, worst {worst[0]:.3f} s (input {worst[1]}), {dict(tally)}")
    assert worst[0] < SECONDS, f"input {worst[1]}"
    assert len(opened) == len(closed) > FUZZ and set(opened) == {":memory:"}
    assert not list(tmp_path.iterdir())
    assert peak_of_process() - before < 100
    assert 0.1 < tally["rows"] / FUZZ < 0.9 and tally["worth 1"], "the inputs are too much alike"
