"""One step of PPO, GRPO, SFT and the reward model: this repository against TRL, in one run.

    python bench/peers.py --install bench/.peers       # once: TRL in environments of its own
    python bench/peers.py --peers bench/.peers --case grpo --shape tiny --out peers.json

Every contender is a process that builds its models once and then does a step when it is its turn;
exactly one computes at a time. PPO is TRL 1.12.0, the last that has it; the rest is TRL 1.16.0.
"""

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
from bench.contenders import CASES, Turns  # noqa: E402

FOLDER = ROOT / "bench" / ".peers"
ROUNDS = {"tiny": 9, "opt125m": 3}
TITLES = {
    "ppo": "PPO iteration, 16 prompts, 64 new tokens, 4 epochs, minibatch 8",
    "grpo": "GRPO step, 2 prompts x 8 answers, 64 new tokens",
    "sft": "SFT step, 8 rows",
    "reward": "Reward model step, 8 pairs",
}
SILENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python_of(folder, who):
    """TRL has a Python of its own; everybody else has this one."""
    place = "Scripts" if os.name == "nt" else "bin"
    own = folder / who.lower().replace(" ", "-")
    return str(own / place / "python") if who.startswith("TRL") else sys.executable


def install(folder):
    """One environment for each version of TRL, all else in it as requirements.txt has it."""
    for who in sorted({who for case in CASES.values() for who in case if who.startswith("TRL")}):
        python = Path(python_of(folder, who))
        venv.create(python.parent.parent, with_pip=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        trl = who.replace("TRL ", "trl==")
        subprocess.run([*pip, "-c", ROOT / "requirements.txt", "torch", trl], check=True)


class Worker:
    """A contender in its process."""

    def __init__(self, folder, who, case, shape):
        self.who, self.errors = who, tempfile.TemporaryFile("w+")  # noqa: SIM115
        python = python_of(folder, who)
        if not Path(python).exists():
            raise SystemExit(f"{who} is not there: python bench/peers.py --install FOLDER")
        work = [python, __file__, "--work", who, "--case", case, "--shape", shape]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.process = subprocess.Popen(work, env=os.environ | SILENT, **pipes)

    def step(self):
        """One step, as what it took: {"total": seconds, ...}."""
        with suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(
                f"{self.who} stopped (was there memory for all? --who takes some of them):\n"
                f"{self.errors.read()[-3000:]}"
            )
        return json.loads(answer)

    def close(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def phases(step):
    """A step in seconds a phase, as far as its contender tells them apart."""
    found = {"seconds": step["total"]}
    if "generate" in step:
        found["generate, s"] = step["generate"]
        found["score, s"] = step["rollout"] - step["generate"]
        found["update, s"] = step["total"] - step["rollout"]
    return found | {"peak MB": step["peak"]}


def compete(folder, case, shape, rounds, chosen):
    """The lines of one table; ratios are taken round by round."""
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
        faster = common.ratios(columns["seconds"], ours) if who != "ours" else "1"
        yield {"contender": who} | columns | {"ours is faster, times": faster}


def main():
    parser = common.arguments(__doc__, f"{ROUNDS}, of PPO 2 with opt125m")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", type=Path, default=FOLDER, help="where --install put TRL")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="install TRL, then stop")
    everybody = sorted({who for case in CASES.values() for who in case})
    parser.add_argument(
        "--who", nargs="+", default=everybody, choices=everybody, help="beside ours"
    )
    parser.add_argument("--work", choices=everybody)
    args = parser.parse_args()
    if args.install:
        return install(args.install)
    if args.work:
        return CASES[args.case[0]][args.work](Turns(), args.shape[0], args.case[0])
    report = common.Report(args.out)
    for shape in args.shape:
        for case in args.case:
            few = 2 if (case, shape) == ("ppo", "opt125m") else ROUNDS[shape]
            lines = compete(args.peers.resolve(), case, shape, args.rounds or few, args.who)
            report.table(f"{TITLES[case]}, {shape}", list(lines))


if __name__ == "__main__":
    main()
