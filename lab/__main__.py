"""python -m lab: runs the course without a browser.

Papermill runs the notebook of each stage; `course` runs all five notebooks, and `overoptimise` the
optional lesson in more/. `fits` estimates the memory and time of every stage, `chat` talks to a
trained model, `evaluate` measures models, `label` asks you which of two answers is better, `data`
shows how data of yours are read, `compare` draws two runs on one page, `push` uploads a model to
the hub, `world` writes the embedded data, and `address` enters the repository's address.
"""

import argparse
import json
import logging
import math
import os
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

from lab import CourseError, processes
from lab.errors import explained, plain_errors
from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parent.parent  # the folder of the notebooks
STAGES = {  # command: (its folder in model/, its name in the metadata of Config)
    "download": ("base", "base"),
    "actor": ("actor", "actor"),
    "critic": ("critic", "critic"),
    "rlhf": ("rlhf", "rlhf"),
    "test": ("report", "test"),
}
LANGUAGE_MODELS = ("base", "actor", "rlhf")  # the folders in model/ that `chat` can talk to
TRAINED = ("base", "actor", "critic", "rlhf")  # the folders in model/ that hold a model
LESSON = "more/overoptimisation.ipynb"
REWRITE = "\r\033[K"  # moves to the start of the terminal's line and empties it


class Failed(CourseError):
    """A notebook stopped with an error."""


# ------------------------------------------------------------------------------------------------
# Parameters


class Parser(argparse.ArgumentParser):
    """Appends a table of parameters to the help.

    The table is built only when somebody asks for help, because it imports torch, which is slow.
    """

    table = staticmethod(list)

    def format_help(self):
        rows = [f"  {name:20} {default!s:>8}  {meaning}" for name, default, meaning in self.table()]
        return super().format_help() + "\n".join(["\nparameters:", *rows, ""] if rows else [])


def parser():
    top = Parser(prog="python -m lab", description="Runs the course without a browser.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    add_world(commands)
    add_notebooks(commands)
    add_lesson(commands)
    add_fits(commands)
    add_chat(commands)
    add_evaluate(commands)
    add_label(commands)
    add_data(commands)
    add_parameters(commands)
    add_address(commands)
    add_compare(commands)
    add_push(commands)
    return top


def add_world(commands):
    world = commands.add_parser(
        "world",
        help="write the embedded data",
        description="Writes the embedded data: train.json and eval.json.",
    )
    world.add_argument(
        "--out", metavar="DIR", default=HOME / "dataset", help="the folder to write to [dataset]"
    )
    world.table = world_table


def add_notebooks(commands):
    notebooks = {stage: f"run {NOTEBOOKS[folder]}" for stage, (folder, _) in STAGES.items()}
    for name, text in {**notebooks, "course": "run all five notebooks"}.items():
        command = commands.add_parser(
            name, help=text, description=f"Runs{text[3:]}. The result goes to model/. {TABLE_NOTE}"
        )
        command.add_argument(
            "--json",
            action="store_true",
            help="under torchrun: print the metrics of every step, and an error, as lines of JSON",
        )
        if name == "critic":
            command.add_argument(
                "--rows", metavar="FILE", help="under torchrun: the pairs to learn from, as JSON"
            )


def add_lesson(commands):
    lesson = commands.add_parser(
        "overoptimise",
        help=f"run {LESSON}",
        description=f"Runs {LESSON}: policies of every algorithm against strong and weak reward "
        "models, judged by the gold. It starts from the base model and the actor, and takes about "
        f"a quarter of an hour. The runs go to model/overoptimisation. {TABLE_NOTE}",
    )
    lesson.add_argument("--quick", action="store_true", help="one seed, fewer runs: 3 minutes")


def add_fits(commands):
    fits = commands.add_parser(
        "fits",
        help="how much memory and time each stage takes with a model",
        description=f"{FITS_NOTE} {TABLE_NOTE}",
    )
    fits.add_argument(
        "model",
        metavar="MODEL",
        help="tiny, a folder with config.json, a name on the hub, or one of opt-125m, "
        "smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b, qwen2.5-7b, which need no hub",
    )
    fits.add_argument(
        "--gpu", metavar="GB", type=float, help="the memory of the GPU [that of the GPU found]"
    )


def add_chat(commands):
    chat = commands.add_parser(
        "chat", help="talk to a trained model", description=f"{CHAT_NOTE} {TABLE_NOTE}"
    )
    chat.add_argument(
        "stage",
        nargs="?",
        choices=LANGUAGE_MODELS,
        default="rlhf",
        help="the model to talk to: base, actor or rlhf [rlhf]",
    )
    chat.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="the sampling temperature; 0 always takes the most likely token [1]",
    )
    chat.add_argument("--seed", metavar="N", help="the same as --set seed=N")
    chat.add_argument(
        "--safety", metavar="FILTER", default="",
        help="replace unsafe answers: rules, or module.function of your own; default: no filter",
    )  # fmt: skip


