"""What goes wrong while a model trains: memory, disks, answers. Each said in a sentence."""

import errno
import functools
import math
import re
import traceback
from contextlib import contextmanager
from pathlib import Path

from lab import CourseError, memory
from lab.data import repeated
from lab.hub import reach, reason_of
from lab.tokens import encoder

NOTEBOOKS = {
    "base": "0_download.ipynb",
    "actor": "1_actor.ipynb",
    "critic": "2_critic.ipynb",
    "rlhf": "3_rlhf.ipynb",
    "report": "4_test.ipynb",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
ODD = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def out_of_memory(error):
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def explained(error):
    """A sentence about an error of the machine, not of the program; None for any other error."""
    if out_of_memory(error):
        return (
            "Memory ran out: lower eval_batch, rollout, micro_batch or max_new_tokens, or take a "
            "smaller model."
        )
    # What is written in Rust tells the number in its text.
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    where = f" ({error.filename})" if getattr(error, "filename", None) else ""
    if number in FULL:
        return f"The disk is full{where}: make room, then run this again."
    if number in CLOSED:
        return f"There is no permission to write here{where}: allow it, or choose another root."
    if number in ODD:
        return f"A file stands where a folder belongs, or the reverse{where}: move it away."
    return None


def find_device(name):
    """A torch device, which from now on is the current GPU; "auto": the first GPU, else the CPU.

    Everything that a stage loads goes there, and nothing moves it later.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
        torch.zeros(1, device=device).item()  # there is a device without numbers, "meta"
        if device.type == "cuda":  # kernels of other packages start on the current one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError):  # torch has one for each backend
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        known = ", ".join(["auto", "cpu", *gpus])
        raise CourseError(f"device = {name!r} is not there: this machine has {known}.") from None


@contextmanager
def loading(path, part=""):
    """Whatever a hub, a disk or a file format can do wrong, in one sentence."""
    try:
        reach(path)
        yield
    except Exception as error:
        reason = part + reason_of(error)
        record = Path(path) / "stage.json"
        remedy = f" Run {NOTEBOOKS[Path(path).name]} again." if record.exists() else ""
        raise CourseError(f"{path} will not load ({reason}).{remedy}") from None


@contextmanager
def judging(what="reward"):
    """An error of a reward or metric of one's own, with the line of code that raised it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CourseError) or out_of_memory(error):
            raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise CourseError(
            f"The {what} failed ({Path(line.filename).name}, line {line.lineno}: "
            f"{type(error).__name__}: {error}). It must give a finite number for each answer."
        ) from error


def in_words(function):
    """The function, with errors of the machine as sentences."""

    @functools.wraps(function)
    def told(*args, **more):
        try:
            return function(*args, **more)
        except (RuntimeError, MemoryError, OSError) as error:
            if (sentence := explained(error)) is None:
                raise
        raise CourseError(sentence)

    return told


def enough(cfg, blocks):
    """Raises where pretraining has no text, or text too short for what comes later."""
    longest = cfg.max_prompt + cfg.max_new_tokens
    if cfg.pretrain_length < longest:
        problem = f"pretrain_length = {cfg.pretrain_length} is impossible: at least"
        raise CourseError(f"{problem} max_prompt + max_new_tokens = {longest}.")
    if not len(blocks):
        problem = f"pretrain_documents = {cfg.pretrain_documents} is impossible: their text is"
        raise CourseError(f"{problem} shorter than pretrain_length = {cfg.pretrain_length} tokens.")


def note_texts(say, tokenizer, rows, answers, cfg):
    """Says how many texts are longer than their limit and which end they lose, and what repeats."""
    written, encode = [("prompt", "max_prompt", "front")], encoder(tokenizer)
    written += [(field, "max_new_tokens", "end") for field in answers]
    for field, name, end in written:
        ids_of, limit = encode.answers if field in answers else encode.prompts, getattr(cfg, name)
        ids = ids_of([row[field] for row in rows], math.inf)
        if count := sum(len(text) > limit for text in ids):
            what = f"{count} of {len(rows)} texts in {field!r} are longer than {name} allows"
            say(f"{what} ({limit} tokens): they lose their {end}.")
    if copies := repeated(rows):
        say(
            f"{copies} of {len(rows)} rows are copies of others: they count as often as they occur."
        )


def in_pieces(work, state, name, say, leave=None):
    """work(size) with as many rows at once as fit: state[name] halves when memory runs out.

    Where one row is too much, `leave` moves everything to the CPU, if it is given.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return work(state[name])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (state[name] == 1 and leave is None):
                raise
        clear_device_cache(garbage_collection=True)  # out here the failed attempt is let go
        if state[name] > 1:
            state[name] = (state[name] + 1) // 2
            say(
                f"memory ran out: going on with {state[name]} rows at once; the result is the same."
            )
        else:
            leave()
            leave = None
            say("memory ran out with one row at a time: going on with the CPU.")


def text_length(row):
    """Characters of a row's texts, or of several rows side by side."""
    if isinstance(row, (tuple, list, dict)):
        return sum(map(text_length, row.values() if isinstance(row, dict) else row))
    return len(row) if isinstance(row, str) else 0


class Sturdy:
    """What an optimiser does so that a machine or a loss does not fail it.

    `state` holds the few numbers, besides weights and moments, that a stopped run needs again.
    """

    length = staticmethod(text_length)  # how long a row is, to find the one that needs most memory

    def __init__(self, cfg, models, frozen, say):
        memory.keep()  # every step asks for the same blocks again
        self.cfg, self.models, self.frozen, self.say = cfg, models, frozen, say
        self.sizes = {"rollout_batch": cfg.rollout, "longest": -1}
        self.state = {"skipped": 0, "in_a_row": 0}

    def room(self):
        """Bytes for one piece, found once: a run that was stopped goes on with the same."""
        device = next(self.models[0].parameters()).device
        asked = [self.cfg.memory, self.cfg.micro_batch, str(device)]
        if self.state.get("asked") != asked:
            models = (*self.models, *self.frozen)
            found = {"asked": asked, "room": memory.room(self.cfg.memory, models, self.models)}
            self.state |= self.sizes | found
        return self.state["room"]

    def update_size(self, rows, loss_of):
        """How many rows of an update go at once so that it stays within its memory.

        The longest row tells, and again each longer one that comes along.
        """
        room, lengths = self.room(), [self.length(row) for row in rows]
        longest = max(lengths)
        if not self.cfg.micro_batch and longest > self.state["longest"]:
            i, before = lengths.index(longest), self.state["micro_batch"]
            found = memory.of_update(lambda: loss_of(rows[i : i + 1]), self.models)
            size = memory.at_once(before, found[1], room - found[0])
            self.state |= {"longest": longest, "micro_batch": size}
            if size < before:
                self.say(f"updates take {size} rows at once, so that they fit into memory.")
            if self.cfg.memory and sum(found) > room:
                limit = self.cfg.memory
                need = f"{limit + (sum(found) - room) / 1e9:.1f} GB"
                self.say(f"memory = {limit:g} is too little: with one row at a time it is {need}.")
        return self.state["micro_batch"]

    def rollout_size(self):
        """The same for answers, which need no gradient."""
        room = self.room()
        row = memory.of_reading(self.models[0], self.cfg.max_prompt + self.cfg.max_new_tokens)
        self.state["rollout_batch"] = memory.at_once(self.state["rollout_batch"], row, room)
        return self.state["rollout_batch"]

    def fit(self, work, name):
        """work(size) with as many rows at once as memory holds, on the CPU if it comes to that."""
        gpu = next(self.models[0].parameters()).device.type != "cpu"
        leave = self.leave_gpu if gpu and self.cfg.cpu_fallback else None
        return in_pieces(work, self.state, name, self.say, leave)

    def tidy(self):
        """Gives back what lies free between blocks in use; else such holes add up."""
        if sum(p.nbytes for model in self.models for p in model.parameters()) > memory.LARGE:
            memory.trim()

    def leave_gpu(self):
        for model in (*self.models, *self.frozen):
            model.to("cpu")
        self.adamw.load_state_dict(self.adamw.state_dict())  # moments follow their weights
        self.state |= self.sizes

    def take(self, finite, step):
        """The step itself, unless its loss or gradient is no number."""
        if finite:
            self.scaler.step(self.adamw)
            self.state["in_a_row"] = 0
        elif self.scaler.get_scale() <= 1:  # else fp16 was scaled too high, and the scale falls
            self.skip(step)
        if self.scaler.is_enabled():
            self.scaler.update()
            self.state["scaler"] = self.scaler.state_dict()
        self.adamw.zero_grad()

    def skip(self, step):
        """A loss or gradient that is no number would spoil every weight: they stay as they are."""
        self.state["skipped"] += 1
        self.state["in_a_row"] += 1
        what = f"step {step}: a loss or gradient is no finite number"
        if self.state["in_a_row"] == 3:
            raise CourseError(
                f"{what[0].upper()}{what[1:]}, for the third time in a row. The last checkpoint is "
                "good. Lower the learning rate, look at the data and the reward, and go on from "
                "there with resume_changed = True."
            )
        self.say(f"{what}; this update was skipped.")


# How far rounding may move the ratio of an average token before any update, where it ought to be 1.
# A wrong temperature, dropout left on or shifted positions move it further.
ROUNDING = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.02}


