"""Figures, tables and the report: what was measured, in a form that you can read at a glance.

Figures have a transparent background and grey text, so that they are legible on light and on dark
pages. They are at most 7.4 inches (740 pixels) wide, so that a narrow window does not shrink them
much. The label of a figure describes it in words: the report and the notebooks use it as its text.
"""

import base64
import html
import io
import json
import math
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#008A66"  # Okabe-Ito, the green a little darker
INK, PALE, DARK = "#7C7C7C", "#F4F4F4", "#1A1A1A"
COLOURS = {"base": "#6E6E6E", "actor": BLUE, "rlhf": ORANGE}
TINTS = {"#6E6E6E": "#CDCDCD", BLUE: "#9CCBE6", ORANGE: "#F5B98F", GREEN: "#8FD6BF"}
HALO = [withStroke(linewidth=3, foreground="white"), Normal()]  # dark lines on dark pages
WIDTH = 7.4
STYLE = {
    "figure.facecolor": "none",
    "figure.dpi": 100,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "text.color": INK,
    "legend.frameon": False,
    "font.size": 10,
    "svg.hashsalt": "course",
}


def canvas(columns=1, rows=1, width=WIDTH, height=2.2):
    """An empty figure of `width` inches with rows of `height` inches, and a flat list of axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = [dressed(ax) for ax in figure.subplots(rows, columns, squeeze=False).flatten()]
    return figure, axes


def dressed(ax):
    """Axes whose ticks and grid have the style as well: matplotlib makes them when it draws."""
    ax.tick_params(which="both", color=INK, labelcolor=INK, grid_color=INK, grid_alpha=0.25)
    ax.grid(True)
    ax.set_axisbelow(True)
    return ax


def plain(text, limit=40):
    """Text as a plot may show it: dollars are not mathematics, line ends are visible."""
    text = text.replace("\n", "\\n").strip() or "(space)"
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


# --------------------------------------------------------------------------------------------------
# Curves


@matplotlib.rc_context(STYLE)
def curves(history, panels, x="step", columns=2):
    """A panel for each `column: (title, unit)`; `(title, unit, "log")` has a logarithmic axis.

    The thin line is what was measured at each step. A noisy column also has a thick line: the
    mean of the steps around each step. It looks as far ahead as back, so it does not lag.
    """
    if not panels:
        return canvas(1)[0]
    columns = min(columns, len(panels))
    figure, axes = canvas(columns, -(-len(panels) // columns), height=2.1)
    for ax, (column, (title, unit, *scale)) in zip(axes, panels.items()):
        empty = pd.Series(dtype=float)
        line = history[[x, column]].dropna() if column in history else {x: empty, column: empty}
        steps, values = np.asarray(line[x], float), np.asarray(line[column], float)
        if noisy(values):
            window = max(5, len(values) // 20)
            ax.plot(steps, values, color=INK, alpha=0.55, linewidth=0.7, label="each step")
            label = "mean of the steps around it"
            ax.plot(steps, centred_mean(values, window), color=BLUE, linewidth=2, label=label)
        else:
            ax.plot(steps, values, color=BLUE, marker="o" if len(values) < 12 else None)
        if "log" in scale and len(values) and values.min() > 0:
            log_axis(ax, values)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        ax.set(title=title, xlabel=x, ylabel=fill(unit, 22))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    explained = [ax.get_legend_handles_labels() for ax in axes]
    if any(labels for _, labels in explained):
        handles, labels = next(pair for pair in explained if pair[1])
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
        figure.set_figheight(figure.get_figheight() + 0.3)
    titles = [title for title, *_ in panels.values()]
    figure.set_label(f"Curves over the {x}s: {', '.join(titles)}.")
    return figure


def noisy(values):
    """Whether a curve goes up and down so often that a reader needs its mean as well."""
    moves = np.diff(values)
    moves = np.sign(moves[moves != 0])
    return len(values) >= 40 and len(moves) > 1 and bool((moves[1:] != moves[:-1]).mean() > 0.25)


def centred_mean(values, window):
    """The mean over `window` values around each one. The window shrinks towards both ends; the
    first and the last few values, which have next to no neighbours, get none."""
    half, n, out = window // 2, len(values), np.full(len(values), np.nan)
    for i in range(n):
        reach = min(half, i, n - 1 - i)
        if reach >= half / 3:
            out[i] = values[i - reach : i + reach + 1].mean()
    return out


def log_axis(ax, values):
    """A logarithmic y-axis with ticks at round numbers, also if the values are close together."""
    ratio = values.max() / values.min()
    ax.set_yscale("log")
    subs = (1,) if ratio > 500 else (1, 2, 5)
    ax.yaxis.set_major_locator(LogLocator(subs=subs) if ratio > 8 else MaxNLocator(5))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


LEARNING = {  # column: (title, unit), what to watch while an algorithm learns
    "reward": ("Reward", "standard deviations above the actor"),
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
        "loss": ("Loss", "nats per pair", "log"),
        "accuracy": ("Chosen likelier than before", "share of pairs"),
        "margin": ("Chosen minus rejected", "implicit reward"),
        "chosen_logprob": ("Chosen answers", "log-prob, nats"),
        "rejected_logprob": ("Rejected answers", "log-prob, nats"),
        "grad_norm": ("Gradient norm", "before clipping"),
    },
}


def panels(algorithm):
    """The curves for an algorithm; your own algorithm shows the curves that all have."""
    return PANELS.get(algorithm, LEARNING)


# --------------------------------------------------------------------------------------------------
# Tokens


@matplotlib.rc_context(STYLE)
def token_strip(answers, per_line=9):
    """Numbers under the tokens of one or more answers, `{title: (tokens, rows)}`.

    `rows` is `{name: one number per token}`. Orange is above zero, blue below. Each row of each
    answer has its own colour scale, so colours compare tokens and not rows. A long answer goes on
    in the next line.
    """
    strips = []  # title or "", tokens, names, numbers, scales
    for title, (tokens, rows) in answers.items():
        values = np.array([list(row) for row in rows.values()], dtype=float)
        scale = np.abs(values).max(axis=1, keepdims=True) + 1e-9
        for start in range(0, len(tokens), per_line):
            part = slice(start, start + per_line)
            strips.append(
                (title if not start else "", tokens[part], list(rows), values[:, part], scale)
            )
    heights = [0.3 * len(names) + (0.75 if title else 0.45) for title, _, names, *_ in strips]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False, height_ratios=heights).flatten()
    colours = LinearSegmentedColormap.from_list("below, above", [BLUE, PALE, ORANGE])
    for ax, (title, tokens, names, values, scale) in zip(axes, strips):
        dressed(ax).imshow(values / scale, cmap=colours, vmin=-1.7, vmax=1.7, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:z.2f}", ha="center", va="center", fontsize=9, color=DARK)
        ax.set_xticks(range(len(tokens)), [plain(token, 11) for token in tokens], fontsize=8.5)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set_xlim(-0.5, per_line - 0.5)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        if title:
            ax.set_title(plain(title, 90), loc="left", fontsize=10)
    figure.supxlabel(
        "Orange: above 0. Blue: below 0. Each row has its own colour scale.", fontsize=9, color=INK
    )
    said = [
        f"{title}: " + "; ".join(f"{name} {numbers(row)}" for name, row in rows.items())
        for title, (_, rows) in answers.items()
    ]
    figure.set_label("Numbers per token. " + " ".join(said))
    return figure


def numbers(row):
    return " ".join(f"{float(value):z.2f}" for value in row)


@matplotlib.rc_context(STYLE)
def value_curves(tokens, curves, reward=None):
    """What the value model expects before each token of one answer, `{name: values}`, as lines.
    `reward` is the reward that the whole answer gets in the end."""
    figure, (ax,) = canvas(height=3.1)
    for (name, values), colour in zip(curves.items(), (BLUE, ORANGE, GREEN)):
        ax.plot(range(len(tokens)), list(values), "o-", color=colour, markersize=4, label=name)
    if reward is not None:
        ax.axhline(reward, color=INK, linestyle="--", label="reward of the whole answer")
    ax.set_xticks(range(len(tokens)), [plain(t, 14) for t in tokens], rotation=45, ha="right")
    ax.set(xlabel="the value is read before this token", ylabel="value (expected reward)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    ends = [f"{name} from {list(v)[0]:z.2f} to {list(v)[-1]:z.2f}" for name, v in curves.items()]
    told = "" if reward is None else f" The answer's reward is {reward:z.2f}."
    figure.set_label(f"Values along the answer: {', '.join(ends)}.{told}")
    return figure


@matplotlib.rc_context(STYLE)
def next_token_bars(tokens, before, after, names=("actor", "rlhf"), top=8):
    """Probabilities of the next token under two models: the `top` tokens that are likeliest under
    either model, and the rest together."""
    both = np.array([list(map(float, before)), list(map(float, after))])  # (2, V)
    best = np.argsort(-both.max(axis=0), kind="stable")[:top]
    labels = [plain(tokens[i], 20) for i in best]
    shares = both[:, best]
    rest = np.clip(1 - shares.sum(axis=1), 0, 1)
    if len(tokens) > top or rest.max() > 0.005:
        labels, shares = [*labels, "all others"], np.column_stack([shares, rest])
    figure, (ax,) = canvas(height=0.42 * len(labels) + 1)
    for i, (name, row) in enumerate(zip(names, shares)):
        y = np.arange(len(labels)) + (i - 0.5) * 0.38
        ax.barh(y, row, 0.36, color=COLOURS.get(name, (BLUE, ORANGE)[i]), label=name)
        for place, share in zip(y, row):
            inside = share > 0.9
            ax.text(
                share + (-0.01 if inside else 0.01), place, f"{share:.2f}", va="center", fontsize=9,
                ha="right" if inside else "left", color="white" if inside else INK,
            )  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlim=(0, 1), xlabel="probability of the next token")
    ax.legend(loc="lower right")
    pairs = [f"{label} {a:.2f} and {b:.2f}" for label, a, b in zip(labels, *shares)]
    figure.set_label(f"Next token, {names[0]} and {names[1]}: {', '.join(pairs)}.")
    return figure


@matplotlib.rc_context(STYLE)
def clip_plot(loss_of_ratio, clip_ratio):
    """The loss of one token against its ratio, for a good and for a bad token.

    `loss_of_ratio(ratio, advantage)` is the loss itself; where it is flat it has no gradient.
    """
    figure, axes = canvas(2, height=2.9)
    reach = min(0.95, 2.5 * clip_ratio)
    ratios, told = np.linspace(1 - reach, 1 + reach, 401), []
    for ax, advantage in zip(axes, (1.0, -1.0)):
        losses = np.array([float(loss_of_ratio(float(ratio), advantage)) for ratio in ratios])
        flat = np.abs(np.gradient(losses, ratios)) < 1e-3
        ax.plot(ratios, np.where(flat, np.nan, losses), color=BLUE, linewidth=2, label="gradient")
        ax.plot(
            ratios, np.where(flat, losses, np.nan), color=ORANGE, linewidth=3, label="no gradient"
        )
        for edge in (1 - clip_ratio, 1 + clip_ratio):
            ax.axvline(edge, color=INK, linestyle="--", linewidth=1)
        ax.plot(1, float(loss_of_ratio(1.0, advantage)), "o", color=INK)
        word = "better" if advantage > 0 else "worse"
        ax.set(title=f"Advantage {advantage:+.0f}: {word} than expected", ylabel="loss")
        ax.set_xlabel("ratio: probability now / when sampled")
        ax.set_xticks([1 - clip_ratio, 1, 1 + clip_ratio])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        told.append(f"advantage {advantage:+.0f}: {gaps(ratios, flat)}")
    axes[0].legend()
    figure.set_label(f"The clipped loss against the ratio, {'; '.join(told)}.")
    return figure


def gaps(ratios, flat):
    """In words: where a loss has no gradient."""
    if not flat.any():
        return "it has a gradient everywhere"
    return f"it has no gradient between {ratios[flat][0]:.2f} and {ratios[flat][-1]:.2f}"


# --------------------------------------------------------------------------------------------------
# The reward model on pairs


def wins(pairs):
    """1 where the chosen answer has the higher score, 0 where the rejected has; a tie is half."""
    return 0.5 + 0.5 * np.sign(pairs["chosen"] - pairs["rejected"])


def share_interval(mean, count):
    """Wilson's 95 % interval of a share (low, high); it has a width at 0 and at 1 as well."""
    z2 = 1.96**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 / (1 + z2 / count) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2))
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