def add_evaluate(commands):
    evaluate = commands.add_parser(
        "evaluate",
        help="measure models, and how they differ",
        description=f"{EVALUATE_NOTE} {TABLE_NOTE}",
    )
    evaluate.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="base, actor, rlhf, a folder, or a name on the hub; all are compared with the first",
    )
    evaluate.add_argument(
        "--prompts", metavar="FILE", help="the prompts, in any form that data may have [eval.json]"
    )
    evaluate.add_argument("--out", metavar="FILE", help="write every answer as a line of JSON")


def add_label(commands):
    label = commands.add_parser(
        "label", help="compare answers of the actor", description=f"{LABEL_NOTE} {TABLE_NOTE}"
    )
    label.add_argument(
        "--count", metavar="N", type=int, default=40, help="how many pairs to compare in all [40]"
    )
    label.add_argument(
        "--report",
        action="store_true",
        help="compare the answers of actor and rlhf that 4_test has reported: it then shows how "
        "often you prefer rlhf. No training reads these comparisons (dataset/compared.jsonl)",
    )
    label.add_argument(
        "--labeller",
        metavar="NAME",
        help="a reward or module.function that compares in your place: the higher number wins",
    )
    label.add_argument(
        "--noise",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="the share of its choices that are turned round [0]",
    )


def add_data(commands):
    shown = commands.add_parser(
        "data",
        help="show how data of yours are read",
        description="Shows which rows a source gives, how long they are, and what is left out. It "
        f"writes nothing unless you give --out. {TABLE_NOTE}",
    )
    shown.add_argument(
        "source", nargs="?", help="a file, a folder or a name on the hub [the parameters below]"
    )
    shown.add_argument(
        "--out", metavar="DIR", help="write train.json and eval.json of the course into this folder"
    )


def add_parameters(commands):
    """Lets the commands above take parameters, and explain them in their help."""
    for name in (*STAGES, "course", "overoptimise", "fits", "chat", "evaluate", "label", "data"):
        command = commands.choices[name]
        command.add_argument("--preset", metavar="NAME", help="the same as --set preset=NAME")
        command.add_argument(
            "--config", metavar="FILE", help="a YAML file with parameters of one or more stages"
        )
        command.table = lambda name=name: [
            (f.name, f.default, f.metadata["meaning"]) for f in read_by(name)
        ]
    for command in commands.choices.values():
        setting = {"metavar": "NAME=VALUE", "help": "set a parameter; you may repeat this"}
        command.add_argument("--set", action="append", default=[], **setting)


def add_address(commands):
    address = commands.add_parser(
        "address",
        help="enter the address of your repository",
        description="Writes the address of your git repository into the setup cells of the "
        "notebooks and into the READMEs, with links that open the notebooks in Colab if the "
        "repository is on GitHub. Run it again to change the address.",
    )
    address.add_argument(
        "url", metavar="URL", help='https://github.com/OWNER/REPOSITORY, or "" to remove it'
    )


