"""Trains the whole course for several seeds and measures how good each stage becomes.

    python bench/seeds.py --seeds 0 1 2 --out seeds.json

It runs all training stages without notebooks, each seed in a folder of its own, and judges the
models on the eval rows exactly as 4_test does. It prints one line per seed, then mean and range.
"""

import argparse
import json
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

STAGES = {
    "base": util.train_base,
    "actor": util.train_actor,
    "critic": util.train_critic,
    "rlhf": util.train_rlhf,
}


def pipeline(seed, folder, rows, parameters):
    """Trains all four stages in `folder` and evaluates them; returns the results of one seed."""
    (folder / "dataset").symlink_to(ROOT / "dataset")
    cfg = util.Config("tiny", root=str(folder), seed=seed, **parameters)
    seconds = {}
    for name, train in STAGES.items():
        start = time.perf_counter()
        for _ in train(cfg):
            pass
        seconds[name] = round(time.perf_counter() - start, 1)
    _, reference = util.load_pair(cfg, "actor")
    critic = util.artifact(cfg.root, "critic")
    reward = util.RewardModel(critic, cfg)
    models = {}
    for name in ("base", "actor", "rlhf"):
        tokenizer, model = util.load_pair(cfg, name)
        crew = util.Crew(tokenizer, model, reference, reward)
        answers = [
            util.evaluate(crew, rows, cfg, util.rng_for(cfg, "test"), temperature=t)
            for t in (None, 0)
        ]
        models[name] = report.summarise(*answers)
    scorer, tokenizer = util.load_scorer(critic, cfg), util.load_tokenizer(critic)
    pairs = pd.DataFrame(util.evaluate_critic(scorer, tokenizer, rows, cfg))
    summary = report.critic_summary(pairs)
    return {"seed": seed, "seconds": seconds, "models": models, "critic": summary}


def line(run):
    """One seed in one line: each model's score, sampled and greedy, then rlhf's by kind."""
    judges = {
        name: (m["judge"]["mean"], m["judge_greedy"]["mean"]) for name, m in run["models"].items()
    }
    kinds = {k: round(v, 2) for k, v in run["models"]["rlhf"]["judge"]["kinds"].items()}
    figures = "  ".join(f"{name} {s:.3f} (greedy {g:.3f})" for name, (s, g) in judges.items())
    kl, seconds = run["models"]["rlhf"]["kl"], run["seconds"]
    return (
        f"seed {run['seed']}: {figures}  {kinds}  critic {run['critic']['accuracy']:.3f}  "
        f"KL {kl:.2f}  {sum(seconds.values()):.0f} s {seconds}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--split",
        choices=["eval", "tune"],
        default="eval",
        help="rows to judge on; use tune to choose parameters",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="name=value", help="parameters of the course"
    )
    parser.add_argument("--out", type=Path, help="write all figures to this file as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows = list(world.rows(world.World(), args.split, 1_000))
    parameters = dict(pair.split("=", 1) for pair in args.set)
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(pipeline(seed, Path(folder), rows, parameters))
        print(line(runs[-1]), flush=True)
    table = pd.DataFrame(
        {
            f"{name}, {how}": model[key]["mean"]
            for name, model in run["models"].items()
            for how, key in (("sampled", "judge"), ("greedy", "judge_greedy"))
        }
        for run in runs
    )
    print(table.agg(["mean", "min", "max"]).round(3).to_string())
    if args.out:
        args.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
