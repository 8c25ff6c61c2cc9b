"""Measures where reward models begin to see a single wrong word, and what RLHF gains from it.

    python bench/blind_spot.py --seeds 0 1 2 --folder model/blind_spot --out docs/blind_spot.json

Reward models of both kinds start from the course's actor and learn from some of its pairs, for
bodies of different sizes. Their accuracy is measured on pairs whose rejected answer is right but
for one word. With --rlhf, the crowd's data change: three in ten of its wrong answers are right but
for one word. An actor imitates this crowd, both kinds of reward models learn from its pairs, PPO
trains against each, and the judge scores the results.

A figure that the JSON file holds is not measured again, so an interrupted run goes on where it
stopped. The picture beside the JSON file and the tables of the page beside it are written anew.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402
from transformers.utils import logging  # noqa: E402

import util  # noqa: E402
from bench.algorithms import train_and_time  # noqa: E402
from lab import record, report, splits, world  # noqa: E402
from lab.runs import read_record  # noqa: E402

SUBTLE = world.World(subtle=0.3, popular=0.55)
KINDS = {  # name: critic_kind
    "plain": "plain",
    "plain, pairs of the subtle world": "plain",
    "careful": "careful",
    "careful, only training combinations": "careful",
}
SIZES = {"64 x 2": (64, 2), "128 x 2": (128, 2), "128 x 4": (128, 4)}  # width x layers


def one_word_pairs(split, count):
    """Pairs of a split whose rejected answer is right but for one word."""
    only = world.World(subtle=1.0, popular=0.0)
    rows = world.rows(only, split, 2 * count)
    return [row for row in rows if row["flaw"] == "one word"][:count]


def combination(prompt, answer):
    """The combination that a text rests on, as `world.Item.trace` has it; None if it shows none."""
    if answer.startswith("SELECT"):
        words = answer.rstrip(";").split()
        if found := re.match(r"SELECT [A-Z]+(\(\w+\)) FROM (\w+)", answer):
            return (f"{found[1]} FROM {found[2]}",)
        return (" ".join(words[: 7 if "ORDER" in words else 6]),)
    if found := re.search(rf"\b({'|'.join(world.SAFE)}) (?:a|the|this) (\w+)", prompt):
        return found.groups()
    feeling = re.search(rf"\b({'|'.join(world.FEELINGS)})\b", prompt)
    if cause := re.search(r"\bmy (\w+) (\w+)", prompt):
        return feeling and (feeling[1], f"{cause[1]} {cause[2]}")
    topics = r"win the (\w+ \w+) on (\w+)|rain in (\w+) on (\w+)|will (\w+) cost on (\w+)"
    if found := re.search(topics, prompt):
        return tuple(filter(None, found.groups()))
    if found := re.search(r"What is the (\w+) of (\w+)\?|does (\w+) hide the (\w+)", prompt):
        secret, owner, hider, treasure = found.groups()
        return (owner, secret) if secret else (hider, treasure)
    return None


def in_training(pair):
    """Whether both answers of a mirrored pair rest on combinations of the training split."""
    traces = [combination(pair["prompt"], pair[name]) for name in ("chosen", "rejected")]
    return all(trace is None or world.split_of(trace) == "train" for trace in traces)


def accuracy(scores, rows):
    """The share of pairs whose chosen answer scores higher, with its interval, and by kind."""
    pairs = pd.DataFrame(scores)
    pairs["kind"] = [row["kind"] for row in rows]
    found = report.critic_summary(pairs)
    low, high = report.share_interval(found["accuracy"], len(pairs))
    return found | {"low": low, "high": high, "pairs": len(pairs)}


def likelihoods(cfg, rows, shift=0):
    """The actor's summed log-probs of both answers. `shift` asks the question of another row."""
    tokenizer, model = util.load_pair(cfg, "actor")
    asked = [rows[(i + shift) % len(rows)] | row_answers(row) for i, row in enumerate(rows)]
    parts = util.in_parts(
        lambda part: util.pair_logprobs(model, tokenizer, part, cfg)[:2], asked, cfg, model
    )
    columns = [[x for part in column for x in part.tolist()] for column in zip(*parts)]
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(*columns)]


