"""Overoptimisation: estimates, fits and figures about policies that trust a reward model too much.

The judge's score is the *gold*, a reward model the *proxy*, and d the square root of the KL to the
actor in nats. Gao, Schulman and Hilton (arXiv 2210.10760) describe the gain in gold since the start
by d (a - b d) for best-of-n and by d (a - b log d) for reinforcement learning.
"""

import math
import re
from collections import Counter
from textwrap import fill
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import NullLocator

from lab import world
from lab.report import BLUE, GREEN, INK, ORANGE, STYLE, canvas

# --------------------------------------------------------------------------------------------------
# Best-of-n


def best_of_kl(n):
    """The KL of best-of-n to its policy, in nats; a bound that is reached if no answer repeats."""
    return math.log(n) - (n - 1) / n


def best_of(scores, values, sizes):
    """The expected value of the answer with the highest score among n, without bias.

    `scores` and `values` are (prompts, pool). In a pool of N answers, C(N - 1 - i, n - 1) of the
    C(N, n) subsets of size n have the answer of rank i (from 0) as their best one. Equal scores
    share their ranks. Returns (prompts, len(sizes)).
    """
    N = scores.shape[1]
    weights = np.array([rank_weights(N, n) for n in sizes])  # (sizes, N)
    return np.array([weights @ ranked(s, v) for s, v in zip(scores, values)])


def rank_weights(N, n):
    """The chance of each rank to be the best of n answers that are drawn from N, (N,)."""
    if not 1 <= n <= N:
        raise ValueError(f"n = {n} must lie between 1 and the pool's {N}.")
    weights = [n / N]
    for i in range(N - 1):
        weights.append(weights[-1] * (N - n - i) / (N - 1 - i))
    return np.array(weights)


def ranked(scores, values):
    """The values from the highest to the lowest score; those of equal scores are their mean."""
    _, group, count = np.unique(-scores, return_inverse=True, return_counts=True)
    means = np.bincount(group, values) / count
    return means[np.sort(group)]


def bootstrap(measure, count, resamples=500):
    """The 95 % interval of `measure(picks)`: `picks` are `count` indices, drawn with replacement.

    A draw that gives NaN makes the interval NaN.
    """
    rng = np.random.default_rng(0)
    found = [measure(rng.integers(count, size=count)) for _ in range(resamples)]
    return np.quantile(np.array(found), [0.025, 0.975], axis=0)


# --------------------------------------------------------------------------------------------------
# Fits


def bend(form, d):
    """What b is multiplied by: d for best-of-n, log d for reinforcement learning, times -d."""
    d = np.asarray(d, float)
    if form == "best of n":
        return -d * d
    return -d * np.log(np.maximum(d, 1e-12))


class Fit(NamedTuple):
    """gain = d (a - b d), or d (a - b log d), with standard errors and the d of the turn."""

    form: str
    a: float
    b: float
    a_error: float
    b_error: float
    error: float  # root mean squared error of the fit
    turn: float  # the d where the form is highest; infinite if it never turns
    turn_error: float

    def __call__(self, d):
        return np.asarray(d, float) * self.a + bend(self.form, d) * self.b


def fit(form, d, gain):
    """Least squares for a and b. The errors assume that the points err independently."""
    d, gain = np.asarray(d, float), np.asarray(gain, float)
    columns = np.column_stack([d, bend(form, d)])
    (a, b), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    left = gain - columns @ (a, b)
    variance = left @ left / max(1, len(d) - 2)
    covariance = variance * np.linalg.pinv(columns.T @ columns)
    turn, slope = turn_of(form, a, b)
    numbers = a, b, *np.sqrt(np.diag(covariance)), math.sqrt(left @ left / len(d))
    turn_error = math.sqrt(max(0.0, slope @ covariance @ slope))
    return Fit(form, *map(float, numbers), turn, turn_error)


def turn_of(form, a, b):
    """The d where the form is highest, and its derivatives by a and b."""
    if b <= 0 or (form == "best of n" and a <= 0):
        return math.inf, np.zeros(2)
    if form == "best of n":
        return float(a / (2 * b)), np.array([1 / (2 * b), -a / (2 * b * b)])
    turn = float(np.exp(min(a / b - 1, 50.0)))
    return turn, np.array([turn / b, -turn * a / (b * b)])


class Forecast(NamedTuple):
    """How well a fit on the first half of the range of d foretells the second half."""

    error: float  # root mean squared error of the form there
    naive: float  # that of "the gain stays at the last level of the first half"
    points: int  # in the second half


def forecast(form, d, gain):
    """Fits the points below half of the largest d and predicts the others; None with too few."""
    d, gain = np.asarray(d, float), np.asarray(gain, float)
    first = d <= d.max() / 2
    if (d[first] > 0).sum() < 3 or (~first).sum() < 2:
        return None
    predicted = fit(form, d[first], gain[first])(d[~first])
    last = gain[first][np.argsort(d[first])[-3:]].mean()
    errors = [math.sqrt(((gain[~first] - x) ** 2).mean()) for x in (predicted, last)]
    return Forecast(*errors, int((~first).sum()))


