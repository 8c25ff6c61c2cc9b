"""Errors in words: what happened, where, and what to do about it."""

import errno
import functools
import re
import traceback
from contextlib import contextmanager
from pathlib import Path

from lab import CourseError
from lab.hub import reach, reason_of

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
def scoring_errors(what="reward"):
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


def plain_errors(function):
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
