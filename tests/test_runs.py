"""Artifacts are published whole or not at all, and every error names the notebook to run."""

import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import util
from lab import checkpoints, runs
from lab.runs import NOTEBOOKS, CourseError, Stage, artifact, finished, read_record

CHAIN = {"base": (), "actor": ("base",), "critic": ("actor",), "rlhf": ("actor", "critic")}


def make(root, name, weights="w", data=()):
    """Makes a finished stage with this text as its weights."""
    with Stage(root, name, {"seed": 0}, CHAIN[name], data) as stage:
        (stage.folder / "model.safetensors").write_text(f"{name} {weights}")
        (stage.folder / "config.json").write_text("{}")
        for step in range(3):
            stage.log({"step": step, "loss": 1 / (step + 1)})
        stage.summary = {"loss": 0.25}
    return artifact(root, name)


@pytest.fixture
def course(tmp_path):
    """A folder with four finished stages."""
    for name in CHAIN:
        make(tmp_path, name)
    return tmp_path


def everything(root):
    """{path: content} of each visible file below model/."""
    files = [path for path in (root / "model").rglob("*") if path.is_file()]
    shown = [
        path for path in files if not path.relative_to(root / "model").parts[0].startswith(".")
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in shown}


def test_a_stage_is_published_with_all_that_the_design_promises(tmp_path):
    (tmp_path / "train.json").write_text("rows")
    folder = make(tmp_path, "base", data={"train.json": runs.digest(tmp_path / "train.json")})
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
    """Interrupts the process at the `number`-th rename."""
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


def test_stopped_after_the_renames_the_next_run_starts_from_the_beginning(
    tmp_path, monkeypatch, capsys
):
    def removes(path, **more):
        if str(path).endswith(".checkpoints"):
            raise KeyboardInterrupt
        shutil.rmtree(path, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        run = train(tmp_path)
        next(run)
        patch.setattr(runs, "shutil", SimpleNamespace(rmtree=removes))
        list(run)
    assert artifact(tmp_path, "base") and kept(tmp_path)
    assert [row["step"] for row in train(tmp_path)] == list(range(6))
    assert "damaged" not in capsys.readouterr().out and not kept(tmp_path)


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
    """Every way to read a finished stage; each returns what it read or raises."""
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
        if len(calls) == 1:  # the record has been read, but not yet the weights
            make(course, "actor", "new")
        return digest(*paths)

    monkeypatch.setattr(runs, "digest", slow)
    runs.fingerprint.cache_clear()
    assert artifact(course, "actor") and len(calls) > 2


def test_whoever_is_missing_is_missed_at_once_although_a_run_has_begun(tmp_path):
    with Stage(tmp_path, "base", {}):
        start = time.perf_counter()
        with pytest.raises(CourseError, match="model/base does not exist yet"):
            artifact(tmp_path, "base")
        assert time.perf_counter() - start < 5


def forked(work):
    """Runs `work` in a forked process."""
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
    """Publishes artifacts with different files; every tenth writer dies before its last rename."""

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


# --------------------------------------------------------------------------------- checkpoints


class Trained:
    """A minimal optimiser for `Stage.steps`: two models, AdamW and a dict of state."""

    def __init__(self, layer=torch.nn.Linear, fused=True):
        torch.manual_seed(0)
        self.models = [layer(3, 2), layer(2, 1)]
        parameters = [p for model in self.models for p in model.parameters()]
        self.adamw = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        self.state = {"price": 1.0}

    def step(self):
        self.models[1](self.models[0](torch.rand(4, 3))).square().sum().backward()
        self.adamw.step()
        self.adamw.zero_grad()
        self.state["price"] *= 1.1

    def weights(self):
        return [p.detach().clone() for model in self.models for p in model.parameters()]


def train(root, total=6, minutes=0, optimiser=None, each=lambda step: None):
    """A training loop whose steps draw from every random generator; yields the numbers."""
    optimiser = optimiser or Trained()
    with Stage(root, "base", {}, minutes=minutes) as stage:
        for step in stage.steps(total, optimiser):
            optimiser.step()
            luck = {"a": random.random(), "b": np.random.rand(), "c": torch.rand(1).item()}
            each(step)
            yield stage.log({"step": step} | luck)
        (stage.folder / "model.safetensors").write_text("done")


def stop_after(run, steps):
    for _ in range(steps):
        next(run)
    run.close()


def kept(root):
    return sorted(path.name for path in (root / "model" / ".base.checkpoints").glob("*"))


def drawn(rows):
    return [[row[name] for name in "abc"] for row in rows]


def test_weights_moments_numbers_and_luck_go_on_where_they_were(tmp_path):
    def seeded(root, optimiser):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        return train(tmp_path / root, optimiser=optimiser)

    whole, first, second = Trained(), Trained(), Trained()
    rows = list(seeded("one", whole))
    stop_after(seeded("two", first), 4)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    rest = list(train(tmp_path / "two", optimiser=second))
    assert drawn(rest) == drawn(rows)[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights()))
    moments = [optimiser.adamw.state_dict()["state"] for optimiser in (whole, second)]
    for i, own in moments[0].items():
        assert own.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(x, moments[1][i][name]) for name, x in own.items())
    assert whole.state == second.state


