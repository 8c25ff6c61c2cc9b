"""Compares one step of PPO, GRPO, SFT and the reward model with TRL, in one run.

    python bench/peers.py --install bench/.peers       # once: installs TRL
    python bench/peers.py --peers bench/.peers --case grpo --shape tiny --out peers.json

Each version of TRL gets an environment of its own. Every contender is a process that builds its
models once and does a step when its turn comes, so that exactly one computes at a time. PPO uses
TRL 1.12.0, the last version that has it; the other cases use TRL 1.16.0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import common  # noqa: E402
from bench.contenders import CASES, StepTimer  # noqa: E402

FOLDER = ROOT / "bench" / ".peers"
ROUNDS = {"tiny": 9, "opt125m": 3}
TITLES = {
    "ppo": "PPO iteration, 16 prompts, 64 new tokens, 4 epochs, minibatch 8",
    "grpo": "GRPO step, 2 prompts x 8 answers, 64 new tokens",
    "sft": "SFT step, 8 rows",
    "reward": "Reward model step, 8 pairs",
}
QUIET_ENV = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python_of(folder, who):
    """The Python of a contender: TRL has environments of its own, the others use this one."""
    place = "Scripts" if os.name == "nt" else "bin"
    own = folder / who.lower().replace(" ", "-")
    return str(own / place / "python") if who.startswith("TRL") else sys.executable


def install(folder):
    """Makes an environment for each version of TRL, with the versions of requirements.txt."""
    for who in sorted({who for case in CASES.values() for who in case if who.startswith("TRL")}):
        python = Path(python_of(folder, who))
        venv.create(python.parent.parent, with_pip=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        trl = who.replace("TRL ", "trl==")
        subprocess.run([*pip, "-c", ROOT / "requirements.txt", "torch", trl], check=True)


class Worker:
    """A contender and the process in which it runs."""

    def __init__(self, folder, who, case, shape):
        self.who, self.errors = who, tempfile.TemporaryFile("w+")  # noqa: SIM115
        python = python_of(folder, who)
        if not Path(python).exists():
            raise SystemExit(f"{who} is not installed: run python bench/peers.py --install FOLDER")
        work = [python, __file__, "--work", who, "--case", case, "--shape", shape]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.process = subprocess.Popen(work, env=os.environ | QUIET_ENV, **pipes)

    def step(self):
        """Lets the contender do one step; returns its measurements: {"total": seconds, ...}."""
        with suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(
                f"{self.who} stopped. If memory ran out, choose fewer contenders with --who.\n"
                f"{self.errors.read()[-3000:]}"
            )
        return json.loads(answer)

    def close(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def phases(step):
    """The seconds of each phase of a step, as far as the contender reports them."""
    found = {"seconds": step["total"]}
    if "generate" in step:
        found["generate, s"] = step["generate"]
        found["score, s"] = step["rollout"] - step["generate"]
        found["update, s"] = step["total"] - step["rollout"]
    return found | {"peak MB": step["peak"]}


def table_rows(folder, case, shape, rounds, chosen):
    """Runs the contenders in turns and yields the rows of one table."""
    workers, steps = [], {who: [] for who in CASES[case] if who == "ours" or who in chosen}
    try:
        for who in steps:
            workers.append(Worker(folder, who, case, shape))
        for i in range(rounds + 1):
            for worker in workers[:: 1 if i % 2 else -1]:
                step = phases(worker.step())
                if i:  # the first round warms up
                    steps[worker.who].append(step)
    finally:
        for worker in workers:
            worker.close()
    ours = [step["seconds"] for step in steps["ours"]]
    for who, found in steps.items():
        columns = {name: [step[name] for step in found] for name in found[0]}
        relative = common.ratios(columns["seconds"], ours) if who != "ours" else "1"
        yield {"contender": who} | columns | {"time / ours": relative}


def main():
    parser = common.make_parser(__doc__, f"{ROUNDS}, and 2 for PPO with opt125m")
    parser.add_argument(
        "--case",
        nargs="+",
        default=list(CASES),
        choices=list(CASES),
        help="steps to compare; default: all",
    )
    parser.add_argument(
        "--peers", type=Path, default=FOLDER, help="the folder into which --install put TRL"
    )
    parser.add_argument(
        "--install", type=Path, metavar="FOLDER", help="install TRL into this folder, then stop"
    )
    names = sorted({who for case in CASES.values() for who in case})
    parser.add_argument(
        "--who",
        nargs="+",
        default=names,
        choices=names,
        help="contenders to run beside ours; default: all",
    )
    parser.add_argument("--work", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.install:
        return install(args.install)
    if args.work:
        return CASES[args.case[0]][args.work](StepTimer(), args.shape[0], args.case[0])
    report = common.Report(args.out)
    for shape in args.shape:
        for case in args.case:
            default = 2 if (case, shape) == ("ppo", "opt125m") else ROUNDS[shape]
            rounds = args.rounds or default
            rows = table_rows(args.peers.resolve(), case, shape, rounds, args.who)
            report.table(f"{TITLES[case]}, {shape}", list(rows))


if __name__ == "__main__":
    main()