@matplotlib.rc_context(STYLE)
def score_histogram(pairs):
    """The scores of chosen and of rejected answers, one panel per kind."""
    kinds = sorted(pairs["kind"].unique())
    columns = min(2, len(kinds))
    figure, axes = canvas(columns, -(-len(kinds) // columns), height=2.3)
    edges = nice_bins(pairs[["chosen", "rejected"]].to_numpy(), 24)
    right = wins(pairs)
    for ax, kind in zip(axes, kinds):
        part = pairs[pairs["kind"] == kind]
        ax.hist(part["rejected"], edges, color=ORANGE, alpha=0.7, label="rejected")
        ax.hist(part["chosen"], edges, color=BLUE, alpha=0.7, label="chosen")
        share = right[part.index].mean()
        ax.set(title=f"{plain(kind)}: {share:.0%} right", xlabel="score", ylabel="answers")
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    axes[0].legend(fontsize=9)
    told = [f"{kind} {right[pairs['kind'] == kind].mean():.0%}" for kind in kinds]
    figure.set_label(f"Scores of chosen and rejected answers. Pairs right: {', '.join(told)}.")
    return figure


def nice_bins(values, most):
    """Edges at round numbers that hold all values, also when all values are equal."""
    low, high = float(np.min(values)), float(np.max(values))
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    return MaxNLocator(most).tick_values(low, high)


def calibrated(pairs):
    """The table behind `calibration`: predicted and actual win rate in fixed bins, with counts."""
    margin = (pairs["chosen"] - pairs["rejected"]).to_numpy(dtype=float)
    said = 1 / (1 + np.exp(-np.abs(margin)))
    group = np.minimum(((said - 0.5) * 10 + 1e-9).astype(int), 4)
    rows = []
    for i in range(5):
        here = group == i
        if here.any():
            won = wins(pairs)[here].mean()
            low, high = share_interval(won, here.sum())
            name = f"{0.5 + i / 10:.1f} to {0.6 + i / 10:.1f}"
            rows.append((name, said[here].mean(), won, low, high, int(here.sum())))
    columns = ["predicted", "mean of the predicted", "actual", "low", "high", "pairs"]
    return pd.DataFrame(rows, columns=columns)


@matplotlib.rc_context(STYLE)
def calibration(pairs):
    """How often the higher score wins, against how often the reward model says it will."""
    table = calibrated(pairs)
    figure, (ax,) = canvas(width=5.6, height=3.9)
    bottom = min(0.4, math.floor(10 * table["low"].min() - 0.5) / 10)
    ax.plot([0.5, 1], [0.5, 1], color=INK, linestyle="--", label="perfectly calibrated")
    bars = [table["actual"] - table["low"], table["high"] - table["actual"]]
    ax.errorbar(
        table["mean of the predicted"], table["actual"], np.abs(bars), color=BLUE, marker="o",
        linestyle="none", capsize=4, label="reward model, with 95 % interval",
    )  # fmt: skip
    for _, row in table.iterrows():
        middle = float(row["predicted"][:3]) + 0.05
        ax.text(middle, bottom + 0.015, f"{row['pairs']:,.0f}", ha="center", fontsize=9)
    ax.text(0.497, bottom + 0.085 * (1 - bottom), "number of pairs in each bin:", fontsize=9)
    ax.set(xlim=(0.49, 1.01), ylim=(bottom, 1.02))
    ax.set(xlabel="win rate that the score difference predicts", ylabel="actual win rate")
    ax.set_xticks(np.arange(5, 11) / 10)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    told = [f"{r['predicted']}: {r['actual']:.2f} of {r['pairs']}" for _, r in table.iterrows()]
    figure.set_label(f"Actual win rate by predicted win rate: {', '.join(told)}.")
    return figure


# --------------------------------------------------------------------------------------------------
# The judge


@matplotlib.rc_context(STYLE)
def judged_bars(models):
    """The means of each model, sampled beside greedy, with lines for their 95 % intervals: the
    judge's scores of all questions and of each kind; without a judge your metrics; without both the
    mean rewards."""
    judged = all(model["judge"] for model in models.values())
    if not judged and not metrics_in(models):
        return reward_bars(models)
    first, *rest = panels = judge_panels(models) if judged else metric_panels(models)
    columns = 2 if rest else 1
    heights = [2.9] + [2.0] * -(-len(rest) // columns)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    ax = dressed(figure.add_subplot(grid[0, :]))
    score_bars(ax, panels[first])
    ax.set_title(plain(first), loc="left")
    ax.set_ylabel("judge's score" if judged else "mean")
    ax.legend(handles=legend_of(panels), loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for i, title in enumerate(rest):
        ax = dressed(figure.add_subplot(grid[1 + i // columns, i % columns]))
        score_bars(ax, panels[title], size=8)
        ax.set_title(plain(title), fontsize=10)
    told = {"The judge's scores": panels[first]} if judged else panels
    figure.set_label(" ".join(f"{title}. {in_words(found)}" for title, found in told.items()))
    return figure


def judge_panels(models):
    """The judge's means of all questions, then of each kind: {title: {model: (sampled, greedy)}}.

    A mean has its interval beside it. It is None if there are no greedy answers.
    """
    both = {name: (model["judge"], model.get("judge_greedy")) for name, model in models.items()}
    kinds = list(next(iter(models.values()))["judge"]["kinds"])
    found = {"All questions": both}
    for kind in kinds if len(kinds) > 1 else []:
        found[kind] = {
            name: [judge and score_of_kind(judge, kind) for judge in pair]
            for name, pair in both.items()
        }
    return found


def score_of_kind(judge, kind):
    """Mean and interval of one kind; the mean three times where the interval is not known."""
    mean = judge["kinds"].get(kind, float("nan"))
    low, high = judge.get("intervals", {}).get(kind, (mean, mean))
    return {"mean": mean, "low": low, "high": high}


def metrics_in(models):
    """The names of your own metrics, in their order."""
    return list(dict.fromkeys(x for model in models.values() for x in model.get("metrics") or {}))


def metric_panels(models):
    """The means of each metric, in the form of `judge_panels`."""
    return {
        metric: {
            name: [(model.get(how) or {}).get(metric) for how in ("metrics", "metrics_greedy")]
            for name, model in models.items()
        }
        for metric in metrics_in(models)
    }


def score_bars(ax, models, size=9.5):
    """For each model a bar for the sampled and, if there are any, for the greedy answers. The axis
    goes from 0 to 1 if all scores do."""
    known = [found for both in models.values() for found in both if found]
    low, high = min(0, *(x["low"] for x in known)), max(0, *(x["high"] for x in known))
    share = low == 0 and high <= 1
    room = 1 if share else (high - low) or 1
    for i, (name, both) in enumerate(models.items()):
        colour = COLOURS.get(name, GREEN)
        both = zip(both, ((colour, "white"), (TINTS[colour], DARK)))
        both = [(found, *colours) for found, colours in both if found]
        for j, (found, fill_colour, text_colour) in enumerate(both):
            x, mean = i + (j - (len(both) - 1) / 2) * 0.42, found["mean"]
            ax.bar(x, mean, 0.4, color=fill_colour)
            ends = [found["low"], found["high"]]
            ax.plot([x, x], ends, color=DARK, linewidth=1.5, path_effects=HALO)
            inside = share and mean > 0.17
            above = max(0, found["high"]) + 0.03 * room
            above = min(above, 0.85) if share else above
            place, shade = (0.03, text_colour) if inside else (above, INK)
            text = ax.text(x, place, digits(mean), ha="center", fontsize=size, color=shade)
            if inside:  # an interval that reaches down to the number does not cross it out
                text.set_path_effects([withStroke(linewidth=3, foreground=fill_colour), Normal()])
    ax.set_xticks(range(len(models)), [plain(name) for name in models], fontsize=size + 0.5)
    ax.set(xlim=(-0.6, len(models) - 0.4))
    ax.set_ylim((0, 1) if share else (low - 0.05 * room * (low < 0), high + 0.2 * room))
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")


def legend_of(panels):
    greedy = any(both[1] for models in panels.values() for both in models.values())
    handles = [Patch(color="#555555", label="sampled")]
    return handles + [Patch(color="#BDBDBD", label="greedy (temperature 0)")] * greedy


def in_words(models):
    """Means as a sentence, for people who do not see the picture."""
    told = []
    for name, (sampled, greedy) in models.items():
        also = f", greedy {digits(greedy['mean'])}" if greedy else ""
        told.append(f"{name}: sampled {digits(sampled['mean'])}{also}")
    return "; ".join(told) + "."


@matplotlib.rc_context(STYLE)
def headline(models):
    """The judge's scores of base, actor and rlhf in one small picture, for the README."""
    if not all(model["judge"] for model in models.values()):
        return judged_bars(models)
    figure, (ax,) = canvas(width=6.4, height=2.7)
    panels = judge_panels(models)
    found = panels["All questions"]
    score_bars(ax, found, size=10.5)
    ax.set_ylabel("judge's score")
    ax.legend(handles=legend_of(panels), loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.set_label("The judge's scores. " + in_words(found))
    return figure


def svg(figure):
    """A figure as SVG text that is the same every time."""
    data = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(data, format="svg", metadata={"Date": None, "Title": figure.get_label()})
    return data.getvalue()


@matplotlib.rc_context(STYLE)
def reward_bars(models):
    """The mean reward of each model, for rows that have neither a judge nor a metric."""
    figure, (ax,) = canvas(width=5.6, height=3.2)
    colours = [COLOURS.get(name, GREEN) for name in models]
    means = [model["reward"] for model in models.values()]
    bars = ax.bar([plain(name) for name in models], means, color=colours)
    ax.bar_label(bars, [f"{mean:z.2f}" for mean in means], padding=3)
    ax.margins(y=0.15)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.grid(False, axis="x")
    ax.set_ylabel("mean reward\n" + fill(LEARNING["reward"][1], 22))
    told = ", ".join(f"{name} {mean:z.2f}" for name, mean in zip(models, means))
    figure.set_label(f"Mean rewards: {told}.")
    return figure


VERDICTS = {"right": BLUE, "partly right": "#9CCBE6", "wrong": ORANGE}


@matplotlib.rc_context(STYLE)
def reward_against_judge(answers, names=("actor", "rlhf")):
    """What the judge says about answers, by their reward: one column of panels per model.

    Above: how many answers got which reward, and whether the judge finds them right (score 1),
    partly right or wrong (0). Below: the judge's mean in each bin that holds answers. Without a
    judge a metric takes its place.
    """
    tables = {name: pd.DataFrame(answers[name]) for name in names if name in answers}
    metric, verdicts, mean_of = stand_in(answers), list(VERDICTS), "judge's mean"
    if metric:
        verdicts, mean_of = [f"{metric} = 1", "between", f"{metric} = 0"], f"mean of {metric}"
        for name, table in tables.items():
            table["judge"] = [answer["metrics"][metric] for answer in answers[name]]
    tables = {name: table.dropna(subset=["judge", "reward"]) for name, table in tables.items()}
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        figure, (ax,) = canvas(height=1)
        ax.set_axis_off()
        figure.set_label("No answer has both a reward and a judge's score.")
        ax.text(0.5, 0.5, figure.get_label(), ha="center")
        return figure
    edges = nice_bins(np.concatenate([table["reward"] for table in tables.values()]), 14)
    figure, axes = canvas(len(tables), 2, height=2.4)
    told = []
    for i, (name, table) in enumerate(tables.items()):
        above, below = axes[i], axes[len(tables) + i]
        reward, judge = table["reward"].to_numpy(float), table["judge"].to_numpy(float)
        groups = {"right": judge > 0.99, "partly right": (judge <= 0.99) & (judge >= 0.01)}
        groups["wrong"] = judge < 0.01
        parts = [reward[group] for group in groups.values()]
        colours = [VERDICTS[group] for group in groups]
        above.hist(parts, edges, stacked=True, color=colours, label=verdicts)
        above.set(title=plain(name), ylabel="answers" if not i else None)
        for low, high in zip(edges[:-1], edges[1:]):
            last = high == edges[-1]
            here = judge[(reward >= low) & ((reward <= high) if last else (reward < high))]
            if len(here):
                x, mean = (low + high) / 2, here.mean()
                below.plot([x, x], share_interval(mean, len(here)), color=INK, linewidth=1.5)
                below.plot(
                    x, mean, "o", color=COLOURS.get(name, GREEN), markersize=5, clip_on=False
                )
                below.text(x, 1.05, f"{len(here)}", ha="center", fontsize=7.5, rotation=90)
        below.set(ylim=(0, 1), xlim=(edges[0], edges[-1]), xlabel="reward")
        below.set_ylabel(plain(mean_of) if not i else None)
        above.set_xlim(edges[0], edges[-1])
        top = table.nlargest(max(1, len(table) // 10), "reward")["judge"]
        told.append(f"{name}: {mean_of} {judge.mean():.2f}, of the top tenth {top.mean():.2f}")
    axes[0].legend(fontsize=8)
    figure.set_label(f"{'Metric' if metric else 'Judge'}'s scores by reward. {'; '.join(told)}.")
    return figure


def stand_in(answers):
    """The metric that takes the judge's place if it knows none of the answers: the first whose
    values all lie between 0 and 1. None if there is a judge, or no such metric."""
    results = [result for part in answers.values() for result in part]
    if any(result["judge"] is not None for result in results):
        return None
    known = [result.get("metrics", {}) for result in results]
    names = known[0] if known else ()
    return next((x for x in names if all(0 <= values[x] <= 1 for values in known)), None)


# --------------------------------------------------------------------------------------------------
# Tables


def interval(values, resamples=2000):
    """Mean and its 95 % interval, by bootstrap; by Wilson's formula if all values are 0 or all are
    1, because resampling then finds no spread at all."""
    values = np.asarray(values, dtype=float)
    mean = values.mean().item()
    if (values == mean).all() and mean in (0, 1):
        low, high = share_interval(mean, len(values))
        return {"mean": mean, "low": low, "high": high}
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return {"mean": mean, "low": low.item(), "high": high.item()}


def judged(results):
    """The judge's mean, its interval, and both by kind; None if no row says what is right."""
    table = pd.DataFrame(results).dropna(subset="judge")
    if table.empty:
        return None
    kinds = {kind: interval(part) for kind, part in table.groupby("kind")["judge"]}
    return interval(table["judge"]) | {
        "kinds": {kind: found["mean"] for kind, found in kinds.items()},
        "intervals": {kind: [found["low"], found["high"]] for kind, found in kinds.items()},
    }


def measured(results):
    """The mean of each of your metrics, with its interval; None if there are no answers."""
    table = pd.DataFrame([result.get("metrics", {}) for result in results])
    return {name: interval(table[name]) for name in table} or None


def distinct_2(texts):
    """Share of different pairs of neighbouring words among all such pairs."""
    pairs = [pair for text in texts for words in [text.split()] for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def summarise(sampled, greedy=()):
    """One model's entry in report.json, from its answers at temperature 1 and its greedy ones."""
    table = pd.DataFrame(sampled)
    means = [name for name in ("reward", "kl", "length", "eos") if name in table]
    own = {"metrics": measured(sampled), "metrics_greedy": measured(greedy)}
    return {
        "questions": len(table),
        "judge": judged(sampled),
        "judge_greedy": judged(greedy) if greedy else None,
        **(own if "metrics" in table else {}),
        **{name: float(table[name].mean()) for name in means},
        "distinct_2": distinct_2(table["response"]),
    }


def critic_summary(pairs):
    """How often the reward model is right about pairs, overall and by kind; None without pairs."""
    if pairs is None:
        return None
    right = wins(pairs)
    kinds = right.groupby(pairs["kind"]).mean()
    return {"accuracy": float(right.mean()), "kinds": {k: float(v) for k, v in kinds.items()}}


def by_flaw(pairs):
    """How often the reward model is right, by what is wrong with the rejected answer."""
    table = wins(pairs).groupby(pairs["flaw"]).agg(["mean", "size"])
    table = table.sort_values("mean").reset_index()
    return table.set_axis(["flaw of the rejected answer", "right", "pairs"], axis=1)


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


def digits(value, like=None):
    """A number with two decimals; with fewer if it, or the number `like` it, is 10 or more."""
    whole = len(f"{abs(value if like is None else like):.0f}")
    return f"{value:z,.{max(0, 3 - whole)}f}"


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
