"""How much memory there is, how much a row needs, and how many rows therefore go at once.

Memory that is freed stays at hand: the C library of Linux gives large blocks back to the system at
once, and the system wipes every page before it lends it again. A training step asks for the same
blocks each time: without `keep` it spends up to half of its time on their return.
"""

import ctypes
import gc
import sys

import psutil

from lab.errors import out_of_memory

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # glibc's names of what can be set
LARGE = 2**27  # bytes of weights: an update takes seconds, and a moment to tidy up is little


def c_library(function):
    """A function of the C library, or None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), function, None)


def keep():
    """From here on this process keeps what it frees, for itself, to use again."""
    mallopt = c_library("mallopt")
    if mallopt:
        mallopt(MMAP_MAX, 0)  # large blocks come from the heap too,
        mallopt(TRIM_THRESHOLD, -1)  # whose end is not cut off
        mallopt(TOP_PAD, 2**26)  # and which grows 64 MB at a time


def give_back():
    """What nobody needs any longer goes back to the system after all."""
    gc.collect()
    trim()


def trim():
    """Free pages go back, those between blocks in use as well."""
    malloc_trim = c_library("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


# --------------------------------------------------------------------------------------------------
# How much there is

OVERHEAD = 0.6e9  # bytes that Python, torch and a device's kernels hold besides tensors
SHARE = 0.6  # of the free memory, where no limit is given
BUSY = 2**29  # bytes of a piece that keep one core busy
LAPTOP = 4.5e9  # bytes of a stage beyond which a CPU gains little from larger pieces


def peaks():
    """The most memory so far, in MB: of this process, and of its GPU where it uses one."""
    import torch

    found = {"peak_memory_mb": round(peak_of_process())}
    if torch.cuda.is_initialized():
        gpus = range(torch.cuda.device_count())
        found["peak_device_mb"] = round(max(map(torch.cuda.max_memory_allocated, gpus)) / 2**20)
    elif torch.backends.mps.is_available():  # keeps no maximum: what the driver holds now
        found["peak_device_mb"] = round(torch.mps.driver_allocated_memory() / 2**20)
    return found


def peak_of_process():
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free(device):
    """Bytes that are free on a device, with those that torch has freed and kept."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def room(limit, models, learning=()):
    """Bytes that one piece may take: what `limit` (GB; 0: a share of what is free) leaves beside
    the weights, and beside the gradients and moments of what is `learning`.

    With a limit it depends on nothing else, so that the same run is cut in the same way again.
    """
    import torch

    device = next(models[0].parameters()).device
    coming = 3 * sum(p.nbytes for m in learning for p in m.parameters() if p.requires_grad)
    there = OVERHEAD + sum(p.nbytes for m in models for p in m.parameters())
    left = limit * 1e9 - there if limit else SHARE * free(device)
    if device.type == "cpu":
        busy = BUSY * max(2, torch.get_num_threads())
        left = min(left, max(LAPTOP - there, busy + coming))
    return left - coming


# --------------------------------------------------------------------------------------------------
# How much a row needs


def of_update(loss, models):
    """(bytes that every update needs, bytes that its only row needs) while it runs backward.

    `loss()` is a forward pass; no random number is used up and no gradient computed. Counted is
    what torch keeps for the backward pass. Half-precision copies of weights are there but once. The
    largest tensor has its gradient and two tensors of work beside it when its turn comes.
    """
    import torch

    parameters = [p for model in models for p in model.parameters()]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    shapes = {shape for p in parameters for shape in (p.shape, p.shape[::-1])}
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    copies, kept = {}, {}

    def note(x):
        storage = x.untyped_storage()
        where = storage.data_ptr()
        if where not in own:
            (copies if made_of_weights(x, shapes) else kept)[where] = storage.nbytes()
        return x.detach()  # with its graph it would hold itself for ever

    watched = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with torch.random.fork_rng(devices), torch.enable_grad(), watched:
        alive = loss()  # as long as it is, no block can be used and counted twice
    del alive
    row = sum(kept.values()) + 3 * max(kept.values(), default=0)
    return sum(copies.values()), row


def made_of_weights(x, shapes):
    """Whether a tensor is a weight in another precision or another order."""
    step = x.grad_fn
    if step is None:
        return x.dim() > 1 and x.shape in shapes
    while step and len(step.next_functions) == 1:
        step = step.next_functions[0][0]
    return type(step).__name__ == "AccumulateGrad"


def of_reading(model, tokens):
    """Bytes that a row of so many tokens needs while a model writes or reads it: keys and values of
    all layers, one layer at work, the logits of one token. From its config."""
    shape = model.config.get_text_config()
    width = getattr(shape, "hidden_size", 0)
    heads = getattr(shape, "num_attention_heads", None) or 1
    key_heads = getattr(shape, "num_key_value_heads", None) or heads
    keys = key_heads * (getattr(shape, "head_dim", None) or width // heads)
    cache = 2 * keys * getattr(shape, "num_hidden_layers", 1)
    return 4 * (tokens * (cache + 24 * width) + 8 * getattr(shape, "vocab_size", 0))


def at_once(most, row, room):
    """How many of `most` rows fit: all of them, half, a quarter, ..., at least one."""
    while most > 1 and most * row > room:
        most = (most + 1) // 2
    return most


def halving(work, state, name, say, leave=None):
    """work(size) with as many rows at once as fit: state[name] halves when memory runs out.

    If even one row does not fit, `leave` (where given) moves everything to the CPU.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return work(state[name])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (state[name] == 1 and leave is None):
                raise
        clear_device_cache(garbage_collection=True)  # outside `except`, which holds the tensors
        if state[name] > 1:
            state[name] = (state[name] + 1) // 2
            say(f"memory ran out: continuing with {state[name]} rows at once, same result.")
        else:
            leave()
            leave = None
            say("memory ran out with one row at a time: continuing on the CPU.")
