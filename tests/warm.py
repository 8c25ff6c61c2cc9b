"""Runs each notebook in a fork of one process that has already imported everything.

    python tests/warm.py     reads one JSON list per line (notebook, parameters, printed); answers
                             with the error that stopped the notebook, or null

This saves the imports that every kernel would repeat. Everything that a cell prints goes to the
file `printed`. As with papermill, the parameters get a cell of their own after the notebook's
parameters cell, and no notebook sees variables of another.
"""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds allowed for a notebook


class Warm:
    """A handle on the warm process, for tests."""

    def __init__(self, env=None):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=HOME, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, notebook, printed, **parameters):
        """Runs a notebook; returns the error that stopped it as "Type: message", or None."""
        self.process.stdin.write(json.dumps([notebook, parameters, str(printed)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or '"the warm process has ended"')

    def close(self):
        self.process.kill()
        self.process.wait()


def cells_of(notebook, parameters):
    """Yields the code of each cell; the parameters follow the cell tagged `parameters`."""
    book = json.loads((HOME / notebook).read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            yield re.sub(r"^%.*autoreload.*", "", "".join(cell["source"]), flags=re.M)
            if "parameters" in cell["metadata"].get("tags", []):
                yield "\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in parameters.items())])


def run(notebook, parameters):
    """Runs the cells in a fresh shell; returns the error that stopped them, or None."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    InteractiveShell.enable_gui = lambda *_: None  # else `%matplotlib inline` calls it
    quick = Config()
    quick.HistoryManager.hist_file = ":memory:"
    quick.InlineBackend.figure_formats = set()  # figures are made, but not drawn
    shell = InteractiveShell.instance(config=quick)
    for number, source in enumerate(cells_of(notebook, parameters), 1):
        found = shell.run_cell(source, store_history=True)
        if error := found.error_before_exec or found.error_in_exec:
            return f"{type(error).__name__}: {error} (cell {number} of {notebook})"
    return None


def child(notebook, parameters, printed, answer):
    """Runs the notebook in the forked process, sends the answer and exits; it never returns."""
    signal.alarm(LIMIT)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.write(answer, json.dumps(run(notebook, parameters)).encode())
    sys.stdout.flush()
    os._exit(0)


def serve():
    sys.path[0] = str(HOME)  # instead of tests/
    # The imports of the notebooks. Nothing computes here, because threads do not survive a fork.
    import matplotlib_inline.backend_inline  # noqa: F401
    import peft  # noqa: F401

    import util  # noqa: F401
    from lab import notebook, report  # noqa: F401

    gc.freeze()  # the garbage collector skips the objects that exist now
    out = os.dup(1)
    for line in sys.stdin:
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            child(*json.loads(line), writer)
        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        status = os.waitpid(pid, 0)[1]
        said = said or json.dumps(f"the process ended with status {status}")
        os.write(out, (said + "\n").encode())


if __name__ == "__main__":
    serve()
