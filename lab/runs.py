"""The folders that stages write and read: published complete or not at all, with all metrics."""

import functools
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from lab import CourseError, memory, processes, tracking
from lab.errors import NOTEBOOKS, explained
from lab.hub import reason_of


def digest(*paths):
    """Returns one hash of the contents of all files."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def digest_of(rows):
    """Returns one hash of the contents of all rows."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def retry_if_replaced(read):
    """Decorates a function that reads an artifact: it reads again if a run has replaced the
    artifact in the meantime."""

    @functools.wraps(read)
    def reads(root, name):
        while True:
            before = version_of(root, name)
            try:
                found = read(root, name)
            except (CourseError, OSError):
                if version_of(root, name) == before:
                    raise
            else:
                if version_of(root, name) == before:
                    return found

    return reads


def version_of(root, name):
    """Returns the stamp of the folder model/<name>; None if there is no such folder.

    It waits while another run is between the two renames of `publish`. If that run has died there,
    its lock is free, and the old artifact is put back.
    """
    folder, old, lock = places(root, name)
    end = time.monotonic() + (10 if old.exists() else 0.1)
    while not (found := stamp(folder)) and lock.exists() and time.monotonic() < end:
        try:
            with FileLock(lock).acquire(timeout=0):
                recover(folder, old)
                return stamp(folder)
        except OSError:  # a running process has the lock, or this folder is read-only
            time.sleep(0.005)
    return found or stamp(folder)


def places(root, name):
    """Returns the folder of a stage, the place of its old version while publishing, its lock."""
    folder = Path(root) / "model" / name
    return folder, folder.with_name(f".{name}.old"), folder.with_name(f".{name}.lock")


