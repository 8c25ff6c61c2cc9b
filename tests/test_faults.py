"""What can go wrong, injected: every fault is one clear sentence or two, and nothing is lost.

`FAULTS=tests/faults.md python -m pytest tests/test_faults.py` rewrites the table of faults.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import util
from lab import CourseError, checkpoints, world
from lab import __main__ as driver
from lab.runs import Stage

resource = pytest.importorskip("resource")  # POSIX only, as forks and signals are
TABLE = Path(__file__).with_name("faults.md")
STAGES = ("base", "actor", "critic", "rlhf")
SMALL = dict(
    device="cpu", pretrain_steps=5, pretrain_documents=400, steps=3, rollout=6, minibatch=3,
    ppo_epochs=1, checkpoint_minutes=0, sft_share=0.2, preference_share=0.3, prompt_share=0.1,
    validation_rows=8, critic_batch=24, max_new_tokens=12, test_rows=8,
)  # fmt: skip
PAIR = ("prompt", "chosen", "rejected")
CUDA_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX signals")


# ------------------------------------------------------------------------------------------------
# A course to be harmed


@dataclass
class Course:
    """A finished course in the current folder, and what a fault changes about the next run."""

    root: Path
    patch: pytest.MonkeyPatch
    changes: dict = field(default_factory=dict)  # parameters
    line: str = ""  # of the shell
    reward: object = None
    in_child: object = None  # called first, in a process of its own that then acts
    after: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def train(self):
        return self.root / "dataset" / "train.json"

    @property
    def evals(self):
        return self.root / "dataset" / "eval.json"

    def model(self, *names):
        return self.root.joinpath("model", *names)

    def cfg(self, **changes):
        return util.Config("smoke", **{**SMALL, **self.changes, **changes})

    def run(self, stage, **changes):
        more = [self.reward] if stage == "rlhf" else []
        return list(getattr(util, f"train_{stage}")(self.cfg(**changes), *more))

    def edit(self, path, old, new):
        """The first `old` in a file becomes `new`."""
        data = path.read_bytes()
        assert old.encode() in data
        path.write_bytes(data.replace(old.encode(), new.encode(), 1))

    def edit_json(self, path, **changes):
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    def edit_row(self, number, **changes):
        """Fields of one row of train.json; None removes one."""
        lines = self.train.read_text().splitlines()
        row = json.loads(lines[number - 1]) | changes
        row = {name: value for name, value in row.items() if value is not None}
        lines[number - 1] = json.dumps(row, ensure_ascii=False)
        self.train.write_text("\n".join(lines) + "\n")

    def checkpoint(self, number=-1):
        """The folder of the newest checkpoint of the stopped run, or of an older one."""
        return sorted(self.model(".rlhf.checkpoints").glob("step-*"))[number]

    def mine(self):
        """A model somebody brings along, in ./mine; a run that takes it would accept no other."""
        folder = shutil.copytree(self.model("base"), self.root / "mine")
        (folder / "stage.json").unlink()
        self.changes |= dict(base_model="mine", fallback=False)
        return folder

    def tight(self, name, most, rows):
        """The function util.<name> needs too much memory for more rows than `most`."""
        whole = getattr(util, name)

        def limited(*args):
            if len(args[rows]) > most:
                raise torch.OutOfMemoryError(CUDA_FULL)
            return whole(*args)

        self.patch.setattr(util, name, limited)
        for known in [known for known, loss in util.LOSSES.items() if loss is whole]:
            self.patch.setitem(util.LOSSES, known, limited)

    def spoil(self, *calls):
        """The loss of 1_actor is no number in these updates."""
        whole, count = util.sft_loss, []

        def spoilt(model, *args):
            loss, *rest = whole(model, *args)
            count.extend([1] * (model.training and len(args[-1]) > 1))  # one row is measured first
            bad = model.training and len(count) in calls
            return loss * (float("nan") if bad else 1), *rest

        self.patch.setattr(util, "sft_loss", spoilt)

    def every_token(self, choose):
        """`choose` may put another token in the place of the sampled one; its log-prob is true."""
        whole = util.pick

        def pick(logits, luck, temperature, *more):
            token = choose(whole(logits, luck, temperature, *more)[0])
            return token, util.token_logprobs(logits / (temperature or 1.0), token)

        self.patch.setattr(util, "pick", pick)


def copy_of(folder, target):
    return shutil.copytree(folder, target, dirs_exist_ok=True, symlinks=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all four stages ran."""
    folder = tmp_path_factory.mktemp("finished")
    world.write(world.World(rows=300, eval_rows=40), folder / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        course = Course(folder, patch)
        for stage in STAGES:
            course.run(stage)
    return folder


@pytest.fixture(scope="module")
def halted(finished, tmp_path_factory):
    """The same, with a second run of 3_rlhf that was stopped in its third step."""
    folder = copy_of(finished, tmp_path_factory.mktemp("halted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = util.train_rlhf(Course(folder, patch).cfg())
        assert len([next(run) for _ in range(3)]) == 3
        run.close()
        names = [path.name for path in sorted((folder / "model/.rlhf.checkpoints").iterdir())]
        assert names == ["step-00000001", "step-00000002"]
    return folder


def in_a_child(work):
    """What `work` returns in a process of its own; None if it is killed there."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        with open(into, "w", encoding="utf-8") as file:
            json.dump(work(), file)
            file.flush()
            os._exit(0)
    os.close(into)
    with open(out, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def nobody():
    """A user who may not write here, whoever runs the tests."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def read_only(course):
    """Anybody may read, nobody may write; the next run is that of an ordinary user."""
    for path in (course.root, *course.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for folder in course.root.parents:
        mode = folder.stat().st_mode & 0o7777
        if folder.owner() == course.root.owner() and not mode & 0o001:
            folder.chmod(mode | 0o011)
            course.after.callback(folder.chmod, mode)
    course.in_child = nobody


def no_larger_than(size):
    """Files end at `size` bytes, as on a disk that fills up."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


# ------------------------------------------------------------------------------------------------
# Actions: what meets a fault


def report(course):
    """What 4_test does, without its figures."""
    cfg = course.cfg()
    rows, (tokenizer, model) = util.load_eval_rows(cfg), util.load_pair(cfg, "rlhf")
    reward = util.RewardModel(util.artifact(cfg.root, "critic"), cfg)
    crew = util.Crew(tokenizer, model, util.load_pair(cfg, "actor")[1], reward)
    util.evaluate(crew, rows, cfg, util.rng_for(cfg, "test"))
    with util.open_stage(cfg, "report", STAGES) as stage:
        (stage.folder / "report.json").write_text("{}")


def judge(course):
    cfg, folder = course.cfg(), course.model("critic")
    critic, tokenizer = util.load_scorer(folder, cfg), util.load_tokenizer(folder)
    util.evaluate_critic(critic, tokenizer, util.load_eval_rows(cfg), cfg)


def command(course):
    """A line of the shell; a notebook that starts is one fault too many."""

    def execute(*args, **more):
        raise AssertionError("a notebook was run")

    stub = SimpleNamespace(execute_notebook=execute, PapermillExecutionError=AssertionError)
    course.patch.setitem(sys.modules, "papermill", stub)  # the real one takes seconds to import
    course.patch.setattr(driver, "HOME", Path())
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = driver.main(course.line.split())
    if code:
        raise CourseError(said.getvalue().strip())


def choose(course):
    print(util.choose_base(course.cfg())[1])


ACTIONS = {
    "rows": lambda course: util.load_rows(course.cfg(), "preference", needs=PAIR),
    "eval rows": lambda course: util.load_eval_rows(course.cfg()),
    "parameters": lambda course: course.cfg(),
    "auto": lambda course: util.Config.of(),
    "device": lambda course: util.pick_device(course.cfg()),
    "choose": choose,
    "report": report,
    "judge": judge,
    "command": command,
} | {stage: lambda course, stage=stage: course.run(stage) for stage in STAGES}


@dataclass(frozen=True)
class Fault:
    """How it is injected, what meets it, what the user reads, what is promised.

    Promise "" is a refusal; else the run goes on: with the same "bits", the same "figures", or
    just "on".
    """

    group: str
    act: str
    seen: str
    inject: object
    promise: str = ""
    stopped: bool = False  # starts from the stopped run of 3_rlhf

    @property
    def how(self):
        return " ".join(self.inject.__doc__.split())


FAULTS = {}


def fault(group, act, seen, promise="", stopped=False):
    def keep(inject):
        assert inject.__name__ not in FAULTS
        FAULTS[inject.__name__] = Fault(group, act, seen, inject, promise, stopped)
        return inject

    return keep


# ------------------------------------------------------------------------------------------------
# Bad input

INPUT = "bad input"


@fault(INPUT, "rows", r"train\.json, line 7: this is not valid JSON.*one JSON object per line")
def broken_line(course):
    """line 7 of train.json ends in the middle"""
    lines = course.train.read_text().splitlines()
    lines[6] = lines[6][:40]
    course.train.write_text("\n".join(lines))


@fault(INPUT, "rows", r"train\.json, line \d+: this is not valid JSON")
def list_cut_off(course):
    """train.json is a JSON list without its end"""
    rows = [json.loads(line) for line in course.train.read_text().splitlines()[:9]]
    course.train.write_text(json.dumps(rows, indent=1)[:-30])


LEFT_OUT = r"1 of 300 rows of dataset/train\.json are left out\. 1: "


@fault(INPUT, "critic", LEFT_OUT + r"the field 'chosen' is missing \(first: line 5\)", "on")
def missing_field(course):
    """a row has only a prompt"""
    course.edit_row(5, chosen=None, rejected=None, response=None)


@fault(INPUT, "critic", r"line 1 .*: the field 'chosen' is missing; the row has 'choosen': rename")
def misnamed_field(course):
    """the rows say "choosen" instead of "chosen\""""
    course.train.write_text(course.train.read_text().replace('"chosen"', '"choosen"'))


@fault(INPUT, "actor", LEFT_OUT + r"the field 'response' must be a text", "on")
def wrong_type(course):
    """a row's response is a number"""
    course.edit_row(5, response=5)


@fault(INPUT, "actor", "1 of 300 rows have no response: 1_actor learns the chosen answer", "on")
def null_field(course):
    """a row's response is null"""
    course.edit(course.train, '"response": "', '"response": null, "old": "')


@fault(INPUT, "actor", r"1 of 301 rows .* left out\. 1: a row must be an object", "on")
def row_is_a_list(course):
    """a line of train.json is a list"""
    lines = course.train.read_text().splitlines()
    course.train.write_text("\n".join([*lines[:2], '["Human: Hi", "Hello"]', *lines[2:]]))


@fault(INPUT, "rows", r"train\.json contains no rows: write one JSON object per line")
def empty_file(course):
    """train.json is empty"""
    course.train.write_bytes(b"")


@fault(INPUT, "rows", r"train\.json contains no rows")
def blank_file(course):
    """train.json holds blank lines only"""
    course.train.write_text("\n  \n\n")


@fault(INPUT, "rows", r"train\.json does not exist: run `python -m lab world`")
def no_file(course):
    """train.json is not there"""
    course.train.unlink()


@fault(INPUT, "eval rows", r"eval\.json does not exist: run `python -m lab world`")
def no_eval_file(course):
    """eval.json is not there"""
    course.evals.unlink()


@fault(INPUT, "base", r"train\.json does not exist: run `python -m lab world`")
def no_file_for_the_base(course):
    """train.json is not there when 0_download begins"""
    course.train.unlink()


@fault(INPUT, "critic", r"train\.json.*(must be a file that you may read|is a directory|folder)")
def folder_for_a_file(course):
    """a folder stands where train.json belongs"""
    course.train.unlink()
    course.train.mkdir()


@fault(INPUT, "rows", r"train\.json cannot be read \(Permission denied\)")
def unreadable_file(course):
    """the user may not read train.json"""
    read_only(course)
    course.train.chmod(0)


@fault(INPUT, "actor", r"2 of 300 rows .* 2: the field 'response' is empty \(first: line 4\)", "on")
def empty_answers(course):
    """two rows have an empty answer"""
    course.edit_row(4, response="")
    course.edit_row(9, response=" \n")


@fault(INPUT, "actor", r"line 4 \(the first of 297\): the field 'response' is empty: fill it in")
def mostly_empty_answers(course):
    """most rows have an empty answer"""
    rows = [json.loads(line) for line in course.train.read_text().splitlines()]
    rows = [row | {"response": row["response"] * (i < 3)} for i, row in enumerate(rows)]
    course.train.write_text("".join(json.dumps(row) + "\n" for row in rows))


@fault(INPUT, "critic", LEFT_OUT + r"chosen and rejected are equal \(first: line 4\)", "on")
def equal_answers(course):
    """a row's chosen and rejected answers are the same"""
    course.edit_row(4, chosen="Yes.", rejected=" Yes. ")


@fault(INPUT, "rows", r"line 2: this is not UTF-8 text: save the file as UTF-8")
def latin_1(course):
    """train.json was saved as Latin-1"""
    course.edit_row(2, response="Un café.")
    course.train.write_bytes(course.train.read_text().encode("latin-1", "replace"))


@fault(INPUT, "rows", r"this is UTF-16 text: save the file as UTF-8")
def utf_16(course):
    """train.json was saved as UTF-16"""
    course.train.write_bytes(course.train.read_text().encode("utf-16"))


@fault(INPUT, "actor", LEFT_OUT + r"the text contains NUL characters \(first: line 2\)", "on")
def nul_characters(course):
    """a prompt holds a NUL character"""
    course.edit_row(2, prompt="Hi\0there")


@fault(INPUT, "actor", LEFT_OUT + r"the text contains half of a surrogate pair", "on")
def half_a_character(course):
    """an answer holds one half of a surrogate pair"""
    course.edit(course.train, '"chosen": "', '"chosen": "\\ud800')


@fault(INPUT, "rows", r"line 1: NaN is not valid JSON: write null")
def nan_in_json(course):
    """a row holds NaN, which JSON does not know"""
    course.edit(course.train, '"kind": ', '"score": NaN, "kind": ')


@fault(INPUT, "rows", r"line 1: brackets are nested too deeply")
def deep_nesting(course):
    """a row holds a hundred thousand brackets"""
    course.edit(course.train, '"kind": ', f'"x": {"[" * 100_000}, "kind": ')


@fault(INPUT, "actor", "", "bits")
def byte_order_mark(course):
    """train.json begins with a byte order mark"""
    course.train.write_bytes(b"\xef\xbb\xbf" + course.train.read_bytes())


@fault(INPUT, "actor", "", "bits")
def windows_line_ends(course):
    """train.json has the line ends of Windows"""
    course.train.write_bytes(course.train.read_bytes().replace(b"\n", b"\r\n"))


@fault(INPUT, "rlhf", r"rlhf: \d+ of 30 texts in 'prompt' are longer than max_prompt allows", "on")
def huge_prompt(course):
    """every prompt is a megabyte long"""
    rows = [json.loads(line) for line in course.train.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["prompt"] = f"{i} " + "word " * (200_000 if i < 2 else 200)
    course.train.write_text("".join(json.dumps(row) + "\n" for row in rows))


@fault(
    INPUT, "rows", r"reader = 'my_reader\.read' cannot be imported \(No module named 'my_reader'"
)
def no_reader(course):
    """the module of reader is not there"""
    course.changes |= dict(reader="my_reader.read")


@fault(INPUT, "eval rows", r"eval\.json, row 3 \(the first of 2\): this prompt is also in the")
def trained_rows_in_eval(course):
    """two rows of train.json are also in eval.json"""
    lines, known = course.evals.read_text().splitlines(), course.train.read_text().splitlines()
    course.evals.write_text("\n".join([*lines[:2], known[5], known[6], *lines[2:]]))


@fault(INPUT, "judge", r"no row of eval\.json has both chosen and rejected\. Add pairs")
def no_pairs_to_measure(course):
    """eval.json has prompts only"""
    rows = [json.loads(line) for line in course.evals.read_text().splitlines()]
    lines = [json.dumps({"prompt": row["prompt"]}) for row in rows]
    course.evals.write_text("\n".join(lines))


@fault(INPUT, "rows", r"preference_share = 0\.001 of 300 rows gives no row")
def share_without_rows(course):
    """the share of a stage is less than a row"""
    course.changes |= dict(preference_share=0.001)


@fault(INPUT, "actor", r"validation_rows = 60.*60 rows")
def nothing_but_validation(course):
    """validation_rows takes all rows of the SFT share"""
    course.changes |= dict(validation_rows=60)


# ------------------------------------------------------------------------------------------------
# Parameters

PARAMETERS = "parameters"


@fault(PARAMETERS, "parameters", r"'colour' is not a parameter")
def unknown_parameter(course):
    """util.Config(colour="blue")"""
    course.changes |= dict(colour="blue")


@fault(PARAMETERS, "parameters", r"'kl_coeff' is not a parameter; did you mean 'kl_coef'\?")
def misspelt_parameter(course):
    """util.Config(kl_coeff=0.1)"""
    course.changes |= dict(kl_coeff=0.1)


@fault(PARAMETERS, "parameters", r"gamma = 2\.0 is impossible: .*between 0 and 1")
def gamma_of_two(course):
    """gamma = 2"""
    course.changes |= dict(gamma=2)


@fault(PARAMETERS, "parameters", r"sft_share = 0\.9 is impossible: .*must add up to at most 1")
def shares_above_one(course):
    """sft_share = 0.9 beside the other shares"""
    course.changes |= dict(sft_share=0.9)


@fault(PARAMETERS, "parameters", r"minibatch = 7 is impossible: .*between 1 and rollout")
def minibatch_above_rollout(course):
    """minibatch = 7 of a rollout of 6"""
    course.changes |= dict(minibatch=7)


@fault(PARAMETERS, "parameters", r"steps = 0 is impossible: it must be at least 1")
def no_steps(course):
    """steps = 0"""
    course.changes |= dict(steps=0)


@fault(PARAMETERS, "parameters", r"policy_lr = -0\.1 is impossible")
def negative_rate(course):
    """policy_lr = -0.1"""
    course.changes |= dict(policy_lr=-0.1)


@fault(PARAMETERS, "parameters", r"policy_lr = nan is impossible: .*finite")
def rate_that_is_no_number(course):
    """policy_lr = nan"""
    course.changes |= dict(policy_lr=float("nan"))


@fault(PARAMETERS, "parameters", r"temperature = 0\.0 is impossible: .*above 0")
def no_temperature(course):
    """temperature = 0"""
    course.changes |= dict(temperature=0)


@fault(PARAMETERS, "parameters", r"hidden_size = 30 is impossible: .*a multiple of heads")
def heads_that_do_not_divide(course):
    """hidden_size = 30 with 4 heads"""
    course.changes |= dict(hidden_size=30)


@fault(PARAMETERS, "parameters", r"steps = 'many' is impossible: it must be of type int")
def text_for_a_number(course):
    """steps = "many\""""
    course.changes |= dict(steps="many")


@fault(PARAMETERS, "parameters", r"steps = 2\.5 is impossible: it must be of type int")
def half_a_step(course):
    """steps = 2.5"""
    course.changes |= dict(steps=2.5)


@fault(PARAMETERS, "parameters", r"whiten = 'perhaps' is impossible: it must be of type bool")
def neither_true_nor_false(course):
    """whiten = "perhaps\""""
    course.changes |= dict(whiten="perhaps")


@fault(PARAMETERS, "actor", r"seed = 18446744073709551616 is impossible: .*below")
def seed_beyond_64_bits(course):
    """seed = 2^64"""
    course.changes |= dict(seed=2**64)


@fault(PARAMETERS, "actor", r"beta1 = 1\.0 is impossible: .*below 1")
def moment_that_never_decays(course):
    """beta1 = 1"""
    course.changes |= dict(beta1=1)


@fault(
    PARAMETERS, "parameters", r"precision = 'half' is not known; choose from: float32, bf16, fp16"
)
def unknown_word(course):
    """precision = "half\""""
    course.changes |= dict(precision="half")


@fault(PARAMETERS, "parameters", r"rollout = 6 is impossible: it must be a multiple of answers")
def groups_that_do_not_fill_a_rollout(course):
    """algorithm = "grpo" with 4 answers to a prompt, and a rollout of 6"""
    course.changes |= dict(algorithm="grpo", answers=4)


@fault(PARAMETERS, "parameters", r"answers = 1 is impossible: rloo .*needs at least 2")
def group_of_one(course):
    """algorithm = "rloo" with one answer to a prompt"""
    course.changes |= dict(algorithm="rloo", answers=1)


@fault(PARAMETERS, "rlhf", r"algorithm = 'gpro' is not known; did you mean 'grpo'\?")
def misspelt_algorithm(course):
    """algorithm = "gpro\""""
    course.changes |= dict(algorithm="gpro")


@fault(
    PARAMETERS, "rlhf", r"reward = 'model 2\*length' cannot be parsed at '2\*length': write a sum"
)
def unclear_reward(course):
    """reward = "model 2*length\""""
    course.changes |= dict(reward="model 2*length")


@fault(PARAMETERS, "rlhf", r"reward = 'lenght' is not known; did you mean 'length'\?")
def misspelt_reward(course):
    """reward = "model - lenght\""""
    course.changes |= dict(reward="model - lenght")


@fault(PARAMETERS, "rlhf", r"reward = 'my\.polite' cannot be imported \(No module named 'my'")
def reward_of_nobody(course):
    """reward = "my.polite", and there is no my.py"""
    course.changes |= dict(reward="my.polite")


@fault(PARAMETERS, "actor", r"load_in_4bit = True needs a GPU and the package bitsandbytes")
def four_bits_without_a_gpu(course):
    """load_in_4bit = True without a GPU"""
    course.changes |= dict(load_in_4bit=True, lora_rank=2)


@fault(PARAMETERS, "base", r"pretrain_length = 20 .*(max_prompt|max_new_tokens)")
def blocks_shorter_than_texts(course):
    """pretrain_length = 20, less than max_prompt + max_new_tokens"""
    course.changes |= dict(pretrain_length=20)


@fault(PARAMETERS, "base", r"pretrain_documents = 1\b.*pretrain_length")
def too_little_text(course):
    """pretrain_documents = 1, less than one block of text"""
    course.changes |= dict(pretrain_documents=1)


@fault(PARAMETERS, "command", r"preset = 'smoky' is not known; did you mean 'smoke'\?")
def unknown_preset(course):
    """python -m lab actor --preset smoky"""
    course.line = "actor --preset smoky"


@fault(PARAMETERS, "command", r"my\.yaml, line \d: this is not valid YAML \(")
def broken_yaml(course):
    """the file of --config is no YAML"""
    Path("my.yaml").write_text("steps: [1, 2\n")
    course.line = "rlhf --config my.yaml"


@fault(PARAMETERS, "command", r"my\.yaml must hold lines like `kl_coef: 0\.1`")
def yaml_without_names(course):
    """the file of --config holds a list"""
    Path("my.yaml").write_text("- 1\n- 2\n")
    course.line = "rlhf --config my.yaml"


@fault(PARAMETERS, "command", r"my\.yaml cannot be read \(No such file or directory\)")
def no_yaml(course):
    """the file of --config is not there"""
    course.line = "rlhf --config my.yaml"


@fault(PARAMETERS, "command", r"my\.yaml cannot be read: it must be YAML, saved as UTF-8")
def yaml_of_bytes(course):
    """the file of --config is no text"""
    Path("my.yaml").write_bytes(b"\xff\xfe\x00")
    course.line = "rlhf --config my.yaml"


@fault(PARAMETERS, "command", r"--set needs NAME=VALUE.*it got 'seed'\.")
def set_without_value(course):
    """python -m lab actor --set seed"""
    course.line = "actor --set seed"


@fault(PARAMETERS, "command", r"actor does not read kl_coef\. .*--help` lists")
def parameter_of_another_stage(course):
    """python -m lab actor --set kl_coef=0.1"""
    course.line = "actor --set kl_coef=0.1"


@fault(PARAMETERS, "command", r"rows = 'ten' is impossible")
def world_of_ten(course):
    """python -m lab world --set rows=ten"""
    course.line = "world --set rows=ten"


for _name, _device in {
    "second_gpu": "cuda:7", "another_maker": "tpu", "rubbish": "my laptop", "no_numbers": "meta",
}.items():  # fmt: skip

    def _inject(course, device=_device):
        course.changes |= dict(device=device)

    _inject.__doc__, _inject.__name__ = f'device = "{_device}"', f"device_{_name}"
    fault(
        PARAMETERS, "device", rf"device = '{_device}' is not available here; choose from: auto, cpu"
    )(_inject)


# ------------------------------------------------------------------------------------------------
# Order and artifacts

ORDER = "order and artifacts"


def without(*names):
    def inject(course):
        for name in names:
            shutil.rmtree(course.model(name))

    return inject


for _stage, _lost, _notebook in (
    ("actor", "base", "0_download"), ("critic", "actor", "1_actor"), ("rlhf", "critic", "2_critic"),
    ("report", "rlhf", "3_rlhf"),
):  # fmt: skip
    _inject = without(_lost)
    _inject.__doc__ = f"the stage {_stage} is run before {_notebook}.ipynb"
    _inject.__name__ = f"{_stage}_too_early"
    fault(ORDER, _stage, rf"model/{_lost} does not exist yet: run {_notebook}\.ipynb first")(
        _inject
    )


@fault(ORDER, "report", r"model/\w+ does not exist yet: run \d_\w+\.ipynb first")
def report_of_nothing(course):
    """4_test in a folder where nothing was made"""
    shutil.rmtree(course.model())


@fault(
    ORDER,
    "rlhf",
    r"model/critic was made from another version of model/actor.* run 2_critic\.ipynb",
)
def stale_critic(course):
    """1_actor was run again, 2_critic was not"""
    course.run("actor", actor_lr=3e-3)


@fault(
    ORDER, "report", r"model/actor was made from another version of model/base.* run 1_actor\.ipynb"
)
def stale_grandparent(course):
    """0_download was run again, nothing else was"""
    course.run("base", pretrain_lr=1e-3)


@fault(
    ORDER,
    "critic",
    r"model/actor is damaged \(model\.safetensors is missing or .*\): run 1_actor\.ipynb again",
)
def weights_cut(course):
    """model.safetensors of model/actor is cut in half"""
    path = course.model("actor", "model.safetensors")
    os.truncate(path, path.stat().st_size // 2)


@fault(
    ORDER,
    "critic",
    r"model/actor is damaged \(model\.safetensors is missing or .*\): run 1_actor\.ipynb again",
)
def weights_deleted(course):
    """model.safetensors of model/actor is deleted"""
    course.model("actor", "model.safetensors").unlink()


@fault(ORDER, "critic", r"model/actor .*(damaged|load).*1_actor\.ipynb")
def weights_are_garbage(course):
    """model.safetensors of model/actor is noise of the same size"""
    path = course.model("actor", "model.safetensors")
    path.write_bytes(os.urandom(path.stat().st_size))


@fault(ORDER, "critic", r"model/actor .*(damaged|load).*1_actor\.ipynb")
def weights_are_half_garbage(course):
    """model.safetensors of model/actor has its header and noise behind it"""
    path = course.model("actor", "model.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-90_000] + bytes(range(250)) * 360)


@fault(ORDER, "critic", r"model/actor .*(damaged|load).*1_actor\.ipynb")
def tokenizer_is_garbage(course):
    """tokenizer.json of model/actor is noise of the same size"""
    path = course.model("actor", "tokenizer.json")
    path.write_bytes(b"\x93" * path.stat().st_size)


@fault(ORDER, "critic", r"model/actor .*(damaged|load).*1_actor\.ipynb")
def config_is_garbage(course):
    """config.json of model/actor is noise of the same size"""
    path = course.model("actor", "config.json")
    path.write_bytes(b"x" * path.stat().st_size)


for _name, _text in {"broken": '{"stage": "act', "empty": "", "a_list": "[]"}.items():

    def _inject(course, text=_text):
        course.model("actor", "stage.json").write_text(text)

    _inject.__doc__ = f"stage.json of model/actor is {_name.replace('_', ' ')}"
    _inject.__name__ = f"record_is_{_name}"
    fault(ORDER, "critic", r"model/actor/stage\.json cannot be read: run 1_actor\.ipynb again")(
        _inject
    )


@fault(ORDER, "critic", r"model/actor/stage\.json cannot be read: run 1_actor\.ipynb again")
def record_of_another_shape(course):
    """the files in stage.json of model/actor are a list"""
    course.edit_json(course.model("actor", "stage.json"), files=["model.safetensors"])


@fault(ORDER, "auto", r"model/base/stage\.json cannot be read: run 0_download\.ipynb again")
def record_without_preset(course):
    """stage.json of model/base has no preset"""
    course.edit_json(course.model("base", "stage.json"), config={}, metrics={})


@fault(
    ORDER, "critic", r"model/actor contains the result of 3_rlhf\.ipynb: move model/actor elsewhere"
)
def another_stage(course):
    """the folder of 3_rlhf was copied over model/actor"""
    shutil.rmtree(course.model("actor"))
    shutil.copytree(course.model("rlhf"), course.model("actor"))


@fault(ORDER, "critic", r"model/actor/stage\.json cannot be read: run 1_actor\.ipynb again")
def stage_nobody_knows(course):
    """stage.json of model/actor names a stage that does not exist"""
    course.edit_json(course.model("actor", "stage.json"), stage="pilot")


@fault(ORDER, "actor", r"model/base was not made by this course: move model/base elsewhere")
def foreign_model_is_read(course):
    """model/base is a Hugging Face folder from elsewhere, read by 1_actor"""
    course.model("base", "stage.json").unlink()


@fault(ORDER, "base", r"model/base was not made by this course and would be overwritten: move")
def foreign_model_is_overwritten(course):
    """model/base is a Hugging Face folder from elsewhere, in the way of 0_download"""
    course.model("base", "stage.json").unlink()


# ------------------------------------------------------------------------------------------------
# Files and disk

FILES = "files and disk"


def model_is_a_file(course):
    shutil.rmtree(course.model())
    course.model().write_text("my notes")


@fault(FILES, "base", r"A file is where a folder should be.*\(model\).*move it away")
def file_for_a_folder(course):
    """a file stands where model/ belongs"""
    model_is_a_file(course)


@fault(FILES, "command", r"A file is where a folder should be.*model.*move it away")
def file_for_a_folder_of_the_shell(course):
    """a file stands where model/ belongs, for python -m lab base"""
    model_is_a_file(course)
    course.line = "download"


@fault(FILES, "actor", r"model/actor was not written.*A file is where a folder should be")
def file_for_the_unfinished(course):
    """a file stands where model/.actor.partial belongs"""
    course.model(".actor.partial").write_text("my notes")


@fault(FILES, "command", r"A file is where a folder should be.*move it away")
def file_for_the_world(course):
    """python -m lab world --out FILE"""
    Path("notes").write_text("my notes")
    course.line = "world --out notes"


@fault(FILES, "actor", r"model/actor was not written\. You have no permission to write here.*model")
def no_permission(course):
    """the user may read model/, but not write there"""
    read_only(course)


@fault(FILES, "command", r"You have no permission to write here.*model")
def no_permission_of_the_shell(course):
    """the user may not write to model/, for python -m lab actor"""
    read_only(course)
    course.line = "actor"


@fault(FILES, "base", r"You have no permission to write here.*tokenizer")
def no_permission_for_the_tokenizer(course):
    """the user may not write to tokenizer/ when 0_download ends"""
    read_only(course)
    for path in (course.model(), *course.model().rglob("*")):
        path.chmod(0o777)


@fault(FILES, "rlhf", r"model/rlhf was not written\. The disk is full.*free some space, then run")
def full_while_checkpointing(course):
    """the disk is full when a checkpoint is written"""
    course.in_child = no_larger_than(100_000)


@fault(FILES, "actor", r"model/actor was not written\. The disk is full.*free some space, then run")
def full_while_publishing(course):
    """the disk is full when the finished weights are written"""
    course.changes |= dict(checkpoint_minutes=60)
    course.in_child = no_larger_than(100_000)


@fault(FILES, "actor", r"model/actor was not written\. The disk is full.*free some space, then run")
def full_while_logging(course):
    """the disk is full when the first metrics are written"""
    course.in_child = no_larger_than(16)


@fault(FILES, "actor", r"model/actor was not written\. The disk is full.*free some space, then run")
def full_at_the_last_file(course):
    """the disk is full when stage.json is written"""
    write = Path.write_text

    def full(path, *args, **more):
        if path.name == "stage.json":
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **more)

    course.patch.setattr(Path, "write_text", full)


@fault(FILES, "command", r"The disk is full.*free some space")
def full_while_writing_the_world(course):
    """the disk is full when python -m lab world writes"""
    course.in_child, course.line = no_larger_than(1_000), "world --set rows=50 --out new"


@fault(FILES, "rlhf", r"Another run is writing model/rlhf: wait until it has finished, or stop")
def two_at_once(course):
    """3_rlhf is started while another 3_rlhf runs"""
    first = util.train_rlhf(course.cfg())
    next(first)
    course.after.callback(first.close)


@fault(FILES, "actor", "", "bits")
def lock_of_the_dead(course):
    """1_actor was killed and left its lock"""

    def dies():
        with Stage(".", "actor", {}, ["base"]):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(dies) is None and course.model(".actor.lock").exists()


@fault(FILES, "critic", "", "bits")
def killed_between_the_renames(course):
    """1_actor was killed between the two renames that publish it"""
    replace = os.replace

    def dies(source, target):
        if Path(target).name == "actor":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with course.patch.context() as patch:
        patch.setattr(os, "replace", dies)
        assert in_a_child(lambda: course.run("actor")) is None
    assert course.model(".actor.old").exists() and not course.model("actor").exists()


# ------------------------------------------------------------------------------------------------
# Checkpoints

KEPT = "checkpoints"


@fault(KEPT, "rlhf", r"step 2, and the parameter gamma has changed from 1\.0 to 0\.5", stopped=True)
def changed_parameter(course):
    """gamma is changed before a stopped run is started again"""
    course.changes |= dict(gamma=0.5)


@fault(
    KEPT,
    "rlhf",
    r"step 2, and the file train\.json has changed since then.*change that back",
    "",
    True,
)
def changed_data(course):
    """train.json is changed before a stopped run is started again"""
    with open(course.train, "a") as file:
        file.write(course.train.read_text().splitlines()[0] + "\n")


@fault(KEPT, "rlhf", r"step 2, and the input (actor|critic) has changed since then", stopped=True)
def changed_input(course):
    """actor and critic are made anew before a stopped 3_rlhf is started again"""
    course.run("actor", actor_lr=3e-3)
    course.run("critic")


@fault(KEPT, "rlhf", r"resuming although the parameter gamma has changed from", "on", True)
def changed_on_purpose(course):
    """the same, with resume_changed = True"""
    course.changes |= dict(gamma=0.5, resume_changed=True)


@fault(KEPT, "rlhf", r"", "on", stopped=True)
def started_afresh(course):
    """the same, with resume = False"""
    course.changes |= dict(gamma=0.5, resume=False)


@fault(KEPT, "rlhf", r"resuming the interrupted run after step 2 of 3", "bits", True)
def stopped_run(course):
    """a stopped run is started again"""


@fault(KEPT, "rlhf", r"resuming the interrupted run after step 2 of 3", "bits", True)
def moved_course(course):
    """the folder of the course is named in another way before the run is started again"""
    course.changes |= dict(root=str(course.root))


@fault(KEPT, "rlhf", r"step-00000002 is damaged; resuming from step-00000001 instead", "bits", True)
def newest_checkpoint_cut(course):
    """the weights of the newest checkpoint are cut in half"""
    path = course.checkpoint() / "model-0.safetensors"
    os.truncate(path, path.stat().st_size // 2)


@fault(
    KEPT,
    "rlhf",
    r"all checkpoints of the interrupted run are damaged; starting afresh",
    "bits",
    True,
)
def all_checkpoints_cut(course):
    """the weights of every checkpoint are cut in half"""
    for folder in (course.checkpoint(0), course.checkpoint(1)):
        os.truncate(folder / "model-0.safetensors", 1_000)


@fault(KEPT, "rlhf", r"step-00000002 is damaged; resuming from step-00000001 instead", "bits", True)
def empty_note(course):
    """note.json of the newest checkpoint is empty"""
    (course.checkpoint() / "note.json").write_text("")


@fault(KEPT, "rlhf", r"step-00000002 is damaged; resuming from step-00000001 instead", "bits", True)
def note_of_another_shape(course):
    """note.json of the newest checkpoint holds an empty plan"""
    course.edit_json(course.checkpoint() / "note.json", plan={})


@fault(KEPT, "rlhf", r"checkpoints/step-00000002 cannot be loaded.*delete that folder", "", True)
def optimiser_is_garbage(course):
    """the moments of the newest checkpoint are noise of the same size"""
    path = course.checkpoint() / "adamw.safetensors"
    path.write_bytes(b"\x93" * path.stat().st_size)


@fault(KEPT, "rlhf", r"checkpoints/step-00000002 cannot be loaded.*delete that folder", "", True)
def checkpoint_weights_are_garbage(course):
    """the weights of the newest checkpoint are noise of the same size"""
    path = course.checkpoint() / "model-0.safetensors"
    path.write_bytes(b"\x93" * path.stat().st_size)


@fault(
    KEPT,
    "rlhf",
    r"all checkpoints of the interrupted run are damaged; starting afresh",
    "bits",
    True,
)
def metrics_lost(course):
    """the metrics of the stopped run are deleted"""
    course.model(".rlhf.partial", "metrics.jsonl").unlink()


@fault(
    KEPT,
    "rlhf",
    r"all checkpoints of the interrupted run are damaged; starting afresh",
    "bits",
    True,
)
def metrics_are_garbage(course):
    """the metrics of the stopped run are noise of the same size"""
    path = course.model(".rlhf.partial", "metrics.jsonl")
    path.write_bytes(b"\x93" * path.stat().st_size)


@fault(KEPT, "rlhf", r"resuming the interrupted run after step 1 of 3", "bits")
def killed_while_saving(course):
    """3_rlhf was killed in the middle of its second checkpoint"""
    write, calls = checkpoints.write, []

    def dies(folder, optimiser):
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir(parents=True)
            (folder / "model-0.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, optimiser)

    with course.patch.context() as patch:
        patch.setattr(checkpoints, "write", dies)
        assert in_a_child(lambda: course.run("rlhf")) is None
    assert course.model(".rlhf.checkpoints", "building").exists()


# ------------------------------------------------------------------------------------------------
# Hub and models

MODELS = "hub and models"


@fault(MODELS, "base", r"nobody/nothing does not load \(.*(offline|connect|cached).*base_model")
def model_nobody_has(course):
    """base_model = "nobody/nothing", fallback = False"""
    course.changes |= dict(base_model="nobody/nothing", fallback=False)


@fault(
    MODELS,
    "choose",
    r"nobody/nothing does not load \(.+\)\..* So this run trains the embedded tiny model",
    "on",
)
def model_nobody_has_with_fallback(course):
    """base_model = "nobody/nothing\""""
    course.changes |= dict(base_model="nobody/nothing")


@fault(
    MODELS,
    "choose",
    r"facebook/opt-125m does not load \(.+\)\..* So this run trains the embedded tiny",
    "on",
)
def hub_is_down(course):
    """there is a GPU, but no network"""
    course.patch.setattr("lab.models.find_device", lambda name: torch.device("cuda"))


@fault(MODELS, "base", r"mine does not load \(.*no file named model\.safetensors.*\)")
def pickle_only(course):
    """base_model is a folder whose weights are a pickle"""
    folder = course.mine()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@fault(
    MODELS, "base", r"mine does not load: its files lack the weight model\.decoder\.layers\.0\.fc1"
)
def some_weights_lacking(course):
    """base_model lacks a layer's weights"""
    path = course.mine() / "model.safetensors"
    weights = load_file(path)
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, path, {"format": "pt"})


@fault(MODELS, "base", r"mine does not load.*model\.decoder\.layers\.0\.fc1\.weight.*(size|shape)")
def weights_of_another_shape(course):
    """base_model has a layer of another shape"""
    path = course.mine() / "model.safetensors"
    weights = load_file(path)
    weights["model.decoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    save_file(weights, path, {"format": "pt"})


@fault(MODELS, "base", r"mine does not load \(.*mine/config\.json' is not a valid JSON file")
def broken_model_config(course):
    """config.json of base_model is broken"""
    (course.mine() / "config.json").write_text('{"model_type": "opt",')


@fault(MODELS, "base", r"(The tokenizer in mine|mine does not load).*(vocabulary|tokenizer)")
def no_tokenizer(course):
    """base_model has no tokenizer"""
    folder = course.mine()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@fault(MODELS, "base", r"tokenizer .* has \d+ tokens, but its model only \d+: they do not belong")
def tokenizer_too_large(course):
    """the tokenizer of base_model knows more tokens than its model embeds"""
    words = (" ".join(f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl") for c in "mnopqrstuvwxyz")
    util.train_tokenizer(words, 900).save_pretrained(course.mine())


@fault(MODELS, "base", "", "on")
def tokenizer_with_new_tokens(course):
    """tokens were added to the tokenizer of base_model, its model gets rows for them"""
    folder = course.mine()
    tokenizer = util.load_tokenizer(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


@fault(MODELS, "base", "", "on")
def tokenizer_without_eos(course):
    """the tokenizer of base_model has no eos, and gets one"""
    course.edit_json(course.mine() / "tokenizer_config.json", eos_token=None)


@fault(MODELS, "base", r"max_prompt \+ max_new_tokens = 212, but \S+ reads at most 128 tokens")
def model_reads_too_little(course):
    """base_model reads fewer tokens than max_prompt + max_new_tokens"""
    course.mine()
    course.changes |= dict(max_prompt=200)


@fault(
    MODELS, "actor", r"max_prompt \+ max_new_tokens = 212, but model/base reads at most 128 tokens"
)
def base_reads_too_little(course):
    """max_prompt = 200 for a base that reads 128 tokens"""
    course.changes |= dict(max_prompt=200)


@fault(MODELS, "base", r"dataset does not load \(Unrecognized model in dataset")
def folder_without_a_model(course):
    """base_model is a folder without a model"""
    course.changes |= dict(base_model="dataset", fallback=False)


# ------------------------------------------------------------------------------------------------
# Training trouble

TRAINING = "training trouble"


@fault(
    TRAINING,
    "rlhf",
    r"The reward must return a finite number for each of \d answers; it returned \d",
)
def reward_too_few(course):
    """a reward of one's own forgets an answer"""
    course.reward = lambda prompts, responses: [0.0] * (len(responses) - 1)


@fault(TRAINING, "rlhf", r"each of \d answers; it returned \d numbers, \d of them finite")
def reward_of_nan(course):
    """a reward of one's own is NaN once"""
    course.reward = lambda prompts, responses: [float("nan"), *range(len(responses) - 1)]


@fault(TRAINING, "rlhf", r"[Tt]he reward .*'good'")
def reward_of_words(course):
    """a reward of one's own gives words"""
    course.reward = lambda prompts, responses: ["good"] * len(responses)


@fault(TRAINING, "rlhf", r"[Tt]he reward .*(None|NoneType)")
def reward_of_nothing(course):
    """a reward of one's own returns nothing"""
    course.reward = lambda prompts, responses: None


@fault(TRAINING, "rlhf", r"[Tt]he reward .*KeyError.*score")
def reward_that_raises(course):
    """a reward of one's own raises KeyError"""
    course.reward = lambda prompts, responses: [{}["score"] for _ in responses]


@fault(TRAINING, "actor", r"step 2: the loss or a gradient is not finite; this update was", "on")
def one_loss_is_nan(course):
    """the loss is NaN in one step"""
    course.spoil(2)


@fault(TRAINING, "actor", r"Step 4.*third time in a row\. The last checkpoint is good\. Lower the")
def three_losses_are_nan(course):
    """the loss is NaN in three steps in a row"""
    course.spoil(2, 3, 4)


@fault(TRAINING, "actor", r"resuming although the parameter actor_lr has changed from 0.001", "on")
def after_three_losses(course):
    """after three such steps: a lower rate and resume_changed = True"""
    with course.patch.context() as patch:
        Course(course.root, patch).spoil(2, 3, 4)
        assert met(course, "actor").error
    course.changes |= dict(actor_lr=1e-4, resume_changed=True)


@fault(TRAINING, "rlhf", r"memory ran out: continuing with 2 rows at once, same result", "figures")
def no_memory_for_an_update(course):
    """memory ends in an update of 3_rlhf with more than 2 rows"""
    course.tight("ppo_minibatch_loss", 2, 3)


@fault(
    TRAINING, "critic", r"memory ran out: continuing with 6 rows at once, same result", "figures"
)
def no_memory_for_pairs(course):
    """memory ends in an update of 2_critic with more than 6 pairs"""
    course.tight("critic_loss", 6, 3)


@fault(TRAINING, "rlhf", r"memory ran out: continuing with 2 rows at once", "figures")
def no_memory_for_a_rollout(course):
    """memory ends in a rollout with more than 2 rows"""
    course.tight("decode", 2, 1)


@fault(TRAINING, "rlhf", r"model/rlhf was not written\. Memory ran out: lower eval_batch, rollout")
def no_memory_for_one_row(course):
    """memory ends even with one row at a time"""
    course.tight("ppo_minibatch_loss", 0, 3)


@fault(TRAINING, "report", r"Memory ran out: lower eval_batch")
def no_memory_for_the_test(course):
    """memory ends in the answers of 4_test even with one row at a time"""
    course.tight("encode_prompts", 0, 1)


@fault(TRAINING, "rlhf", r"KL is \S+ nats per answer, above kl_limit = 1e-06: the policy is", "on")
def beyond_kl_limit(course):
    """KL is above kl_limit"""
    course.changes |= dict(kl_limit=1e-6, policy_lr=1e-2, kl_estimator="k3")


@fault(TRAINING, "rlhf", r"KL is \S+ nats.*The run stopped because stop_on_alert = 'kl'")
def beyond_kl_limit_and_stopped(course):
    """KL is above kl_limit, with stop_on_alert = "kl\""""
    calls = []

    def fourth_is_eos(token):
        calls.append(1)
        return token.clamp(min=2) if len(calls) % 4 else torch.ones_like(token)

    course.every_token(fourth_is_eos)
    course.reward = lambda prompts, responses: [3.0] * len(responses)  # likelier, all of them
    course.changes |= dict(kl_limit=1e-3, policy_lr=1e-2, whiten=False, stop_on_alert="kl")


@fault(
    TRAINING,
    "rlhf",
    r"100% of the answers are empty: the policy has collapsed, or the reward",
    "on",
)
def nothing_but_eos(course):
    """every answer is empty"""
    course.every_token(torch.ones_like)


@fault(
    TRAINING, "rlhf", r"Only 0% of the answers end within max_new_tokens: answers are cut off", "on"
)
def no_eos(course):
    """no answer ends"""
    course.every_token(lambda token: token.clamp(min=2))


# ------------------------------------------------------------------------------------------------
# Security

SECURITY = "security"


class Evil:
    """Unpickled, it runs code of its own."""

    def __reduce__(self):
        return Path("executed").touch, ()


CODE = "from pathlib import Path\nPath('executed').touch()\n"


@fault(SECURITY, "base", r"mine does not load \(.*no file named model\.safetensors.*\)")
def evil_weights(course):
    """the pickled weights of base_model hold code"""
    folder = course.mine()
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")


@fault(
    SECURITY,
    "base",
    r"chat template in mine fails \(SecurityError: access to attribute .* is unsafe",
)
def evil_chat_template(course):
    """the chat template of base_model reaches for the machine"""
    text = "{{ cycler.__init__.__globals__.os.system('touch executed') }}"
    (course.mine() / "chat_template.jinja").write_text(text)


@fault(SECURITY, "base", r"mine does not load, because it needs Python code")
def evil_model_code(course):
    """base_model brings a Python file for its model"""
    folder = course.mine()
    (folder / "evil.py").write_text(CODE)
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    course.edit_json(folder / "config.json", auto_map=names, model_type="evil", architectures=[])


@fault(SECURITY, "base", "", "on")
def evil_tokenizer_code(course):
    """base_model brings a Python file for its tokenizer, which is ignored"""
    folder = course.mine()
    (folder / "evil.py").write_text(CODE)
    names = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    path = folder / "tokenizer_config.json"
    course.edit_json(path, auto_map=names, tokenizer_class="EvilTokenizer")
    course.patch.setattr("builtins.input", lambda question="": "y")  # who is asked says yes


@fault(
    SECURITY, "rlhf", r"checkpoints/step-00000002 cannot be loaded.*delete that folder", "", True
)
def evil_checkpoint(course):
    """the weights of a checkpoint are a pickle that holds code"""
    path = course.checkpoint() / "model-1.safetensors"
    path.write_bytes(pickle.dumps(Evil()).ljust(path.stat().st_size, b"\0"))


@fault(
    SECURITY, "rlhf", r"checkpoints/step-00000002 cannot be loaded.*delete that folder", "", True
)
def evil_optimiser(course):
    """the moments of a checkpoint are a pickle that holds code"""
    path = course.checkpoint() / "adamw.safetensors"
    path.write_bytes(pickle.dumps(Evil()).ljust(path.stat().st_size, b"\0"))


@fault(SECURITY, "command", r"my\.yaml, line 1: this is not valid YAML \(could not determine")
def evil_yaml(course):
    """the file of --config holds code"""
    Path("my.yaml").write_text('steps: !!python/object/apply:os.system ["touch executed"]\n')
    course.line = "rlhf --config my.yaml"


# ------------------------------------------------------------------------------------------------
# The tests


@dataclass
class Outcome:
    """What a run said, and the words with which it stopped, if it did."""

    printed: str
    error: str | None = None
    traceback: bool = False


def met(course, act):
    """Acts, here or in a process of its own."""

    def work():
        if course.in_child:
            course.in_child()
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            try:
                ACTIONS[act](course)
            except CourseError as error:
                return [out.getvalue(), str(error)]
            except Exception as error:
                return [out.getvalue(), f"Traceback ... {type(error).__name__}: {error}", True]
        return [out.getvalue()]

    return Outcome(*(in_a_child(work) if course.in_child else work()))


def contents(root):
    """Each file that a run may not lose: the models, and the checkpoints of stopped runs."""
    files = {}
    for path in (root / "model").rglob("*") if (root / "model").is_dir() else [root / "model"]:
        top = path.relative_to(root / "model").parts[:1]
        shown = not top or not top[0].startswith(".") or top[0].endswith(".checkpoints")
        if path.is_file() and shown:
            files[str(path.relative_to(root))] = path.read_bytes()
    return files


def lost(before, after, stage):
    """What is not as it was, but for the stage that ran and its own checkpoints."""
    own = (f"model/{stage}/", f"model/.{stage}.checkpoints/") if stage else ()
    names = [name for name, data in before.items() if after.get(name) != data]
    return [name for name in names if not name.startswith(own)]


def figures(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows
    ]


def same(promise, found, expected):
    """Whether a stage came out as that of the undisturbed run, as far as promised."""
    if promise == "bits":
        weights = [(f / "model.safetensors").read_bytes() for f in (found, expected)]
        return weights[0] == weights[1]
    if promise == "figures":
        return figures(found) == [pytest.approx(row, abs=1e-4) for row in figures(expected)]
    return True


def saw(item, outcome, root):
    """What the user saw of it: the error, or the line that tells how the run goes on."""
    text = outcome.error
    if text is None:
        lines = [line for line in outcome.printed.splitlines() if re.search(item.seen, line)]
        text = lines[0] if item.seen and lines else "nothing: it runs"
    text = re.sub(r"(/private)?" + re.escape(f"{root}/"), "", text)
    return " ".join(text.replace(str(root), ".").split())


def unclear(text):
    """What a sentence for a person must not hold."""
    words = ["Traceback", "<class", "object at 0x", "site-packages", "<unicode string>", "\n"]
    words += ["weights_only", "ignore_mismatched_sizes"]  # no parameters of this course
    found = [word for word in words if word in text]
    count = len(re.findall(r"[.!?][)\"']?(?=\s|$)", text))
    return found + ([f"{count} sentences"] if not 1 <= count <= 3 else [])


@pytest.fixture(scope="module")
def rows():
    """The rows of the table, as the faults are met."""
    return {}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_a_clear_sentence_and_loses_nothing(
    name, rows, request, tmp_path, monkeypatch
):
    item = FAULTS[name]
    finished = request.getfixturevalue("finished")
    root = copy_of(request.getfixturevalue("halted") if item.stopped else finished, tmp_path)
    monkeypatch.chdir(root)
    course = Course(root, monkeypatch)
    with course.after:
        item.inject(course)
        before = contents(root)
        outcome = met(course, item.act)
    ran = item.act if outcome.error is None and item.act in STAGES else None
    gone, text = lost(before, contents(root), ran), saw(item, outcome, root)
    rows[name] = (item.group, item.how, text, ", ".join(gone) or "nothing")
    assert not outcome.traceback, text
    assert not gone
    assert not Path("executed").exists(), "code that came with data was run"
    assert bool(outcome.error) != bool(item.promise), text
    assert re.search(item.seen, outcome.error or outcome.printed, re.S), text
    assert outcome.error is None or not unclear(outcome.error), f"{unclear(outcome.error)}: {text}"
    if ran:
        assert same(item.promise, root / "model" / ran, finished / "model" / ran)


HEADER = """What a user sees when something goes wrong. Every row is injected and met by a test;
`FAULTS=tests/faults.md python -m pytest tests/test_faults.py` rewrites this table.

| group | how it is injected | what the user sees | what is lost |
|---|---|---|---|
"""


def markdown(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def masked(line):
    """Numbers with a fraction, long ones, GPUs and lines of code differ from place to place."""
    return re.sub(r"\d+\.\d+|\d{5,}|(?<=\.py, line )\d+", "N", re.sub(r"(, cuda:\d+)+", "", line))


def test_the_table_is_up_to_date(rows):
    """Of the faults that were met in this run; the table itself must know all of them."""
    if target := os.environ.get("FAULTS"):
        assert rows.keys() == FAULTS.keys(), "run the whole file to rewrite the table"
        text = HEADER + "".join(markdown(row) + "\n" for row in rows.values())
        Path(target).write_text(text, encoding="utf-8")
    written = TABLE.read_text(encoding="utf-8")
    assert written.startswith(HEADER)
    known = [line.split(" | ")[1] for line in written[len(HEADER) :].splitlines()]
    assert known == [markdown([item.how])[2:-2] for item in FAULTS.values()]
    lines = set(map(masked, written.splitlines()))
    assert not [row for row in rows.values() if masked(markdown(row)) not in lines]


def test_there_are_faults_of_every_kind():
    groups = [item.group for item in FAULTS.values()]
    assert len(groups) >= 70 and len(set(groups)) == 8
    assert len({item.how for item in FAULTS.values()}) == len(FAULTS)
    assert min(map(groups.count, groups)) >= 5