def add_compare(commands):
    compare = commands.add_parser(
        "compare",
        help="draw two runs on one page",
        description="Draws two runs on one page: their curves, the parameters that differ, and "
        "their results. A run is the folder of a course, its folder model/, or the folder of a "
        "finished stage.",
    )
    compare.add_argument("first", metavar="A")
    compare.add_argument("second", metavar="B")
    compare.add_argument(
        "--out", metavar="FILE", default="compare.html", help="the page to write [compare.html]"
    )


def add_push(commands):
    push = commands.add_parser(
        "push",
        help="upload a model to the hub",
        description="Prints the model card and the files of model/STAGE; with --yes it uploads "
        "them to the Hugging Face hub.",
    )
    push.add_argument("name", metavar="NAME", help="the name on the hub, for example ada/tiny-rlhf")
    push.add_argument("stage", metavar="STAGE", choices=TRAINED, help="|".join(TRAINED))
    push.add_argument("--yes", action="store_true", help="upload them")
    push.add_argument(
        "--root", metavar="DIR", default=HOME, help="the folder of the course [the notebooks' one]"
    )


TABLE_NOTE = (
    "The table shows the defaults of the preset tiny. Relative paths start at the folder of the "
    "notebooks."
)
FITS_NOTE = (
    "Estimates the memory and the time of each stage from the config of a model; no weights are "
    "loaded. With parameters it speaks of the run that these parameters start. Without --preset it "
    "takes tiny for tiny and colab for all other models. If a stage does not fit, the last column "
    "has the cheapest change with which it does, and its peak."
)
CHAT_NOTE = (
    "Talks to a trained model in the terminal. The models know single questions only, so every "
    "question stands alone: a model does not see what you asked before. If the judge knows the "
    "kind of question, it grades the answer; it forgives the case of letters, extra spaces and a "
    "missing mark at the end, and the model gets the question in its usual spelling. An empty line "
    "or Ctrl-C ends the chat."
)
EVALUATE_NOTE = (
    "Lets each model answer the prompts, sampled and greedy, and prints what 4_test measures: the "
    "judge's scores where the judge knows the question, metrics, categories, rewards where there "
    "is a reward model, variety, and the distance from the first model. Below stands how the other "
    "models differ from the first, with 95 % intervals by paired bootstrap."
)
LABEL_NOTE = (
    "Shows two answers of the actor to the same question and asks which is better. Every choice is "
    "a line of dataset/feedback.jsonl; you may stop at any time and go on later. 2_critic and DPO "
    "learn from the file."
)


def read_by(command):
    """The fields of Config that a command reads; `course` reads all of them."""
    from util import Config

    read = dict.fromkeys(("chat", "label", "data"), {"all"}) | {"evaluate": {"all", "test"}}
    read |= {name: {"all", stage} for name, (_, stage) in STAGES.items()}
    read["overoptimise"] = {"all", "critic", "rlhf"}
    every = command in ("course", "fits")
    return [f for f in fields(Config) if every or read[command] & {*f.metadata["stages"]}]


def world_table():
    from lab.world import World

    return [(f.name, f.default, f.metadata["meaning"]) for f in fields(World)]


def assignments(pairs):
    """Turns ["seed=1"] into {"seed": "1"}."""
    for pair in pairs:
        if "=" not in pair:
            raise CourseError(f"--set needs NAME=VALUE, for example seed=1; it got {pair!r}.")
    return {name.strip(): value.strip() for name, value in (pair.split("=", 1) for pair in pairs)}


def from_yaml(path):
    """The parameters in a YAML file, {name: value}."""
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
    """The given parameters, checked and typed by Config, and the root folder."""
    from util import Config

    typed = assignments(args.set) | ({"preset": args.preset} if args.preset else {})
    if args.command == "chat" and args.seed is not None:
        typed["seed"] = args.seed
    given = (from_yaml(args.config) if args.config else {}) | typed
    root = HOME / str(given.get("root", "."))
    # After 0_download there is a base model, and the preset `auto` means the one that suits it.
    build = Config if args.command in ("course", "download") else Config.of
    config = build(**given | {"root": str(root)})
    own = {f.name for f in read_by(args.command)}
    if lost := [name for name in typed if name not in own]:  # a file may serve other stages too
        raise CourseError(
            f"{args.command} does not read {', '.join(lost)}. `python -m lab {args.command} "
            "--help` lists the parameters that it reads."
        )
    kept = {name: str(given[name]) for name in ("preset", "root") if name in given}
    return {name: getattr(config, name) for name in given} | kept, root


