"""Turns exceptions into sentences that say what happened, where, and what to do."""

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
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
FILE_OR_FOLDER = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def out_of_memory(error):
    """Returns whether an error means that the memory of the CPU or the GPU ran out."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def explained(error):
    """Describes an error of memory, disk or permissions in a sentence; None for other errors."""
    if out_of_memory(error):
        return (
            "Memory ran out: lower eval_batch, rollout, micro_batch or max_new_tokens, or use a "
            "smaller model."
        )
    # Libraries written in Rust give the error number in the text only.
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    where = f" ({error.filename})" if getattr(error, "filename", None) else ""
    if number in DISK_FULL:
        return f"The disk is full{where}: free some space, then run this again."
    if number in NO_PERMISSION:
        return f"You have no permission to write here{where}: allow it, or choose another root."
    if number in FILE_OR_FOLDER:
        return f"A file is where a folder should be, or the reverse{where}: move it away."
    return None


@contextmanager
def loading(path, part=""):
    """Turns every error of loading a model into one sentence, whether hub, disk or file format."""
    try:
        reach(path)
        yield
    except Exception as error:
        reason = part + reason_of(error)
        record = Path(path) / "stage.json"
        remedy = f" Run {NOTEBOOKS[Path(path).name]} again." if record.exists() else ""
        raise CourseError(f"{path} does not load ({reason}).{remedy}") from None


@contextmanager
def scoring_errors(what="reward", returns="a finite number for each answer"):
    """Turns an error in your own reward or metric into one that names the line of code."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CourseError) or out_of_memory(error):
            raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise CourseError(
            f"The {what} failed ({Path(line.filename).name}, line {line.lineno}: "
            f"{type(error).__name__}: {error}). It must return {returns}."
        ) from error


def plain_errors(function):
    """Decorates a function so that it raises errors of the machine as a CourseError."""

    @functools.wraps(function)
    def told(*args, **more):
        try:
            return function(*args, **more)
        except (RuntimeError, MemoryError, OSError) as error:
            if (sentence := explained(error)) is None:
                raise
        raise CourseError(sentence)

    return told