def stamp(path):
    """Returns numbers that change if a file or folder is replaced, changed or moved; else None."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def recover(folder, old):
    """Puts the old artifact back if a run died between its renames. Call it with the lock only."""
    if not folder.exists() and old.exists():
        old.rename(folder)


@retry_if_replaced
def artifact(root, name):
    """Returns the folder of a finished stage; raises if it is damaged or out of date."""
    folder, record = Path(root) / "model" / name, read_record(root, name)
    lost = [f for f, size in record["files"].items() if file_size(folder / f) != size]
    if lost:
        problem = f"{lost[0]} is missing or has the wrong size"
        raise CourseError(f"model/{name} is damaged ({problem}): run {NOTEBOOKS[name]} again.")
    weights = [f for f in record["files"] if f.endswith(".safetensors")] or record["files"]
    stamps = [(folder / f, stamp(folder / f)) for f in weights]
    if fingerprint(tuple(stamps), record["id"]) != record["id"]:
        raise CourseError(
            f"model/{name} is damaged (its weights have changed since they were written): run "
            f"{NOTEBOOKS[name]} again."
        )
    for source, made_from in record["inputs"].items():
        if read_record(root, source)["id"] != made_from:
            raise CourseError(
                f"model/{name} was made from another version of model/{source}: run "
                f"{NOTEBOOKS[name]} again."
            )
        artifact(root, source)
    return folder


@functools.lru_cache(maxsize=64)
def fingerprint(stamps, expected):
    """Returns the hash of some files; cached while their stamps and the expected hash are equal."""
    return digest(*(path for path, _ in stamps))


@retry_if_replaced
def has_record(root, name):
    """Returns whether the course has made this artifact."""
    return (Path(root) / "model" / name / "stage.json").exists()


@retry_if_replaced
def read_record(root, name):
    """Returns the stage.json of a finished stage as a dict."""
    path = Path(root) / "model" / name / "stage.json"
    if not path.parent.exists():
        raise CourseError(f"model/{name} does not exist yet: run {NOTEBOOKS[name]} first.")
    if foreign(path.parent):
        raise CourseError(f"model/{name} was not made by this course: {MOVE.format(name)}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = dict(stage=str, id=str, files=dict, inputs=dict, config=dict, metrics=dict)
        if not all(isinstance(record[key], kind) for key, kind in kinds.items()):
            raise ValueError
        made_by = NOTEBOOKS[record["stage"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise CourseError(f"{path} cannot be read: run {NOTEBOOKS[name]} again.") from None
    if record["stage"] != name:
        raise CourseError(f"model/{name} contains the result of {made_by}: {MOVE.format(name)}")
    return record


MOVE = (
    "move model/{0} elsewhere, then run the notebook that makes it. (To use your own model, set "
    "base_model in 0_download.ipynb.)"
)


def foreign(folder):
    """Returns whether a folder contains something that no stage of the course wrote."""
    if folder.is_dir():
        return any(folder.iterdir()) and not (folder / "stage.json").exists()
    return folder.exists()


def finished(root):
    """Returns the names of the finished stages, in the order of the course."""
    return [name for name in NOTEBOOKS if name != "report" and version_of(root, name)]


def file_size(path):
    return path.stat().st_size if path.exists() else None


def versions():
    """Returns the versions of Python and of the main packages."""
    names = ("torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


class Stage:
    """The folder that a stage writes: a hidden folder until it is complete, then model/<name>.

    If the run is interrupted, the previous `model/<name>` stays as it was, and a rerun with the
    same parameters resumes from the last checkpoint. The lock of a dead process blocks nobody.
    """

    def __init__(
        self,
        root,
        name,
        config,
        inputs=(),
        data=(),
        *,
        resume=True,
        resume_changed=False,
        minutes=2.0,
        tracker="none",
        pairs=(),
    ):
        self.root, self.name, self.config, self.minutes = Path(root), name, config, minutes
        self.inputs = {source: read_record(root, source)["id"] for source in inputs}
        for source in inputs:
            artifact(root, source)
        self.data = dict(data)  # {name: digest}
        self.pairs = digest_of(pairs)
        self.target, self.old, lock = places(root, name)
        self.folder = self.target.with_name(f".{name}.partial")
        self.checkpoints = self.target.with_name(f".{name}.checkpoints")
        self.lock = FileLock(lock)
        self.resume, self.resume_changed = resume, resume_changed
        self.past, self.notes, self.summary, self.stop_requested = [], [], {}, False
        self.step, self.trackers = 0, tracking.Trackers(tracker, self.say)

    def __enter__(self):
        try:
            self.open()
        except OSError as error:
            self.fail(error)
            raise
        self.started = time.perf_counter()
        return self

    def open(self):
        """Finds the last checkpoint. Of several processes the first one looks for all."""
        found = processes.from_first(self.take)
        self.checkpoint, self.past, self.step, self.notes = found

    def take(self):
        """Takes the lock, and finds the last checkpoint or clears the folder for a new run."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0.2)  # a reader may hold it for a moment
        except Timeout:
            raise CourseError(
                f"Another run is writing model/{self.name}: wait until it has finished, or stop it."
            ) from None
        try:
            recover(self.target, self.old)
            if foreign(self.target):
                raise CourseError(
                    f"model/{self.name} was not made by this course and would be overwritten: "
                    f"{MOVE.format(self.name)}"
                )
            self.checkpoint = self.last_checkpoint() if self.resume else None
            if self.checkpoint is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            self.trackers.start(self.name, self.folder, self.config, self.step)
        except BaseException:
            self.lock.release()
            raise
        return self.checkpoint, self.past, self.step, self.notes

    def say(self, sentence):
        """Prints a sentence and keeps it for the notes in stage.json."""
        if processes.first():
            print(f"{self.name}: {sentence}", flush=True)
        self.notes.append(sentence)

    def plan(self):
        """Returns the parameters, inputs and data that must be unchanged to resume a run."""
        config = {k: v for k, v in self.config.items() if k not in MAY_CHANGE}
        told = {"parameter": config, "input": self.inputs, "file": self.data}
        return told | {"list of": {"pairs": self.pairs}}  # last: the others say more

    def last_checkpoint(self):
        """Returns the newest intact checkpoint of an interrupted run, or None.

        It also restores the files of the unfinished stage to their state at that checkpoint.
        """
        if not self.folder.exists():  # the interrupted run was complete
            return None
        found = sorted(self.checkpoints.glob("step-*"), reverse=True)
        for folder in found:
            note = self.read_note(folder)
            if note is None:
                continue
            if folder != found[0]:
                self.say(f"{found[0].name} is damaged; resuming from {folder.name} instead.")
            self.check_unchanged(note)
            for damaged in found[: found.index(folder)]:
                shutil.rmtree(damaged)
            self.restore_files(note["sizes"])
            self.past, self.step = note["past"], note["step"]
            return folder
        if found:
            self.say("all checkpoints of the interrupted run are damaged; starting afresh.")
        return None

    def restore_files(self, sizes):
        """Restores the files of the stage: truncates logs, removes files written later."""
        for path in self.folder.iterdir():
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read_note(self, folder):
        """Returns the note.json of a checkpoint; None if the checkpoint or a log is damaged."""
        try:
            note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
            parts = {folder / name: size for name, size in note["parts"].items()}
            fine = all(file_size(path) == size for path, size in parts.items())
            logs = {self.folder / name: size for name, size in note["sizes"].items()}
            fine &= all((file_size(path) or 0) >= size for path, size in logs.items())
            fine &= {"step", "state", "notes", "random"} <= set(note)
            fine &= set(note["plan"]) == set(self.plan())
            text = (self.folder / "metrics.jsonl").read_bytes()[: note["sizes"]["metrics.jsonl"]]
            note["past"] = [json.loads(line) for line in text.decode().splitlines()]
            return note if fine else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def check_unchanged(self, note):
        """Raises if parameters, inputs or data have changed; resume_changed only reports it."""
        for kind, now in self.plan().items():
            for name in sorted({*now, *note["plan"][kind]}):
                was, new = note["plan"][kind].get(name), now.get(name)
                if was != new:
                    change = f" from {was!r} to {new!r}" if kind == "parameter" else ""
                    change = f"the {kind} {name} has changed{change}"
                    if not self.resume_changed:
                        raise CourseError(
                            f"A run of model/{self.name} was interrupted at step {note['step']}, "
                            f"and {change} since then. To resume it, change that back or set "
                            "resume_changed = True; to start afresh, set resume = False."
                        )
                    self.say(f"resuming although {change} since step {note['step']}.")

    def steps(self, total, optimiser, keep_last=False):
        """Yields the numbers of the remaining steps and saves checkpoints, also on an interrupt.

        A checkpoint contains `optimiser.models`, `.adamw` and the dict `.state`, all random states
        and the logs. Everything else must depend on the number of the step only. `keep_last` saves
        a checkpoint after the last step, for a stage whose remaining work may fail.
        """
        first = self.load(optimiser, total) if self.checkpoint else 0
        with Stop() as stop:
            saved, seconds = time.perf_counter(), 60 * self.minutes
            pause = seconds
            for step in range(first, total):
                yield step
                if step + 1 == total:
                    if keep_last:
                        self.save(optimiser, total)
                    self.stop_requested = stop.requested  # finish first: no step is left
                    return
                start = time.perf_counter()
                stop.requested = processes.any_of(stop.requested)
                late = processes.from_first(partial(operator.ge, start - saved, pause))
                if stop.requested or late:
                    self.save(optimiser, step + 1)
                    saved = time.perf_counter()
                    if seconds:  # saving takes at most a twentieth of the time
                        pause = max(seconds, 19 * (saved - start))
                if stop.requested:
                    raise KeyboardInterrupt(f"{self.name} stopped after step {step + 1}.")

    def load(self, optimiser, total):
        """Reads the checkpoint and returns its number of finished steps."""
        from lab import checkpoints

        try:
            note = json.loads((self.checkpoint / "note.json").read_text(encoding="utf-8"))
            checkpoints.read(self.checkpoint, optimiser)
            checkpoints.set_random_states(note["random"], device_of(optimiser))
        except Exception as error:  # safetensors, torch and the disk raise many types
            reason = reason_of(error)
            raise CourseError(
                f"model/{self.checkpoints.name}/{self.checkpoint.name} cannot be loaded "
                f"({reason}): delete that folder to resume from the checkpoint before it, or set "
                "resume = False to start afresh."
            ) from None
        optimiser.state.update(note["state"])
        self.notes = note["notes"] + self.notes
        self.say(f"resuming the interrupted run after step {note['step']} of {total}.")
        return note["step"]

    def save(self, optimiser, step):
        """Saves a checkpoint. Of several processes the first one saves: all have the same state."""
        from lab import checkpoints

        parts = checkpoints.parts_of(optimiser)  # all processes gather what is sharded
        processes.from_first(lambda: self.write(optimiser, step, parts))

    def write(self, optimiser, step, parts):
        """Writes a checkpoint to the folder `building`, then renames that folder.

        So one complete checkpoint always exists after the first. At most two are on the disk,
        including the one being written.
        """
        from lab import checkpoints

        folder, building = self.checkpoints / f"step-{step:08d}", self.checkpoints / "building"
        for old in (building, *sorted(self.checkpoints.glob("step-*"))[:-1]):
            shutil.rmtree(old, ignore_errors=True)
        checkpoints.write(building, parts)
        note = {"step": step, "state": optimiser.state, "notes": self.notes, "plan": self.plan()}
        note["random"] = checkpoints.random_states(device_of(optimiser))
        note["parts"] = {path.name: file_size(path) for path in building.iterdir()}
        note["sizes"] = {path.name: file_size(path) for path in self.folder.iterdir()}
        (building / "note.json").write_text(json.dumps(note), encoding="utf-8")
        os.replace(building, folder)

    def log(self, metrics):
        """Adds the peak memory to a step's metrics, appends them to metrics.jsonl, returns them."""
        metrics = {name: rounded(value) for name, value in metrics.items()}
        metrics |= memory.peaks()
        self.append("metrics.jsonl", [metrics])
        self.step = metrics.get("step", self.step)
        self.trackers.log(metrics, self.step)
        return metrics

    def alert(self, alert):
        """Prints an alert, sends it to the trackers and appends it to alerts.jsonl."""
        self.say(alert["sentence"])
        self.trackers.text("alerts", alert["sentence"], alert["step"])
        self.append("alerts.jsonl", [alert])

    def samples(self, rows):
        """Appends sample answers to samples.jsonl, one per line."""
        rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
        self.append("samples.jsonl", rows)
        if rows:
            self.trackers.text("samples", tracking.as_text(rows), rows[0].get("step", self.step))

    def append(self, name, rows):
        """Appends rows to a file of JSON lines. Of several processes the first one writes."""
        rows = list(rows)  # every process takes part in computing them
        if not processes.first():
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def __exit__(self, kind, error, trace):
        try:
            self.trackers.close()  # Windows renames no folder with an open file
            if kind is None:
                self.publish()
        except OSError as late:
            self.fail(late)
            raise
        finally:
            self.lock.release()
        self.fail(error)
        if self.stop_requested and kind is None:
            raise KeyboardInterrupt(f"{self.name} was already complete when you stopped it.")

    def fail(self, error):
        """Raises an error of memory, disk or permissions as a CourseError. The previous result is
        still there."""
        told = explained(error) if error else None
        if told:
            raise CourseError(f"model/{self.name} was not written. {told}") from None

    def publish(self):
        """Writes stage.json and moves the folder to model/<name>."""
        processes.from_first(self.replace)

    def replace(self):
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = [path for path in files if not tracking.is_event_file(path)]  # nothing reads them
        weights = [path for path in files if path.suffix == ".safetensors"]
        record = {
            "stage": self.name,
            "id": digest(*(weights or files)),
            "config": self.config,
            "inputs": self.inputs,
            "data": self.data,
            "versions": versions(),
            "processes": processes.joined(),
            "metrics": self.summary,
            "notes": self.notes,
            "seconds": round(time.perf_counter() - self.started, 2),
            **memory.peaks(),
            "files": {str(path.relative_to(self.folder)): file_size(path) for path in files},
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "stage.json").write_text(text, encoding="utf-8")
        shutil.rmtree(self.old, ignore_errors=True)
        if self.target.exists():
            os.replace(self.target, self.old)
        os.replace(self.folder, self.target)
        tracking.rename_event_files(self.target, record["id"])
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


MAY_CHANGE = {  # parameters that may change before a run is resumed
    "root",  # you may move the folder of the course
    "resume", "resume_changed", "checkpoint_minutes", "kl_limit", "stop_on_alert", "cpu_fallback",
    "memory", "tracker", "num_processes", "shard",
}  # fmt: skip


def device_of(optimiser):
    return next(optimiser.models[0].parameters()).device


def rounded(value):
    """Rounds a float to six digits; NaN and infinity, which JSON cannot store, become None."""
    if type(value) is not float:
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Stop:
    """Turns SIGINT and SIGTERM into a request to stop after this step; the second stops at once."""

    def __enter__(self):
        self.requested, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.request)
        return self

    def request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