def row_answers(row):
    return {name: row[name] for name in ("chosen", "rejected")}


class Bench:
    """The figures measured so far, and the folder in which the models are kept."""

    def __init__(self, args):
        self.args, self.folder, self.out = args, args.folder, args.out
        found = args.out.exists()
        self.runs = json.loads(args.out.read_text(encoding="utf-8")) if found else []
        split, count = args.split, args.rows
        self.one_word = self.kept("one-word", lambda: one_word_pairs(split, count))
        self.rows = {
            False: self.kept("course", lambda: list(world.rows(world.World(), split, count))),
            True: self.kept("subtle", lambda: list(world.rows(SUBTLE, split, count))),
        }

    def kept(self, name, make):
        """The rows of a test; making them takes longer than reading them again."""
        path = self.folder / f"{self.args.split}-{name}-{self.args.rows}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(make()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def measured(self, **key):
        return any(key.items() <= run.items() for run in self.runs)

    def add(self, key, figures):
        self.runs.append(key | figures)
        self.out.write_text(json.dumps(self.runs, indent=1) + "\n", encoding="utf-8")
        short = {k: round(v, 3) for k, v in figures.items() if isinstance(v, float)}
        print(key, short, flush=True)

    def config(self, size, seed, subtle=False, **values):
        """The parameters of one course, in a folder of its own."""
        width, layers = SIZES[size]
        root = self.folder / f"{width}x{layers}-seed-{seed}{'-subtle' * subtle}"
        shape = dict(hidden_size=width, layers=layers, tracker="none")
        shape["resume"] = False  # an interrupted run may have had other rows
        return util.Config("tiny", watchdog=0.0, root=str(root), seed=seed, **shape | values)

    def actor(self, size, seed, subtle=False):
        """Trains base and actor of a course, unless its folder holds them."""
        cfg = self.config(size, seed, subtle)
        data, root = self.folder / "subtle" if subtle else ROOT / "dataset", Path(cfg.root)
        if not data.exists():
            world.write(SUBTLE, data)
        if not (root / "dataset").exists():
            root.mkdir(parents=True, exist_ok=True)
            (root / "dataset").symlink_to(data.resolve())
        base = Path(self.config(size, seed).root) / "model" / "base"
        if subtle and base.exists() and not (root / "model" / "base").exists():
            shutil.copytree(base, root / "model" / "base")  # pretraining reads no data of a crowd
        for name, train in (("base", util.train_base), ("actor", util.train_actor)):
            if not (root / "model" / name).exists():
                train_and_time(train(cfg))

    def language_model(self, size, seed):
        """The actor's own log-probs as a score, for the right question and for another one."""
        key = {"what": "language model", "size": size, "seed": seed}
        if not self.measured(**key):
            cfg = self.config(size, seed)
            own, other = (likelihoods(cfg, self.one_word, shift) for shift in (0, 1))
            control = accuracy(other, self.one_word)["accuracy"]
            self.add(key, accuracy(own, self.one_word) | {"another question": control})

    def critic(self, size, seed, kind, count, subtle=False):
        """Trains a reward model on `count` pairs and measures it."""
        key = {"what": "critic", "size": size, "seed": seed, "kind": kind, "from": count}
        key |= {"subtle": subtle}
        if self.measured(**key):
            return
        cfg = self.config(size, seed, subtle, critic_kind=KINDS[kind])
        rows = util.preference_rows(cfg, lambda text: None)[:count]
        if "pairs of the subtle" in kind:
            rows = list(world.rows(SUBTLE, "train", count))
        with only_training_combinations("only" in kind):
            seconds = train_and_time(util.train_critic(cfg, rows))
        folder = util.artifact(cfg.root, "critic")
        scorer, tokenizer = util.load_scorer(folder, cfg), util.load_tokenizer(folder, cfg)
        scores = util.evaluate_critic(scorer, tokenizer, self.one_word, cfg)
        every = pd.DataFrame(util.evaluate_critic(scorer, tokenizer, self.rows[subtle], cfg))
        found, table = accuracy(scores, self.one_word), report.by_flaw(every)
        found["flaws"] = dict(zip(table["flaw of the rejected answer"], table["right"]))
        found["all flaws"] = report.critic_summary(every)["accuracy"]
        found |= {"seconds": seconds, "parameters": sum(p.numel() for p in scorer.parameters())}
        self.add(key, found)

    def rlhf(self, size, seed, kind, count):
        """The actor of the subtle world, or PPO from it; judged sampled and greedy."""
        key = {"what": "rlhf", "size": size, "seed": seed, "kind": kind}
        if self.measured(**key):
            return
        cfg, seconds, name = self.config(size, seed, True), 0.0, "actor"
        if kind != "actor":
            self.critic(size, seed, kind, count, subtle=True)
            if read_record(cfg.root, "critic")["config"]["critic_kind"] != kind:
                train_and_time(
                    util.train_critic(cfg.changed(critic_kind=kind))
                )  # of an interrupted run
            shutil.rmtree(Path(cfg.root) / "model" / "rlhf", ignore_errors=True)
            seconds, name = train_and_time(util.train_rlhf(cfg)), "rlhf"
        tokenizer, model = util.load_pair(cfg, name)
        crew = util.Crew(tokenizer, model, util.load_pair(cfg, "actor")[1], None)
        rows, generator = self.rows[True], util.rng_for(cfg, "test")
        sampled = util.evaluate(crew, rows, cfg, generator)
        greedy = util.evaluate(crew, rows, cfg, generator, temperature=0)
        kl = sum(answer["kl"] for answer in sampled) / len(rows)
        found = {"judge": report.judged(sampled), "greedy": report.judged(greedy), "kl": kl}
        self.add(key, found | {"seconds": seconds})


