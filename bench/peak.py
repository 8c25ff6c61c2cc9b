"""What this machine could do, and which share of it a PPO iteration gets.

    python bench/peak.py --shape tiny --out peak.json

The iteration is that of peers.py; its arithmetic is counted at its least (real tokens, head only at
the answers, see common.forward_flops), so that padding and waste lower the share.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench import common, contenders  # noqa: E402
from bench.peers import FOLDER, Worker, phases  # noqa: E402

ROUNDS = {"tiny": 5, "opt125m": 1}
SIZES = (1024, 2048, 4096)


def fastest(function, times=5):
    """Seconds of the quickest of a few runs."""
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def products():
    """{name: function(x, w)}: the ways to multiply float32 matrices that this torch has."""
    ways = {"torch.mm": torch.mm}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        ways["oneDNN"] = lambda x, w: linear(x, w, None, "none", [], "")
    return ways


def matmul_rates():
    """{name: FLOP/s}, the best over a few sizes."""
    rates = {}
    for size in SIZES:
        x, w = torch.randn(2, size, size)
        for name, multiply in products().items():
            rate = 2 * size**3 / fastest(lambda multiply=multiply, x=x, w=w: multiply(x, w))
            rates[name] = max(rate, rates.get(name, 0))
    return rates


def memory_rates():
    """{name: bytes/s}: of half a gigabyte read, and of it copied (read and written)."""
    x = torch.ones(2**27)
    y = torch.empty_like(x)
    size = x.numel() * x.element_size()
    return {"read": size / fastest(x.sum), "copy": 2 * size / fastest(lambda: y.copy_(x))}


def least_arithmetic(name):
    """FLOPs of the phases of one PPO iteration."""
    shape, longest = common.shape_of(name), contenders.LONGEST
    rows = [(len(r["prompt"].split()), longest) for r in contenders.rows_of(name, "ppo")]
    whole, body = (common.forward_flops(shape, rows, head) for head in (True, False))
    return {
        "generate": whole,
        "score": whole + 2 * body,  # reference; reward and value model
        "update": contenders.EPOCHS * 3 * (whole + body),  # backward is twice forward
    }


def shares(name, rounds, best, read):
    """The lines of one shape: what each phase reaches."""
    worker = Worker(FOLDER, "ours", "ppo", name)
    steps = [phases(worker.step()) for _ in range(rounds + 1)][1:]
    worker.close()
    flops, total = least_arithmetic(name), [step["seconds"] for step in steps]
    streamed = 4 * common.parameters(common.shape_of(name)) * contenders.LONGEST
    for phase in (*flops, "whole"):
        seconds = total if phase == "whole" else [step[f"{phase}, s"] for step in steps]
        work = sum(flops.values()) if phase == "whole" else flops[phase]
        reached = [streamed / s / read for s in seconds]  # the weights once for each new token
        yield {
            "phase": phase,
            "seconds": seconds,
            "least GFLOP": work / 1e9,
            "GFLOP/s": [work / s / 1e9 for s in seconds],
            "share of the matmul peak": [work / s / best for s in seconds],
            "share of read bandwidth": reached if phase == "generate" else "-",
        }


def main():
    args = common.arguments(__doc__, ROUNDS).parse_args()
    report = common.Report(args.out)
    rates, memory = matmul_rates(), memory_rates()
    rows = [
        {"what": f"float32 {name}", "rate": f"{r / 1e9:.0f} GFLOP/s"} for name, r in rates.items()
    ]
    rows += [
        {"what": f"memory, {name}", "rate": f"{r / 1e9:.0f} GB/s"} for name, r in memory.items()
    ]
    report.table("Limits", rows)
    for name in args.shape:
        rounds = args.rounds or ROUNDS[name]
        lines = list(shares(name, rounds, max(rates.values()), memory["read"]))
        report.table(f"PPO iteration, {name}", lines)


if __name__ == "__main__":
    main()
