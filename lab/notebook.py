"""What the cells of a notebook need: parameters in; live curves, source code and tables out."""

import ast
import base64
import inspect
import json
import re
import time
from contextlib import contextmanager
from dataclasses import fields
from html import escape, unescape
from unittest import mock

import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES, Token
from tqdm import tqdm

from lab import CourseError, memory, models, report
from lab.data import repeated
from lab.runs import artifact, read_record, versions
from lab.world import judge, knows

pd.options.display.max_colwidth = None


def hello(cfg):
    """Says where and in which precision this notebook runs. Figures are pictures, and other
    libraries show no progress bars.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    get_ipython().run_line_magic("matplotlib", "inline")
    words = get_ipython().display_formatter.formatters["text/plain"]
    words.for_type(Figure, lambda figure, p, _: p.text(figure.get_label() or repr(figure)))
    half = {"bf16": "products in bf16", "fp16": "products in fp16, with loss scaling"}
    parts = [str(models.pick_device(cfg)), half.get(models.precision(cfg))]
    parts += [f"{name} {version}" for name, version in versions().items()]
    print("Running on", ", ".join(filter(None, parts)))


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
    fold(f"All {len(rows)} parameters of this notebook (click)", pd.DataFrame(rows))


def fold(title, table):
    """A table that shows only its title until you click on it."""
    summary = f"<summary>{escape(title)}</summary>"
    bundle(
        title + "\n" + as_text(table),
        **{
            "text/html": f"<details>{summary}{report.table_html(table)}</details>",
            "text/markdown": f"<details>{summary}\n\n{as_markdown(table)}\n\n</details>",
        },
    )


def source(*functions):
    """The source of functions or classes as it stands in util.py now, in colours.

    Hosts that drop HTML get a markdown code block, and others the plain text.
    """
    code = "\n\n".join(inspect.getsource(function).rstrip() for function in functions)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    bundle(
        code,
        **{"text/html": coloured(code), "text/markdown": f"{fence}python\n{code}\n{fence}"},
    )


SHADES = {  # token: Jupyter's name of the colour, and a colour for light and dark pages elsewhere
    Token.Comment: ("comment", "#7C7C7C"),
    Token.Keyword: ("keyword", "#2F8F46"),
    Token.Literal.String: ("string", "#C4602F"),
    Token.Literal.Number: ("number", "#3B82C4"),
    Token.Name.Function: ("def", "#3B82C4"),
    Token.Name.Class: ("def", "#3B82C4"),
    Token.Name.Builtin: ("builtin", "#2F8F46"),
}


def coloured(code):
    """Python code as HTML: the colours follow Jupyter's theme, and long lines scroll.

    Each token also has its class of Pygments, for hosts that drop styles and keep classes.
    """
    spans = []
    for kind, words in PythonLexer().get_tokens(code):
        shade = next((SHADES[part] for part in reversed(kind.split()) if part in SHADES), None)
        text = escape(words, quote=False)
        if shade:
            color = f"var(--jp-mirror-editor-{shade[0]}-color, {shade[1]})"
            text = f'<span class="{STANDARD_TYPES[kind]}" style="color:{color}">{text}</span>'
        spans.append(text)
    mono = "var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace)"
    style = (
        f"font-family:{mono};font-size:13px;line-height:1.4;margin:0;overflow-x:auto;"
        "white-space:pre;word-break:normal"
    )
    code = "".join(spans)
    return f'<div class="highlight"><pre style="{style}"><code>{code}</code></pre></div>'


def show(table):
    """A table without row numbers; what a model wrote is escaped."""
    html = report.table_html(table)
    bundle(as_text(table), **{"text/html": html, "text/markdown": as_markdown(table)})


def draw(svg):
    """A drawing of lab/drawing.py; its title and description are there as text.

    The HTML form is an image, because Jupyter shows bare SVG only after you have run the cell.
    """
    told = "\n".join(re.findall(r"<(?:title|desc)>(.*?)</(?:title|desc)>", svg, re.DOTALL))
    width = re.search(r'width="(\d+)"', svg)[1]
    code = base64.b64encode(svg.encode()).decode()
    image = f'<img src="data:image/svg+xml;base64,{code}" alt="{told}" width="{width}">'
    bundle(unescape(told), **{"text/html": image, "image/svg+xml": svg})


def bundle(text, **forms):
    """Shows the same thing in several forms; the host picks the first one that it can show."""
    display(forms | {"text/plain": text}, raw=True)


def as_text(table):
    return report.frame(table).map(report.cell).to_string(index=False)


def as_markdown(table):
    """A markdown table, for code hosts that drop HTML. What a model wrote stays text."""
    table = report.frame(table).map(report.cell)
    rows = [list(table), *table.values.tolist()]
    lines = [" | ".join(map(markdown_text, row)) for row in rows]
    lines.insert(1, " | ".join([":---"] * table.shape[1]))
    return "\n".join(f"| {line} |" for line in lines)


def markdown_text(value):
    """Text that markdown shows as it is, in one line."""
    text = re.sub(r"([\\`*_\[\]|$~])", r"\\\1", " ".join(str(value).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


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


def examples(rows, most=1000):
    """Rows that show what the data is like, as a table: of each kind one row whose response the
    judge finds right and one whose response it finds wrong, both with the right label; without a
    judge the first row of the kind. It takes the first that it finds in the first `most` rows.
    """
    found = {}
    for row in rows[:most]:
        kind, score = row.get("kind", "all"), None
        if "response" in row and knows(row):
            score = judge(row, row["response"])
        row = row | {"kind": kind, "judge's score": score}
        of_kind = found.setdefault(kind, {"first": row})
        verdict = None if score is None else {1.0: "right", 0.0: "wrong"}.get(round(score, 2))
        if verdict and verdict not in of_kind and not mislabelled(row):
            of_kind[verdict] = row
    shown = []
    for _, of_kind in sorted(found.items()):
        judged = [of_kind[verdict] for verdict in ("right", "wrong") if verdict in of_kind]
        shown += judged or [of_kind["first"]]
    table = pd.DataFrame(shown)
    names = ["kind", "prompt", "chosen", "rejected", "response", "judge's score"]
    return table[[name for name in names if name in table and table[name].notna().any()]]


def mislabelled(row):
    """Whether the judge prefers the rejected answer of a pair."""
    pair = "chosen" in row and "rejected" in row
    return pair and judge(row, row["rejected"]) > judge(row, row["chosen"])


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
            swapped = [mislabelled(row) for row in judged]
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


def raised(root):
    """The alerts of 3_rlhf as it ran last, one row each."""
    path = artifact(root, "rlhf") / "alerts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return pd.DataFrame([json.loads(line) for line in lines])


def samples(root, temperature):
    """Answers to the same prompts before and after the training, one row per prompt.

    They come from the first and the last step of samples.jsonl. `temperature` is 0 for greedy
    answers or cfg.temperature for sampled ones.
    """
    path = artifact(root, "rlhf") / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    table = pd.DataFrame([json.loads(line) for line in lines if line])
    if not {"step", "temperature"} <= set(table):
        raise CourseError(f"{path} comes from an older version. Run 3_rlhf.ipynb again.")
    at = table[(table["temperature"] - temperature).abs() < 1e-9]
    if at["step"].nunique() < 2:
        raise CourseError(
            f"{path} does not hold answers at temperature {temperature} from before and after the "
            f"training. It has temperatures {sorted(table['temperature'].unique().tolist())} and "
            f"steps {sorted(table['step'].unique().tolist())}. Use one of these temperatures, or "
            "run 3_rlhf.ipynb to its end."
        )
    at = at.drop_duplicates(["step", "prompt"], keep="last").set_index("prompt")  # after a resume
    first, last = (at[at["step"] == at["step"].agg(end)] for end in ("min", "max"))
    shown = pd.DataFrame({"before": first["response"], "after": last["response"]})
    for name, column in (
        ("reward before", first.get("reward")),
        ("reward after", last.get("reward")),
        ("KL after", last.get("kl")),
    ):
        if column is not None and column.notna().any():
            shown[name] = column.astype(float).round(3) + 0.0  # rounding alone is not worth reading
    return shown.loc[first.index].reset_index()
