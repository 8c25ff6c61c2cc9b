"""Figures and the report: what was measured, so that it can be read at a glance."""

import base64
import html
import io
import json

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"  # Okabe-Ito
COLOURS = {"base": GREY, "actor": BLUE, "rlhf": ORANGE}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "figure.dpi": 100,
}


def canvas(columns=1, rows=1, width=4.0, height=3.0):
    """An empty figure in the house's style, and its axes as a flat list."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
    return figure, axes


# --------------------------------------------------------------------------------------------------
# Figures


def curves(history, panels, x="step", columns=3):
    """A panel for each `column: (title, unit)`: thin as measured, thick as a moving average."""
    figure, axes = canvas(min(columns, len(panels)), -(-len(panels) // columns), height=2.6)
    for ax, (column, (title, unit)) in zip(axes, panels.items()):
        line = (
            history.dropna(subset=column)
            if column in history
            else history.assign(**{column: np.nan})
        )
        smooth = line[column].rolling(max(1, len(line) // 20), min_periods=1).mean()
        ax.plot(line[x], line[column], color=BLUE, alpha=0.3, linewidth=1)
        ax.plot(line[x], smooth, color=BLUE, linewidth=2, marker="o" if len(line) < 12 else None)
        ax.set(title=title, xlabel=x, ylabel=unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


LEARNING = {  # column: (title, unit), what to watch while an algorithm learns
    "reward": ("Reward", "spreads above the actor"),
    "kl": ("KL to the actor", "nats per answer"),
    "length": ("Length", "tokens"),
    "entropy": ("Entropy", "nats per token"),
    "clip_fraction": ("Clipped", "share of tokens"),
}
PANELS = {
    "ppo": LEARNING | {"explained_variance": ("Explained variance", "share")},
    "grpo": LEARNING | {"zero_deviation": ("Groups that teach nothing", "share")},
    "rloo": LEARNING | {"zero_deviation": ("Groups that teach nothing", "share")},
    "dpo": {
        "loss": ("Loss", "nats per pair"),
        "accuracy": ("Chosen likelier than before", "share of pairs"),
        "margin": ("Chosen minus rejected", "implicit reward"),
        "chosen_logprob": ("Chosen answers", "log-prob, nats"),
        "rejected_logprob": ("Rejected answers", "log-prob, nats"),
        "grad_norm": ("Gradient norm", "before clipping"),
    },
}


def panels(algorithm):
    """The curves for an algorithm; one of somebody's own shows what all of them have."""
    return PANELS.get(algorithm, LEARNING)


def token_strip(tokens, rows):
    """The tokens of one answer over rows of numbers: orange above zero, blue below."""
    width, values = max(8, 0.75 * len(tokens)), np.array(list(rows.values()), dtype=float)
    figure, (ax,) = canvas(width=width, height=0.5 * len(rows) + 0.9)
    colours = LinearSegmentedColormap.from_list("below, above", [BLUE, "white", ORANGE])
    scale = np.abs(values).max(axis=1, keepdims=True) + 1e-9
    ax.imshow(values / scale, cmap=colours, vmin=-1.6, vmax=1.6, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.2f}".replace("-0.00", "0"), ha="center", va="center", fontsize=9)
    ax.set_xticks(range(len(tokens)), [plain(token) for token in tokens], rotation=40, ha="left")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.xaxis.tick_top()
    ax.grid(False)
    return figure


def plain(text):
    """Text as a plot may show it: dollars are not mathematics, line ends are visible."""
    return text.replace("$", r"\$").replace("\n", "\\n").strip() or "(space)"


def score_histogram(pairs):
    """How the reward model scores what people chose and what they rejected, kind by kind."""
    kinds = sorted(pairs["kind"].unique())
    figure, axes = canvas(len(kinds), width=3.2)
    low, high = pairs[["chosen", "rejected"]].min().min(), pairs[["chosen", "rejected"]].max().max()
    bins = np.linspace(low, high, 31)
    for ax, kind in zip(axes, kinds):
        part = pairs[pairs["kind"] == kind]
        ax.hist(part["rejected"], bins, color=ORANGE, alpha=0.6, label="rejected")
        ax.hist(part["chosen"], bins, color=BLUE, alpha=0.6, label="chosen")
        right = (part["chosen"] > part["rejected"]).mean()
        ax.set(title=f"{plain(kind)}: {right:.0%} right", xlabel="score", ylabel="pairs")
    axes[0].legend()
    return figure


