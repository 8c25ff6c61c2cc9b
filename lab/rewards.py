"""Rewards: callables `reward(prompts, responses) -> list of numbers`, and their weighted sum."""

import difflib
import hashlib
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import torch

from lab import CourseError
from lab.errors import scoring_errors

TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+\.?\d*(?:e-?\d+)?)\s*\*\s*)?([^\W\d][\w.]*)\s*")


def length(prompts, responses):
    """Counts the words of each answer; give it a negative weight to penalise long answers."""
    return [float(len(text.split())) for text in responses]


def repetition(prompts, responses):
    """Returns the share of repeated word pairs; give it a negative weight to penalise them."""
    shares = []
    for text in responses:
        words = text.lower().split()
        pairs = list(zip(words, words[1:]))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return shares


def sentence(prompts, responses):
    """Returns 1 for each answer that ends like a sentence, else 0."""
    return [float(text.rstrip("\"')”’").endswith(tuple(".!?。！？"))) for text in responses]


def sentiment(prompts, responses):
    """Returns the VADER sentiment of each English answer, from -1 (negative) to 1 (positive)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in responses]


SHIPPED = {f.__name__: f for f in (length, repetition, sentence, sentiment)}


class Sum:
    """A weighted sum of rewards; `parts` gives the scores of each reward."""

    def __init__(self, terms):
        """`terms` is {name: (weight, reward)}."""
        self.terms = terms

    def parts(self, prompts, responses):
        """Returns {name: scores} before weighting."""
        found = {}
        for name, (_, reward) in self.terms.items():
            found[name] = [float(score) for score in reward(prompts, responses)]
            if (count := len(found[name])) != len(prompts):
                raise CourseError(
                    f"The reward {name} must return a finite number for each of {len(prompts)} "
                    f"answers; it returned {count} numbers."
                )
        return found

    def __call__(self, prompts, responses):
        return self.add(self.parts(prompts, responses))

    def add(self, parts):
        """Returns the weighted sums of the scores that `parts` returned."""
        columns = [[self.terms[name][0] * x for x in scores] for name, scores in parts.items()]
        return [sum(row) for row in zip(*columns)]


class Ensemble:
    """Several reward models as one reward. A policy exploits the errors of a single reward model;
    where the members disagree, the rule `min` or `cautious` lowers the score."""

    def __init__(self, members, rule, k):
        self.members, self.rule, self.k = members, rule, k

    def __call__(self, prompts, responses):
        scores = np.array([member(prompts, responses) for member in self.members])  # (members, B)
        if self.rule == "min":
            return scores.min(0).tolist()
        caution = self.k * scores.std(0) if self.rule == "cautious" else 0
        return (scores.mean(0) - caution).tolist()


def models_in(reward):
    """Returns all models inside a reward, so that they can be moved to another device."""
    inner = getattr(reward, "members", None) or [
        r for _, r in getattr(reward, "terms", {}).values()
    ]
    own = [reward.model] if hasattr(reward, "model") else []
    return own + [model for part in inner for model in models_in(part)]


def parse(text, model):
    """Parses a text like "model - 0.01*length + my.rewards.polite" and returns a Sum.

    `model()` loads the reward model.
    """
    terms, rest = {}, text
    while rest or not terms:
        found = TERM.match(rest)
        if not found or (terms and not found[1]):
            raise CourseError(
                f"reward = {text!r} cannot be parsed at {rest!r}: write a sum like "
                '"model - 0.01*length + my_rewards.polite".'
            )
        sign, weight, name = found.groups()
        value = float(weight or 1) * (-1 if sign == "-" else 1)
        if name in terms:
            raise CourseError(f"reward = {text!r} names {name} twice: combine the two weights.")
        terms[name] = value, model() if name == "model" else named("reward", name, SHIPPED)
        rest = rest[found.end() :]
    return Sum(terms)


def named(what, name, shipped):
    """Returns a built-in function by its name, or imports your own, named module.function."""
    if name in shipped:
        return shipped[name]
    module, _, function = name.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, shipped, n=1)
        known = f"; did you mean {near[0]!r}?" if near else f"; choose from: {', '.join(shipped)}."
        own = "To use a function of your own, write module.function."
        raise CourseError(f"{what} = {name!r} is not known{known if shipped else '.'} {own}")
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)  # the folder of the notebooks, for your own modules
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CourseError(
            f"{what} = {name!r} cannot be imported ({error}): check the name, and that the file is "
            "in the current folder."
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise CourseError(f"{what} = {name!r} is not a function: name one that can be called.")
    return found


def metrics_of(text):
    """Returns {name: function} for a text like "length, my_module.politeness": cfg.metric."""
    metrics = {}
    for path in filter(None, map(str.strip, text.split(","))):
        name = path.rpartition(".")[2]
        if name in metrics:
            raise CourseError(
                f"metric = {text!r} has two functions named {name}: rename or remove one."
            )
        metrics[name] = named("metric", path, {})
    return metrics


def name_of(function, shipped, preferred=""):
    """Returns the name by which `named` finds a function; `preferred` if it has several names."""
    names = [name for name, known in shipped.items() if known is function]
    if names:
        return preferred if preferred in names else names[0]
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}.{own.__qualname__}"


def code_of(function):
    """Returns a short hash of a function, so that a resumed run notices a changed function.

    It covers the code, its constants and defaults, and plain values in the function's closure.
    """
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        function = type(function).__call__
    return hashlib.md5(repr(meaning(function)).encode()).hexdigest()[:12]


def meaning(part):
    """Returns code as nested tuples, without addresses, line numbers and file names."""
    if inspect.iscode(part):
        return part.co_code, part.co_names, tuple(map(meaning, part.co_consts))
    if inspect.isfunction(part):
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        return meaning(part.__code__), meaning(part.__defaults__), tuple(map(meaning, cells))
    if isinstance(part, tuple | list):
        return tuple(map(meaning, part))
    return part if isinstance(part, int | float | str | bytes | None) else type(part).__name__


def ask(reward, prompts, responses, what="reward"):
    """Returns the reward of each answer, (B,), and the scores of each term, {name: scores}."""
    with scoring_errors(what):
        parts = reward.parts(prompts, responses) if isinstance(reward, Sum) else {}
        total = reward.add(parts) if parts else reward(prompts, responses)
        scores = torch.tensor([float(score) for score in total])
    if len(scores) != len(prompts) or not scores.isfinite().all():
        raise CourseError(
            f"The {what} must return a finite number for each of {len(prompts)} answers; it "
            f"returned {len(scores)} numbers, {int(scores.isfinite().sum())} of them finite."
        )
    return scores, parts


def normalised(scores, running):
    """Returns the scores minus the mean of all scores so far, divided by their standard deviation.

    `running` keeps the count, the mean and the sum of squared deviations M2 (Chan's update).
    """
    n, count = running.get("scores", 0), len(scores)
    mean, m2 = running.get("mean", 0.0), running.get("m2", 0.0)
    delta = scores.mean().item() - mean
    m2 += (scores - scores.mean()).square().sum().item() + delta**2 * n * count / (n + count)
    running |= {"scores": n + count, "mean": mean + delta * count / (n + count), "m2": m2}
    return (scores - running["mean"]) / max((m2 / (n + count)) ** 0.5, 1e-6)
