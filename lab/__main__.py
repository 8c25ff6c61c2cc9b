"""python -m lab: the course without a browser.

Each stage is its notebook, run by papermill; `course` runs all five. `world` writes the embedded
data.
"""

import argparse
import json
import logging
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

from lab import CourseError
from lab.errors import explained
from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parent.parent  # the notebooks lie here, wherever one stands
STAGES = {  # subcommand: its folder in model/, its name in the metadata of Config
    "download": ("base", "base"),
    "actor": ("actor", "actor"),
    "critic": ("critic", "critic"),
    "rlhf": ("rlhf", "rlhf"),
    "test": ("report", "test"),
}
REWRITE = "\r\033[K"  # to the start of the terminal's line, and empty it


class Failed(CourseError):
    """A notebook that stopped."""


# ------------------------------------------------------------------------------------------------
# Parameters


class Parser(argparse.ArgumentParser):
    """Its help ends with a table of parameters, made when asked for: importing torch is slow."""

    table = staticmethod(list)

    def format_help(self):
        rows = [f"  {name:20} {default!s:>8}  {meaning}" for name, default, meaning in self.table()]
        return super().format_help() + "\n".join(["\nparameters:", *rows, ""] if rows else [])


def parser():
    top = Parser(prog="python -m lab", description="The course without a browser.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    world = commands.add_parser("world", help="write the embedded data, dataset/*.json")
    world.add_argument("--out", metavar="DIR", default=HOME / "dataset", help="default: dataset")
    world.table = world_table
    notebooks = {stage: f"run {NOTEBOOKS[folder]}" for stage, (folder, _) in STAGES.items()}
    for name, text in {**notebooks, "course": "run all five notebooks"}.items():
        note = f"{text}. The defaults below are those of the preset tiny. Relative paths among"
        note += " the parameters count from the folder of the notebooks."
        command = commands.add_parser(name, help=text, description=note)
        command.add_argument("--preset", metavar="NAME", help="the same as --set preset=NAME")
        command.add_argument("--config", metavar="FILE", help="YAML, for one stage or for all")
        command.table = lambda name=name: [
            (f.name, f.default, f.metadata["meaning"]) for f in read_by(name)
        ]
    for command in commands.choices.values():
        setting = {"metavar": "NAME=VALUE", "help": "a parameter; may be repeated"}
        command.add_argument("--set", action="append", default=[], **setting)
    return top


def read_by(command):
    """The fields of Config that a notebook reads, or any of them."""
    from util import Config

    stage = STAGES.get(command, ("", None))[1]
    return [f for f in fields(Config) if stage is None or {"all", stage} & {*f.metadata["stages"]}]


def world_table():
    from lab.world import World

    return [(f.name, f.default, f.metadata["meaning"]) for f in fields(World)]


def assignments(pairs):
    """["seed=1"] as {"seed": "1"}."""
    for pair in pairs:
        if "=" not in pair:
            raise CourseError(f"--set wants NAME=VALUE, not {pair!r}.")
    return {name.strip(): value.strip() for name, value in (pair.split("=", 1) for pair in pairs)}


def from_yaml(path):
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise CourseError(f"{path} cannot be read ({error.strerror}).") from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}, line {error.problem_mark.line + 1}"
        raise CourseError(f"{place}: this is not valid YAML ({error.problem}).") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise CourseError(f"{path} cannot be read: it must be YAML, saved as UTF-8.") from None
    if not isinstance(values, dict):
        raise CourseError(f"{path} must hold lines like `kl_coef: 0.1`.")
    return {str(name): value for name, value in values.items() if value is not None}


def parameters(args):
    """What was given, typed by Config, and the root folder. What cannot work is found here."""
    from util import Config

    typed = assignments(args.set) | ({"preset": args.preset} if args.preset else {})
    given = (from_yaml(args.config) if args.config else {}) | typed
    root = HOME / str(given.get("root", "."))
    # Behind 0_download the base model exists, and the preset `auto` is the one that suits it.
    build = Config if args.command in ("course", "download") else Config.of
    config = build(**given | {"root": str(root)})
    own = {f.name for f in read_by(args.command)}
    if lost := [name for name in typed if name not in own]:  # in a file they are for other stages
        raise CourseError(f"{args.command} does not read {', '.join(lost)}: see its --help.")
    kept = {name: str(given[name]) for name in ("preset", "root") if name in given}
    return {name: getattr(config, name) for name in given} | kept, root


# ------------------------------------------------------------------------------------------------
# Running


def run_notebook(stage, given, root):
    """Runs one notebook. The executed copy goes to model/notebooks, that of a failure as well."""
    from papermill import PapermillExecutionError, execute_notebook

    notebook = NOTEBOOKS[STAGES[stage][0]]
    copy = root / "model" / "notebooks" / notebook
    copy.parent.mkdir(parents=True, exist_ok=True)
    own = {f.name for f in read_by(stage)}
    given = {name: value for name, value in given.items() if name in own}
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    with Progress(root / "model", STAGES[stage][0]):
        try:
            execute_notebook(HOME / notebook, copy, given, kernel_name="python3", cwd=HOME, **quiet)
            return
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}".strip(": ").split("\n")[0]
        except RuntimeError as error:  # the kernel itself died, or did not start
            reason = f"{type(error).__name__}: {error or 'is there memory enough?'}"
    raise Failed(f"{notebook} stopped. {reason}\nThe notebook as far as it came: {copy}")


class Progress:
    """How far a notebook is, from the metrics that its stage writes line by line.

    On a terminal one line, rewritten every second; elsewhere a line every 20 seconds.
    """

    def __init__(self, model, folder):
        self.name = Path(NOTEBOOKS[folder]).stem
        self.metrics = model / f".{folder}.partial" / "metrics.jsonl"
        self.record = model / folder / "stage.json"
        self.rewrite = REWRITE if sys.stdout.isatty() else ""
        self.thread, self.done = threading.Thread(target=self.watch, daemon=True), threading.Event()
        self.began, self.status = time.time(), ""

    def __enter__(self):
        self.thread.start()

    def __exit__(self, kind, *_):
        self.done.set()
        self.thread.join()
        peak = (self.fresh(self.record) or {}).get("peak_memory_mb")
        memory = f"  peak memory {peak} MB" if peak else ""
        print(self.rewrite + self.line() + memory, flush=True)

    def watch(self):
        while not self.done.wait(1 if self.rewrite else 20):
            print(self.rewrite + self.line(), end="" if self.rewrite else "\n", flush=True)

    def line(self):
        if last := self.fresh(self.metrics) or self.fresh(self.record.with_name("metrics.jsonl")):
            total = f"/{last['steps']}" if "steps" in last else ""
            shown = [name for name in ("loss", "reward", "kl") if last.get(name) is not None]
            figures = [f"{name} {last[name]:.3f}" for name in shown]
            self.status = "  ".join([f"{last.get('step', '?')}{total} steps", *figures])
        return f"{self.name:11} {self.status:40} {time.time() - self.began:4.0f} s"

    def fresh(self, path):
        """The last line of a file as JSON (stage.json as a whole), if this run wrote it."""
        try:
            if path.stat().st_mtime < self.began:
                return None
            text = path.read_text(encoding="utf-8")
            return json.loads(text if path == self.record else text.splitlines()[-1])
        except (OSError, ValueError, IndexError):  # not there, or half a line
            return None


def show_result(folder):
    """The table of 4_test, a column a model, and where to read more."""
    from lab.report import result_table

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    unknown = float("nan")
    models = {
        name: {k: unknown if v is None and k[:5] != "judge" else v for k, v in model.items()}
        for name, model in report["models"].items()
    }
    print(f"\n{report['rows']} held-out questions")
    print(result_table(models).T.to_string(na_rep="-").replace("nan", "  -"))
    accuracy = (report.get("critic") or {}).get("accuracy")
    if accuracy is not None:
        print(f"The critic prefers the better answer in {accuracy:.0%} of the held-out pairs.")
    print(f"The report: {folder / 'report.html'}")


def make_world(args):
    from lab.world import World, write

    for path in write(World(**assignments(args.set)), args.out).values():
        print(path)


def run(args):
    if args.command == "world":
        return make_world(args)
    given, root = parameters(args)
    for stage in STAGES if args.command == "course" else [args.command]:
        run_notebook(stage, given, root)
    folder = root / "model" / "report"
    if args.command in ("course", "test") and (folder / "report.json").exists():
        show_result(folder)


def main(argv=None):
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    args = parser().parse_args(argv)
    try:
        run(args)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, Failed) else 2
    except OSError as error:  # a full or closed disk, a file in the way
        if (told := explained(error)) is None:
            raise
        print(told, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What was finished stays.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