# ------------------------------------------------------------------------------------------------
# Running


def run_notebook(stage, given, root):
    """Runs the notebook of a stage under a line that tells how far it is."""
    own = {f.name for f in read_by(stage)}
    given = {name: value for name, value in given.items() if name in own}
    with progress(stage, root):
        execute(NOTEBOOKS[STAGES[stage][0]], given, root)


def progress(stage, root):
    """The line that tells how far the training of a stage is."""
    folder = STAGES[stage][0]
    metrics = root / "model" / f".{folder}.partial" / "metrics.jsonl"
    return Progress(NOTEBOOKS[folder], metrics, root / "model" / folder / "stage.json")


def execute(notebook, given, root):
    """Executes a notebook. The executed copy goes to model/notebooks, also after a failure."""
    from papermill import PapermillExecutionError, execute_notebook

    copy = root / "model" / "notebooks" / Path(notebook).name
    copy.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    try:
        execute_notebook(HOME / notebook, copy, given, kernel_name="python3", cwd=HOME, **quiet)
        return
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip(": ").split("\n")[0]
    except RuntimeError as error:  # the kernel died or did not start
        reason = f"{type(error).__name__}: {error or 'the memory may be too small.'}"
    raise Failed(f"{notebook} stopped. {reason}\nThe notebook up to the error: {copy}")


@plain_errors
def run_together(stage, given, root, as_json, rows=None):
    """Runs the training of a stage in all processes that a launcher has started. 4_test does not
    train: the first process runs its notebook. `rows` is a file of pairs for 2_critic."""
    import util

    if stage == "test":
        return processes.from_first(lambda: run_alone(stage, given, root))
    train = {
        "download": util.train_base,
        "actor": util.train_actor,
        "critic": util.train_critic,
        "rlhf": util.train_rlhf,
    }
    own = {f.name for f in read_by(stage)}
    given = {name: value for name, value in given.items() if name in own} | {"root": str(root)}
    cfg = util.Config(**given) if stage == "download" else util.Config.of(**given)
    more = {"rows": json.loads(Path(rows).read_text(encoding="utf-8"))} if rows else {}
    quiet = as_json or not processes.first()
    quiet_transformers()
    with nullcontext() if quiet else progress(stage, root):
        for metrics in train[stage](cfg, **more):
            if as_json and processes.first():
                print(json.dumps(metrics), flush=True)


def quiet_transformers():
    """Loading and saving a model prints no progress bars and no reports."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def run_alone(stage, given, root):
    """Runs a notebook in this process of several: its kernel must not join them."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name in processes.JOINS]:
            del os.environ[name]
        run_notebook(stage, given, root)


class Progress:
    """Prints how far a notebook is, from the metrics that its stage writes.

    In a terminal it rewrites one line every second; elsewhere it prints a line every 20 seconds.
    """

    def __init__(self, notebook, metrics, record):
        """`metrics` is the file that grows; `record` is there when the notebook has finished."""
        self.name, self.metrics, self.record = Path(notebook).stem, metrics, record
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
        """The JSON in the last line of a file, or in the whole stage.json, if this run wrote it."""
        try:
            if path.stat().st_mtime < self.began:
                return None
            text = path.read_text(encoding="utf-8")
            return json.loads(text if path == self.record else text.splitlines()[-1])
        except (OSError, ValueError, IndexError):  # there is no file, or half a line
            return None


def overoptimise(args):
    """Runs the lesson in more/, and prints what it has found out in sentences."""
    given, root = parameters(args)
    folder = root / "model" / "overoptimisation"
    with Progress(LESSON, folder / "progress.jsonl", folder / "results.json"):
        execute(LESSON, given | {"quick": args.quick}, root)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    print("\n".join(found["sentences"]))