def calibration(pairs, bins=8):
    """How often the higher score won, against how often the model said it would."""
    margin = pairs["chosen"] - pairs["rejected"]
    said = 1 / (1 + np.exp(-margin.abs()))
    group = pd.qcut(said, bins, duplicates="drop")
    table = pd.DataFrame({"said": said, "won": margin > 0}).groupby(group, observed=True).mean()
    figure, (ax,) = canvas(width=4.5, height=4)
    ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="perfect")
    ax.plot(table["said"], table["won"], color=BLUE, marker="o", label="reward model")
    ax.set(xlabel="predicted win rate", ylabel="actual win rate", title="Calibration")
    ax.legend()
    return figure


def judged_bars(models):
    """The judge's mean by kind for each model, with the 95 % interval of the overall mean."""
    if not all(model["judge"] for model in models.values()):
        return reward_bars(models)
    names = list(models)
    kinds = list(models[names[0]]["judge"]["kinds"])
    figure, (ax,) = canvas(width=9, height=3.4)
    for i, name in enumerate(names):
        judge = models[name]["judge"]
        x = np.arange(len(kinds) + 1) + (i - (len(names) - 1) / 2) * 0.27
        heights = [*judge["kinds"].values(), judge["mean"]]
        ax.bar(x, heights, 0.25, color=COLOURS.get(name, GREEN), label=name)
        spread = [[judge["mean"] - judge["low"]], [judge["high"] - judge["mean"]]]
        ax.errorbar(x[-1:], heights[-1:], spread, color="black", capsize=4)
        for place, height, top in zip(x, heights, [*heights[:-1], judge["high"]]):
            ax.text(place, top + 0.03, f"{height:.2f}", ha="center", fontsize=8)
    ax.set_xticks(range(len(kinds) + 1), [*map(plain, kinds), "all kinds"])
    ax.set(ylabel="judge's score", ylim=(0, 1.25), title="Judged by the truth (temperature 1)")
    ax.legend(loc="upper left", ncols=3, frameon=False)
    return figure


def reward_bars(models):
    """The mean reward of each model, for data of which nobody knows the truth."""
    figure, (ax,) = canvas(width=4.5, height=3.4)
    colours = [COLOURS.get(name, GREEN) for name in models]
    ax.bar(list(models), [model["reward"] for model in models.values()], color=colours)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(ylabel="mean reward", title="Reward (these rows have no judge)")
    return figure


