"""Numbers: what an evaluation counts, and how sure it can be of it.

Words are what spaces separate; in Chinese and Japanese text every character counts as a word.
"""

import math
import random
import re
from collections import Counter

import numpy as np
import pandas as pd

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")

# --------------------------------------------------------------------------------------------------
# Means and how sure they are


def share_interval(mean, count):
    """Wilson's 95 % interval of a share (low, high); it has a width at 0 and at 1 as well."""
    z2 = 1.96**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 / (1 + z2 / count) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2))
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def interval(values, resamples=2000):
    """Mean and its 95 % interval, by bootstrap; by Wilson's formula if all values are 0 or all are
    1, because resampling then finds no spread at all."""
    values = np.asarray(values, dtype=float)
    mean = values.mean().item()
    if (values == mean).all() and mean in (0, 1):
        low, high = share_interval(mean, len(values))
        return {"mean": mean, "low": low, "high": high}
    low, high = np.quantile(resampled_means(values, resamples), [0.025, 0.975])
    return {"mean": mean, "low": low.item(), "high": high.item()}


def resampled_means(values, resamples):
    """The means of `resamples` draws of as many values, with replacement.

    Scores mostly take few different values: then it is enough to draw how often each one comes.
    """
    rng, count = np.random.default_rng(0), len(values)
    levels, times = np.unique(values, return_counts=True)
    if len(levels) <= 50:
        return rng.multinomial(count, times / count, size=resamples) @ levels / count
    return values[rng.integers(count, size=(resamples, count))].mean(axis=1)


def paired_difference(first, second, resamples=2000):
    """The mean of second - first and its 95 % interval, for two lists of scores of the same
    questions (the paired bootstrap: it draws questions, and both scores of a question together).

    Where both find the same questions hard, this interval is narrower than those of the two means.
    """
    return interval(np.asarray(second, dtype=float) - np.asarray(first, dtype=float), resamples)


def win_rate(own, other):
    """How often `own` scores higher than `other` on the same question, with its interval; a tie is
    half. Questions without a score do not count; None if there is no other question."""
    own, other = np.asarray(own, dtype=float), np.asarray(other, dtype=float)
    known = ~(np.isnan(own) | np.isnan(other))
    if not known.any():
        return None
    return interval(0.5 + 0.5 * np.sign(own - other)[known]) | {"questions": int(known.sum())}


WHO = ("judge", "reward", "watchdog")  # scores an answer, where there is such a one


def win_rates(results, others, comparisons=()):
    """{who compares: how often the answers win against the other answers to the same questions}.

    `comparisons` are the lines of compared.jsonl: a person counts who has compared these answers.
    """
    others = others[: len(results)]
    scores = {who: [[r.get(who) for r in part] for part in (results, others)] for who in WHO}
    scores["person"] = choices(results, others, comparisons)
    found = {who: win_rate(*both) for who, both in scores.items() if both[0]}
    return {who: rate for who, rate in found.items() if rate}


def choices(results, others, comparisons):
    """The choices of a person between two answers, as two lists of scores: 1 and 0, 0 and 1, or a
    tie. Only comparisons of these very answers count."""
    texts = {(r["prompt"], r["response"], o["response"]) for r, o in zip(results, others)}
    own, other = [], []
    for row in comparisons:
        for mine, side, against in (("left", "left", "right"), ("right", "right", "left")):
            key = row["prompt"], row[side], row[against]
            if key in texts and row["choice"] != "skip":
                own.append(float(row["choice"] == mine))
                other.append(float(row["choice"] == against))
    return own, other


def differences(first, second):
    """How much more the second answers score than the first, on the questions that both answer: a
    line for each score, with the interval of the difference by paired bootstrap."""
    waiting, both, lines = {}, [], []
    for result in first:
        waiting.setdefault(result["prompt"], []).append(result)
    for result in second:
        if waiting.get(result["prompt"]):
            both.append((waiting[result["prompt"]].pop(0), result))
    own = dict.fromkeys(name for _, result in both for name in result.get("metrics", {}))
    for name in (*WHO, "length", *own):
        pairs = [(score_of(a, name), score_of(b, name)) for a, b in both]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            lines.append({"score": name} | difference_line(*zip(*pairs)))
    return lines


