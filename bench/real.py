"""Runs the whole course on a real chat model, with the preset `real`, for several seeds.

    python bench/real.py --seeds 0 1 2 --folder model/real --out docs/real.json

Each seed has a folder of its own. A seed whose report exists is not run again, so an interrupted
measurement goes on where it stopped. `python -m lab.record` turns the JSON file into the tables and
the picture of README.md and docs/real.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.runs import finished, read_record  # noqa: E402

SHOWN = 10  # answers that the JSON file keeps


def run_course(root, seed, settings):
    """Runs the five notebooks in a folder, unless its report exists."""
    if (root / "model" / "report" / "stage.json").exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    given = [f"root={root.resolve()}", f"seed={seed}", *settings]
    command = [sys.executable, "-m", "lab", "course", "--preset", "real"]
    for value in given:
        command += ["--set", value]
    subprocess.run(command, check=True, cwd=ROOT)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(root, seed):
    """What a finished run found: the report, its costs, the curves of 3_rlhf and some answers."""
    model = root / "model"
    report = json.loads((model / "report" / "report.json").read_text(encoding="utf-8"))
    records = {name: read_record(root, name) for name in finished(root)}
    answers = [row for row in lines_of(model / "report" / "answers.jsonl") if row["temperature"]]
    prompts = list(dict.fromkeys(row["prompt"] for row in answers))[:SHOWN]
    return {
        "seed": seed,
        "rows": report["rows"],
        "models": report["models"] | {f"best of {report['best_of']['n']}": report["best_of"]},
        "critic": report["critic"]["accuracy"],
        "minutes": {name: record["seconds"] / 60 for name, record in records.items()},
        "peak_memory_gb": max(r["peak_memory_mb"] for r in records.values()) / 1000,
        "curves": lines_of(model / "rlhf" / "metrics.jsonl"),
        "answers": [
            {row["model"]: row["response"] for row in answers if row["prompt"] == prompt}
            | {"prompt": prompt}
            for prompt in prompts
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--out", type=Path, help="write all figures to this file as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        root = args.folder / f"seed-{seed}"
        run_course(root, seed, args.set)
        runs.append(figures(root, seed))
        if args.out:
            text = json.dumps(runs, indent=1, ensure_ascii=False)
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
