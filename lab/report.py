"""Tables and the report: report.html for people, report.json for programs (docs/report.md)."""

import base64
import html
import io
import json
import math

import pandas as pd
from matplotlib.figure import Figure

from lab.figures import *  # noqa: F403
from lab.measures import *  # noqa: F403

# ruff: noqa: F405
# Everything that draws or counts is at hand as report.x, so that a notebook imports one name.

# --------------------------------------------------------------------------------------------------
# Tables


def result_table(models):
    """The table of 4_test: one row per model."""
    rows, perplexity = {}, any("perplexity" in model for model in models.values())
    for name, m in models.items():
        judge, greedy = m["judge"], m.get("judge_greedy")
        row = {"questions": f"{m['questions']:,}"} if "questions" in m else {}
        if judge:
            row["judge, sampled"] = with_interval(judge)
            row["judge, greedy"] = f"{greedy['mean']:.2f}" if greedy else "-"
            row |= {kind: f"{mean:.2f}" for kind, mean in judge["kinds"].items()}
        row |= {
            "reward": f"{m['reward']:z.2f}",
            "KL (nats)": f"{m['kl']:z.2f}",
            "length (tokens)": f"{m['length']:.1f}",
            "distinct-2": f"{m['distinct_2']:.2f}",
            "ended": f"{m['eos']:.0%}",
        }
        if perplexity:
            row["perplexity"] = f"{m['perplexity']:,.1f}" if "perplexity" in m else "-"
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("model")


def metric_table(models):
    """Your metrics, one column per model: the means of sampled and of greedy answers, with their
    intervals."""
    rows = {}
    for metric, found in metric_panels(models).items():
        for i, how in enumerate(("sampled", "greedy")):
            rows[f"{metric}, {how}"] = {name: with_interval(x[i]) for name, x in found.items()}
    return pd.DataFrame(rows).T.rename_axis("metric")


