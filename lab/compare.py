"""Two runs on one page: their curves, the parameters that differ, and their results."""

import html
import json
import re
from dataclasses import fields
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from lab import CourseError, report
from lab.config import Config
from lab.errors import NOTEBOOKS

COLOURS = {"A": report.BLUE, "B": report.ORANGE}
MEASURED = {  # metric: (title, unit) of all stages
    "loss": ("Loss", "", "log"),
    "validation_loss": ("Validation loss", "nats per answer token", "log"),
    "copying": ("Words copied from the question", "share predicted"),
    "accuracy": ("Accuracy", "share of pairs"),
    "margin": ("Chosen minus rejected", "difference of scores"),
    "chosen_logprob": ("Chosen answers", "log-prob, nats"),
    "rejected_logprob": ("Rejected answers", "log-prob, nats"),
    "nll": ("SFT loss of the chosen answers", "nats per answer token"),
    **report.LEARNING,
    "eos": ("Ended", "share of answers"),
    "empty": ("Empty answers", "share of answers"),
    "explained_variance": ("Explained variance", "share"),
    "zero_deviation": ("Groups that teach nothing", "share of groups"),
    "policy_loss": ("Policy loss", ""),
    "value_loss": ("Value loss", "half the squared error"),
    "approx_kl": ("KL of the update", "nats per token"),
    "value_clip_fraction": ("Values clipped", "share of tokens"),
    "kl_coef": ("kl_coef", ""),
    "kl_in_loss": ("KL in the loss", "nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", "per step"),
    "skipped": ("Skipped updates", "sum"),
    "seconds": ("Time", "seconds per step"),
    "peak_memory_mb": ("Peak memory", "MB"),
}
LEFT_OUT = re.compile(r"steps?|seconds_.*|.*_per_second|ratio_error.*|updates|peak_.*")
NOT_COMPARED = {"root", "resume", "resume_changed", "checkpoint_minutes", "tracker"}


def compare(first, second, out):
    """Writes the page that compares two courses, model folders or stage folders; returns its path.

    It covers the stages that both have.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise CourseError(f"{first} is the same run twice: give two runs.")
    runs = {"A": stages_in(first), "B": stages_in(second)}
    common = [name for name in NOTEBOOKS if all(name in run for run in runs.values())]
    if not common:
        has = [f"{place} has {', '.join(runs[x])}" for x, place in zip("AB", (first, second))]
        raise CourseError(
            f"The two runs have no stage in common: {'; '.join(has)}. Give folders that hold the "
            "same stage."
        )
    body = [legend({"A": first, "B": second})]
    for name in common:
        found = {letter: run[name] for letter, run in runs.items()}
        title = f"{Path(NOTEBOOKS[name]).stem}: model/{name}"
        body.append(f"<section><h2>{title}</h2>")
        body += result_parts(found, runs) if name == "report" else stage_parts(name, found)
        body.append("</section>")
    page, out = report.page("Two runs", "Two runs compared", "\n".join(body)), Path(out)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CourseError(f"{out} cannot be written ({error.strerror}).") from None
    return out


# --------------------------------------------------------------------------------------------------
# Reading


def stages_in(place):
    """Returns {stage: (its folder, its stage.json)} of a course, a model folder or a stage."""
    place = Path(place)
    found, outer = {}, (place, place / "model")
    for folder in (place, *(above / name for above in outer for name in NOTEBOOKS)):
        if (folder / "stage.json").is_file():
            record = record_in(folder)
            found.setdefault(record["stage"], (folder, record))
    if not found:
        raise CourseError(
            f"There is no run in {place}: give the folder of a course, its folder model/, or the "
            "folder of a finished stage, for example model/rlhf."
        )
    return {name: found[name] for name in NOTEBOOKS if name in found}


def record_in(folder):
    try:
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        if record["stage"] not in NOTEBOOKS or not isinstance(record["config"], dict):
            raise ValueError
        return record
    except (OSError, ValueError, KeyError, TypeError):
        raise CourseError(f"{folder / 'stage.json'} cannot be read.") from None


def history_of(folder):
    """Returns metrics.jsonl as a table, which is empty if there is no such file."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines])
    except (OSError, ValueError):
        raise CourseError(f"{path} cannot be read.") from None