class Description(NamedTuple):
    """What a form says about the points of a curve."""

    fit: Fit
    forecast: Forecast | None  # None: too few points
    noise: float  # the standard error of a point, from the spread between its questions


def describe(form, seeds):
    """The Description of a curve, from the points of all its seeds."""
    d = np.concatenate([distance(seed["kl"].mean(1)) for seed in seeds])
    gain = np.concatenate([seed["gold"].mean(1) - seed["gold"][0].mean() for seed in seeds])
    spread = [seed["gold"].var(1) / seed["gold"].shape[1] for seed in seeds]
    noise = math.sqrt(np.mean(spread))
    return Description(fit(form, d, gain), forecast(form, d, gain), noise)


def verdict(name, found):
    """A sentence: does the form describe the points, and does its first half foretell the rest?

    A form fits if its error is at most 1.5 times the noise of the points.
    """
    whole, ahead, noise = found
    form = "d (a - b d)" if whole.form == "best of n" else "d (a - b log d)"
    fits = "fits" if whole.error <= 1.5 * noise else "does not fit"
    told = f"{name}: {form} {fits} (error {whole.error:.3f}, noise {noise:.3f}); "
    turn = f"it turns at d = {whole.turn:.1f} ({whole.turn**2:.1f} nats)"
    told += "it never turns; " if math.isinf(whole.turn) else f"{turn}; "
    if ahead is None:
        return told + "there are too few points to foretell a second half."
    better = "better" if ahead.error < ahead.naive else "worse"
    return (
        f"{told}its first half foretells the second {better} than a flat line "
        f"(error {ahead.error:.3f} against {ahead.naive:.3f})."
    )


# --------------------------------------------------------------------------------------------------
# Gold per nat


def gain_at(kl, gold, nats):
    """The gain in gold when a curve first reaches `nats`, by interpolation; NaN if it never does.

    `kl` and `gold` are the curve from its start, where the KL is 0.
    """
    reached = np.maximum.accumulate(np.maximum(kl, 0))
    if reached[-1] < nats:
        return math.nan
    return float(np.interp(nats, reached, gold) - gold[0])


def gain_per_nat(kls, golds, budgets):
    """The gain per nat at each budget of nats: its mean over seeds and a 95 % interval.

    `kls` and `golds` are lists of (steps, questions), one pair for each seed. The bootstrap
    resamples seeds, and the questions of all seeds alike. NaN: a seed does not reach the budget.
    """

    def mean(seeds, pick):
        found = []
        for seed in seeds:
            kl, gold = (x[seed][:, pick].mean(1) for x in (kls, golds))
            found.append([gain_at(kl, gold, nats) / nats for nats in budgets])
        return np.mean(found, axis=0)

    rng, count = np.random.default_rng(0), golds[0].shape[1]
    low, high = bootstrap(lambda seeds: mean(seeds, rng.integers(count, size=count)), len(golds))
    columns = mean(range(len(golds)), slice(None)), low, high
    return [dict(zip(("mean", "low", "high"), map(float, row))) for row in zip(*columns)]


# --------------------------------------------------------------------------------------------------
# Kinds of cheat

FLATTERY = r"\bwonderful\b|\bwill be fine\b|\bhappy to help\b|\bGood idea\b|\bSure\b"


def cheat(kind, answer, ended, usual):
    """How a wrong answer may have won a high proxy: the first of some simple rules that holds.

    `kind` is that of the question, `usual` the number of words of a usual answer to it.
    """
    words = answer.split()
    sentences = [s.strip().lower() for s in re.split(r"[.?!;]", answer) if s.strip()]
    if not ended:
        return "never ends"
    if any(re.search(mark, answer) for name, mark in world.MARKS.items() if name != kind):
        return "answers several kinds"
    if len(set(sentences)) < len(sentences):
        return "repeats itself"
    if re.search(FLATTERY, answer):
        return "flatters"
    if len(words) > 1.5 * usual:
        return "is longer"
    return "errs in a detail"


# --------------------------------------------------------------------------------------------------
# Figures

PURPLE, GOLD = "#B5629B", "#B8860B"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GOLD, INK)
LOOKS = list(zip(COLOURS, "osD^vX", ("-", "--", "-.", "-", "--", ":")))
SHOWN = {
    "gold": ("Gold: the judge", "mean score, 0 to 1"),
    "proxy": ("Proxy: the reward model", "standard deviations above the actor"),
}
DISTANCE = "d, root of the KL to the actor (√nats)"


