"""Runs and what they leave behind: whole folders or none, and every number that was measured."""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from lab import CourseError, memory
from lab.data import reading
from lab.errors import NOTEBOOKS, explained
from lab.hub import reason_of


def digest(*paths):
    """One hash over the contents of some files."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                whole.update(block)
    return whole.hexdigest()


def steadily(read):
    """The reader of an artifact; it reads anew where a run has replaced the artifact meanwhile."""

    @functools.wraps(read)
    def reads(root, name):
        while True:
            before = settled(root, name)
            try:
                found = read(root, name)
            except (CourseError, OSError):
                if settled(root, name) == before:
                    raise
            else:
                if settled(root, name) == before:
                    return found

    return reads


def settled(root, name):
    """Which folder stands at model/<name>; None without one.

    It waits where a run is between the two renames of `publish`. A run that died there has left the
    lock free and the old artifact beside: whoever gets the lock puts it back.
    """
    folder, old, lock = places(root, name)
    end = time.monotonic() + (10 if old.exists() else 0.1)
    while not (found := stamp(folder)) and lock.exists() and time.monotonic() < end:
        try:
            with FileLock(lock).acquire(timeout=0):
                recover(folder, old)
                return stamp(folder)
        except OSError:  # a living run has the lock; or nobody may write here
            time.sleep(0.005)
    return found or stamp(folder)


def places(root, name):
    """Where a finished stage stands, where its predecessor waits, and the lock of both."""
    folder = Path(root) / "model" / name
    return folder, folder.with_name(f".{name}.old"), folder.with_name(f".{name}.lock")


def stamp(path):
    """What tells a file or folder from any other in its place, and from itself moved and back."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def recover(folder, old):
    """Puts the old artifact back where a run died between its renames; only under the lock."""
    if not folder.exists() and old.exists():
        old.rename(folder)


@steadily
def artifact(root, name):
    """The folder of a finished stage, after checking that it is whole and fits its inputs."""
    folder, record = Path(root) / "model" / name, read_record(root, name)
    lost = [f for f, size in record["files"].items() if file_size(folder / f) != size]
    if lost:
        raise CourseError(f"model/{name} is damaged ({lost[0]}): run {NOTEBOOKS[name]} again.")
    weights = [f for f in record["files"] if f.endswith(".safetensors")] or record["files"]
    stamps = [(folder / f, stamp(folder / f)) for f in weights]
    if fingerprint(tuple(stamps), record["id"]) != record["id"]:
        raise CourseError(
            f"model/{name} is damaged (other weights than were written): run {NOTEBOOKS[name]} "
            "again."
        )
    for source, made_from in record["inputs"].items():
        if read_record(root, source)["id"] != made_from:
            raise CourseError(
                f"model/{name} was made from another model/{source} than the one there now: "
                f"run {NOTEBOOKS[name]} again."
            )
        artifact(root, source)
    return folder


@functools.lru_cache(maxsize=64)
def fingerprint(stamps, expected):
    """The hash of some files; once for files that have not changed since, nor what is expected."""
    return digest(*(path for path, _ in stamps))


@steadily
def has_record(root, name):
    """Whether the course has made this artifact."""
    return (Path(root) / "model" / name / "stage.json").exists()


@steadily
def read_record(root, name):
    """The stage.json of a finished stage."""
    path = Path(root) / "model" / name / "stage.json"
    if not path.parent.exists():
        raise CourseError(f"model/{name} is not there yet: run {NOTEBOOKS[name]} first.")
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
        raise CourseError(f"model/{name} holds the result of {made_by}: {MOVE.format(name)}")
    return record


MOVE = (
    "move model/{0} elsewhere and run the notebook that makes it. (A model of your own comes in as "
    "the parameter base_model of 0_download.ipynb.)"
)


def foreign(folder):
    """Something lies there that no stage of the course wrote."""
    if folder.is_dir():
        return any(folder.iterdir()) and not (folder / "stage.json").exists()
    return folder.exists()


