"""Several processes train as one: N processes are N micro-batches at the same time.

All processes make the same random choices, because those follow from seed, purpose and step. Each
process works on its own part of the rows; sums and results are then shared, so that all processes
make the same update. The first process alone writes, logs and prints. With one process every
function here does nothing. Each function imports torch itself, because `python -m lab --help`
should not wait for it.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextvars import ContextVar
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from lab import CourseError

HOME = Path(__file__).resolve().parent.parent  # the folder of the notebooks
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by torchrun and by MPI
JOINS = (*SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)  # the first process may save a large model while others wait


alone = ContextVar("alone", default=False)  # inside `together`: this process has its own task


def count():
    """How many processes share the work; 1 inside `together`, where each has its own task."""
    return 1 if alone.get() else joined()


def joined():
    """How many processes train together."""
    if launched() == 1:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    if joined() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def first():
    """Whether this process is the one that writes, logs and prints."""
    return rank() == 0


def launched():
    """How many processes a launcher has started: torchrun, accelerate launch or mpirun."""
    return max(int(os.environ.get(name, 1)) for name in SIZES)


def on_this_machine():
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", joined())) if joined() > 1 else 1


def local_rank():
    """The number of this process, and of its GPU, on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if joined() > 1 else 0


def start(device="auto"):
    """Joins the processes that a launcher has started. `device` is the parameter of the course."""
    if launched() > 1 and joined() == 1:
        import torch
        from accelerate import PartialState

        check_engine()
        cpu = device == "cpu" or not torch.cuda.is_available()
        PartialState._reset_state()  # it may remember that this process was alone
        PartialState(cpu=cpu, timeout=PATIENCE)
    elif os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise CourseError(
            "accelerate launch has started one process: without a GPU it starts several only "
            "through MPI. Use torchrun --nproc-per-node N -m lab ... instead."
        )


def check_engine():
    """Of accelerate's engines for models that do not fit one card, the course uses FSDP2."""
    told = os.environ.get
    if told("ACCELERATE_USE_DEEPSPEED") == "true":
        raise CourseError(
            "accelerate launch was told to use DeepSpeed, which the course does not use: choose "
            "FSDP version 2 with `accelerate config`, or set shard = True and use torchrun."
        )
    if told("ACCELERATE_USE_FSDP") != "true":
        return
    if told("FSDP_VERSION") != "2":
        raise CourseError(
            "accelerate launch was told to use version 1 of FSDP, but the course uses version 2: "
            "set fsdp_version to 2 in the config file of accelerate, or add --fsdp_version 2."
        )
    if told("FSDP_OFFLOAD_PARAMS") == "true":
        raise CourseError(
            "accelerate launch was told to keep sharded weights on the CPU, which the course does "
            "not do: set fsdp_offload_params to false, and use more processes."
        )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all processes load, then shard


def stop():
    if joined() > 1:
        import torch.distributed as dist

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
        if getattr(error, "common", False):  # the others have it already
            raise
        told = str(error) if isinstance(error, CourseError) else f"{type(error).__name__}: {error}"
        mine = CourseError(told)
    finally:
        alone.reset(token)
    return agreed(mine)


def agreed(mine):
    """What each process says, in the order of the processes. All of them must call this at the same
    time, also inside `together`. The error of one is raised in all."""
    import torch.distributed as dist

    found = [None] * joined()
    with_neighbours(lambda: dist.all_gather_object(found, mine))
    for place, result in enumerate(found):
        if isinstance(result, Exception):
            result.elsewhere, result.common = place != rank(), True
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
    import torch
    import torch.distributed as dist

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
        stopped = CourseError(lost(error))
        stopped.common = True
        raise stopped from None


def lost(error):
    return (
        f"Another process of this training has stopped ({str(error).splitlines()[0]}). Its own "
        "message says why. Start the same command again: it goes on from the last checkpoint."
    )


def moved(thing, device):
    """Tensors in nested lists, tuples and dicts, moved to a device."""
    if hasattr(thing, "to") and hasattr(thing, "dtype"):
        return thing.to(device)
    if isinstance(thing, dict):
        return {name: moved(x, device) for name, x in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(moved(x, device) for x in thing)
    return thing


# ------------------------------------------------------------------------------------------------
# Starting them from a notebook


def spread(command):
    """Decorates a training: with cfg.num_processes > 1 it runs in that many new processes, as
    `python -m lab COMMAND` does, and this process yields the metrics of their steps."""

    def decorate(train):
        @functools.wraps(train)
        def steps(cfg, *args, **functions):
            if cfg.num_processes == 1 or launched() > 1:
                yield from train(cfg, *args, **functions)
                return
            rows = functions.pop("rows", args[0] if args and command == "critic" else None)
            if any(callable(function) for function in functions.values()):
                raise CourseError(
                    f"num_processes = {cfg.num_processes} starts new processes, which find your "
                    "functions by name only: set reward or algorithm to module.function."
                )
            yield from launch(command, cfg, rows)

        return steps

    return decorate


def launch(command, cfg, rows=None):
    """Runs `python -m lab COMMAND` in cfg.num_processes processes; yields what they measure.
    `rows` are pairs for 2_critic."""
    import torch

    told, values = "", asdict(cfg) | {"root": str(Path(cfg.root).resolve()), "num_processes": 1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        torchrun = "torch.distributed.run", "--standalone", "--nproc-per-node", cfg.num_processes
        line = [sys.executable, "-m", *map(str, torchrun), "-m", "lab", command]
        if rows:
            pairs = Path(folder) / "pairs.json"
            pairs.write_text(json.dumps(rows, default=str), encoding="utf-8")
            line += ["--rows", str(pairs)]
        threads = str(max(1, torch.get_num_threads() // cfg.num_processes))
        child = subprocess.Popen(
            [*line, "--config", str(path), "--json"],
            cwd=HOME, env={"OMP_NUM_THREADS": threads} | os.environ, text=True, encoding="utf-8",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            for text in child.stdout:
                line = json.loads(text) if text.startswith("{") else {}
                told = line.get("error", told)
                if "step" in line:
                    yield line
        except BaseException:  # the notebook was stopped: they save a checkpoint
            child.send_signal(signal.SIGTERM)
            raise
        finally:
            child.wait()
    if child.returncode:
        raise CourseError(told or f"The new processes stopped (exit status {child.returncode}).")
