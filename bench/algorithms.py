"""Every algorithm on the embedded world, for several seeds of the whole course.

    python bench/algorithms.py --seeds 0 1 2 --out algorithms.json

Each seed trains base, actor and reward models once, in a folder of its own; then every contender
starts from there, and the judge scores its answers to the eval rows, at temperature 1.
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
    "grpo": {"algorithm": "grpo"},
    "grpo, k3 in the loss": {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
    "rloo": {"algorithm": "rloo"},
    "dpo": {"algorithm": "dpo"},
    "ppo, LoRA": {"lora_rank": 16, "policy_lr": 2e-3, "value_lr": 2e-3},
    "rloo, LoRA": {"algorithm": "rloo", "lora_rank": 16, "policy_lr": 2e-3},
    "ppo, mean of 3 reward models": {"ensemble_rule": "mean"},
    "ppo, cautious 3 reward models": {"ensemble_rule": "cautious"},
}


def drain(steps):
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def answers(cfg, name, rows):
    """The judged answers of a finished model; the reward is the first reward model alone."""
    tokenizer, model = util.load_pair(cfg, name)
    _, reference = util.load_pair(cfg, "actor")
    reward = util.RewardModel(util.artifact(cfg.root, "critic"), cfg)
    crew = util.Crew(tokenizer, model, reference, reward)
    return report.summarise(util.evaluate(crew, rows, cfg, util.rng_for(cfg, "test")))


def line(seed, name, summary, seconds):
    judge = summary["judge"]
    kinds = {kind: round(mean, 2) for kind, mean in judge["kinds"].items()}
    return (
        f"seed {seed}  {name:30} judge {judge['mean']:.3f} ({judge['low']:.3f} to "
        f"{judge['high']:.3f})  KL {summary['kl']:5.2f}  reward {summary['reward']:.2f}  "
        f"{seconds:4.0f} s  {kinds}"
    )


def one_seed(seed, folder, rows, contenders):
    """Trains what all have in common, then each contender; yields name, summary, seconds."""
    (folder / "dataset").symlink_to(ROOT / "dataset")

    def cfg(**values):
        return util.Config("tiny", root=str(folder), seed=seed, **values)

    seconds = drain(util.train_base(cfg())) + drain(util.train_actor(cfg()))
    print(f"seed {seed}  base and actor: {seconds:.0f} s", flush=True)
    for ensemble in (1, 3):
        group = [name for name in contenders if ("reward models" in name) == (ensemble == 3)]
        if group:
            took = drain(util.train_critic(cfg(ensemble=ensemble)))
            print(f"seed {seed}  {ensemble} reward model(s): {took:.0f} s", flush=True)
            if ensemble == 1:
                yield "actor", answers(cfg(), "actor", rows), 0.0
        for name in group:
            shutil.rmtree(folder / "model" / "rlhf", ignore_errors=True)
            values = cfg(**CONTENDERS[name])
            took = drain(util.train_rlhf(values))
            yield name, answers(values, "rlhf", rows), took


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows, runs = list(world.rows(world.World(), "eval", args.rows)), []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, summary, seconds in one_seed(seed, Path(folder), rows, args.only):
                print(line(seed, name, summary, seconds), flush=True)
                figures = {"judge": summary["judge"]["mean"], "KL": summary["kl"]}
                runs.append({"seed": seed, "name": name, **figures, "seconds": seconds})
                if args.out:
                    args.out.write_text(json.dumps(runs, indent=1) + "\n")
    table = pd.DataFrame(runs).groupby("name", sort=False)[["judge", "KL", "seconds"]]
    print(table.agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
