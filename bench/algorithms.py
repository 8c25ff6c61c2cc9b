"""Trains every algorithm on the embedded world, for several seeds of the whole course.

    python bench/algorithms.py --seeds 0 1 2 --out docs/algorithms.json

Each seed trains base, actor and reward models once, in a folder of its own. Every contender starts
from these models. The judge scores its answers to the eval rows, sampled at temperature 1 and
greedy.
`python -m lab.record` turns the JSON file into the tables of README.md and docs/algorithms.md.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402
from transformers.utils import logging  # noqa: E402

import util  # noqa: E402
from lab import report, world  # noqa: E402

CONTENDERS = {
    "ppo": {},
    "ppo, values from the actor": {"value_init": "actor"},
    "grpo": {"algorithm": "grpo"},
    "grpo, k3 in the loss": {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
    "rloo": {"algorithm": "rloo"},
    "dpo": {"algorithm": "dpo"},
    "ppo, LoRA": {"lora_rank": 16, "policy_lr": 2e-3, "value_lr": 2e-3},
    "rloo, LoRA": {"algorithm": "rloo", "lora_rank": 16, "policy_lr": 2e-3},
    "ppo, mean of 3 reward models": {"ensemble_rule": "mean"},
    "ppo, cautious 3 reward models": {"ensemble_rule": "cautious"},
}


def train_and_time(steps):
    """Runs a training loop to its end; returns the seconds that it took."""
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def crew_of(cfg, name):
    """A trained model to evaluate. Only the first reward model gives its reward."""
    tokenizer, model = util.load_pair(cfg, name)
    _, reference = util.load_pair(cfg, "actor")
    reward = util.RewardModel(util.artifact(cfg.root, "critic"), cfg)
    return util.Crew(tokenizer, model, reference, reward)


def evaluate_stage(cfg, name, rows):
    """The summary of a trained model's answers, sampled and greedy."""
    crew = crew_of(cfg, name)
    sampled, greedy = (
        util.evaluate(crew, rows, cfg, util.rng_for(cfg, "test"), temperature=temperature)
        for temperature in (None, 0)
    )
    return report.summarise(sampled, greedy)


def critic_accuracy(cfg, rows):
    """The accuracy of the reward model on the pairs of these rows."""
    folder = util.artifact(cfg.root, "critic")
    critic, tokenizer = util.load_scorer(folder, cfg), util.load_tokenizer(folder, cfg)
    pairs = pd.DataFrame(util.evaluate_critic(critic, tokenizer, rows, cfg))
    return report.critic_summary(pairs)["accuracy"]


def format_line(seed, name, summary, seconds):
    judge, greedy = summary["judge"], summary["judge_greedy"]
    kinds = {kind: round(mean, 2) for kind, mean in judge["kinds"].items()}
    greedy = f"{greedy['mean']:.3f}" if greedy else "    -"
    return (
        f"seed {seed}  {name:30} judge {judge['mean']:.3f} ({judge['low']:.3f} to "
        f"{judge['high']:.3f})  greedy {greedy}  KL {summary['kl']:5.2f}  "
        f"reward {summary['reward']:.2f}  {seconds:4.0f} s  {kinds}"
    )


def one_seed(seed, folder, rows, contenders):
    """Trains the shared models, then each contender; yields (name, summary, seconds)."""
    (folder / "dataset").symlink_to(ROOT / "dataset")

    def cfg(**values):
        return util.Config("tiny", root=str(folder), seed=seed, **values)

    seconds = train_and_time(util.train_base(cfg())) + train_and_time(util.train_actor(cfg()))
    print(f"seed {seed}  base and actor: {seconds:.0f} s", flush=True)
    for ensemble in (1, 3):
        group = [name for name in contenders if ("reward models" in name) == (ensemble == 3)]
        if group:
            took = train_and_time(util.train_critic(cfg(ensemble=ensemble)))
            print(f"seed {seed}  {ensemble} reward model(s): {took:.0f} s", flush=True)
            if ensemble == 1:
                print(f"seed {seed}  critic: {critic_accuracy(cfg(), rows):.3f} of the pairs")
                for stage in ("base", "actor"):
                    yield stage, evaluate_stage(cfg(), stage, rows), 0.0
                rng = util.rng_for(cfg(), "best")
                best = util.best_of(crew_of(cfg(), "actor"), rows, cfg(), rng)
                yield f"best of {cfg().best_of}", report.summarise(best), 0.0
        for name in group:
            shutil.rmtree(folder / "model" / "rlhf", ignore_errors=True)
            values = cfg(**CONTENDERS[name])
            took = train_and_time(util.train_rlhf(values))
            yield name, evaluate_stage(values, "rlhf", rows), took


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(CONTENDERS),
        choices=list(CONTENDERS),
        help="contenders to train; default: all",
    )
    parser.add_argument("--rows", type=int, default=1_000, help="eval rows; default: 1000")
    parser.add_argument("--out", type=Path, help="write all figures to this file as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows, runs = list(world.rows(world.World(), "eval", args.rows)), []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, summary, seconds in one_seed(seed, Path(folder), rows, args.only):
                print(format_line(seed, name, summary, seconds), flush=True)
                figures = {"judge": summary["judge"]["mean"], "KL": summary["kl"]}
                figures |= {"kinds": summary["judge"]["kinds"]}
                if greedy := summary["judge_greedy"]:
                    figures |= {"greedy": greedy["mean"], "greedy kinds": greedy["kinds"]}
                runs.append({"seed": seed, "name": name, **figures, "seconds": seconds})
                if args.out:
                    args.out.write_text(json.dumps(runs, indent=1) + "\n")
    table = pd.DataFrame(runs).groupby("name", sort=False)[["judge", "greedy", "KL", "seconds"]]
    print(table.agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
