"""Matrix products on the CPU, as fast as they are exact."""

import time
from contextlib import contextmanager
from functools import cache

import torch

WIDE = 512  # hidden size from which oneDNN's products are worth their call


@contextmanager
def fast_matmul(model):
    """Inside, a wide model on the CPU multiplies with oneDNN, if that is faster and as exact."""
    before = torch.get_float32_matmul_precision()
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    if model.device.type == "cpu" and width >= WIDE and onednn_is_better():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def onednn_is_better(size=1024):
    """Whether precision "medium", oneDNN's way, is faster here and yet float32; measured once.

    On some processors it rounds to half precision instead: then nothing changes.
    """
    rng = torch.Generator().manual_seed(0)
    x, before = torch.randn(2, size, size, generator=rng), torch.get_float32_matmul_precision()
    seconds, error = {}, {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        seconds[precision] = min(timed(torch.mm, *x) for _ in range(4))
        error[precision] = (torch.mm(*x) - torch.mm(*x.double())).abs().max() / size**0.5
    torch.set_float32_matmul_precision(before)
    gain = seconds["highest"] / seconds["medium"]
    if error["medium"] > 4 * error["highest"] or gain < 1.2:
        return False
    print(f"oneDNN multiplies matrices {gain:.1f} times as fast here, as exactly: it does so.")
    return True


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
