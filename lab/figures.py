"""Figures: what was measured, in a form that you can read at a glance.

They have a transparent background and grey text, so that they are legible on light and on dark
pages. They are at most 7.4 inches (740 pixels) wide, so that a narrow window does not shrink them
much. The label of a figure describes it in words: the report and the notebooks use it as its text.
"""

import io
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

from lab.measures import calibrated, categories_in, digits, metrics_in, share_interval, wins

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


@matplotlib.rc_context(STYLE)
def reliability_picture(models):
    """How often the favourite answers of each model are right, against how probable the model finds
    them. A larger dot stands for more answers. None if no truth is known."""
    known = {name: m["calibration"] for name, m in models.items() if m.get("calibration")}
    if not known:
        return None
    figure, (ax,) = canvas(width=5.6, height=3.9)
    ax.plot([0, 1], [0, 1], color=INK, linestyle="--", label="perfectly calibrated")
    told = []
    for name, found in known.items():
        table = pd.DataFrame(found["bins"])
        said, actual, colour = table["mean of the predicted"], table["actual"], colour_of(name)
        ax.plot(said, actual, color=colour, linewidth=1, alpha=0.6)
        sizes = 15 + 300 * table["count"] / table["count"].sum()
        ax.scatter(said, actual, sizes, color=colour, alpha=0.8, label=plain(name))
        told.append(f"{name} {found['error']:.2f}")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set(xlabel="probability of its own answer", ylabel="share that is right")
    legend = figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    for dot in legend.legend_handles[1:]:
        dot.set_sizes([40])
    figure.set_label(f"Calibration of the models. Mean gap (ECE): {', '.join(told)}.")
    return figure


def colour_of(name):
    """The colour of a model: the three of the course have their own, all others share one."""
    return COLOURS.get(name, GREEN)


# --------------------------------------------------------------------------------------------------
# The judge


@matplotlib.rc_context(STYLE)
def judged_bars(models):
    """The means of each model, sampled beside greedy, with lines for their 95 % intervals: the
    judge's scores of all questions and of each kind; without a judge your metrics; without both the
    categories, or else the mean rewards."""
    judged = all(model["judge"] for model in models.values())
    panels = judge_panels(models) if judged else metric_panels(models) or category_panels(models)
    if not panels:
        return reward_bars(models)
    first, *rest = panels
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


def metric_panels(models):
    """The means of each metric, in the form of `judge_panels`."""
    return {
        metric: {
            name: [(model.get(how) or {}).get(metric) for how in ("metrics", "metrics_greedy")]
            for name, model in models.items()
        }
        for metric in metrics_in(models)
    }


def category_panels(models):
    """The means of the categories that have files, in the form of `judge_panels`."""
    return {
        name: {
            model: [(entry.get("categories") or {}).get(name), None]
            for model, entry in models.items()
            if name in (entry.get("categories") or {})
        }
        for name in categories_in(models)
    }


def score_bars(ax, models, size=9.5):
    """For each model a bar for the sampled and, if there are any, for the greedy answers. The axis
    goes from 0 to 1 if all scores do."""
    known = [found for both in models.values() for found in both if found]
    low, high = min(0, *(x["low"] for x in known)), max(0, *(x["high"] for x in known))
    share = low == 0 and high <= 1
    room = 1 if share else (high - low) or 1
    for i, (name, both) in enumerate(models.items()):
        colour = colour_of(name)
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
    colours = [colour_of(name) for name in models]
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
                below.plot(x, mean, "o", color=colour_of(name), markersize=5, clip_on=False)
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