def with_interval(found):
    """A mean and, in brackets, its interval; a dash if there is none."""
    if not found:
        return "-"
    mean, low, high = (digits(found[name], found["mean"]) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def side_by_side(rows, answers):
    """Question and answer of every model, the same few rows of each kind, about ten in all. With
    metrics every answer has a line of its own, and the metrics stand beside it."""
    kinds = [row.get("kind", "all") for row in rows]
    several, found = len(set(kinds)) > 1, []
    for row, kind, *alike in zip(rows, kinds, *answers.values()):
        asked = {"kind": kind, "prompt": row["prompt"]}
        if alike and "metrics" in alike[0]:
            lines = zip(answers, alike)
            lines = [{"model": m, "answer": x["response"]} | x["metrics"] for m, x in lines]
            nothing = dict.fromkeys(asked, "")  # the question stands before its first answer only
            found.append([(asked if not i else nothing) | x for i, x in enumerate(lines)])
        else:
            found.append([asked | {m: x["response"] for m, x in zip(answers, alike)}])
    per_kind = max(3, 10 // max(1, len(set(kinds))))
    order = pd.Series(kinds, dtype=object)
    order = order.groupby(order).head(per_kind).sort_values(kind="stable").index
    table = pd.DataFrame([line for i in order for line in found[i]])
    return table if several else table.drop(columns="kind")


def frame(table):
    """A table as it is shown: an index with a name is a column, other row numbers are not."""
    table = pd.DataFrame(table)
    return table.reset_index() if table.index.name else table


def cell(value):
    """A value as people read it: three digits, no -0, a dash for what is missing."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:z.3g}" if isinstance(value, float) else str(value)


def table_html(table):
    """A table in a box that scrolls sideways. What a model wrote is escaped, and is no formula."""
    table = frame(table)
    columns = [[cell(value) for value in table[name]] for name in table]
    head, body = [], [[] for _ in range(len(table))]
    for name, values in zip(table, columns):
        wraps = any(len(value) > 24 for value in values)
        style = "min-width:11em;white-space:pre-line" if wraps else "white-space:nowrap"
        style = f"text-align:left;{style}"
        head.append(f'<th style="text-align:left;white-space:normal">{html.escape(str(name))}</th>')
        for line, value in zip(body, values):
            line.append(f'<td style="{style}">{html.escape(value)}</td>')
    lines = "\n".join(f"<tr>{''.join(line)}</tr>" for line in body)
    return (
        '<div style="overflow-x:auto" class="scroll mathjax_ignore tex2jax_ignore"><table>\n'
        f"<thead><tr>{''.join(head)}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


# --------------------------------------------------------------------------------------------------
# The file

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1a1a1a;background:#fff}}h1,h2{{line-height:1.2}}h2{{margin-top:2.5rem}}
table{{border-collapse:collapse;font-size:14px}}
td,th{{padding:.3rem .7rem .3rem 0;border-bottom:1px solid #ccc;vertical-align:top}}
.scroll{{overflow-x:auto}}figure{{margin:0}}img{{max-width:100%;height:auto}}
@media (prefers-color-scheme:dark){{body{{color:#ddd;background:#161616}}
td,th{{border-color:#444}}}}
@media (max-width:600px){{body{{margin:1rem auto;padding:0 .7rem}}}}</style></head>
<body><h1>{heading}</h1>
{body}
</body></html>
"""


def page(title, heading, body):
    """A page that needs no other file, for light and dark screens of any width."""
    return PAGE.format(title=title, heading=heading, body=body)


def parts(models, answers, beside, pairs):
    """What report.html shows, in this order: (title, table or figure, caption)."""
    known = all(model["judge"] for model in models.values())
    own, plain = metrics_in(models), any("perplexity" in model for model in models.values())
    if known or own:
        what = "The judge's mean score" if known else "The mean of each metric"
        told = f"{what}: dark bars for sampled answers, light bars for greedy answers, lines for "
        found = [("Sampled and greedy answers", judged_bars(models), f"{told}95 % intervals.")]
    else:
        told = "The mean reward of each model. These rows have no judge, so nothing here says "
        told += "whether a high reward means a good answer."
        found = [("Reward", judged_bars(models), told)]
    found.append(
        (
            "Result",
            result_table(models),
            f"{'The judge scores between 0 and 1; in brackets its 95 % interval. ' * known}"
            f"{'The columns of single kinds are for sampled answers. ' * known}"
            "Reward: standard deviations above the actor. KL: distance from the actor per answer. "
            "Distinct-2: share of different word pairs. Ended: answers that end by themselves. "
            f"{'Perplexity on a plain text: lower is better. ' * plain}"
            "If a model has fewer questions, it answered the first ones of the same list.",
        )
    )
    if own:
        told = "The mean of each metric; in brackets its 95 % interval."
        found.append(("Metrics", metric_table(models), told))
    told = "Held-out questions and one sampled answer of each model. No training has seen these "
    found.append(("Answers to the same questions", beside, f"{told}questions."))
    metric = stand_in(answers)
    if known or metric:
        what = f"how high {metric} is for them" if metric else "what the judge says about them"
        mean = f"the mean of {metric}" if metric else "the judge's mean"
        found.append(
            (
                f"Reward and {metric or 'judge'}",
                reward_against_judge(answers),
                f"Above: how many answers got which reward, and {what}. Orange at a high reward "
                f"means that the reward model is wrong. Below: {mean} in each range of rewards, "
                "with its 95 % interval and the number of answers.",
            )
        )
    if pairs is None:  # with a reward of your own there may be no reward model
        return found
    found.append(
        (
            "The reward model on held-out pairs",
            score_histogram(pairs),
            "Scores of the answers that people chose and of those that they rejected. A tie counts "
            "as half right.",
        )
    )
    if set(pairs["flaw"]) != {"unknown"}:
        found.append(
            (
                "What the reward model overlooks",
                by_flaw(pairs),
                "How often the reward model prefers the chosen answer, by what is wrong with the "
                "rejected one.",
            )
        )
    found.append(
        (
            "Calibration of the reward model",
            calibration(pairs),
            "How often the higher score wins, against how often the score difference predicts that "
            "it wins. Above the line the reward model is too cautious, below it is too sure of "
            "itself.",
        )
    )
    return found


def picture(figure):
    """A figure as an <img> that needs no other file, with its label as the alternative text."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    code = base64.b64encode(data.getvalue()).decode()
    width = round(100 * figure.get_figwidth())
    alt = html.escape(figure.get_label())
    return f'<img src="data:image/png;base64,{code}" alt="{alt}" width="{width}">'


def write_answers(folder, sampled, greedy, temperature):
    """answers.jsonl: a line for each answer of a model, sampled and greedy, from `evaluate`."""
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        for at, answers in ((temperature, sampled), (0.0, greedy)):
            for model, results in answers.items():
                for result in results:
                    line = {"model": model, "temperature": at} | result
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_report(folder, report, parts):
    """report.json with `report`, report.html with `parts`.

    A part is (title, figure, table or text), and may have a caption as its last element.
    """
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    body = []
    for title, part, *caption in parts:
        told = "".join(f"<p>{html.escape(text)}</p>" for text in caption)
        if isinstance(part, Figure):
            shown = f"{told}<figure>{picture(part)}</figure>"
        elif isinstance(part, pd.DataFrame):
            shown = told + table_html(part)
        else:
            shown = f"<p>{html.escape(str(part))}</p>{told}"
        body.append(f"<section><h2>{html.escape(title)}</h2>\n{shown}</section>")
    text = page("RLHF report", "RLHF report: before and after", "\n".join(body))
    (folder / "report.html").write_text(text, encoding="utf-8")
