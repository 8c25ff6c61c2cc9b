"""Everything that 4_test measures, for every algorithm and several seeds of the embedded world.

    python bench/evaluate.py --seeds 0 1 2 --out docs/evaluation.json

Each seed trains base, actor, reward model and watchdog once, in a folder of its own. Then each
algorithm trains a policy with the settings of the preset `tiny`. `--models FOLDER` takes base and
actor from FOLDER/seed-0, FOLDER/seed-1, ... instead of training them. `python -m lab.record` turns
the JSON file into the table of docs/evaluation.md.
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
from lab import measures, report  # noqa: E402

ALGORITHMS = ("ppo", "grpo", "rloo", "dpo")


def train(steps, what):
    """Runs a training loop to its end and says how long it took."""
    start = time.perf_counter()
    for _ in steps:
        pass
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)


def prepare(folder, seed, models):
    """Makes a course with base, actor, reward model and watchdog; returns its Config."""
    (folder / "dataset").symlink_to(ROOT / "dataset")
    cfg = util.Config("tiny", root=str(folder), seed=seed, tracker="none")
    for name in ("base", "actor"):
        if models:
            shutil.copytree(models / f"seed-{seed}" / "model" / name, folder / "model" / name)
        else:
            train(getattr(util, f"train_{name}")(cfg), name)
    train(util.train_critic(cfg), "reward model and watchdog")
    return cfg


def one_seed(cfg, n):
    """Trains every algorithm; returns the entries of all models and of both reward models."""
    rlhf = Path(cfg.root) / "model" / "rlhf"
    for algorithm in ALGORITHMS:
        train(util.train_rlhf(cfg.changed(**settings(algorithm))), algorithm)
        shutil.move(rlhf, rlhf.with_name(algorithm))
    start = time.perf_counter()
    rows, pairs = util.load_eval_rows(cfg), util.held_out_pairs(cfg)
    scorer, watchdog = util.load_reward(cfg), util.load_watchdog(cfg)
    names = ["base", "actor", *ALGORITHMS]
    examined = util.examine_models(cfg, names, rows, pairs, scorer, watchdog)
    models = {name: one.summary for name, one in examined.items()}
    tokenizer, actor = util.load_pair(cfg, "actor")
    crew = util.Crew(tokenizer, actor, actor, scorer)
    best = util.best_of(crew, rows, cfg.changed(best_of=n), util.rng_for(cfg, "best"))
    models[f"best of {n}"] = util.summarise(best, (), examined["actor"].sampled, watchdog)
    critics = {}
    for name, critic in util.critics_to_test(cfg, watchdog).items():
        table = util.evaluate_critic(critic.model, critic.tokenizer, pairs, cfg)
        critics[name] = measures.critic_summary(pd.DataFrame(table))
    print(f"evaluation: {time.perf_counter() - start:.0f} s", flush=True)
    return models, critics


def settings(algorithm):
    """The parameters of an algorithm: GRPO and RLOO have their own usual settings."""
    own = util.Config("tiny", algorithm=algorithm)
    return {name: getattr(own, name) for name in ("algorithm", "answers", "loss_mean")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--models", type=Path, help="folder with seed-N/model/base and .../actor")
    parser.add_argument("--best-of", type=int, default=16, help="n of best-of-n; default: 16")
    parser.add_argument("--out", type=Path, help="write all figures to this file as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            models, critics = one_seed(prepare(Path(folder), seed, args.models), args.best_of)
        runs.append({"seed": seed, "models": models, "critics": critics})
        for table in (report.result_table(models), report.detail_table(models)):
            print(f"\nseed {seed}\n{table.to_string()}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
