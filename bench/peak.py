"""Measures the peak rates of this machine and how much of them a PPO iteration reaches.

    python bench/peak.py --shape tiny --out peak.json

The iteration is the one of peers.py. Its arithmetic is the minimum that the task needs (real tokens
only, the LM head only at the answers; see common.forward_flops), so padding and other wasted work
lower the share.
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


def best_seconds(function, times=5):
    """The seconds of the fastest of a few runs, after one warm-up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def matmul_functions():
    """{name: function(x, w)}: the float32 matmuls that this version of torch has."""
    functions = {"torch.mm": torch.mm}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        functions["oneDNN"] = lambda x, w: linear(x, w, None, "none", [], "")
    return functions


def matmul_rates():
    """{name: FLOP/s}: the best rate over a few matrix sizes."""
    rates = {}
    for size in SIZES:
        x, w = torch.randn(2, size, size)
        for name, multiply in matmul_functions().items():
            rate = 2 * size**3 / best_seconds(lambda multiply=multiply, x=x, w=w: multiply(x, w))
            rates[name] = max(rate, rates.get(name, 0))
    return rates


def memory_rates():
    """{name: bytes/s} for reading half a gigabyte and for copying it (a read and a write)."""
    x = torch.ones(2**27)
    y = torch.empty_like(x)
    size = x.numel() * x.element_size()
    return {"read": size / best_seconds(x.sum), "copy": 2 * size / best_seconds(lambda: y.copy_(x))}


def minimum_flops(name):
    """{phase: minimum FLOPs} of one PPO iteration."""
    config, answer = common.opt_config(name), contenders.NEW_TOKENS
    rows = [(len(r["prompt"].split()), answer) for r in contenders.rows_of(name, "ppo")]
    whole, body = (common.forward_flops(config, rows, head) for head in (True, False))
    return {
        "generate": whole,
        "score": whole + 2 * body,  # the reference has an LM head; reward and value model have none
        "update": contenders.EPOCHS * 3 * (whole + body),  # backward costs two forward passes
    }


def table_rows(name, rounds, matmul_rate, read_rate):
    """Yields the rows of one shape: the rates that each phase reaches."""
    worker = Worker(FOLDER, "ours", "ppo", name)
    steps = [phases(worker.step()) for _ in range(rounds + 1)][1:]
    worker.close()
    flops, total = minimum_flops(name), [step["seconds"] for step in steps]
    streamed = 4 * common.count_weights(common.opt_config(name)) * contenders.NEW_TOKENS
    for phase in (*flops, "whole"):
        seconds = total if phase == "whole" else [step[f"{phase}, s"] for step in steps]
        work = sum(flops.values()) if phase == "whole" else flops[phase]
        reached = [streamed / s / read_rate for s in seconds]  # all weights once per new token
        yield {
            "phase": phase,
            "seconds": seconds,
            "minimum GFLOP": work / 1e9,
            "GFLOP/s": [work / s / 1e9 for s in seconds],
            "share of the matmul peak": [work / s / matmul_rate for s in seconds],
            "share of read bandwidth": reached if phase == "generate" else "-",
        }


def main():
    args = common.make_parser(__doc__, ROUNDS).parse_args()
    report = common.Report(args.out)
    rates, memory = matmul_rates(), memory_rates()
    rows = [
        {"what": f"float32 {name}", "rate": f"{r / 1e9:.0f} GFLOP/s"} for name, r in rates.items()
    ]
    rows += [
        {"what": f"memory, {name}", "rate": f"{r / 1e9:.0f} GB/s"} for name, r in memory.items()
    ]
    report.table("Rates of the machine", rows)
    for name in args.shape:
        rounds = args.rounds or ROUNDS[name]
        rows = list(table_rows(name, rounds, max(rates.values()), memory["read"]))
        report.table(f"Utilisation in a PPO iteration, {name}", rows)


if __name__ == "__main__":
    main()
