"""Runs the slow tests, then all others as on other processors: python tests/machines.py

Kernels for other instruction sets round differently, and so do sums over other numbers of threads.
Every test has to pass on all of them. The script ends with one line per setting. It hands its
arguments to pytest.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from torch.backends.cpu import get_cpu_capability

HOME = Path(__file__).resolve().parent.parent
KINDS = ("default", "avx2", "avx512")  # each supports everything that those before it support
AS_IF = [
    *({"ATEN_CPU_CAPABILITY": kind} for kind in KINDS),
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    *({"OMP_NUM_THREADS": str(threads)} for threads in (1, 2, 4)),
]
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def pytest(env, *arguments):
    """Runs pytest; returns its result and the seconds that it took."""
    start = time.time()
    line = [sys.executable, "-m", "pytest", *arguments, *sys.argv[1:]]
    code = subprocess.run(line, cwd=HOME, env=os.environ | env).returncode
    return {0: "passed", 5: "no such tests"}.get(code, "FAILED"), time.time() - start


def main():
    here = get_cpu_capability().lower()
    can = KINDS[: KINDS.index(here) + 1] if here in KINDS else KINDS[:1]
    found = {"the slow tests": pytest({}, "-m", "slow")}
    for env in AS_IF:
        name = " ".join("=".join(pair) for pair in env.items())
        print(f"\n{name}", flush=True)
        if env.get("ATEN_CPU_CAPABILITY", "default") in can:
            found[name] = pytest(env, *TWO_AT_ONCE)
        else:  # this processor lacks the instructions
            found[name] = f"skipped: this processor supports {here} at most", 0
    print()
    for name, (end, seconds) in found.items():
        print(f"{name:30} {end} in {seconds:.0f} s" if seconds else f"{name:30} {end}")
    return any(end == "FAILED" for end, _ in found.values())


if __name__ == "__main__":
    sys.exit(main())