def check_ratios(rollout, stats, precision, optimiser):
    """Raises where sampling, scoring and training do not see one distribution.

    What moves an average token is an error. Single tokens may lie further off, as rounding hits
    unlikely ones hard; that is said once.
    """
    limit, outliers = ROUNDING[precision], stats.get("ratio_error_q99", 0)
    error = max(rollout.sampling_error, stats.get("ratio_error", 0))
    if error > limit:
        raise CourseError(
            f"The first ratios of a rollout are off by {error:.2g} on average; rounding explains "
            f"{limit:g}. Sampling and scoring see different distributions: look for dropout, a "
            "second temperature, or a model whose answers depend on padding."
        )
    if outliers > 3 * limit and not optimiser.state.get("rounding_said"):
        optimiser.state["rounding_said"] = True
        optimiser.say(
            f"One first ratio in a hundred is off by {outliers:.2g} or more, by rounding: "
            "precision = float32 would be exact."
        )


def alerts(metrics, kl_limit):
    """{name: sentence} for what a person would want to be woken for."""
    rules = {
        "kl": (
            kl_limit and metrics["kl"] > kl_limit,
            f"KL is {metrics['kl']:.1f} nats an answer, beyond kl_limit = {kl_limit:g}: the policy "
            "has left the actor. Raise kl_coef or lower policy_lr.",
        ),
        "empty": (
            metrics["empty"] > 0.5,
            f"{metrics['empty']:.0%} of the answers are empty. Is the reward paid for saying "
            "nothing? Raise kl_coef, and look at the samples.",
        ),
        "endless": (
            metrics["eos"] < 0.5,
            f"Only {metrics['eos']:.0%} of the answers end within max_new_tokens. Raise "
            "max_new_tokens or missing_eos_penalty.",
        ),
    }
    return {name: sentence for name, (risen, sentence) in rules.items() if risen}