def show_result(folder):
    """Prints what 4_test found: the models, then the judge's mean of every kind of question."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    models = dict(report["models"])
    if best := report.get("best_of"):
        models[f"best of {best['n']}"] = best
    judged = any(model["judge"] for model in models.values())
    print(f"\n{report['rows']} held-out questions. Means; the length in tokens, the KL in nats.")
    if judged:
        print("The judge's mean of sampled and of greedy answers, with its 95 % interval:")
    print_aligned(overview(models, report["rows"], judged))
    for metric in dict.fromkeys(name for m in models.values() for name in m.get("metrics") or {}):
        print(f"\nThe mean of {metric}, with its 95 % interval")
        print_aligned(means_of(metric, models))
    if judged:
        print("\nThe judge's means by kind of question, sampled / greedy")
        print_aligned(by_kind(models))
    if not judged and any(model.get("categories") for model in models.values()):
        print("\nThe means of the categories")
        print_aligned(by_category(models))
    accuracy = (report.get("critic") or {}).get("accuracy")
    if accuracy is not None:
        print(f"\nThe reward model is right about {accuracy:.0%} of the held-out pairs.")
    print(f"Read the whole report: {folder / 'report.html'}")


def overview(models, rows, judged):
    """The lines of the result, a line for each model: the judge's mean of its sampled answers
    beside that of its greedy ones, and the means of all other figures."""
    numbers = {"reward": ".2f", "kl": ".2f", "length": ".1f", "distinct_2": ".2f", "eos": ".0%"}
    numbers |= {"perplexity": ",.1f"} if any("perplexity" in m for m in models.values()) else {}
    heads = {"kl": "KL", "distinct_2": "distinct-2", "eos": "ended"}
    head = ["model", "questions", *["sampled", "greedy"] * judged]
    yield head + [heads.get(name, name) for name in numbers]
    for name, model in models.items():
        line = [name, str(model.get("questions", rows))]
        if judged:
            line += [with_interval(model["judge"]), with_interval(model["judge_greedy"])]
        yield line + [number(model.get(name), form) for name, form in numbers.items()]


def with_interval(judge):
    return f"{judge['mean']:.2f} ({judge['low']:.2f}-{judge['high']:.2f})" if judge else "-"


def number(value, form):
    return "-" if value is None else format(value, form)


def means_of(metric, models):
    """The lines of one of your metrics: each model's sampled beside its greedy answers."""
    from lab.report import with_interval

    yield ["model", "sampled", "greedy"]
    for name, model in models.items():
        both = model.get("metrics"), model.get("metrics_greedy")
        yield [name, *(with_interval((found or {}).get(metric)) for found in both)]


def by_kind(models):
    """The lines of the judge's means by kind, with a column for each model."""
    models = {name: model for name, model in models.items() if model["judge"]}
    yield ["kind", *models]
    kinds = dict.fromkeys(kind for model in models.values() for kind in model["judge"]["kinds"])
    for kind in kinds:
        line = [kind]
        for model in models.values():
            both = model["judge"], model["judge_greedy"]
            line.append(" / ".join(number(x["kinds"].get(kind), ".2f") for x in both if x))
        yield line


def by_category(models):
    """The lines of the categories' means, with a column for each model."""
    yield ["category", *models]
    for name in dict.fromkeys(
        x for model in models.values() for x in model.get("categories") or {}
    ):
        found = [(model.get("categories") or {}).get(name) for model in models.values()]
        yield [name, *(number(entry and entry["mean"], ".2f") for entry in found)]


