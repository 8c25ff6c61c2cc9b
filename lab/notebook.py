"""What the cells of a notebook need: parameters in; live curves, source code and tables out."""

import ast
import inspect
import re
import time
from contextlib import contextmanager
from dataclasses import fields
from unittest import mock

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from tqdm import tqdm

from lab import CourseError, memory, report
from lab.data import repeated
from lab.runs import artifact, read_record, versions
from lab.world import judge, knows

pd.options.display.max_colwidth = None


def hello(device):
    """Says where this notebook runs; figures as pictures, no bars of other libraries."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    get_ipython().run_line_magic("matplotlib", "inline")
    print(f"Running on {device},", ", ".join(f"{k} {v}" for k, v in versions().items()))


def parameters():
    """Names and values of the parameters cell, and of what papermill put behind it.

    Both kinds of cell begin with "# Parameters". The names are read from their text, so that a
    misspelt one is noticed; the values come from the kernel.
    """
    space = get_ipython().user_ns
    cells = [cell for cell in space["In"] if cell.startswith("# Parameters")]
    own = max((i for i, cell in enumerate(cells) if cell.startswith("# Parameters:")), default=0)
    lines = [line for cell in cells[own:] for line in ast.parse(cell).body]
    names = [line.targets[0].id for line in lines if isinstance(line, ast.Assign)]
    return {name: space[name] for name in names}


def forget(*names):
    """Drops what the cells above made by hand, so that its memory is free for what comes next."""
    for name in names:
        get_ipython().user_ns.pop(name, None)
    memory.give_back()


def explain(cfg, stage):
    """The parameters that a stage reads, folded away: value and meaning."""
    rows = [
        {"parameter": f.name, "value": getattr(cfg, f.name), "meaning": f.metadata["meaning"]}
        for f in fields(cfg)
        if {stage, "all"} & set(f.metadata["stages"])
    ]
    summary = f"<summary>All {len(rows)} parameters of this notebook (click)</summary>"
    display(HTML(f"<details>{summary}{as_html(pd.DataFrame(rows))}</details>"))


def source(function):
    """The source of a function as it stands in util.py now."""
    mono = "font-family:monospace;font-size:13px;line-height:1.4;margin:0"
    style = HtmlFormatter(noclasses=True, prestyles=mono)
    display(HTML(highlight(inspect.getsource(function), PythonLexer(), style)))


def show(table):
    """A table without row numbers; what a model wrote is escaped."""
    display(HTML(as_html(pd.DataFrame(table))))


def as_html(table):
    text = table.to_html(index=False, escape=True, border=0, float_format="{:.3g}".format)
    return re.sub(r"<(t[dh])( style=\"[^\"]*\")?>", r'<\1 style="text-align:left">', text)


def watch(steps, panels, what):
    """Drains a training generator under a progress line and live curves; returns the metrics.

    The display is redrawn rarely enough to cost a twentieth of the time, and a headless run keeps
    the last state only.
    """
    history, started, due, handles = [], time.perf_counter(), 0.0, None
    for metrics in steps:
        history.append(metrics)
        now = time.perf_counter()
        if now >= due:
            handles = redraw(handles, history, panels, what, now - started)
            due = time.perf_counter() + max(2.0, 20 * (time.perf_counter() - now))
    redraw(handles, history, panels, what, time.perf_counter() - started)
    memory.give_back()  # the notebook stays open, its models are saved
    return pd.DataFrame(history)


def redraw(handles, history, panels, what, elapsed):
    last = history[-1]
    total = last.get("steps", last["step"])
    line = {"text/plain": f"{what}: {tqdm.format_meter(last['step'], total, elapsed, ncols=80)}"}
    figure = report.curves(pd.DataFrame(history), panels)
    if handles is None:
        return display(line, raw=True, display_id=True), display(figure, display_id=True)
    handles[0].update(line, raw=True)
    handles[1].update(figure)
    return handles


def first_of_kind(rows, kind):
    """The first row of a kind; the very first where there is none."""
    return next((row for row in rows if row.get("kind") == kind), rows[0])


def examples(rows):
    """The first row of each kind."""
    table = pd.DataFrame(rows)
    fields = ["kind", "prompt", "chosen", "rejected", "response"]
    table = table.assign(kind=table.get("kind", "all")).groupby("kind").head(1)
    return table.sort_values("kind")[[name for name in fields if name in table]]


def composition(train, evals):
    """What the data is made of, as far as its judge can tell."""
    table = {}
    for name, rows in (("train", train), ("eval", evals)):
        judged = [row for row in rows[:2000] if knows(row)]
        column = {"rows": len(rows), "copies of another row": repeated(rows)}
        column["words of a prompt (median)"] = median_words(rows)
        kinds = pd.Series([row.get("kind", "all") for row in rows]).value_counts(normalize=True)
        column |= {f"share of {kind}": f"{share:.0%}" for kind, share in sorted(kinds.items())}
        if judged:
            bad = [judge(row, row["response"]) < 0.99 for row in judged]
            swapped = [judge(row, row["rejected"]) > judge(row, row["chosen"]) for row in judged]
            column["bad answers of the crowd"] = f"{sum(bad) / len(judged):.0%}"
            column["pairs with the wrong label"] = f"{sum(swapped) / len(judged):.0%}"
        table[name] = column
    return pd.DataFrame(table).rename_axis("what").reset_index()


def median_words(rows):
    return int(pd.Series([len(row["prompt"].split()) for row in rows]).median())


def files(root, stage):
    """What a stage has written."""
    record = read_record(root, stage)
    table = [{"file": f"model/{stage}/{name}", "bytes": n} for name, n in record["files"].items()]
    show(pd.DataFrame(table))
    print(f"{record['seconds']:.0f} s, {record['peak_memory_mb']} MB at most")
    history = artifact(root, stage) / "metrics.jsonl"
    spent = pd.read_json(history, lines=True) if history.exists() else pd.DataFrame()
    told = [f"{name[8:]} {spent[name].sum():.1f} s" for name in spent if "seconds_" in name]
    speeds = [name for name in spent if name.endswith("_per_second")]
    told += [f"{spent[name].median():,.0f} {name.replace('_', ' ')}" for name in speeds]
    if told:  # a copied model has neither, nor has the report
        print(f"{len(spent)} steps: {', '.join(told)}")


def samples(root):
    """What the policy said on its way, from samples.jsonl."""
    table = pd.read_json(artifact(root, "rlhf") / "samples.jsonl", lines=True)
    if "kl" in table:  # rounding alone is not worth reading, nor is -0
        table["kl"] = table["kl"].round(3) + 0.0
    return table


@contextmanager
def break_it(module, **broken):
    """Replaces functions of a module inside the block, and prints the check that notices it."""
    try:
        with mock.patch.multiple(module, **broken):
            yield
    except (AssertionError, CourseError) as error:
        print(f"Caught: {error}")
    else:
        print("Not noticed with this model and these rows.")


def values(root):
    """Tokens of one answer, and {when: values along it} before and after training: the answer of
    values.jsonl whose values changed most. None where no value model was trained."""
    path = artifact(root, "rlhf") / "values.jsonl"
    if not path.exists():
        return None
    table = pd.read_json(path, lines=True)
    first, last = (table[table["step"] == step] for step in (0, table["step"].max()))
    lines = list(zip(first["tokens"], first["values"], last["values"]))
    moved = [sum(abs(a - b) for a, b in zip(old, new)) / len(old) for _, old, new in lines]
    tokens, old, new = lines[moved.index(max(moved))]
    return tokens, {"before training": old, "after training": new}
