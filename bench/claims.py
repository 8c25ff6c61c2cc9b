"""Reproduces every number that an exercise of the notebooks claims.

    python -m bench.claims                      # on model/ and dataset/ of this folder
    python -m bench.claims --root DIR --only eos_in_the_loss

A claim is a function of a trained course that returns a number. The answers in the notebooks name
their claims; tests/test_lessons.py checks that none is missing. Exit status 1: a number lies
outside the range that the answer allows.
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

CLAIMS = {}


class Claim(NamedTuple):
    notebook: str
    sentence: str
    low: float
    high: float
    measure: object


def claim(notebook, sentence, low, high, name=None):
    """Registers a function `measure(course) -> number` under its name, or the one given."""

    def register(measure):
        CLAIMS[name or measure.__name__] = Claim(notebook, sentence, low, high, measure)
        return measure

    return register


@cache
def answers_of(cfg, stage, temperature=None, *, rows=None, purpose="test"):
    """What `util.evaluate` finds for the model of a stage and the questions of 4_test."""
    import util

    (tokenizer, model), (_, actor) = util.load_pair(cfg, stage), util.load_pair(cfg, "actor")
    crew, rng = util.Crew(tokenizer, model, actor, None), util.rng_for(cfg, purpose)
    return util.evaluate(crew, util.load_eval_rows(cfg)[:rows], cfg, rng, temperature=temperature)


def judged(answers):
    """The judge's mean."""
    return sum(answer["judge"] for answer in answers) / len(answers)


class Course:
    """A folder in which the course was trained."""

    def __init__(self, root):
        from util import Config

        self.root = Path(root).resolve()
        self.cfg = Config.of(root=str(self.root))

    @contextmanager
    def scratch(self, *stages):
        """A root of its own with the same data and copies of some stages, to train others in."""
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "dataset").symlink_to(self.root / "dataset")
            for stage in stages:
                shutil.copytree(self.root / "model" / stage, folder / "model" / stage)
            yield self.cfg.changed(root=str(folder))


def main(argv=None):
    from bench import (  # noqa: F401
        claims_actor,
        claims_critic,
        claims_download,
        claims_rlhf,
        claims_test,
    )

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default=".", help="the folder of a trained course")
    parser.add_argument("--only", nargs="*", help="names of claims; without it: all")
    args = parser.parse_args(argv)
    course, wrong = Course(args.root), []
    for name, it in sorted(CLAIMS.items(), key=lambda pair: pair[1].notebook):
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        found = float(it.measure(course))
        fits = it.low <= found <= it.high
        wrong += [] if fits else [name]
        seconds = time.perf_counter() - start
        print(f"{'ok' if fits else 'WRONG':5} {it.notebook:10} {name:32} {found:8.3g}", end=" ")
        print(f"in [{it.low:g}, {it.high:g}] {seconds:5.1f} s  {it.sentence}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    from bench import claims

    sys.exit(claims.main())