# --------------------------------------------------------------------------------------------------
# A stage


def stage_parts(name, found):
    """Returns the parameters, the costs and the curves of a stage as HTML."""
    records = {letter: record for letter, (_, record) in found.items()}
    different = differing_parameters(name, records)
    if len(different):
        parts = ["<p>Parameters that differ:</p>", report.table_html(different)]
    else:
        parts = ["<p>All parameters of this stage are equal.</p>"]
    if changed := differing_files(records):
        parts.append(f"<p>{html.escape(changed)}</p>")
    costs = {
        "seconds": [record.get("seconds") for record in records.values()],
        "peak memory (MB)": [record.get("peak_memory_mb") for record in records.values()],
    }
    table = pd.DataFrame(costs, index=list(records)).T.rename_axis("cost")
    parts.append(report.table_html(table))
    if len({record.get("id") for record in records.values()}) == 1:
        return [*parts, "<p>Both runs have the same weights, so their curves are the same.</p>"]
    curves = curves_of({letter: history_of(folder) for letter, (folder, _) in found.items()})
    return [*parts, f'<div class="curves">{"".join(curves)}</div>']


def differing_parameters(name, records):
    """Returns a table of the parameters that a stage reads and that differ, with their meaning."""
    reads = {"all", {"report": "test"}.get(name, name)}
    read = [f for f in fields(Config) if reads & set(f.metadata["stages"])]
    known = {f.name: f.metadata["meaning"] for f in read}
    configs = [record["config"] for record in records.values()]
    own = {key: "" for config in configs for key in config if key.startswith("code of ")}
    rows = [
        {"parameter": key, **dict(zip(records, map(shown, values))), "meaning": meaning}
        for key, meaning in (known | own).items()
        if key not in NOT_COMPARED
        and (values := [config.get(key) for config in configs])[0] != values[1]
    ]
    return pd.DataFrame(rows)


def shown(value):
    return "-" if value is None else str(value)


def differing_files(records):
    """Says in a sentence which data, input models and package versions differ."""
    a, b = records.values()
    told = []
    for kind, what in (("data", ""), ("inputs", "model/"), ("versions", "version of ")):
        both = a.get(kind, {}), b.get(kind, {})
        names = dict.fromkeys([*both[0], *both[1]])
        told += [what + name for name in names if both[0].get(name) != both[1].get(name)]
    return f"Also different: {', '.join(told)}." if told else ""


def curves_of(histories):
    """Yields a picture for each metric that says something: its curves in both runs."""
    names = dict.fromkeys(name for history in histories.values() for name in history)
    ordered = [name for name in MEASURED if name in names]
    ordered += [name for name in names if name not in MEASURED]
    for name in ordered:
        if LEFT_OUT.fullmatch(name):
            continue
        lines = {
            letter: history[["step", name]].dropna()
            for letter, history in histories.items()
            if {"step", name} <= set(history)
        }
        values = pd.concat([line[name] for line in lines.values()])
        if len(values) and pd.api.types.is_numeric_dtype(values) and values.nunique() > 1:
            yield picture(name, lines)


