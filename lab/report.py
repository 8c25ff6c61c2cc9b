"""Tables and the report: report.html for people, report.json for programs (docs/report.md)."""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from lab.figures import *  # noqa: F403
from lab.measures import *  # noqa: F403

# ruff: noqa: F405
# Everything that draws or counts is at hand as report.x, so that a notebook imports one name.

# --------------------------------------------------------------------------------------------------
# Tables


def result_table(models, against="the actor"):
    """The main table of 4_test: one row per model. The others are in `detail_table`. Win rates are
    those against the model `against`."""
    rows, categories = {}, categories_in(models)
    who = next((x for x in WHO if any(x in (m.get("wins") or {}) for m in models.values())), None)
    for name, m in models.items():
        judge, greedy = m["judge"], m.get("judge_greedy")
        row = {"questions": f"{m['questions']:,}"} if "questions" in m else {}
        if judge:
            row["judge, sampled"] = with_interval(judge)
            row["judge, greedy"] = f"{greedy['mean']:.2f}" if greedy else "-"
        if categories:
            graded = m.get("categories") or {}
            row |= {x: f"{graded[x]['mean']:.2f}" if x in graded else "-" for x in categories}
        elif judge:
            row |= {kind: f"{mean:.2f}" for kind, mean in judge["kinds"].items()}
        if who:
            row[f"beats {against} ({who})"] = with_interval((m.get("wins") or {}).get(who))
        row |= {
            "reward": rounded(m["reward"]),
            "KL (nats)": rounded(m["kl"]),
            "length (tokens)": f"{m['length']:.1f}",
            "distinct-2": f"{m['distinct_2']:.2f}",
        }
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("model")


def share_right(found):
    """The accuracy on pairs with its interval, from `preference_summary`."""
    low, high = found["interval"]
    return with_interval({"mean": found["accuracy"], "low": low, "high": high})


def rounded(value):
    """A number with two decimals; a dash if there is none."""
    return "-" if value is None else f"{value:z.2f}"


DETAILS = {  # figure: its key in a model's entry, and how to show it
    "KL backwards (nats)": ("kl_backwards", rounded),
    "perplexity of the reference answers": ("reference_perplexity", lambda x: f"{x:,.2f}"),
    "perplexity of the plain text": ("perplexity", lambda x: f"{x:,.1f}"),
    "calibration error": ("calibration", lambda found: f"{found['error']:.3f}"),
    "implicit reward: right pairs": ("implicit_reward", share_right),
    "implicit reward: margin": ("implicit_reward", lambda found: f"{found['margin']:z.2f}"),
    "distinct-1": ("distinct_1", lambda x: f"{x:.3f}"),
    "self-BLEU": ("self_bleu", rounded),
    "ended by themselves": ("eos", lambda x: f"{x:.0%}"),
    "answers said before": ("said_before", lambda x: f"{x:.0%}"),
}


def detail_table(models, against="the actor"):
    """All other figures of 4_test, one column per model."""
    columns = {name: details_of(model, against) for name, model in models.items()}
    fullest = sorted(columns.values(), key=len, reverse=True)  # the actor does not beat itself
    titles = dict.fromkeys(title for column in fullest for title in column)
    rows = {
        title: {name: column.get(title, "-") for name, column in columns.items()}
        for title in titles
    }
    return pd.DataFrame(rows).T.rename_axis("figure")


def details_of(model, against):
    """One model's win rates and categories with their intervals, then what DETAILS names."""
    found = {}
    for who, rate in (model.get("wins") or {}).items():
        found[f"beats {against} ({who})"] = with_interval(rate)
    for category, entry in (model.get("categories") or {}).items():
        found[category] = with_interval(entry)
        kinds = entry.get("kinds", {})
        if len(kinds) > 1:
            found |= {f"{category}: {kind}": f"{mean:.2f}" for kind, mean in kinds.items()}
    for title, (key, show) in DETAILS.items():
        if model.get(key) is not None:
            found[title] = show(model[key])
    return found


def unread_note(models):
    """A sentence about the answers whose script the rules of the categories cannot read; "" if
    there are none."""
    found = [
        f"{entry['unread']} of {entry['prompts']} of {name} ({category})"
        for name, model in models.items()
        for category, entry in (model.get("categories") or {}).items()
        if entry.get("unread")
    ]
    if not found:
        return ""
    return (
        "The rules of the categories read English only: in answers in another script they find no "
        f"refusal, no fact and no kind word. Such answers: {', '.join(found)}."
    )