class only_training_combinations:
    """While it is open, mirrored pairs leave out combinations that the world keeps for tests."""

    def __init__(self, active):
        self.active, self.made = active, splits.mirrored_pairs

    def __enter__(self):
        if self.active:
            splits.mirrored_pairs = lambda *args: list(filter(in_training, self.made(*args)))

    def __exit__(self, *_):
        splits.mirrored_pairs = self.made


# ------------------------------------------------------------------------------------------------
# The picture and the tables


def having(runs, **key):
    return [run for run in runs if key.items() <= run.items()]


def values_of(runs, field="accuracy"):
    """The figures of several seeds, as text."""
    return ", ".join(f"{run[field]:.2f}" for run in runs) or "-"


def curve_of(runs, size, kind):
    """(pairs, mean accuracy, lowest, highest) over the seeds, by number of pairs."""
    points = having(runs, what="critic", size=size, kind=kind, subtle=False)
    for count in sorted({run["from"] for run in points}):
        found = [run["accuracy"] for run in points if run["from"] == count]
        yield count, sum(found) / len(found), min(found), max(found)


@matplotlib.rc_context(report.STYLE)
def picture(runs):
    """Accuracy on one-word errors against the number of pairs, for each size and kind."""
    figure, (ax,) = report.canvas(height=3.6)
    told, colours = [], dict(zip(SIZES, (report.GREEN, report.BLUE, report.ORANGE)))
    for size, kind in itertools.product(SIZES, ("careful", "plain")):
        if not (points := list(curve_of(runs, size, kind))):
            continue
        weights = having(runs, what="critic", size=size)[0]["parameters"]
        label = f"{kind}, {weights / 1e6:.2f} million weights"
        pairs, means, low, high = map(list, zip(*points))
        look = dict(marker="o", linestyle="-") if kind == "careful" else dict(marker="s", ls=":")
        ax.plot(pairs, means, color=colours[size], label=label, **look)
        if low != high:
            ax.fill_between(pairs, low, high, color=colours[size], alpha=0.2, linewidth=0)
        said = ", ".join(f"{mean:.2f} from {count:,}" for count, mean, *_ in points)
        told.append(f"{label}: {said}")
    ax.axhline(0.5, color=report.INK, linestyle="--", linewidth=1)
    ax.text(ax.get_xlim()[1], 0.455, "guessing", ha="right", va="top", fontsize=9)
    ax.set(xscale="log", ylim=(0.4, 1.02), xlabel="pairs of the crowd")
    ax.set_ylabel("right on one-word errors")
    counts = sorted({run["from"] for run in having(runs, what="critic")})
    ax.set_xticks(counts, [f"{count:,}" for count in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    figure.set_label(f"Accuracy on pairs that differ in one word. {'. '.join(told)}.")
    return figure


def language_model_table(runs):
    """How often the actor finds the right answer likelier: one number for each seed."""
    rows = [
        [size, values_of(own), values_of(own, "another question")]
        for size in SIZES
        if (own := having(runs, what="language model", size=size))
    ]
    head = ["width x layers", "right answer likelier", "the same, after another row's question"]
    return record.table(head, rows, {})


def curve_table(runs):
    """Accuracy on one-word errors by size, kind and number of pairs: one number for each seed."""
    points = having(runs, what="critic", subtle=False)
    counts, rows = sorted({run["from"] for run in points}), []
    for size, kind in itertools.product(SIZES, KINDS):
        if own := having(points, size=size, kind=kind):
            millions = f"{own[0]['parameters'] / 1e6:.2f}"
            cells = [values_of([run for run in own if run["from"] == count]) for count in counts]
            longest = max(run["seconds"] for run in own)
            rows.append([size, millions, kind, *cells, f"{longest:.0f}"])
    head = ["width x layers", "million weights", "reward model"]
    return record.table(head + [f"{n:,} pairs" for n in counts] + ["seconds"], rows, {})


def gain_table(runs):
    """What PPO gains in the subtle world: one number for each seed, and the means of the kinds."""
    rows, kinds = [], world.KINDS
    for name in ("actor", "plain", "careful"):
        if own := having(runs, what="rlhf", kind=name):
            judge, greedy = ([run[how]["mean"] for run in own] for how in ("judge", "greedy"))
            row = [name if name == "actor" else f"PPO, {name}"]
            row += [", ".join(f"{x:.3f}" for x in column) for column in (judge, greedy)]
            for kind in kinds:
                row.append(f"{sum(run['judge']['kinds'][kind] for run in own) / len(own):.2f}")
            rows.append([*row, f"{sum(run['kl'] for run in own) / len(own):.2f}"])
    return record.table(["", "judge, sampled", "judge, greedy", *kinds, "KL (nats)"], rows, {})


def publish(runs, out):
    """Writes the picture beside the figures, and the tables of the page beside them."""
    out.with_suffix(".svg").write_text(report.svg(picture(runs)), encoding="utf-8")
    if (page := out.with_suffix(".md")).exists():
        record.fill(page, "knows", language_model_table(runs))
        record.fill(page, "curve", curve_table(runs))
        if having(runs, what="rlhf"):
            record.fill(page, "gain", gain_table(runs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 3_000, 10_000])
    parser.add_argument("--rlhf", action="store_true", help="PPO in the subtle world, too")
    parser.add_argument("--split", choices=["eval", "tune"], default="eval")
    parser.add_argument("--rows", type=int, default=1_000, help="pairs and questions of the test")
    parser.add_argument("--folder", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    bench = Bench(args)
    for size, seed in itertools.product(args.sizes, args.seeds):
        bench.actor(size, seed)
        bench.language_model(size, seed)
        for kind, count in itertools.product(args.kinds, args.pairs):
            bench.critic(size, seed, kind, count)
        if args.rlhf:
            bench.actor(size, seed, subtle=True)
            for kind in ("actor", "plain", "careful"):
                bench.rlhf(size, seed, kind, max(args.pairs))
    publish(bench.runs, args.out)


if __name__ == "__main__":
    main()
