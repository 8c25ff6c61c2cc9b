"""Faster float32 matrix products on the CPU, without a loss of precision."""

import time
from contextlib import contextmanager
from functools import cache

import torch

WIDE = 512  # hidden size from which oneDNN's products are faster despite their overhead


@contextmanager
def fast_matmul(model):
    """Lets a wide model on the CPU use oneDNN inside the block, if that is faster and as exact."""
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
    """Measures once whether precision "medium", which uses oneDNN, is faster and still float32.

    On some processors "medium" rounds to half precision; then this returns False.
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
    print(f"oneDNN multiplies matrices {gain:.1f} times as fast here, with the same precision.")
    return True


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
