"""What goes wrong while a model trains: memory, disks, answers. Each said in a sentence."""

import errno
import re
from contextlib import contextmanager

from lab import CourseError
from lab.data import repeated

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
    # What is written in Rust tells the number in its text; torch tells nothing but that it failed.
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    where = f" ({error.filename})" if getattr(error, "filename", None) else ""
    if number in FULL or "PytorchStreamWriter failed" in str(error):
        return f"The disk is full{where}: make room, then run this again."
    if number in CLOSED:
        return f"There is no permission to write here{where}: allow it, or choose another root."
    if number in ODD:
        return f"A file stands where a folder belongs, or the reverse{where}: move it away."
    return None


def find_device(name):
    """A torch device; "auto" is the first GPU, or the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch has one for each backend
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        known = ", ".join(["auto", "cpu", *gpus])
        raise CourseError(f"device = {name!r} is not there: this machine has {known}.") from None


@contextmanager
def loading(path):
    """Whatever a hub, a disk or a file format can do wrong, in one sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CourseError(f"{path} will not load ({reason}).") from None


def note_texts(say, tokenizer, rows, answers, cfg):
    """Says how many texts are longer than their limit and which end they lose, and what repeats."""
    limits = {"prompt": ("max_prompt", cfg.max_prompt, "front")}
    limits |= dict.fromkeys(answers, ("max_new_tokens", cfg.max_new_tokens - 1, "end"))
    for field, (name, limit, end) in limits.items():
        ids = tokenizer([row[field] for row in rows])["input_ids"]
        if count := sum(len(text) > limit for text in ids):
            what = f"{count} of {len(rows)} texts in {field!r} are longer than {name} allows"
            say(f"{what} ({getattr(cfg, name)} tokens): they lose their {end}.")
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
                f"memory ran out: going on with {state[name]} rows at once; the update is the same."
            )
        else:
            leave()
            leave = None
            say("memory ran out with one row at a time: going on with the CPU.")


class Sturdy:
    """What an optimiser does when a machine or a loss fails it.

    `state` holds the few numbers, besides weights and moments, that a stopped run needs again.
    """

    def __init__(self, cfg, models, frozen, say):
        self.cfg, self.models, self.frozen, self.say = cfg, models, frozen, say
        self.sizes = {"rollout_batch": cfg.rollout}
        self.state = {"skipped": 0, "in_a_row": 0}

    def fit(self, work, name):
        """work(size) with as many rows at once as memory holds, on the CPU if it comes to that."""
        gpu = next(self.models[0].parameters()).device.type != "cpu"
        leave = self.leave_gpu if gpu and self.cfg.cpu_fallback else None
        return in_pieces(work, self.state, name, self.say, leave)

    def leave_gpu(self):
        for model in (*self.models, *self.frozen):
            model.to("cpu")
        self.adamw.load_state_dict(self.adamw.state_dict())  # moments follow their weights
        self.state |= self.sizes

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
