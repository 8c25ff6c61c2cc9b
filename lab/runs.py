"""Runs and what they leave behind: whole folders or none, and every number that was measured."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import psutil

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

    Stopped half-way, whatever stood in `model/<name>` before is untouched.
    """

    def __init__(self, root, name, config, inputs=(), data=()):
        self.root, self.name, self.config = Path(root), name, config
        self.inputs = {source: read_record(root, source)["id"] for source in inputs}
        for source in inputs:
            artifact(root, source)
        self.data = {Path(path).name: digest(path) for path in data}
        self.target = self.root / "model" / name
        self.folder = self.target.with_name(f".{name}.partial")
        self.summary = {}

    def __enter__(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.started = time.perf_counter()
        return self

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
        if kind is None:
            self.publish()

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