def finished(root):
    """The stages whose results are there, in the order of the course."""
    return [name for name in NOTEBOOKS if name != "report" and settled(root, name)]


def file_size(path):
    return path.stat().st_size if path.exists() else None


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
    ):
        self.root, self.name, self.config, self.minutes = Path(root), name, config, minutes
        self.inputs = {source: read_record(root, source)["id"] for source in inputs}
        for source in inputs:
            artifact(root, source)
        self.data = {}
        for path in data:
            with reading(path):
                self.data[Path(path).name] = digest(path)
        self.target, self.old, lock = places(root, name)
        self.folder = self.target.with_name(f".{name}.partial")
        self.kept = self.target.with_name(f".{name}.checkpoints")
        self.lock = FileLock(lock)
        self.resume, self.resume_changed = resume, resume_changed
        self.past, self.notes, self.summary, self.asked = [], [], {}, False

    def __enter__(self):
        try:
            self.open()
        except OSError as error:
            self.fail(error)
            raise
        self.started = time.perf_counter()
        return self

    def open(self):
        """Takes the lock; finds the last checkpoint, or makes room for a run from the start."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0.2)  # a reader may have it for a moment
        except Timeout:
            raise CourseError(
                f"Another run is writing model/{self.name}: wait until it is done, or stop it."
            ) from None
        try:
            recover(self.target, self.old)
            if foreign(self.target):
                raise CourseError(
                    f"model/{self.name} was not made by this course, and would be lost: "
                    f"{MOVE.format(self.name)}"
                )
            self.checkpoint = self.last_checkpoint() if self.resume else None
            if self.checkpoint is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.rmtree(self.kept, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
        except BaseException:
            self.lock.release()
            raise

    def say(self, sentence):
        """Tells whoever watches, and stage.json."""
        print(f"{self.name}: {sentence}", flush=True)
        self.notes.append(sentence)

    def plan(self):
        """What must be the same for a stopped run to go on."""
        config = {k: v for k, v in self.config.items() if k not in FREE}
        return {"parameter": config, "input": self.inputs, "file": self.data}

    def last_checkpoint(self):
        """The newest whole checkpoint of a stopped run, its files cut back to then; or None."""
        if not self.folder.exists():  # what was stopped was complete
            return None
        found = sorted(self.kept.glob("step-*"), reverse=True)
        for folder in found:
            note = self.whole(folder)
            if note is None:
                continue
            if folder != found[0]:
                self.say(f"{found[0].name} is damaged; {folder.name} is whole and is taken.")
            self.compare(note)
            for damaged in found[: found.index(folder)]:
                shutil.rmtree(damaged)
            self.cut_back(note["sizes"])
            self.past = note["past"]
            return folder
        if found:
            self.say("the checkpoints of a stopped run are damaged; starting afresh.")
        return None

    def cut_back(self, sizes):
        """The files being written as they were then: logs shorter, weights and adapters gone."""
        for path in self.folder.iterdir():
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def whole(self, folder):
        """The note of a checkpoint; None if a file of it, or one it counts on, is cut short."""
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

    def compare(self, note):
        """A changed run never goes on silently: what changed is named."""
        for kind, now in self.plan().items():
            for name in sorted({*now, *note["plan"][kind]}):
                was, new = note["plan"][kind].get(name), now.get(name)
                if was != new:
                    change = f" from {was!r} to {new!r}" if kind == "parameter" else ""
                    change = f"the {kind} {name} has changed{change}"
                    if not self.resume_changed:
                        raise CourseError(
                            f"A run for model/{self.name} was stopped at step {note['step']}, and "
                            f"{change} since. Change it back to go on, set resume_changed = True "
                            "to go on all the same, or resume = False to start afresh."
                        )
                    self.say(f"going on although {change} since step {note['step']}.")

    def steps(self, total, optimiser, keep_last=False):
        """The numbers of the steps that are left; a checkpoint now and then, and on a stop.

        What survives: `optimiser.models`, `.adamw` and the dict `.state`, every random state, and
        what was logged. All else has to follow from the number of the step. `keep_last` is for a
        stage that has work to do behind the last step, which may fail.
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
                    self.asked = stop.asked  # nothing is left to be stopped: the result is written
                    return
                start = time.perf_counter()
                if stop.asked or start - saved >= pause:
                    self.save(optimiser, step + 1)
                    saved = time.perf_counter()
                    if seconds:  # saving takes a twentieth of the time at most
                        pause = max(seconds, 19 * (saved - start))
                if stop.asked:
                    raise KeyboardInterrupt(f"{self.name} stopped after step {step + 1}.")

    def load(self, optimiser, total):
        """Reads the checkpoint; the number of steps that it has behind it."""
        from lab import checkpoints

        try:
            note = json.loads((self.checkpoint / "note.json").read_text(encoding="utf-8"))
            checkpoints.read(self.checkpoint, optimiser)
            checkpoints.set_random_states(note["random"], device_of(optimiser))
        except Exception as error:  # safetensors, torch and the disk have many kinds
            reason = reason_of(error)
            raise CourseError(
                f"model/{self.kept.name}/{self.checkpoint.name} cannot be loaded "
                f"({reason}): delete that folder to go on from the one before, or set resume = "
                "False to start afresh."
            ) from None
        optimiser.state.update(note["state"])
        self.notes = note["notes"] + self.notes
        self.say(f"going on after step {note['step']} of {total}, where a run was stopped.")
        return note["step"]

    def save(self, optimiser, step):
        """A checkpoint, written beside its place and renamed.

        From the first on there is always a whole one; with the half one there are never three.
        """
        from lab import checkpoints

        folder, building = self.kept / f"step-{step:08d}", self.kept / "building"
        for old in (building, *sorted(self.kept.glob("step-*"))[:-1]):
            shutil.rmtree(old, ignore_errors=True)
        checkpoints.write(building, optimiser)
        note = {"step": step, "state": optimiser.state, "notes": self.notes, "plan": self.plan()}
        note["random"] = checkpoints.random_states(device_of(optimiser))
        note["parts"] = {path.name: file_size(path) for path in building.iterdir()}
        note["sizes"] = {path.name: file_size(path) for path in self.folder.iterdir()}
        (building / "note.json").write_text(json.dumps(note), encoding="utf-8")
        os.replace(building, folder)

    def log(self, metrics):
        """One step's metrics: kept as a line, handed on to whoever watches."""
        metrics = {name: rounded(value) for name, value in metrics.items()}
        metrics |= memory.peaks()
        self.append("metrics.jsonl", [metrics])
        return metrics

    def alert(self, before, now, stop):
        """Says an alert when it comes up; `stop` makes it an error."""
        for name in now.keys() - before.keys():
            self.say(now[name])
        if now and stop:
            raise CourseError(
                f"{' '.join(now.values())} The run stopped, as stop_on_alert = True asks; with "
                "False it goes on from its last checkpoint."
            )

    def samples(self, rows):
        """Answers worth reading, a line each in samples.jsonl."""
        rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
        self.append("samples.jsonl", rows)

    def append(self, name, rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.publish()
        except OSError as late:
            self.fail(late)
            raise
        finally:
            self.lock.release()
        self.fail(error)
        if self.asked and kind is None:
            raise KeyboardInterrupt(f"{self.name} was complete when it was stopped.")

    def fail(self, error):
        """Puts an error of the machine into words; what was there before is still there."""
        told = explained(error) if error else None
        if told:
            raise CourseError(f"model/{self.name} was not written. {told}") from None

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
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)


FREE = {  # a stopped run goes on whatever these say
    "root",  # a course may move
    "resume", "resume_changed", "checkpoint_minutes", "kl_limit", "stop_on_alert", "cpu_fallback",
    "memory",
}  # fmt: skip


def device_of(optimiser):
    return next(optimiser.models[0].parameters()).device


def rounded(value):
    """Six digits of a float; None for what is no number, which JSON does not know."""
    if type(value) is not float:
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
