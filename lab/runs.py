"""Runs and what they leave behind: whole folders or none, and every number that was measured."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

NOTEBOOKS = {
    "base": "0_download.ipynb",
    "actor": "1_actor.ipynb",
    "critic": "2_critic.ipynb",
    "rlhf": "3_rlhf.ipynb",
    "report": "4_test.ipynb",
}


class CourseError(Exception):
    """Something the person in front of the screen can mend: one sentence, no traceback."""

    def _render_traceback_(self):  # what Jupyter shows in place of a traceback
        return [f"{type(self).__name__}: {self}"]


def digest(*paths):
    """One hash over the contents of some files."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                whole.update(block)
    return whole.hexdigest()


def artifact(root, name):
    """The folder of a finished stage, after checking that it is whole and fits its inputs."""
    folder, record = Path(root) / "model" / name, read_record(root, name)
    lost = [f for f, size in record["files"].items() if file_size(folder / f) != size]
    if lost:
        raise CourseError(f"model/{name} is damaged ({lost[0]}): run {NOTEBOOKS[name]} again.")
    for source, made_from in record["inputs"].items():
        if read_record(root, source)["id"] != made_from:
            raise CourseError(
                f"model/{name} was made from another model/{source} than the one there now: "
                f"run {NOTEBOOKS[name]} again."
            )
        artifact(root, source)
    return folder


