"""Measures free memory and the memory per row, and chooses how many rows to process at a time.

It also keeps freed memory in the process. The C library of Linux returns large blocks to the system
at once, and the system clears every page before it provides it again. A training step allocates the
same blocks each time, so without `keep` it spends up to half of its time on this.
"""

import ctypes
import gc
import sys
from contextlib import contextmanager

import psutil

from lab import processes
from lab.errors import out_of_memory
from lab.sharding import here, is_sharded

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # the parameters of glibc's mallopt
LARGE = 2**27  # bytes of weights from which an update is so slow that `trim` costs little
OFTEN = 2**26  # bytes of new gradients after which a backward pass of such models trims again


def c_library(function):
    """Returns a function of the C library; None if it does not exist on this system."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), function, None)


def keep():
    """Makes the process keep freed memory for reuse."""
    mallopt = c_library("mallopt")
    if mallopt:
        mallopt(MMAP_MAX, 0)  # allocate large blocks on the heap too
        mallopt(TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(TOP_PAD, 2**26)  # grow the heap by 64 MB at a time


def give_back():
    """Collects garbage and returns all free memory to the system."""
    gc.collect()
    trim()


def trim():
    """Returns free pages to the system, including those between blocks in use."""
    malloc_trim = c_library("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def large(models):
    """Returns whether models are so large that `trim` costs little beside a pass."""
    return sum(p.nbytes for model in models for p in model.parameters()) > LARGE


@contextmanager
def tidy(models):
    """Trims before a pass of several large models that learn on the CPU, and inside whenever OFTEN
    bytes of gradients have come: these stand between blocks of the graph that are free then.

    It costs a twelfth of the time and saves a tenth of the memory of PPO, which needs most of all
    stages. One model that learns leaves it out: it fits where PPO fits.
    """
    learning = [p for model in models for p in model.parameters() if p.requires_grad]
    new = [p for p in learning if p.grad is None and p.device.type == "cpu"]
    if not (models[1:] and new and large(models)):
        yield
        return
    came = 0

    def count(parameter):
        nonlocal came
        came += parameter.nbytes
        if came > OFTEN:
            came = 0
            trim()

    trim()
    hooks = [p.register_post_accumulate_grad_hook(count) for p in new]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------------------
# Free memory

OVERHEAD = 0.6e9  # bytes that Python, torch and the kernels of a device use besides tensors
SHARE = 0.6  # share of the free memory to use if no limit is given
GPU_SHARE = 0.75  # the same on a GPU, which few programs share
BUSY = 2**29  # bytes of a piece that keep one core busy
LAPTOP = 4.5e9  # bytes of a stage above which a CPU gains little from larger pieces


def peaks():
    """Returns the peak memory in MB, of this process and of its GPU if it uses one."""
    import torch

    found = {"peak_memory_mb": round(peak_of_process())}
    if torch.cuda.is_initialized():
        gpus = range(torch.cuda.device_count())
        found["peak_device_mb"] = round(max(map(torch.cuda.max_memory_allocated, gpus)) / 2**20)
    elif torch.backends.mps.is_available():  # MPS records no peak: use the current amount
        found["peak_device_mb"] = round(torch.mps.driver_allocated_memory() / 2**20)
    return found


def peak_of_process():
    """Returns the peak memory of this process in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free(device):
    """Returns the free bytes of a device, including those that torch has freed but kept."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def room(limit, models, learning=()):
    """Returns the bytes that one piece may use: `limit` in GB (0: a share of the free memory) minus
    the weights, and minus the gradients and moments of the models in `learning`.

    If a limit is given, the result does not depend on the free memory, so a repeated run uses the
    same pieces.
    """
    import torch

    device = next(models[0].parameters()).device
    coming = 3 * sum(here(p).nbytes for m in learning for p in m.parameters() if p.requires_grad)
    there = OVERHEAD + sum(here(p).nbytes for m in models for p in m.parameters())
    there += max(
        sum(p.nbytes - here(p).nbytes for p in m.parameters()) for m in models
    )  # to generate
    share = GPU_SHARE if device.type == "cuda" else SHARE
    left = limit * 1e9 - there if limit else share * free(device)
    if device.type == "cpu":
        left = left if limit else left / processes.on_this_machine()
        busy = BUSY * max(2, torch.get_num_threads())
        left = min(left, max(LAPTOP - there, busy + coming))
    return left - coming


# --------------------------------------------------------------------------------------------------
# Memory per row


def of_update(loss, models):
    """Returns (bytes that an update needs for any number of rows, bytes per row).

    `loss()` is the forward pass of one row. It counts the tensors that torch saves for the backward
    pass; it computes no gradients and restores the random state. Half-precision copies of weights
    are needed once per update. The backward pass of the largest tensor needs three more tensors of
    its size: its gradient and two temporary ones.
    """
    import torch

    parameters = [p for model in models for p in model.parameters()]
    sharded = {p.dtype for p in parameters if hasattr(p, "to_local")}
    own = {p.untyped_storage().data_ptr() for p in parameters if p.dtype not in sharded}
    shapes = {shape for p in parameters for shape in (p.shape, p.shape[::-1])}
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    copies, kept = {}, {}

    def note(x):
        storage = x.untyped_storage()
        where = storage.data_ptr()
        weights = where in own or made_of_weights(x, shapes)
        if not weights:
            kept[where] = storage.nbytes()
        elif where not in own and x.dtype not in sharded:  # else gathered: freed after its layer
            copies[where] = storage.nbytes()
        return x.detach()  # with its graph it would keep itself alive

    watched = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with torch.random.fork_rng(devices), torch.enable_grad(), watched:
        alive = loss()  # keeps all blocks alive, so that none is reused and counted twice
    del alive
    row = sum(kept.values()) + 3 * max(kept.values(), default=0)
    return sum(copies.values()), row


def made_of_weights(x, shapes):
    """Returns whether a tensor is a weight in another precision or layout."""
    step = x.grad_fn
    if step is None:
        return x.dim() > 1 and x.shape in shapes
    while step and len(step.next_functions) == 1:
        step = step.next_functions[0][0]
    return type(step).__name__ == "AccumulateGrad"


def of_reading(model, tokens):
    """Estimates the bytes that a row of `tokens` tokens needs without gradients, from the config:
    the cache of all layers, the activations of one layer, and the logits of one token; of all of
    them if the model is sharded, because then its own forward computes them at once."""
    shape = model.config.get_text_config()
    width = getattr(shape, "hidden_size", 0)
    heads = getattr(shape, "num_attention_heads", None) or 1
    key_heads = getattr(shape, "num_key_value_heads", None) or heads
    keys = key_heads * (getattr(shape, "head_dim", None) or width // heads)
    cache = 2 * keys * getattr(shape, "num_hidden_layers", 1)
    logits = (8 + 2 * tokens * is_sharded(model)) * getattr(shape, "vocab_size", 0)
    return 4 * (tokens * (cache + 24 * width) + logits)


def at_once(most, row, room):
    """Returns how many of `most` rows fit: all, half, a quarter, ..., but at least one."""
    while most > 1 and most * row > room:
        most = (most + 1) // 2
    return most


def halving(work, state, name, say, leave=None):
    """Returns work(state[name]), and halves the number of rows state[name] when memory runs out.

    If not even one row fits, `leave`, if given, moves everything to the CPU.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return work(state[name])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (state[name] == 1 and leave is None):
                raise
        clear_device_cache(garbage_collection=True)  # not in `except`, which keeps tensors alive
        if state[name] > 1:
            state[name] = (state[name] + 1) // 2
            say(f"memory ran out: continuing with {state[name]} rows at once, same result.")
        else:
            leave()
            leave = None
            say("memory ran out with one row at a time: continuing on the CPU.")
