"""Rewards: each is a callable `reward(prompts, responses) -> list of numbers`; so is their sum."""

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
    """The words of an answer: with a negative weight, a price for long ones."""
    return [float(len(text.split())) for text in responses]


def repetition(prompts, responses):
    """The share of word pairs said before: with a negative weight, a price for saying it again."""
    shares = []
    for text in responses:
        words = text.lower().split()
        pairs = list(zip(words, words[1:]))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return shares


def sentence(prompts, responses):
    """A rule: 1 for an answer that ends like a sentence, else 0."""
    return [float(text.rstrip("\"')”’").endswith(tuple(".!?。！？"))) for text in responses]


def sentiment(prompts, responses):
    """How friendly the words of an answer are, from -1 to 1 (English)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in responses]


SHIPPED = {f.__name__: f for f in (length, repetition, sentence, sentiment)}


class Sum:
    """A weighted sum of rewards; `parts` tells what each of them gave."""

    def __init__(self, terms):
        """`terms`: {name: (weight, reward)}."""
        self.terms = terms

    def parts(self, prompts, responses):
        """{name: its own numbers, not yet weighted}"""
        found = {}
        for name, (_, reward) in self.terms.items():
            found[name] = [float(score) for score in reward(prompts, responses)]
            if (count := len(found[name])) != len(prompts):
                raise CourseError(
                    f"The reward {name} must give a finite number for each of {len(prompts)} "
                    f"answers; it gave {count}."
                )
        return found

    def __call__(self, prompts, responses):
        return self.add(self.parts(prompts, responses))

    def add(self, parts):
        columns = [[self.terms[name][0] * x for x in scores] for name, scores in parts.items()]
        return [sum(row) for row in zip(*columns)]


class Ensemble:
    """Several reward models: where they differ, a policy finds the errors of each."""

    def __init__(self, members, rule, k):
        self.members, self.rule, self.k = members, rule, k

    def __call__(self, prompts, responses):
        scores = np.array([member(prompts, responses) for member in self.members])  # (members, B)
        if self.rule == "min":
            return scores.min(0).tolist()
        caution = self.k * scores.std(0) if self.rule == "cautious" else 0
        return (scores.mean(0) - caution).tolist()


def models_in(reward):
    """The modules that a reward is made of, so that they can be moved."""
    inner = getattr(reward, "members", None) or [
        r for _, r in getattr(reward, "terms", {}).values()
    ]
    own = [reward.model] if hasattr(reward, "model") else []
    return own + [model for part in inner for model in models_in(part)]


def parse(text, model):
    """ "model - 0.01*length + my.rewards.polite" as a Sum; `model()` gives the reward model."""
    terms, rest = {}, text
    while rest or not terms:
        found = TERM.match(rest)
        if not found or (terms and not found[1]):
            raise CourseError(
                f"reward = {text!r} is not clear at {rest!r}: write a sum like "
                '"model - 0.01*length + my_rewards.polite".'
            )
        sign, weight, name = found.groups()
        value = float(weight or 1) * (-1 if sign == "-" else 1)
        if name in terms:
            raise CourseError(f"reward = {text!r} names {name} twice: add up its weights.")
        terms[name] = value, model() if name == "model" else named("reward", name, SHIPPED)
        rest = rest[found.end() :]
    return Sum(terms)


def named(what, name, shipped):
    """A shipped function by its name, or anybody's as module.function."""
    if name in shipped:
        return shipped[name]
    module, _, function = name.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, shipped, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(shipped)}."
        raise CourseError(f"{what} = {name!r}: {known} One of your own is named module.function.")
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)  # the folder of the notebooks, where one's own modules lie
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CourseError(f"{what} = {name!r} cannot be had: {error}.") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise CourseError(f"{what} = {name!r} is no function.")
    return found


def name_of(function, shipped, preferred=""):
    """The name of a function as `named` would find it; `preferred` where several names fit."""
    names = [name for name, known in shipped.items() if known is function]
    if names:
        return preferred if preferred in names else names[0]
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}.{own.__qualname__}"


def code_of(function):
    """A short hash of what a function does, so that a stopped run notices another one.

    It covers the code, its constants and defaults, and plain values that the function closes over.
    """
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        function = type(function).__call__
    return hashlib.md5(repr(meaning(function)).encode()).hexdigest()[:12]


def meaning(part):
    """Code as nested tuples, without addresses, line numbers and file names."""
    if inspect.iscode(part):
        return part.co_code, part.co_names, tuple(map(meaning, part.co_consts))
    if inspect.isfunction(part):
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        return meaning(part.__code__), meaning(part.__defaults__), tuple(map(meaning, cells))
    if isinstance(part, tuple | list):
        return tuple(map(meaning, part))
    return part if isinstance(part, int | float | str | bytes | None) else type(part).__name__


def ask(reward, prompts, responses, what="reward"):
    """The reward of each answer, (B,), and the numbers of which it is the sum."""
    with scoring_errors(what):
        parts = reward.parts(prompts, responses) if isinstance(reward, Sum) else {}
        total = reward.add(parts) if parts else reward(prompts, responses)
        scores = torch.tensor([float(score) for score in total])
    if len(scores) != len(prompts) or not scores.isfinite().all():
        raise CourseError(
            f"The {what} must give a finite number for each of {len(prompts)} answers; it gave "
            f"{len(scores)}, of which {int(scores.isfinite().sum())} are finite."
        )
    return scores, parts


def normalised(scores, running):
    """Scores around the mean of all scores so far, in units of their deviation (Chan's update)."""
    n, count = running.get("scores", 0), len(scores)
    mean, spread = running.get("mean", 0.0), running.get("spread", 0.0)  # spread: n times variance
    step = scores.mean().item() - mean
    spread += (scores - scores.mean()).square().sum().item() + step**2 * n * count / (n + count)
    running |= {"scores": n + count, "mean": mean + step * count / (n + count), "spread": spread}
    return (scores - running["mean"]) / max((spread / (n + count)) ** 0.5, 1e-6)