def preference_table(critics, models):
    """Who is right about the held-out pairs: the reward models, and the implicit rewards of the
    language models."""
    implicit = {f"{name}, implicit reward": m.get("implicit_reward") for name, m in models.items()}
    known = {name: x for name, x in ((critics or {}) | implicit).items() if x}
    rows = [
        {"scores": name, "right": share_right(x), "margin": f"{x['margin']:z.2f}"}
        | {"pairs": f"{x['pairs']:,}"}
        for name, x in known.items()
    ]
    return pd.DataFrame(rows) if rows else None


def difference_table(lines, first, second):
    """What `differences` found, as a table: both means, and the difference with its interval."""
    return pd.DataFrame(
        {
            "score": [line["score"] for line in lines],
            first: [digits(line["first"]) for line in lines],
            second: [digits(line["second"]) for line in lines],
            "difference": [with_interval(line["difference"]) for line in lines],
            "questions": [f"{line['questions']:,}" for line in lines],
        }
    )


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
body{{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;
color:#1a1a1a;background:#fff}}h1,h2{{line-height:1.2}}h2{{margin-top:2.5rem}}
table{{border-collapse:collapse;font-size:14px}}
td,th{{padding:.3rem .7rem .3rem 0;border-bottom:1px solid #ccc;vertical-align:top}}
.scroll{{overflow-x:auto}}figure{{margin:0}}img{{max-width:100%;height:auto}}
@media (prefers-color-scheme:dark){{body{{color:#ddd;background:#161616}}
td,th{{border-color:#444}}}}
summary{{cursor:pointer;margin:.5rem 0}}
@media (max-width:600px){{body{{margin:1rem auto;padding:0 .7rem}}}}</style></head>
<body><h1>{heading}</h1>
{body}
</body></html>
"""


def page(title, heading, body):
    """A page that needs no other file, for light and dark screens of any width."""
    return PAGE.format(title=title, heading=heading, body=body)


class Folded(NamedTuple):
    """A table that the report shows only after a click."""

    table: pd.DataFrame
    summary: str


CAPTIONS = {
    "Result": "Categories are for sampled answers. Beats the actor: how often an answer scores "
    "higher than the actor's to the same question. Reward: standard deviations above the actor. "
    "KL: distance from the actor per answer. Distinct-2: share of different word pairs. If a model "
    "has fewer questions, it answered the first ones of the same list.",
    "More figures": "KL backwards: KL(actor || model), from the actor's answers. Perplexity: lower "
    "is better. Calibration error: how far the probability of a model's favourite answers is from "
    "the share of them that is right. Implicit reward: see the pairs below. Self-BLEU: how alike "
    "answers to different questions are, 1 if they are equal. Said before: answers that are also "
    "the answer to another question.",
    "Metrics": "The mean of each metric; in brackets its 95 % interval.",
    "Answers to the same questions": "Held-out questions and one sampled answer of each model. No "
    "training has seen these questions.",
    "What changed most": "The ten questions with the largest KL of the policy's answer to the "
    "actor.",
    "Calibration of the models": "How often the greedy answers are right (full marks of the "
    "judge), against how probable the model finds them, word for word. Below the line a model is "
    "too sure of itself. A model that knows several wordings of an answer gives each of them a "
    "part of the probability, so it stands above the line.",
    "Who is right about pairs": "How often each score prefers the better answer of a held-out "
    "pair, and by how much. The implicit reward is that of DPO: beta times how much likelier than "
    "the actor, as a log, a model finds an answer.",
    "The reward model on held-out pairs": "Scores of the answers that people chose and of those "
    "that they rejected. A tie counts as half right.",
    "What the reward model overlooks": "How often the reward model prefers the chosen answer, by "
    "what is wrong with the rejected one.",
    "Calibration of the reward model": "How often the higher score wins, against how often the "
    "score difference predicts that it wins. Above the line the reward model is too cautious, "
    "below it is too sure of itself.",
}


def parts(models, answers, beside, pairs, critics=None):
    """What report.html shows, in this order: (title, table or figure, caption)."""
    found = [headline_part(models)]
    shown = {"Result": result_table(models)}
    if len(details := detail_table(models)):
        shown["More figures"] = Folded(details, "Show all figures")
    if metrics_in(models):
        shown["Metrics"] = metric_table(models)
    shown["Answers to the same questions"] = beside
    if {"actor", "rlhf"} <= answers.keys():
        table = most_changed(answers["actor"], answers["rlhf"])
        shown["What changed most"] = Folded(table, "Show the ten answers")
    found += captioned(shown)
    known, metric = all(model["judge"] for model in models.values()), stand_in(answers)
    if known or metric:
        found.append(reward_part(answers, metric))
    shown = {"Calibration of the models": reliability_picture(models)}
    shown["Who is right about pairs"] = preference_table(critics, models)
    if pairs is not None:  # with a reward of your own there may be no reward model
        shown["The reward model on held-out pairs"] = score_histogram(pairs)
        if set(pairs["flaw"]) != {"unknown"}:
            shown["What the reward model overlooks"] = by_flaw(pairs)
        shown["Calibration of the reward model"] = calibration(pairs)
    if note := unread_note(models):
        found.append(("Answers that no rule reads", note))
    return found + captioned(shown)


def captioned(shown):
    """{title: table or figure} as parts, without those that are empty."""
    return [(title, x, CAPTIONS[title]) for title, x in shown.items() if x is not None]


def headline_part(models):
    """The picture at the top: the means of the judge, of metrics, of categories or of rewards."""
    names = {
        "The judge's mean score": all(model["judge"] for model in models.values()),
        "The mean of each metric": metrics_in(models),
        "The mean of each category": categories_in(models),
    }
    if what := next((name for name, there in names.items() if there), None):
        told = f"{what}: dark bars for sampled answers, light bars for greedy answers, lines for "
        return "Sampled and greedy answers", judged_bars(models), f"{told}95 % intervals."
    told = "The mean reward of each model. These rows have no judge, so nothing here says whether "
    return "Reward", judged_bars(models), f"{told}a high reward means a good answer."


def reward_part(answers, metric):
    """The reward against the judge, or against the metric that takes its place."""
    what = f"how high {metric} is for them" if metric else "what the judge says about them"
    mean = f"the mean of {metric}" if metric else "the judge's mean"
    told = f"Above: how many answers got which reward, and {what}. Orange at a high reward means "
    told += f"that the reward model is wrong. Below: {mean} in each range of rewards, with its "
    told += "95 % interval and the number of answers."
    return f"Reward and {metric or 'judge'}", reward_against_judge(answers), told


def training_parts(folder):
    """What report.html shows of the training of the policy, from its folder: curves, alerts, and
    samples before and after."""
    folder, algorithm = Path(folder), "ppo"
    if (folder / "stage.json").exists():
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        algorithm = record["config"].get("algorithm", algorithm)
    found, history = [], pd.DataFrame(lines_of(folder / "metrics.jsonl"))
    shown = {name: panel for name, panel in panels(algorithm).items() if name in history}
    if shown:
        told = f"The training of the policy with {algorithm}, step by step."
        found.append(("The training", curves(history, shown), told))
    if (folder / "alerts.jsonl").exists():
        alerts = pd.DataFrame(lines_of(folder / "alerts.jsonl"))
        told = "What the training warned of." if len(alerts) else "The training raised no alert."
        alerts = alerts[[x for x in ("step", "name", "sentence") if x in alerts]]
        found.append(("Alerts", alerts if len(alerts) else told, *[told] * bool(len(alerts))))
    samples = pd.DataFrame(lines_of(folder / "samples.jsonl"))
    if {"step", "temperature", "prompt", "response"} <= set(samples):
        told = "Greedy answers to the same prompts before and after the training."
        found.append(("Samples", Folded(before_and_after(samples), "Show the samples"), told))
    return found


def lines_of(path):
    """The lines of a JSON lines file; none if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def before_and_after(samples):
    """The greedy answers of the first and of the last step in samples.jsonl, one line a prompt."""
    samples = samples[samples["temperature"] == samples["temperature"].min()]
    samples = samples.drop_duplicates(["step", "prompt"], keep="last").set_index("prompt")
    first, last = (samples[samples["step"] == samples["step"].agg(x)] for x in ("min", "max"))
    return pd.DataFrame({"before": first["response"], "after": last["response"]}).reset_index()


def picture(figure):
    """A figure as an <img> that needs no other file, with its label as the alternative text."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    code = base64.b64encode(data.getvalue()).decode()
    width = round(100 * figure.get_figwidth())
    alt = html.escape(figure.get_label())
    return f'<img src="data:image/png;base64,{code}" alt="{alt}" width="{width}">'


def answer_lines(examined, temperature):
    """A line for each answer of each model: sampled, greedy, and to the prompts of categories."""
    for name, one in examined.items():
        for results, at in (
            (one.sampled, temperature),
            (one.greedy, 0.0),
            (one.graded, temperature),
        ):
            yield from ({"model": name, "temperature": at} | result for result in results)


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
        elif isinstance(part, Folded):
            shown = f"{told}<details><summary>{html.escape(part.summary)}</summary>"
            shown += f"{table_html(part.table)}</details>"
        else:
            shown = f"<p>{html.escape(str(part))}</p>{told}"
        body.append(f"<section><h2>{html.escape(title)}</h2>\n{shown}</section>")
    text = page("RLHF report", "RLHF report: before and after", "\n".join(body))
    (folder / "report.html").write_text(text, encoding="utf-8")