def reward_against_judge(answers, bins=8):
    """Mean of the judge's score at each height of the reward: does more reward mean better?"""
    figure, (ax,) = canvas(width=5, height=3.6)
    for name in (name for name in ("actor", "rlhf") if name in answers):
        table = pd.DataFrame(answers[name]).dropna(subset="judge")
        if len(table) >= bins:
            group = pd.qcut(table["reward"], bins, duplicates="drop")
            means = table.groupby(group, observed=True)[["reward", "judge"]].mean().astype(float)
            ax.plot(means["reward"], means["judge"], "o-", color=COLOURS[name], label=name)
    ax.set(xlabel="reward model", ylabel="judge", ylim=(-0.05, 1.05), title="Reward and truth")
    if ax.lines:
        ax.legend(loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------
# Figures as numbers


def interval(values, resamples=2000):
    """Mean and its 95 % bootstrap interval."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return {"mean": values.mean().item(), "low": low.item(), "high": high.item()}


def judged(results):
    """The judge's mean, interval and means by kind; None where no row says what is right."""
    table = pd.DataFrame(results).dropna(subset="judge")
    if table.empty:
        return None
    kinds = table.groupby("kind")["judge"].mean()
    return interval(table["judge"]) | {"kinds": {k: float(v) for k, v in kinds.items()}}


def distinct_2(texts):
    """Share of different pairs of neighbouring words among all such pairs."""
    pairs = [pair for text in texts for words in [text.split()] for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def summarise(sampled, greedy=()):
    """One model's entry in report.json, from its answers at temperature 1 and its greedy ones."""
    table = pd.DataFrame(sampled)
    means = [name for name in ("reward", "kl", "length", "eos", "metric") if name in table]
    return {
        "judge": judged(sampled),
        "judge_greedy": judged(greedy) if greedy else None,
        **{name: float(table[name].mean()) for name in means},
        "distinct_2": distinct_2(table["response"]),
    }


def critic_summary(pairs):
    if pairs is None:
        return None
    right = pairs["chosen"] > pairs["rejected"]
    kinds = right.groupby(pairs["kind"]).mean()
    return {"accuracy": float(right.mean()), "kinds": {k: float(v) for k, v in kinds.items()}}


def by_flaw(pairs):
    """How often the reward model is right, by what is wrong with the rejected answer."""
    right = pairs["chosen"] > pairs["rejected"]
    table = right.groupby(pairs["flaw"]).agg(["mean", "size"]).sort_values("mean").reset_index()
    return table.set_axis(["flaw of the rejected answer", "right", "pairs"], axis=1)


def result_table(models):
    """The table of 4_test: one row a model."""
    rows = {}
    for name, m in models.items():
        judge, greedy = m["judge"], m["judge_greedy"]
        row = {}
        if judge:
            row["judge"] = f"{judge['mean']:.2f} ({judge['low']:.2f} to {judge['high']:.2f})"
            row["greedy"] = f"{greedy['mean']:.2f}" if greedy else "-"
            row |= {kind: f"{mean:.2f}" for kind, mean in judge["kinds"].items()}
        row |= {
            "reward": f"{m['reward']:.2f}",
            "KL (nats)": f"{m['kl']:.2f}",
            "length (tokens)": f"{m['length']:.1f}",
            "distinct-2": f"{m['distinct_2']:.2f}",
            "ended": f"{m['eos']:.0%}",
        }
        if "metric" in m:
            row["metric"] = f"{m['metric']:.3g}"
        rows[name] = row
    return pd.DataFrame(rows).T


def side_by_side(rows, answers, per_kind=3):
    """Question and answer of every model, the same few rows of each kind."""
    table = pd.DataFrame(
        {"kind": [row.get("kind", "all") for row in rows], "prompt": [r["prompt"] for r in rows]}
        | {name: [result["response"] for result in results] for name, results in answers.items()}
    )
    return table.groupby("kind").head(per_kind).sort_values("kind", kind="stable")


# --------------------------------------------------------------------------------------------------
# The file

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>RLHF report</title>
<style>body{{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;font-size:14px}}td,th{{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid #ddd;vertical-align:top}}img{{max-width:100%}}</style>
<h1>Before and after</h1>{body}</html>
"""


def parts(models, answers, beside, pairs):
    """What report.html shows, in order."""
    truth = [("Reward and truth", reward_against_judge(answers))] if models["rlhf"]["judge"] else []
    critic = []
    if pairs is not None:  # who has a reward of his own may do without
        critic.append(("The reward model on held-out pairs", score_histogram(pairs)))
        critic.append(("Calibration", calibration(pairs)))
    first = [("Result", result_table(models)), ("Before and after", judged_bars(models))]
    return [*first, *truth, *critic, ("Answers", beside)]


def picture(figure):
    """A figure as an <img> that needs no other file."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def write_report(folder, report, parts):
    """report.json with the figures, report.html with `parts`: (title, figure, table or text)."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    body = []
    for title, part in parts:
        body.append(f"<h2>{html.escape(title)}</h2>")
        if isinstance(part, Figure):
            body.append(picture(part))
        elif isinstance(part, pd.DataFrame):
            body.append(part.to_html(escape=True, border=0))
        else:
            body.append(f"<p>{html.escape(str(part))}</p>")
    (folder / "report.html").write_text(PAGE.format(body="\n".join(body)), encoding="utf-8")