def print_aligned(lines):
    """Prints rows of texts as columns, the first column to the left."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *rest in lines:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


# ------------------------------------------------------------------------------------------------
# What fits


def show_fits(args):
    """Prints what each stage needs with a model."""
    import util
    from lab import fits

    if args.gpu is not None and not 0 < args.gpu < math.inf:
        raise CourseError("--gpu must be above 0.")
    given, _ = parameters(args)
    given = {"preset": "tiny" if args.model == "tiny" else "colab"} | given
    cfg = util.Config(**given)
    shape, machine = fits.shape_of(args.model, cfg), fits.machine_of(cfg, args.gpu)
    above, below = fits.sentences(args.model, shape, cfg, machine)
    print(f"{above}\n")
    with warnings.catch_warnings():  # about names that a later transformers will not know
        warnings.simplefilter("ignore", FutureWarning)
        shards = cfg.num_processes if cfg.shard else 1
        print_aligned(fits.table(util, shape, given, machine, shards))
    print(f"\n{below}")


# ------------------------------------------------------------------------------------------------
# Talking to a model


@plain_errors
def chat(args):
    """Loads a model and talks in the terminal."""

    import util
    from lab import safety
    from lab.chat import talk
    from lab.tokens import stops_of

    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise CourseError(f"--temperature {args.temperature} is impossible: it must be 0 or more.")
    check = safety.load(args.safety)
    given, root = parameters(args)
    cfg = util.Config.of(**given | {"root": str(root)})
    quiet_transformers()
    tokenizer, model = util.load_pair(cfg, args.stage)
    reply = partial(answer_ids, cfg, tokenizer, model, args.temperature)
    talk(args.stage, reply, tokenizer, stops_of(model, tokenizer), check)


def answer_ids(cfg, tokenizer, model, temperature, row, number):
    """Yields the ids of the answer to question `number`, which has random numbers of its own."""
    import util
    from lab.chat import stream

    prompt = util.encode_prompts(tokenizer, [row["prompt"]], cfg, model.device)
    how = util.sampling(cfg, model, tokenizer, temperature)
    generator = util.rng_for(cfg, "chat", number)
    uniforms = util.draw_uniforms(1, how["max_new_tokens"], generator, model.device)
    choose = partial(util.pick, temperature=how["temperature"], top_k=0, top_p=1.0)
    return stream(model, *prompt, uniforms, choose, how["eos_token_id"], cfg)


# ------------------------------------------------------------------------------------------------
# Measuring models


@plain_errors
def evaluate_models(args):
    """Prints what is measured of some models, and how the others differ from the first."""

    import util
    from lab import report, runs
    from lab.data import with_pairs

    given, root = parameters(args)
    cfg = util.Config.of(**given | {"root": str(root)})
    quiet_transformers()
    rows = util.splits.rows_of(cfg, args.prompts) if args.prompts else util.load_eval_rows(cfg)
    names, trained = list(dict.fromkeys(args.models)), runs.has_record(root, "critic")
    rewards = (util.load_reward(cfg), util.load_watchdog(cfg)) if trained else (None, None)
    found = util.examine_models(cfg, names, rows, with_pairs(rows), *rewards, actor=names[0])
    models = {name: one.summary for name, one in found.items()}
    print(f"{len(rows)} prompts. In brackets stand 95 % intervals.\n")
    main, details = report.result_table(models, names[0]).T, report.detail_table(models, names[0])
    print_aligned([["", *names], *table_lines(main), *table_lines(details)])
    for name in names[1:]:
        lines = report.differences(scored(found[names[0]]), scored(found[name]))
        print(f"\nWhat {name} scores more than {names[0]}")
        table = report.difference_table(lines, names[0], name)
        print_aligned([list(table), *table.to_numpy().tolist()])
    if args.out:
        report.write_lines(args.out, report.answer_lines(found, cfg.temperature))
        print(f"\nEvery answer: {args.out}")


def scored(one):
    """The sampled answers of a model, and those to the prompts of the categories."""
    from lab.report import as_result

    return one.sampled + list(map(as_result, one.graded))


def table_lines(table):
    return [[name, *row] for name, row in zip(table.index, table.to_numpy().tolist())]


# ------------------------------------------------------------------------------------------------
# Comparing answers


@plain_errors
def label_pairs(args):
    """Asks in the terminal which of two answers is better, or lets a function decide."""

    import util
    from lab import label

    if args.count < 1 or not 0 <= args.noise <= 1:
        raise CourseError("--count must be at least 1, and --noise must lie between 0 and 1.")
    given, root = parameters(args)
    cfg = util.Config.of(**given | {"root": str(root)})
    quiet_transformers()
    find = label.pairs_of_report if args.report else util.pairs_to_ask
    file = label.TEST_FILE if args.report else label.FILE
    if args.labeller:
        done = label.simulate(cfg, find, args.labeller, args.count, args.noise, file)
        print(f"{args.labeller} has compared {done} pairs: {label.path_of(root, file)}")
    else:
        label.ask_in_terminal(label.Session(cfg, find, args.count, file=file))


# ------------------------------------------------------------------------------------------------


def make_world(args):
    from lab.world import World, write

    for path in write(World(**assignments(args.set)), args.out).values():
        print(path)


@plain_errors
def show_data(args):
    """Prints what a source holds and its first rows; writes them to --out if it is given."""
    import util
    from lab.data import write_rows

    given, root = parameters(args)
    cfg = util.Config.of(**given | {"root": str(root)})
    if args.source:
        cfg = cfg.changed(data=args.source, sft_data="", preference_data="", prompt_data="")
    folder = next((f for f in (root / "tokenizer", root / "model" / "base") if f.is_dir()), None)
    tokenizer = util.load_tokenizer(folder, cfg) if folder else None
    for facts in util.splits.overview(cfg, tokenizer):
        print_facts(facts)
    cut = " A model does not read what stands in [brackets]." if tokenizer else ""
    print(f"The first rows as they are read.{cut}\n")
    for row in util.splits.as_read(cfg, tokenizer):
        print_facts(row)
    if args.out:
        train, evals = util.splits.load_data(cfg)
        print("\n".join(str(path) for path in write_rows(args.out, train=train, eval=evals)))


def print_facts(facts):
    width = max(map(len, facts))
    lines = [f"{what:{width}}  {value}" for what, value in facts.items()]
    print("\n".join(lines), end="\n\n")


def enter_address(args):
    from lab.address import write_address

    changed = write_address(args.url, HOME)
    print("\n".join(map(str, changed)) or "Nothing to change: the address is there already.")


def compare_runs(args):
    from lab.compare import compare

    print(compare(args.first, args.second, args.out))


def push_stage(args):
    from lab.push import push

    push(args.root, args.stage, args.name, send=args.yes)


COMMANDS = {  # all others run notebooks
    "world": make_world,
    "data": show_data,
    "label": label_pairs,
    "fits": show_fits,
    "chat": chat,
    "evaluate": evaluate_models,
    "compare": compare_runs,
    "overoptimise": overoptimise,
    "push": push_stage,
    "address": enter_address,
}


def run(args):
    if args.command in COMMANDS:
        return processes.from_first(lambda: COMMANDS[args.command](args))
    given, root = parameters(args)
    processes.start(given.get("device", "auto"))
    for stage in STAGES if args.command == "course" else [args.command]:
        if processes.joined() > 1:
            run_together(stage, given, root, args.json, getattr(args, "rows", None))
        else:
            run_notebook(stage, given, root)
    folder = root / "model" / "report"
    report = args.command in ("course", "test") and (folder / "report.json").exists()
    if report and processes.first():
        show_result(folder)


def main(argv=None):
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    args = parser().parse_args(argv)
    try:
        run(args)
    except CourseError as error:
        if not getattr(error, "elsewhere", False):  # else another process prints it
            print(error, file=sys.stderr)
            if getattr(args, "json", False):
                print(json.dumps({"error": str(error)}), flush=True)
        return 1 if isinstance(error, Failed) else 2
    except OSError as error:  # for example a full disk, or no permission to write
        if (told := explained(error)) is None:
            raise
        print(told, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if processes.first():
            print("\nStopped. Finished stages are kept.", file=sys.stderr)
        return 130
    finally:
        processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