def as_result(line):
    """The line of an answer in answers.jsonl as a result for `differences`: the score of a category
    is a metric, and its prompts are none of the questions."""
    if "category" not in line:
        return line
    prompt = f"{line['category']}: {line['prompt']}"
    return {"prompt": prompt, "metrics": {line["category"]: line["score"]}}


def difference_line(first, second):
    means = {"first": float(np.mean(first)), "second": float(np.mean(second))}
    return means | {"difference": paired_difference(first, second), "questions": len(first)}


def score_of(result, name):
    return result["metrics"].get(name) if name in result.get("metrics", {}) else result.get(name)


def digits(value, like=None):
    """A number with two decimals; with fewer if it, or the number `like` it, is 10 or more."""
    whole = len(f"{abs(value if like is None else like):.0f}")
    return f"{value:z,.{max(0, 3 - whole)}f}"


# --------------------------------------------------------------------------------------------------
# Calibration


def reliability(said, right):
    """How often something happened, against how probable it was said to be, in ten fixed bins.

    `said` are probabilities; `right` is 1 where it happened and 0 where it did not, a tie is half.
    """
    said, right = np.asarray(said, dtype=float), np.asarray(right, dtype=float)
    group = np.minimum((said * 10 + 1e-9).astype(int), 9)
    rows = []
    for i in sorted(set(group.tolist())):
        here = group == i
        actual, count = right[here].mean().item(), int(here.sum())
        name = f"{i / 10:.1f} to {(i + 1) / 10:.1f}"
        rows.append((name, said[here].mean().item(), actual, *share_interval(actual, count), count))
    columns = ["predicted", "mean of the predicted", "actual", "low", "high", "count"]
    return pd.DataFrame(rows, columns=columns)


