"""Measures whether the comparisons of one person with an odd wish change what 3_rlhf produces.

    python bench/clicks.py ROOT ...

ROOT is the folder of a finished course; several courses with different seeds show the luck. Base
and actor are copied from there. The person wants answers that end with a question, and calls a pair
a tie if both answers do or both do not. Only answers about feelings can fulfil the wish. The pairs
are answers of a policy that 3_rlhf has trained without comparisons.
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers.utils import logging  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402
from bench.algorithms import crew_of, critic_accuracy, train_and_time  # noqa: E402
from lab import label, runs, world  # noqa: E402


def question(prompts, responses):
    """1 for an answer that ends with a question."""
    return [float(text.strip().endswith("?")) for text in responses]


def copied(source, folder, stages, **values):
    """The Config of a new course in `folder` with the data, and copies of some stages."""
    skip = shutil.ignore_patterns(label.FILE)
    shutil.copytree(ROOT / "dataset", folder / "dataset", ignore=skip)
    for stage in stages:
        shutil.copytree(source / "model" / stage, folder / "model" / stage)
    seed = runs.read_record(folder, "actor")["config"]["seed"]
    return util.Config("tiny", root=str(folder), seed=seed, **values)


def fulfilled(cfg, stage, rows):
    """How often the answers to `rows` fulfil the wish where they can, and the judge's mean."""
    answers = util.evaluate(crew_of(cfg, stage), rows, cfg, util.rng_for(cfg, "test"))
    able = [answer["response"] for answer in answers if answer["kind"] == "feelings"]
    judged = sum(answer["judge"] for answer in answers) / len(answers)
    return sum(question(able, able)) / len(able), judged


def trained(cfg, rows):
    """Trains the reward model and the policy; returns what was measured."""
    train_and_time(util.train_critic(cfg))
    train_and_time(util.train_rlhf(cfg))
    wish, judged = fulfilled(cfg, "rlhf", rows)
    winners = len(label.pairs_of(cfg.root))
    accuracy = critic_accuracy(cfg, rows)
    return {"with a winner": winners, "wish": wish, "judge": judged, "critic": accuracy}


def one_course(source, count, noise, weight, rows):
    """Yields (arm, what was measured): without comparisons, and with both orders of asking."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder)
        cfg = copied(source, plain, ("base", "actor"))
        found = trained(cfg, rows)
        wish, judged = fulfilled(cfg, "actor", rows)
        yield "actor", {"with a winner": 0, "wish": wish, "judge": judged, "critic": 0.0}
        yield "no comparisons", found
        for arm, find in (("random order", shuffled), ("least certain first", util.pairs_to_ask)):
            with tempfile.TemporaryDirectory() as folder:
                stages = ("base", "actor", "critic", "rlhf")
                cfg = copied(plain, Path(folder), stages, feedback_weight=weight)
                label.simulate(cfg, find, "bench.clicks.question", count, noise)
                yield arm, trained(cfg, rows)


def shuffled(cfg, count):
    """The same pairs in random order."""
    pairs = util.pairs_to_ask(cfg, count)
    random.Random(cfg.seed).shuffle(pairs)
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("roots", type=Path, nargs="+", help="folders of finished courses")
    parser.add_argument("--count", type=int, default=40, help="comparisons; default: 40")
    parser.add_argument("--noise", type=float, default=0.0, help="share of them that is reversed")
    parser.add_argument("--weight", type=int, help="feedback_weight; default: the course's")
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    report, table = common.Report(args.out), {}
    for root in args.roots:
        rows = list(world.rows(world.World(), "eval", 1_000))
        for arm, found in one_course(root, args.count, args.noise, args.weight, rows):
            print(f"{root}  {arm:20} {found}", flush=True)
            line = table.setdefault(arm, {name: [] for name in found})
            for name, value in found.items():
                line[name].append(value)
    title = f"{args.count} comparisons by a person who wants questions"
    report.table(title, [{"arm": arm, **line} for arm, line in table.items()])


if __name__ == "__main__":
    main()