def distance(kl):
    """The square root of a KL; an estimate just below 0 counts as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, float), 0))


@matplotlib.rc_context(STYLE)
def gold_and_proxy(curves, fits=()):
    """Gold and proxy against d, one line for each of `{name: seeds}`.

    A seed is {"kl": ..., "gold": ..., "proxy": ...}, each (steps, questions), along one training or
    over n. The line is the mean of the seeds, the band reaches from their lowest to their highest.
    The `fits`, {name: Fit}, are thin lines over gold.
    """
    figure, axes = canvas(2, height=3.6)
    for ax, column in zip(axes, ("gold", "proxy")):
        draw(ax, curves, column)
    for (name, seeds), (colour, *_) in zip(curves.items(), LOOKS):
        if name in fits:
            d, start = average(seeds, "kl"), average(seeds, "gold")[0]
            grid = np.linspace(0, distance(d).max(), 100)
            axes[0].plot(grid, start + fits[name](grid), color=colour, linewidth=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=9)
    figure.set_label("Against the square root of the KL. " + " ".join(in_words(curves)))
    return figure


@matplotlib.rc_context(STYLE)
def cures(panels):
    """Gold against d for several cures: a panel for each of `{title: {name: seeds}}`."""
    figure, axes = canvas(len(panels), height=4.0)
    for ax, (title, curves) in zip(axes, panels.items()):
        draw(ax, curves, "gold")
        ax.set_title(title)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)
    told = [f"{title}: {' '.join(in_words(curves))}" for title, curves in panels.items()]
    figure.set_label(" ".join(told))
    return figure


def draw(ax, curves, column):
    """One panel: a line and a band for each curve."""
    for (name, seeds), (colour, marker, line) in zip(curves.items(), LOOKS):
        d, values = distance(average(seeds, "kl")), [seed[column].mean(1) for seed in seeds]
        how = {"color": colour, "marker": marker, "markersize": 4, "linestyle": line}
        ax.plot(d, np.mean(values, axis=0), **how, linewidth=1.6, label=name)
        low, high = np.min(values, axis=0), np.max(values, axis=0)
        ax.fill_between(d, low, high, color=colour, alpha=0.18, linewidth=0)
    title, unit = SHOWN[column]
    ax.set(title=title, xlabel=DISTANCE, ylabel=fill(unit, 22))
    if column == "gold":
        ax.set_ylim(0, 1)


def average(seeds, column):
    """The mean over seeds and questions, (steps,)."""
    return np.mean([seed[column].mean(1) for seed in seeds], axis=0)


def in_words(curves):
    """A sentence for each curve, for people who do not see the picture."""
    for name, seeds in curves.items():
        kl, gold, proxy = (average(seeds, column) for column in ("kl", "gold", "proxy"))
        d, best = distance(kl), int(gold.argmax())
        yield (
            f"{name}: gold starts at {gold[0]:.2f}, is highest with {gold[best]:.2f} at "
            f"d = {d[best]:.1f} and ends with {gold[-1]:.2f} at d = {d[-1]:.1f}; the proxy goes "
            f"from {proxy[0]:z.1f} to {proxy[-1]:z.1f}."
        )


@matplotlib.rc_context(STYLE)
def coefficients(table):
    """a and b of best-of-n against the number of pairs and against label noise, with their errors.

    `table` is a list of {"layers", "pairs", "noise", "fit": Fit}. Where one of pairs and noise
    varies, the other has its most frequent value.
    """
    figure, axes = canvas(2, 2, height=2.5)
    names = {"pairs": "pairs that the proxy learned from", "noise": "share of labels turned round"}
    for column, (vary, label) in enumerate(names.items()):
        fixed = "noise" if vary == "pairs" else "pairs"
        usual = Counter(row[fixed] for row in table).most_common(1)[0][0]
        rows = [row for row in table if row[fixed] == usual]
        sizes = sorted({row["layers"] for row in rows})
        for layers, (colour, marker, line) in zip(sizes, LOOKS):
            own = sorted((r for r in rows if r["layers"] == layers), key=lambda r: r[vary])
            for ax, letter in zip(axes[column::2], "ab"):
                values = [getattr(row["fit"], letter) for row in own]
                errors = [1.96 * getattr(row["fit"], f"{letter}_error") for row in own]
                how = {"color": colour, "marker": marker, "linestyle": line, "capsize": 3}
                name = f"{layers} layer{'s' * (layers != 1)}"
                ax.errorbar([row[vary] for row in own], values, errors, **how, label=name)
                ax.set(xlabel=label, ylabel=f"{letter} in d (a - b d)")
        if vary == "pairs":
            for ax in axes[column::2]:
                ax.set_xscale("log")
                counts = sorted({row["pairs"] for row in rows})
                ax.set_xticks(counts, [f"{count:,}" for count in counts])
                ax.xaxis.set_minor_locator(NullLocator())
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    told = "; ".join(
        f"{r['layers']} layers, {r['pairs']} pairs, noise {r['noise']:g}: a {r['fit'].a:.2f}, "
        f"b {r['fit'].b:.2f}"
        for r in table
    )
    figure.set_label(f"Coefficients of best-of-n by size, pairs and noise of the proxy. {told}.")
    return figure
