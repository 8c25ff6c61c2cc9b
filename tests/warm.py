"""Runs notebooks in a fork each of one warm process: the imports of a kernel are paid for once.

    python tests/warm.py     reads a JSON list a line (notebook, parameters, printed); answers with
                             the error that stopped it, or null

Everything a cell prints goes to the file `printed`. As with papermill, the parameters stand in a
cell of their own behind the notebook's, and a notebook knows nothing of the one before it.
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
LIMIT = 300  # seconds that a notebook may take


class Warm:
    """The process, seen from a test."""

    def __init__(self, env=None):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=HOME, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, notebook, printed, **parameters):
        """What stopped the notebook, as "Kind: sentence"; None if nothing did."""
        self.process.stdin.write(json.dumps([notebook, parameters, str(printed)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or '"the warm process has ended"')

    def close(self):
        self.process.kill()
        self.process.wait()


def cells_of(notebook, parameters):
    """The code of a notebook, cell by cell, with its parameters."""
    book = json.loads((HOME / notebook).read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            yield re.sub(r"^%.*autoreload.*", "", "".join(cell["source"]), flags=re.M)
            if "parameters" in cell["metadata"].get("tags", []):
                yield "\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in parameters.items())])


def run(notebook, parameters):
    """Runs the cells in a fresh shell; returns what stopped it."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    InteractiveShell.enable_gui = lambda *_: None  # what a kernel does for `%matplotlib inline`
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
    """Never returns."""
    signal.alarm(LIMIT)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.write(answer, json.dumps(run(notebook, parameters)).encode())
    sys.stdout.flush()
    os._exit(0)


def serve():
    sys.path[0] = str(HOME)  # in the place of tests/
    # What notebooks import first. Nothing is computed here: threads do not survive a fork.
    import matplotlib_inline.backend_inline  # noqa: F401
    import peft  # noqa: F401

    import util  # noqa: F401
    from lab import notebook, report  # noqa: F401

    gc.freeze()  # what is here is not looked at again whenever a notebook collects its garbage
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