def recover(root, name):
    """Puts the old artifact back where a run was stopped between the two renames of `publish`."""
    folder = Path(root) / "model" / name
    old = folder.with_name(f".{name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)


def read_record(root, name):
    recover(root, name)
    path = Path(root) / "model" / name / "stage.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"id": record["id"], "files": record["files"], "inputs": record["inputs"], **record}
    except FileNotFoundError:
        raise CourseError(f"model/{name} is not there yet: run {NOTEBOOKS[name]} first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CourseError(f"{path} cannot be read: run {NOTEBOOKS[name]} again.") from None


def file_size(path):
    return path.stat().st_size if path.exists() else None


def peak_memory_mb():
    """The most memory this process has held, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions():
    names = ("torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


class Stage:
    """The folder a stage writes: built beside its place, moved there when it is complete.

    Stopped half-way, whatever stood in `model/<name>` before is untouched, and a rerun with the
    same parameters goes on from the last checkpoint. The lock of a dead process holds nobody up.
    """

    def __init__(self, root, name, config, inputs=(), data=(), *, resume=True, every=100):
        self.root, self.name, self.config, self.every = Path(root), name, config, every
        self.inputs = {source: read_record(root, source)["id"] for source in inputs}
        for source in inputs:
            artifact(root, source)
        self.data = {Path(path).name: digest(path) for path in data}
        self.target = self.root / "model" / name
        self.folder = self.target.with_name(f".{name}.partial")
        self.kept = self.target.with_name(f".{name}.checkpoints")
        self.lock = FileLock(self.target.with_name(f".{name}.lock"))
        self.resume, self.past, self.summary = resume, [], {}

    def __enter__(self):
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise CourseError(
                f"Another run is writing model/{self.name}: wait until it is done, or stop it."
            ) from None
        try:
            self.checkpoint = self.last_checkpoint() if self.resume else None
        except CourseError:
            self.lock.release()
            raise
        if self.checkpoint is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.kept, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self.started = time.perf_counter()
        return self

    def plan(self):
        """What must be the same for a stopped run to go on."""
        config = {k: v for k, v in self.config.items() if k not in ("resume", "checkpoint_every")}
        return {"parameter": config, "input": self.inputs, "file": self.data}

    def last_checkpoint(self):
        """The newest checkpoint of a stopped run, its files cut back to that moment; or None."""
        for folder in sorted(self.kept.glob("step-*"), reverse=True):
            note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
            if any((file_size(self.folder / f) or 0) < size for f, size in note["sizes"].items()):
                continue
            self.compare(note["plan"])
            for name, size in note["sizes"].items():
                os.truncate(self.folder / name, size)
            for path in self.folder.iterdir():
                if path.name not in note["sizes"]:
                    path.unlink()
            text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
            self.past = [json.loads(line) for line in text.splitlines()]
            return folder
        return None

    def compare(self, plan):
        """A changed run never goes on silently: what changed is named."""
        for kind, now in self.plan().items():
            for name in sorted({*now, *plan[kind]}):
                was, new = plan[kind].get(name), now.get(name)
                if was != new:
                    change = f" from {was!r} to {new!r}" if kind == "parameter" else ""
                    raise CourseError(
                        f"A run for model/{self.name} was stopped at step {self.stopped_at()}, and "
                        f"the {kind} {name} has changed{change} since. Change it back to go on, or "
                        "set resume = False to start afresh."
                    )

    def stopped_at(self):
        return max(int(folder.name.split("-")[1]) for folder in self.kept.glob("step-*"))

    def steps(self, total, optimiser, state=None):
        """The numbers of the steps that are left; a checkpoint now and then, and on a stop.

        What survives: `optimiser.models`, `optimiser.adamw`, the dict `state`, every random state,
        and what was logged. All else has to follow from the number of the step.
        """
        from accelerate import Accelerator

        # It remarks at every save that tied weights are stored once, as they should be.
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        device = next(optimiser.models[0].parameters()).device
        accelerator, first = Accelerator(cpu=device.type == "cpu"), 0
        for part in (*optimiser.models, optimiser.adamw):
            accelerator.prepare(part)
        if self.checkpoint:
            accelerator.load_state(self.checkpoint)
            note = json.loads((self.checkpoint / "note.json").read_text(encoding="utf-8"))
            first = note["step"]
            (state if state is not None else {}).update(note["state"])
            print(f"{self.name}: going on after step {first} of {total}, where a run was stopped.")
        with Stop() as stop:
            for step in range(first, total):
                yield step
                if step + 1 < total and ((step + 1) % self.every == 0 or stop.asked):
                    self.save(accelerator, step + 1, state or {})
                if stop.asked:
                    raise KeyboardInterrupt(f"{self.name} stopped after step {step + 1}.")

    def save(self, accelerator, step, state):
        """A checkpoint, written beside its place and renamed; the last two are kept."""
        folder = self.kept / f"step-{step:08d}"
        building = self.kept / "building"
        shutil.rmtree(building, ignore_errors=True)
        accelerator.save_state(building)
        sizes = {path.name: file_size(path) for path in self.folder.iterdir()}
        note = {"step": step, "state": state, "sizes": sizes, "plan": self.plan()}
        (building / "note.json").write_text(json.dumps(note), encoding="utf-8")
        os.replace(building, folder)
        for old in sorted(self.kept.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def log(self, metrics):
        """One step's metrics: kept as a line, handed on to whoever watches."""
        metrics = {k: float(f"{v:.6g}") if type(v) is float else v for k, v in metrics.items()}
        self.append("metrics.jsonl", [metrics])
        return metrics

    def samples(self, rows):
        """Answers worth reading, a line each in samples.jsonl."""
        self.append("samples.jsonl", rows)

    def append(self, name, rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.publish()
        finally:
            self.lock.release()

    def publish(self):
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        weights = [path for path in files if path.suffix == ".safetensors"]
        record = {
            "stage": self.name,
            "id": digest(*(weights or files)),
            "config": self.config,
            "inputs": self.inputs,
            "data": self.data,
            "versions": versions(),
            "metrics": self.summary,
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_mb": round(peak_memory_mb()),
            "files": {str(path.relative_to(self.folder)): file_size(path) for path in files},
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "stage.json").write_text(text, encoding="utf-8")
        recover(self.root, self.name)
        old = self.target.with_name(f".{self.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            os.replace(self.target, old)
        os.replace(self.folder, self.target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)


class Stop:
    """Takes SIGINT and SIGTERM as a wish to stop after this step; a second one stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
