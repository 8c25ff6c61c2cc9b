"""Artifacts: published whole or not at all, and every mistake names the notebook that mends it."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import util
from lab import runs
from lab.runs import NOTEBOOKS, CourseError, Stage, artifact, finished, read_record

CHAIN = {"base": (), "actor": ("base",), "critic": ("actor",), "rlhf": ("actor", "critic")}


def make(root, name, weights="w", data=()):
    """A finished stage whose weights are this text."""
    with Stage(root, name, {"seed": 0}, CHAIN[name], data) as stage:
        (stage.folder / "model.safetensors").write_text(f"{name} {weights}")
        (stage.folder / "config.json").write_text("{}")
        for step in range(3):
            stage.log({"step": step, "loss": 1 / (step + 1)})
        stage.summary = {"loss": 0.25}
    return artifact(root, name)


@pytest.fixture
def course(tmp_path):
    """Four finished stages."""
    for name in CHAIN:
        make(tmp_path, name)
    return tmp_path


def everything(root):
    """Each visible file below model/ and what it holds."""
    files = [path for path in (root / "model").rglob("*") if path.is_file()]
    shown = [
        path for path in files if not path.relative_to(root / "model").parts[0].startswith(".")
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in shown}


def test_a_stage_is_published_with_all_that_the_design_promises(tmp_path):
    (tmp_path / "train.json").write_text("rows")
    folder = make(tmp_path, "base", data=[tmp_path / "train.json"])
    assert folder == tmp_path / "model" / "base"
    record = read_record(tmp_path, "base")
    assert {"config", "seconds", "peak_memory_mb", "versions", "metrics", "data", "inputs"} <= set(
        record
    )
    assert record["config"] == {"seed": 0} and record["metrics"] == {"loss": 0.25}
    assert record["data"] == {"train.json": runs.digest(tmp_path / "train.json")}
    assert record["seconds"] >= 0 and record["peak_memory_mb"] > 1
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    lines = (tmp_path / "model" / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    listed = set(record["files"]) | {"stage.json"}
    assert listed == {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"base", ".base.lock"}


def test_log_hands_on_what_it_wrote(tmp_path):
    with Stage(tmp_path, "base", {}) as stage:
        told = stage.log({"step": 1, "loss": 0.123456789})
        assert json.loads((stage.folder / "metrics.jsonl").read_text(encoding="utf-8")) == told
        assert told.pop("peak_memory_mb") > 1 and told == {"step": 1, "loss": 0.123457}
        stage.samples([{"response": "é"}])
        stage.samples([{"response": "b"}])
        lines = (stage.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["response"] for line in lines] == ["é", "b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, CourseError])
def test_an_exception_leaves_everything_as_it_was(course, error):
    before = everything(course)
    with pytest.raises(error), Stage(course, "actor", {}, ["base"]) as stage:
        (stage.folder / "model.safetensors").write_text("half")
        raise error("stop")
    assert everything(course) == before
    assert artifact(course, "critic")


def test_an_exception_in_a_first_run_leaves_no_artifact(tmp_path):
    with pytest.raises(ValueError), Stage(tmp_path, "base", {}) as stage:
        (stage.folder / "model.safetensors").write_text("half")
        raise ValueError
    assert not list((tmp_path / "model").rglob("stage.json")) and not everything(tmp_path)
    with pytest.raises(CourseError, match="0_download"):
        artifact(tmp_path, "base")
    make(tmp_path, "base", "second attempt")


def test_a_generator_dropped_half_way_publishes_nothing(course):
    before = everything(course)

    def training():
        with Stage(course, "actor", {}, ["base"]) as stage:
            (stage.folder / "model.safetensors").write_text("half")
            yield stage.log({"step": 1})
            yield stage.log({"step": 2})

    steps = training()
    next(steps)
    steps.close()
    assert everything(course) == before


def test_leftovers_of_a_stopped_run_do_not_get_into_the_next(tmp_path):
    with pytest.raises(ValueError), Stage(tmp_path, "base", {}) as stage:
        (stage.folder / "leftover.bin").write_text("old")
        raise ValueError
    folder = make(tmp_path, "base")
    assert not (folder / "leftover.bin").exists()


def test_running_again_replaces_the_old_artifact_whole(course):
    old = read_record(course, "rlhf")["id"]
    (course / "model" / "rlhf" / "extra.txt").write_text("stays not")
    make(course, "rlhf", "other")
    assert read_record(course, "rlhf")["id"] != old
    assert not (course / "model" / "rlhf" / "extra.txt").exists()


# ------------------------------------------------------------------------ what is wrong, by name


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_missing_input_names_its_notebook(tmp_path, name):
    with pytest.raises(CourseError, match=NOTEBOOKS[name]):
        artifact(tmp_path, name)
    with pytest.raises(CourseError, match=NOTEBOOKS[name]):
        Stage(tmp_path, "report", {}, [name])
    assert not (tmp_path / "model").exists()


def test_a_stale_critic_names_its_notebook(course):
    make(course, "actor", "trained again")
    for use in (
        lambda: artifact(course, "critic"),
        lambda: Stage(course, "rlhf", {}, CHAIN["rlhf"]),
    ):
        with pytest.raises(CourseError, match="model/actor.*2_critic.ipynb"):
            use()
    assert artifact(course, "actor")


def test_a_stale_grandparent_is_noticed(course):
    make(course, "base", "another one")
    for use in (lambda: artifact(course, "rlhf"), lambda: Stage(course, "report", {}, ["critic"])):
        with pytest.raises(CourseError, match="model/base.*1_actor.ipynb"):
            use()


def test_the_same_weights_again_are_not_stale(course):
    make(course, "actor")
    assert artifact(course, "critic") and artifact(course, "rlhf")


def test_a_stale_input_leaves_the_old_result(course):
    make(course, "actor", "trained again")
    before = everything(course)
    with pytest.raises(CourseError):
        Stage(course, "rlhf", {}, CHAIN["rlhf"]).__enter__()
    assert everything(course) == before


@pytest.mark.parametrize("harm", ["truncate", "delete", "empty"])
def test_a_damaged_file_is_named_with_its_notebook(course, harm):
    path = course / "model" / "actor" / "model.safetensors"
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if harm == "truncate" else b"")
    with pytest.raises(CourseError, match=r"model/actor.*model\.safetensors.*1_actor\.ipynb"):
        artifact(course, "actor")
    with pytest.raises(CourseError, match="1_actor.ipynb"):
        Stage(course, "critic", {}, ["actor"])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", b"\xff\xfe"])
def test_a_broken_record_is_named_with_its_notebook(course, text):
    path = course / "model" / "actor" / "stage.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CourseError, match="1_actor.ipynb"):
        artifact(course, "actor")


def test_a_course_error_is_one_sentence_in_jupyter():
    assert CourseError("run it")._render_traceback_() == ["CourseError: run it"]


# ------------------------------------------------------------------- stopped in the worst place


def stop_at_rename(monkeypatch, number):
    """The process dies at the `number`-th rename."""
    done, real = [], os.replace

    def replace(*args):
        done.append(args)
        if len(done) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(runs.os, "replace", replace)


@pytest.mark.parametrize("number", [1, 2])
def test_stopped_between_the_renames_the_old_result_comes_back(course, monkeypatch, number):
    before = everything(course)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, number)
        make(course, "actor", "new")
    assert artifact(course, "actor") and everything(course) == before
    assert artifact(course, "rlhf")


@pytest.mark.parametrize(
    "use", [lambda r: Stage(r, "critic", {}, ["actor"]), lambda r: artifact(r, "critic")]
)
def test_whoever_needs_it_finds_the_old_result_back(course, monkeypatch, use):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, 2)
        make(course, "actor", "new")
    assert use(course)
    assert (course / "model" / "actor").is_dir()


def test_after_such_a_stop_the_stage_runs_again(course, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, 2)
        make(course, "actor", "new")
    make(course, "actor", "new")
    assert (course / "model" / "actor" / "model.safetensors").read_text() == "actor new"
    assert not [
        p for p in (course / "model").iterdir() if p.name.startswith(".") and p.suffix != ".lock"
    ]


def test_stopped_twice_in_the_worst_place_something_whole_is_left(course, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at_rename(patch, 2 if (course / "model" / "actor").exists() else 1)
            make(course, "actor", "new")
    assert artifact(course, "actor")


def test_a_copied_course_still_works(course, tmp_path_factory):
    copy = tmp_path_factory.mktemp("elsewhere") / "course"
    shutil.copytree(course, copy)
    assert artifact(copy, "rlhf")
    texts = [path.read_text() for path in copy.rglob("stage.json")]
    assert not any(str(course) in text for text in texts)


# ---------------------------------------------------------------------- read while it is written


def ways_to_read(root):
    """Whatever looks at a finished stage; each gives what it found, or raises."""
    return [
        lambda: read_record(root, "actor")["id"],
        lambda: artifact(root, "actor"),
        lambda: Stage(root, "critic", {}, ["actor"]).inputs,
        lambda: finished(root).index("actor"),
    ]


@pytest.mark.parametrize("way", range(4))
def test_a_reader_between_the_renames_waits_and_moves_nothing(course, monkeypatch, way):
    renamed, go_on, real = threading.Event(), threading.Event(), os.replace

    def replace(source, target):
        real(source, target)
        if str(target).endswith(".actor.old"):
            renamed.set()
            assert go_on.wait(20)

    monkeypatch.setattr(runs.os, "replace", replace)
    with ThreadPoolExecutor() as pool:
        writer = pool.submit(make, course, "actor", "new")
        assert renamed.wait(20)
        reader = pool.submit(ways_to_read(course)[way])
        time.sleep(0.3)
        assert not reader.done() and (course / "model" / ".actor.old").exists()
        go_on.set()
        writer.result(20), reader.result(20)
    assert (course / "model" / "actor" / "model.safetensors").read_text() == "actor new"


def test_a_reader_between_the_renames_of_the_base_takes_its_preset(course, monkeypatch):
    with Stage(course, "base", {"preset": "smoke"}) as stage:
        (stage.folder / "model.safetensors").write_text("base")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, 2)
        make(course, "base", "new")
    assert util.Config.of(root=str(course)).preset == "smoke"


def test_an_artifact_that_is_replaced_while_it_is_read_is_read_anew(course, monkeypatch):
    digest, calls = runs.digest, []

    def slow(*paths):
        calls.append(paths)
        if len(calls) == 1:  # the record has been read, its weights have not
            make(course, "actor", "new")
        return digest(*paths)

    monkeypatch.setattr(runs, "digest", slow)
    runs.fingerprint.cache_clear()
    assert artifact(course, "actor") and len(calls) > 2


def test_whoever_is_missing_is_missed_at_once_although_a_run_has_begun(tmp_path):
    with Stage(tmp_path, "base", {}):
        start = time.perf_counter()
        with pytest.raises(CourseError, match="model/base is not there yet"):
            artifact(tmp_path, "base")
        assert time.perf_counter() - start < 5


def forked(work):
    """Starts `work` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_in_a_loop(root, seconds):
    """Artifacts whose files differ in names and contents; each tenth writer dies in the gap."""

    def publish(number, dies=False):
        replace = os.replace

        def last(source, target):
            if dies and str(target).endswith("actor"):
                os._exit(7)
            replace(source, target)

        os.replace = last
        with Stage(root, "actor", {}, ["base"]) as stage:
            for part in range(4):
                text = f"{number} {part} " * (1 + number % 3)
                (stage.folder / f"{number % 3}-{part}.safetensors").write_text(text)

    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        if number % 10:
            publish(number)
        else:
            assert status(forked(partial(publish, number, dies=True))) == 7


def read_in_a_loop(root, seconds):
    end, seen = time.monotonic() + seconds, set()
    while time.monotonic() < end:
        for way in ways_to_read(root):
            way()
        seen.add(read_record(root, "actor")["id"])
    return len(seen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers die in processes of their own")
def test_readers_beside_a_writer_never_fail(course):
    children = [forked(lambda: write_in_a_loop(course, 2))]
    children.append(forked(lambda: read_in_a_loop(course, 2)))
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda _: read_in_a_loop(course, 2), range(2)))
    assert [status(child) for child in children] == [0, 0]
    assert min(seen) > 1, "the readers met several artifacts"
    assert artifact(course, "actor")
