"""A run that was stopped at any moment and resumed gives the same bits as one without a stop.

`KILLS=20 python -m pytest tests/test_resume.py -k kill` kills every stage twenty times.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback

import pytest

import util
from lab import checkpoints
from lab.runs import CourseError

STAGES = {"base": (), "actor": ("base",), "critic": ("actor",), "rlhf": ("actor", "critic")}
KILLS = int(os.environ.get("KILLS", 2))
PARAMETERS = dict(
    pretrain_steps=24, pretrain_documents=400, actor_epochs=2, steps=5, kl_target=0.5,
    kl_horizon=40, checkpoint_minutes=0, critic_batch=32,
)  # fmt: skip
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX signals")


def train(folder, stage, **changes):
    cfg = util.Config("smoke", root=str(folder), **{**PARAMETERS, **changes})
    return list(getattr(util, f"train_{stage}")(cfg))


def in_child(folder, stage, **changes):
    """Trains in a forked process that a test can kill; a fork needs no time for imports."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, stage, **changes)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def result(folder, stage):
    """All output of a stage, without times and memory."""
    model = folder / "model" / stage
    lines = (model / "metrics.jsonl").read_text().splitlines()
    metrics = [
        {k: v for k, v in json.loads(line).items() if "second" not in k and "memory" not in k}
        for line in lines
    ]
    samples = model / "samples.jsonl"
    text = samples.read_text() if samples.exists() else ""
    weights = sorted(model.rglob("*.safetensors"))
    return {str(p.relative_to(model)): p.read_bytes() for p in weights}, metrics, text


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    """A folder in which all stages ran without a stop, and the seconds that each took."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "dataset").symlink_to(root / "dataset")
    seconds = {}
    for stage in STAGES:
        start = time.perf_counter()
        train(folder, stage)
        seconds[stage] = time.perf_counter() - start
    return folder, seconds


@pytest.fixture
def begin(finished, tmp_path):
    """Makes a folder with only the inputs of a stage."""

    def make(stage, name="run"):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "dataset").symlink_to(finished[0] / "dataset")
        for source in ("base", *STAGES[stage]):
            if source != stage and not (folder / "model" / source).exists():
                shutil.copytree(finished[0] / "model" / source, folder / "model" / source)
        return folder

    return make


def wait_for_a_checkpoint(folder, stage, child):
    while not list((folder / "model" / f".{stage}.checkpoints").glob("step-*")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before its first checkpoint"
        time.sleep(0.002)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_and_rerun_it_gives_the_same_bits(stage, finished, begin):
    luck = random.Random(stage)
    expected = result(finished[0], stage)
    for kill in range(KILLS):
        folder = begin(stage, f"run{kill}")
        child = in_child(folder, stage)
        time.sleep(luck.uniform(0, 1.1 * finished[1][stage]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        train(folder, stage)
        assert result(folder, stage) == expected, f"kill {kill}"
        left = [path.name for path in (folder / "model").iterdir()]
        assert not [name for name in left if name.endswith((".partial", ".checkpoints", ".old"))]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_after_a_checkpoint_it_goes_on_from_there(stage, finished, begin, capsys):
    folder = begin(stage)
    child = in_child(folder, stage)
    wait_for_a_checkpoint(folder, stage, child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    history = train(folder, stage)
    assert f"{stage}: resuming the interrupted run after step" in capsys.readouterr().out
    assert [row["step"] for row in history] == list(range(1, len(history) + 1)), "curves are whole"
    assert result(folder, stage) == result(finished[0], stage)


def test_killed_in_the_middle_of_a_save_nothing_is_lost(finished, begin, monkeypatch):
    write, calls = checkpoints.write, []

    def dies(folder, optimiser):
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir(parents=True)
            (folder / "model-0.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, optimiser)

    folder = begin("rlhf")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", dies)
        child = in_child(folder, "rlhf")
        os.waitpid(child, 0)
    kept = [path.name for path in (folder / "model" / ".rlhf.checkpoints").iterdir()]
    assert sorted(kept) == ["building", "step-00000001"]
    train(folder, "rlhf")
    assert result(folder, "rlhf") == result(finished[0], "rlhf")


LAST_SAVES = {  # stage: (parameters, subfolders of its last save)
    "actor": (dict(lora_rank=4, actor_epochs=1), {"adapter"}),
    "critic": (dict(lora_rank=4, ensemble=2), {"adapter", "member-1", "watchdog"}),
}


@pytest.fixture(scope="module")
def unstopped(finished, tmp_path_factory):
    """For each of `LAST_SAVES`: the result without a kill, and how often `act` is called."""
    found = {}
    for stage, (changes, _) in LAST_SAVES.items():
        folder, calls = tmp_path_factory.mktemp(stage), []
        shutil.copytree(finished[0], folder, dirs_exist_ok=True, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            at_each_write(patch, calls.append)
            train(folder, stage, **changes)
        found[stage] = result(folder, stage), len(calls)
    return found


def at_each_write(patch, act):
    """Calls `act` with the folder in the middle and at the end of each write of the result."""
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    for kind in (PeftModel, PreTrainedModel, PreTrainedTokenizerBase):
        write = kind.save_pretrained

        def writes(self, folder, *args, write=write, **more):
            if ".partial" not in str(folder):  # not a part of the result
                return write(self, folder, *args, **more)
            os.makedirs(folder, exist_ok=True)
            open(os.path.join(folder, "half"), "w").close()
            act(folder)
            os.unlink(os.path.join(folder, "half"))
            write(self, folder, *args, **more)
            act(folder)

        patch.setattr(kind, "save_pretrained", writes)


@pytest.mark.parametrize(
    "stage, share", [("actor", 0.0), ("actor", 1.0), ("critic", 0.5), ("critic", 1.0)]
)
def test_killed_in_the_last_save_it_goes_on(stage, share, unstopped, begin, monkeypatch, capsys):
    expected, count = unstopped[stage]
    (changes, folders), folder, calls = LAST_SAVES[stage], begin(stage), []

    def dies(_):
        calls.append(1)
        if len(calls) == max(1, round(share * count)):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        at_each_write(patch, dies)
        _, status = os.waitpid(in_child(folder, stage, **changes), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    left = {
        path.name for path in (folder / "model" / f".{stage}.partial").iterdir() if path.is_dir()
    }
    assert left == folders if share == 1 else left <= folders
    train(folder, stage, **changes)
    assert f"{stage}: resuming the interrupted run after step" in capsys.readouterr().out
    assert result(folder, stage) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_signal_saves_and_stops(number, finished, begin):
    folder = begin("rlhf")
    child = in_child(folder, "rlhf")
    wait_for_a_checkpoint(folder, "rlhf", child)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert not (folder / "model" / "rlhf").exists()
    train(folder, "rlhf")
    assert result(folder, "rlhf") == result(finished[0], "rlhf")


def stopped(begin, stage="rlhf"):
    folder = begin(stage)
    child = in_child(folder, stage)
    wait_for_a_checkpoint(folder, stage, child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return folder


def test_changed_parameters_never_go_on_silently(begin):
    folder = stopped(begin)
    with pytest.raises(CourseError, match=r"gamma has changed from 1.0 to 0.5.*resume = False"):
        train(folder, "rlhf", gamma=0.5)
    assert len(train(folder, "rlhf", gamma=0.5, resume=False)) == 5


def test_changed_data_never_go_on_silently(begin):
    folder = stopped(begin)
    text = (folder / "dataset" / "train.json").read_text()
    (folder / "dataset").unlink()
    (folder / "dataset").mkdir()
    (folder / "dataset" / "train.json").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(CourseError, match=r"file train.json has changed"):
        train(folder, "rlhf")


def test_two_runs_at_once_on_one_folder_are_refused(finished, begin):
    folder = begin("rlhf")
    cfg = util.Config("smoke", root=str(folder), **PARAMETERS)
    first = util.train_rlhf(cfg)
    next(first)
    with pytest.raises(CourseError, match="Another run is writing model/rlhf"):
        next(util.train_rlhf(cfg))
    list(first)
    assert result(folder, "rlhf") == result(finished[0], "rlhf")