def calibration_error(said, right):
    """The expected calibration error (ECE): by how much a stated probability misses the actual
    share, as a mean over the bins of `reliability`, each with the weight of its count."""
    table = reliability(said, right)
    gap = (table["mean of the predicted"] - table["actual"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


def calibration_of(results):
    """How well a model knows when it is right: the calibration error of its answers and the bins
    behind it. It compares how probable the model found its whole answer with how often the judge
    gives such answers full marks. None if no truth is known."""
    known = [r for r in results if r["judge"] is not None and r.get("logprob") is not None]
    if not known:
        return None
    said = [math.exp(min(0.0, r["logprob"])) for r in known]
    right = [float(r["judge"] > 0.99) for r in known]
    bins = reliability(said, right).drop(columns="predicted")
    return {"error": calibration_error(said, right), "bins": bins.to_dict("records")}


# --------------------------------------------------------------------------------------------------
# Pairs


def wins(pairs):
    """1 where the chosen answer has the higher score, 0 where the rejected has; a tie is half."""
    return 0.5 + 0.5 * np.sign(pairs["chosen"] - pairs["rejected"])


def win_probability(pairs):
    """How probable the scores make it that the answer with the higher score wins: 0.5 to 1."""
    margin = (pairs["chosen"] - pairs["rejected"]).to_numpy(dtype=float)
    return 1 / (1 + np.exp(-np.abs(margin)))


def calibrated(pairs):
    """The table behind `calibration`: predicted and actual win rate in fixed bins, with counts."""
    table = reliability(win_probability(pairs), wins(pairs))
    return table.rename(columns={"count": "pairs"})


def preference_summary(pairs):
    """How often scores prefer the chosen answer (with its interval), and by how much on average."""
    right = interval(wins(pairs))
    return {
        "accuracy": right["mean"],
        "interval": [right["low"], right["high"]],
        "margin": float((pairs["chosen"] - pairs["rejected"]).mean()),
        "pairs": len(pairs),
    }


def logprob_table(chosen, rejected, tokens):
    """Log-probs of the answers of each pair, and the number of tokens of the chosen one."""
    return pd.DataFrame({"chosen": chosen, "rejected": rejected, "tokens": tokens}, dtype=float)


def implicit_rewards(policy, actor, beta):
    """DPO's implicit reward of both answers of each pair: beta times how much more likely the
    policy finds an answer than the actor does. Both are tables of log-probs, see `read_pairs`."""
    rewards = {x: beta * (policy[x] - actor[x]) for x in ("chosen", "rejected")}
    return pd.DataFrame(rewards)


def reference_perplexity(pairs):
    """exp of the mean negative log-prob of the tokens of the chosen answers."""
    return float(np.exp(-pairs["chosen"].sum() / pairs["tokens"].sum()))


def critic_summary(pairs):
    """How often the reward model is right about pairs, overall and by kind, and how well it is
    calibrated; None without pairs."""
    if pairs is None:
        return None
    kinds = wins(pairs).groupby(pairs["kind"]).mean()
    error = calibration_error(win_probability(pairs), wins(pairs))
    kinds = {kind: float(share) for kind, share in kinds.items()}
    return preference_summary(pairs) | {"calibration_error": error, "kinds": kinds}


def by_flaw(pairs):
    """How often the reward model is right, by what is wrong with the rejected answer."""
    table = wins(pairs).groupby(pairs["flaw"]).agg(["mean", "size"])
    table = table.sort_values("mean").reset_index()
    return table.set_axis(["flaw of the rejected answer", "right", "pairs"], axis=1)


# --------------------------------------------------------------------------------------------------
# Variety


def distinct(texts, n):
    """Share of different runs of n words among all such runs; 0 if there are none."""
    runs = [run for text in texts for run in ngrams(WORD.findall(text), n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def distinct_2(texts):
    """Share of different pairs of neighbouring words among all such pairs."""
    return distinct(texts, 2)


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def self_bleu(texts, samples=500):
    """How alike the answers to different questions are: the mean BLEU of random pairs of them.

    1 if all are equal, 0 if no two share a word.
    """
    if len(texts) < 2:
        return 0.0
    rng, found = random.Random(0), []
    for _ in range(samples):
        one, two = rng.sample(range(len(texts)), 2)
        found.append(bleu(WORD.findall(texts[one]), WORD.findall(texts[two])))
    return sum(found) / len(found)


def bleu(words, like):
    """BLEU of a text against one other text: the geometric mean of the shares of its runs of 1 to
    4 words that the other text has too, times a penalty if it is shorter.

    For runs of 2 words and more, both counts are raised by one, so that short texts count as well.
    """
    if not words or not like:
        return float(words == like)
    logs = 0.0
    for n in range(1, 5):
        own, other = Counter(ngrams(words, n)), Counter(ngrams(like, n))
        shared, all_of_them = (own & other).total() + (n > 1), own.total() + (n > 1)
        if not shared:
            return 0.0
        logs += math.log(shared / all_of_them) / 4
    return math.exp(logs + min(0.0, 1 - len(like) / len(words)))


def said_before(prompts, texts):
    """The share of answers that are, word for word, also the answer to another prompt."""
    asked = {}
    for prompt, text in zip(prompts, texts):
        asked.setdefault(text.strip(), set()).add(prompt)
    return sum(len(asked[text.strip()]) > 1 for text in texts) / len(texts) if texts else 0.0


def most_changed(before, after, count=10):
    """The questions whose answers moved furthest: the largest KL of the later model's answer, which
    is how much likelier (as a log) it finds its own answer than the actor does."""
    table = pd.DataFrame(
        {
            "prompt": [r["prompt"] for r in after],
            "before": [r["response"] for r in before],
            "after": [r["response"] for r in after],
            "KL (nats)": [r["kl"] for r in after],
        }
    )
    return table.nlargest(count, "KL (nats)").reset_index(drop=True)


# --------------------------------------------------------------------------------------------------
# One model


def metrics_in(models):
    """The names of your own metrics, in their order."""
    return list(dict.fromkeys(x for model in models.values() for x in model.get("metrics") or {}))


def categories_in(models):
    """The names of the categories, in their order."""
    return list(
        dict.fromkeys(x for model in models.values() for x in model.get("categories") or {})
    )


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


def summarise(sampled, greedy=()):
    """One model's entry in report.json, from its answers at temperature 1 and its greedy ones."""
    table = pd.DataFrame(sampled)
    texts = list(table["response"])
    own = {"metrics": measured(sampled), "metrics_greedy": measured(greedy)}
    return {
        "questions": len(table),
        "judge": judged(sampled),
        "judge_greedy": judged(greedy) if greedy else None,
        **(own if "metrics" in table else {}),
        **{name: mean_of(table, name) for name in ("reward", "kl", "length", "eos")},
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct_2(texts),
        "self_bleu": self_bleu(texts),
        "said_before": said_before(list(table["prompt"]), texts),
        "calibration": calibration_of(greedy),
    }


def mean_of(table, name):
    """The mean of a column; None if there is no such column, or nothing in it."""
    known = table[name].dropna() if name in table else ()
    return float(known.mean()) if len(known) else None