@matplotlib.rc_context(report.STYLE | {"svg.fonttype": "none"})
def picture(name, lines):
    """One metric of both runs as SVG, small enough for a phone: a noisy curve has its mean too."""
    title, unit, *scale = MEASURED.get(name, (name.replace("_", " "), ""))
    figure, (ax,) = report.canvas(width=3.6, height=2.3)
    told = []
    for letter, line in lines.items():
        steps, values = np.asarray(line["step"], float), np.asarray(line[name], float)
        colour = COLOURS[letter]
        if report.noisy(values):
            ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.6)
            values = report.centred_mean(values, max(5, len(values) // 20))
        dashed = (0, (4, 1.5)) if letter == "B" else "-"  # where both are equal you see both
        marker = "o" if len(values) < 12 else None
        ax.plot(steps, values, color=colour, linestyle=dashed, marker=marker, markersize=4)
        ends = values[np.isfinite(values)][[0, -1]]
        told.append(f"{letter} from {ends[0]:.3g} to {ends[1]:.3g}")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    every = np.concatenate([np.asarray(line[name], float) for line in lines.values()])
    if "log" in scale and every.min() > 0:
        report.log_axis(ax, every)
    ax.set(title=title, xlabel="step", ylabel=fill(unit, 22))
    figure.set_label(f"{title}: {', '.join(told)}.")
    text = report.svg(figure)
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # ids of a page are unique
    label = html.escape(figure.get_label(), quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


# --------------------------------------------------------------------------------------------------
# The results


def result_parts(found, runs):
    """Returns the results of both reports as HTML: the models in pairs, and the reward models."""
    tables, metrics, told = [], [], []
    for letter, (folder, record) in found.items():
        result = report_in(folder)
        models = dict(result["models"])
        if best := result.get("best_of"):
            models[f"best of {best['n']}"] = best
        tables.append(of_run(letter, report.result_table(models)))
        if report.metrics_in(models):
            metrics.append(of_run(letter, report.metric_table(models)))
        if critic := result.get("critic"):
            accuracy = f"{critic['accuracy']:.1%}"
            told.append(f"the reward model of {letter} is right about {accuracy} of its pairs")
        made_from = record.get("inputs", {})
        stale = [name for name in made_from if stale_input(name, made_from, runs[letter])]
        if stale:
            names = ", ".join(f"model/{name}" for name in stale)
            told.append(f"the report of {letter} was made from another version of {names}")
    parts = [report.table_html(in_pairs(one)) for one in (tables, metrics) if one]
    moved = answer_differences(*(folder for folder, _ in found.values()))
    if len(moved):
        parts.append(
            "<p>Sampled answers to the same questions: what B scores more than A, with the "
            "95 % interval of the difference (paired bootstrap).</p>"
        )
        parts.append(report.table_html(moved))
    a, b = (record for _, record in found.values())
    if a.get("data") != b.get("data"):
        told.append("the two reports answer different questions, because eval.json differs")
    return [*parts, *(f"<p>{html.escape(text[0].upper() + text[1:])}.</p>" for text in told)]


def answer_differences(first, second):
    """Returns a table of the differences between the answers of two reports, model by model; equal
    models are left out."""
    found, tables = [sampled_answers(folder) for folder in (first, second)], []
    for name in found[0]:
        lines = report.differences(found[0][name], found[1].get(name, []))
        if any(line["difference"]["mean"] for line in lines):
            table = report.difference_table(lines, "A", "B")
            table.insert(0, "model", name)
            tables.append(table)
    return pd.concat(tables) if tables else pd.DataFrame()


def sampled_answers(folder):
    """Returns {model: its sampled answers} of a report."""
    found = {}
    try:
        for line in report.lines_of(folder / "answers.jsonl"):
            if line["temperature"]:
                found.setdefault(line["model"], []).append(report.as_result(line))
    except (OSError, ValueError, KeyError, TypeError):
        raise CourseError(f"{folder / 'answers.jsonl'} cannot be read.") from None
    return found


def of_run(letter, table):
    table = table.reset_index()
    table.insert(1, "run", letter)
    return table


def in_pairs(tables):
    """Returns the lines of both tables, those with the same name one below the other."""
    table = pd.concat(tables).fillna("-")
    names = table.columns[0]
    order = {name: i for i, name in enumerate(dict.fromkeys(table[names]))}
    return table.sort_values(names, key=lambda column: column.map(order), kind="stable")


def stale_input(name, made_from, run):
    return name in run and run[name][1].get("id") != made_from[name]


def report_in(folder):
    path = folder / "report.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        report.result_table(result["models"])
        return result
    except (OSError, ValueError, KeyError, TypeError):
        raise CourseError(f"{path} cannot be read: run 4_test.ipynb again.") from None


def legend(places):
    """Returns the style of the page and what A and B are."""
    lines = "".join(
        f'<br><b style="color:{COLOURS[letter]}">&#9632; {letter}</b> {html.escape(str(place))}'
        for letter, place in places.items()
    )
    return (
        "<style>.curves{display:grid;gap:1rem;margin-top:1rem;"
        "grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}"
        "svg{width:100%;height:auto}.scroll{margin:1rem 0}</style>"
        f"<p>Two runs:{lines}</p><p>A thin line is what was measured at each step; the thick line "
        "is the mean of the steps around it. Metrics that never change are not shown.</p>"
    )
