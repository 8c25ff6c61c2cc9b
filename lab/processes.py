"""Several processes train as one: N processes are N micro-batches at the same time.

All processes make the same random choices, because those follow from seed, purpose and step. Each
process works on its own part of the rows; sums and results are then shared, so that all processes
make the same update. The first process alone writes, logs and prints. With one process every
function here does nothing.
"""

import os
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist

from lab import CourseError

PATIENCE = timedelta(minutes=30)  # the first process may save a large model while others wait


alone = ContextVar("alone", default=False)  # inside `together`: this process has its own task


def count():
    """How many processes share the work; 1 inside `together`, where each has its own task."""
    return 1 if alone.get() else joined()


def joined():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if joined() > 1 else 0


def first():
    """Whether this process is the one that writes, logs and prints."""
    return rank() == 0


def launched():
    """How many processes a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_this_machine():
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", joined())) if joined() > 1 else 1


def local_rank():
    """The number of this process, and of its GPU, on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if joined() > 1 else 0


def start(device="auto"):
    """Joins the processes that a launcher has started. `device` is the parameter of the course."""
    if launched() == 1 or joined() > 1:
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)


def stop():
    if joined() > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Rows


def part_of(total):
    """(start, stop): the rows of this process; none if there are fewer rows than processes."""
    if count() == 1:
        return 0, total
    return total * rank() // count(), total * (rank() + 1) // count()


def own(rows):
    """The rows of this process."""
    start, stop = part_of(len(rows))
    return rows[start:stop]


# ------------------------------------------------------------------------------------------------
# Results


def together(work):
    """Runs `work()` in every process; returns all results, in the order of the processes.

    An error in one process is raised in all of them, so that no process waits for another one.
    """
    if count() == 1:
        return [work()]
    token = alone.set(True)
    try:
        mine = moved(work(), "cpu")
    except Exception as error:
        told = str(error) if isinstance(error, CourseError) else f"{type(error).__name__}: {error}"
        mine = CourseError(told)
    finally:
        alone.reset(token)
    found = [None] * count()
    with_neighbours(lambda: dist.all_gather_object(found, mine))
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def from_first(work):
    """Runs `work()` in the first process only; all processes return its result or its error."""
    if count() == 1:
        return work()
    return together(lambda: work() if first() else None)[0]


def add(tensors):
    """Adds up each tensor over all processes, in place. All tensors have one dtype."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    with_neighbours(lambda: dist.all_reduce(flat))
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(total.view_as(x))


def any_of(flag):
    """Whether `flag` is true in any process."""
    return any(together(lambda: bool(flag)))


def with_neighbours(exchange):
    """Explains the error that the other processes see when one of them has died."""
    try:
        return exchange()
    except RuntimeError as error:
        raise CourseError(
            f"Another process of this training has stopped ({str(error).splitlines()[0]}). Its own "
            "message says why. Start the same command again: it goes on from the last checkpoint."
        ) from None


def moved(thing, device):
    """Tensors in nested lists, tuples and dicts, moved to a device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if isinstance(thing, dict):
        return {name: moved(x, device) for name, x in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(moved(x, device) for x in thing)
    return thing