def test_only_what_learns_is_kept_and_tied_weights_once(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 2, bias=False) for name in ("frozen", "read", "write")}
    )
    model["norm"] = torch.nn.BatchNorm1d(2)
    model["frozen"].requires_grad_(False)
    model["write"].weight = model["read"].weight
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = SimpleNamespace(models=[model], adamw=torch.optim.AdamW(learning), state={})
    model["norm"](model["read"](torch.rand(4, 2)))
    parts = checkpoints.parts_of(optimiser)  # before the first step there are no moments
    checkpoints.write(tmp_path / "c", parts)
    saved = load_file(tmp_path / "c" / "model-0.safetensors")
    norms = {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    assert saved.keys() == {"read.weight", "norm.num_batches_tracked"} | norms
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for x in (*learning, *model.buffers()):
            x.add_(1)
    checkpoints.read(tmp_path / "c", optimiser)
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    assert model["write"].weight is model["read"].weight


@pytest.fixture
def clock(monkeypatch):
    """A fake clock that moves only when a test changes it."""
    now = SimpleNamespace(time=0.0)
    fake = SimpleNamespace(
        perf_counter=lambda: now.time, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr(runs, "time", fake)
    return now


def saves(root, clock, monkeypatch, total, minutes, step_seconds, save_seconds=lambda: 0):
    """The steps after which a training of that speed writes checkpoints."""
    steps, save = [], Stage.save

    def slow(stage, optimiser, step):
        clock.time += save_seconds()
        steps.append(step)
        save(stage, optimiser, step)

    def each(step):
        clock.time += step_seconds

    monkeypatch.setattr(Stage, "save", slow)
    list(train(root, total, minutes, each=each))
    return steps


def test_checkpoints_come_by_time(tmp_path, clock, monkeypatch):
    assert saves(tmp_path, clock, monkeypatch, 14, 2, 30) == [4, 8, 12]


def test_zero_minutes_are_a_checkpoint_after_every_step(tmp_path, clock, monkeypatch):
    assert saves(tmp_path, clock, monkeypatch, 5, 0, 30, lambda: 1_000) == [1, 2, 3, 4]


def test_saving_takes_a_twentieth_of_the_time(tmp_path, clock, monkeypatch):
    steps = saves(tmp_path, clock, monkeypatch, 400, 2, 10, lambda: 60)
    assert len(steps) > 2 and len(steps) * 60 <= 0.05 * clock.time + 60


def test_one_slow_save_does_not_stretch_all_that_follow(tmp_path, clock, monkeypatch):
    cost = iter([60] + [0] * 99)
    steps = saves(tmp_path, clock, monkeypatch, 200, 2, 10, lambda: next(cost))
    assert steps[:4] == [12, 126, 138, 150]


def test_ppo_has_checkpoints_with_the_preset_colab(tmp_path, clock, monkeypatch):
    cfg = util.Config("colab")
    steps = saves(tmp_path, clock, monkeypatch, cfg.steps, cfg.checkpoint_minutes, 60, lambda: 5)
    assert 10 < len(steps) < 60


def test_there_is_always_a_whole_checkpoint_and_never_more_than_two(tmp_path, monkeypatch):
    write, seen = checkpoints.write, []

    def watched(folder, optimiser):
        write(folder, optimiser)
        seen.append(kept(tmp_path))

    monkeypatch.setattr(checkpoints, "write", watched)
    run = train(tmp_path, 6)
    between = [next(run) and kept(tmp_path) for _ in range(5)]
    run.close()
    assert between[1:4] == [["step-00000001"]] + [
        [f"step-{step - 1:08d}", f"step-{step:08d}"] for step in (2, 3)
    ]
    assert seen[0] == ["building"]
    assert seen[1:] == [["building", f"step-{step:08d}"] for step in range(1, len(seen))]


def test_a_damaged_checkpoint_does_not_crowd_out_the_whole_one(tmp_path, monkeypatch):
    stop_after(train(tmp_path), 4)
    folder = tmp_path / "model" / ".base.checkpoints"
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]
    os.truncate(folder / "step-00000003" / "adamw.safetensors", 10)
    with monkeypatch.context() as patch, pytest.raises(OSError):  # the next save fails too
        patch.setattr(checkpoints, "write", lambda *_: (_ for _ in ()).throw(OSError))
        list(train(tmp_path))
    assert kept(tmp_path) == ["step-00000002"]
    assert [row["step"] for row in train(tmp_path)] == [2, 3, 4, 5]


@pytest.mark.parametrize("harm", ["noise", "other shape"])
def test_a_checkpoint_that_cannot_be_loaded_says_what_to_do(tmp_path, harm):
    stop_after(train(tmp_path), 4)
    path = tmp_path / "model" / ".base.checkpoints" / "step-00000003" / "model-0.safetensors"
    optimiser = Trained()
    if harm == "noise":
        path.write_bytes(b"\x93" * path.stat().st_size)
    else:
        optimiser.models[0] = torch.nn.Linear(3, 1)
    with pytest.raises(CourseError, match=r"checkpoints/step-00000003 cannot be loaded.*delete"):
        next(train(tmp_path, optimiser=optimiser))


def test_a_stop_in_the_last_step_loses_nothing(tmp_path):
    run = train(tmp_path, 2, each=lambda step: step == 1 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="base was already complete when you stopped it"):
        list(run)
    assert artifact(tmp_path, "base")


def test_a_stop_before_the_last_step_saves_at_once(tmp_path):
    run = train(
        tmp_path, 9, 60, each=lambda step: step == 4 and os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt, match="base stopped after step 5"):
        list(run)
    assert kept(tmp_path) == ["step-00000005"]
    assert [row["step"] for row in train(tmp_path, 9, 60)] == [5, 6, 7, 8]


# ------------------------------------------------------------------------------------- devices


class Stays(torch.nn.Linear):
    """A layer that fails if something moves it."""

    def _apply(self, *_, **__):
        raise AssertionError("a model was moved")


class Elsewhere(torch.nn.Parameter):
    """A weight that reports the device cuda:1 on a machine without a GPU."""

    device = torch.device("cuda", 1)


class StaysElsewhere(Stays):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight, self.bias = Elsewhere(self.weight.data), Elsewhere(self.bias.data)


def test_models_stay_where_they_are_on_one_device_after_another(tmp_path, monkeypatch):
    asked, states, real = [], {}, torch.Tensor.to

    def to(x, *args, device=None, **more):
        asked.append(device)
        return real(x, *args, **more)

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: states.update({at: state}))
    stop_after(train(tmp_path / "cpu", optimiser=Trained(Stays)), 3)
    stop_after(train(tmp_path / "gpu", optimiser=Trained(StaysElsewhere, fused=False)), 3)
    assert not states
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        stop_after(train(tmp_path / "gpu", optimiser=Trained(StaysElsewhere, fused=False)), 1)
    assert states == {Elsewhere.device: torch.tensor([1])}, "of the GPU that has the models"
    assert asked == [Elsewhere.device] * 8, "two moments of four weights"
    stop_after(train(tmp_path / "cpu", optimiser=Trained(Stays)), 1)
    assert len(states) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("number", range(torch.cuda.device_count()))
def test_a_run_that_was_stopped_on_a_gpu_goes_on_there(tmp_path, number):
    device, found = torch.device("cuda", number), []

    def run(folder, seed):
        torch.cuda.manual_seed_all(seed)
        optimiser = Trained(partial(torch.nn.Linear, device=device))

        def step():
            x = torch.rand(4, 3, device=device)
            optimiser.models[1](optimiser.models[0](x)).square().sum().backward()
            optimiser.adamw.step()
            optimiser.adamw.zero_grad()
            found.append((x, *optimiser.weights()))

        optimiser.step = step
        return train(tmp_path / folder, optimiser=optimiser)

    list(run("one", 0))
    whole, found[:] = found[:], []
    stop_after(run("two", 0), 4)
    found.clear()
    list(run("two", 1))
    assert len(found) == 3
    for now, then in zip(found, whole[3:]):
        assert all(x.device == device and torch.equal(x, y) for x, y in zip(now, then))
