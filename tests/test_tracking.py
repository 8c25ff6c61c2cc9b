"""Trackers: what TensorBoard, wandb, trackio and swanlab receive, also after an interrupt."""

import json
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from accelerate import tracking as trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import util
from lab.runs import CourseError, Stage, artifact

SMALL = dict(pretrain_documents=200, pretrain_steps=6, checkpoint_minutes=0, max_new_tokens=8)


def config(root, **changes):
    return util.Config("smoke", root=str(root), **(SMALL | changes))


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def scalars(folder):
    """All numbers in the event files of a folder: {(step, name): value}; none occurs twice."""
    found = events(folder)
    points = [(e.step, tag, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag)]
    assert len({point[:2] for point in points}) == len(points)
    return {(step, tag): value for step, tag, value in points}


def logged(folder):
    """The same from metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [(row, name) for row in rows for name in row if name not in ("step", "steps")]
    found = {(row["step"], name): row[name] for row, name in names if row[name] is not None}
    return pytest.approx(found, rel=1e-6)


def texts(folder, name):
    """The texts of one name: {step: text}."""
    found = events(folder).Tensors(f"{name}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def parameters(folder):
    told = events(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(told).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def event_files(folder):
    return sorted(path.name for path in folder.glob("*tfevents*"))


@pytest.fixture(scope="module")
def course(tmp_path_factory, root):
    """A course whose base model was trained without an interrupt, with the default tracker."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "dataset").symlink_to(root / "dataset")
    list(util.train_base(config(folder)))
    return folder


# ------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_every_number_of_every_step(course):
    base = course / "model" / "base"
    assert scalars(base) == logged(base)
    assert {step for step, name in scalars(base) if name == "loss"} == {1, 2, 3, 4, 5, 6}


def test_tensorboard_shows_the_parameters(course):
    found = parameters(course / "model" / "base")
    assert found["pretrain_steps"] == 6 and found["preset"] == "smoke" and found["whiten"]
    assert "root" not in found, "a path of this machine is nobody's business"


def test_an_interrupted_and_resumed_run_has_every_step_once(course, tmp_path):
    (tmp_path / "dataset").symlink_to(course / "dataset")
    for _ in range(2):
        interrupted = util.train_base(config(tmp_path))
        for _ in range(3):
            next(interrupted)
        interrupted.close()
    partial = tmp_path / "model" / ".base.partial"
    assert len(event_files(partial)) == 2
    list(util.train_base(config(tmp_path)))
    base = tmp_path / "model" / "base"
    assert scalars(base) == logged(base)
    assert {step for step, name in scalars(base) if name == "loss"} == {1, 2, 3, 4, 5, 6}


def test_a_rerun_replaces_the_old_curves(course, tmp_path):
    (tmp_path / "dataset").symlink_to(course / "dataset")
    for steps in (4, 2):
        list(util.train_base(config(tmp_path, pretrain_steps=steps)))
    base = tmp_path / "model" / "base"
    assert {step for step, name in scalars(base)} == {1, 2} and len(event_files(base)) == 1


def test_names_of_event_files_depend_on_the_run_only(course, tmp_path):
    (tmp_path / "dataset").symlink_to(course / "dataset")
    list(util.train_base(config(tmp_path)))
    first, again = (event_files(folder / "model" / "base") for folder in (course, tmp_path))
    assert first == again and socket.gethostname() not in first[0]


def test_event_files_are_no_part_of_the_artifact(course, tmp_path):
    (tmp_path / "dataset").symlink_to(course / "dataset")
    list(util.train_base(config(tmp_path)))
    record = json.loads((tmp_path / "model" / "base" / "stage.json").read_text())
    assert not [name for name in record["files"] if "tfevents" in name]
    for name in event_files(tmp_path / "model" / "base"):
        (tmp_path / "model" / "base" / name).unlink()
    assert artifact(tmp_path, "base")


def one_step(root, name, tracker="tensorboard", config=None, **metrics):
    """A stage with one step, sample answers and an alert."""
    with Stage(root, name, config or {"seed": 7, "root": "secret"}, tracker=tracker) as stage:
        stage.samples([SAMPLE | {"step": 0}])
        stage.log({"step": 1, "steps": 1, "loss": 0.5, "kl": float("nan")} | metrics)
        stage.alert({"step": 1, "name": "kl", "number": 11.0, "sentence": "The KL is high."})
        (stage.folder / "model.safetensors").write_bytes(b"weights")
    return root / "model" / name


SAMPLE = {
    "temperature": 0.0, "prompt": "Human: <b>Hi</b>\nAssistant:", "response": "Hello | you\n\n*!*",
    "reward": 1.5, "kl": None,
}  # fmt: skip


def test_tensorboard_shows_samples_and_alerts_as_they_are(tmp_path):
    folder = one_step(tmp_path, "rlhf")
    text = texts(folder, "samples")[0]
    lines = [line.strip() for line in text.splitlines() if line]
    asked, answered = SAMPLE["prompt"].split("\n"), SAMPLE["response"].split("\n\n")
    assert lines == ["temperature 0, reward 1.5, step 0", *asked, *answered]
    assert all(line.startswith("    ") for line in text.splitlines() if line), "shown unformatted"
    assert texts(folder, "alerts")[1].strip() == "The KL is high."
    assert ("loss" in {name for _, name in scalars(folder)}) and "kl" not in str(scalars(folder))


def test_one_folder_shows_all_stages(tmp_path):
    for name in ("base", "actor", "rlhf"):
        one_step(tmp_path, name)
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "model")).Runs()
    assert set(found) == {"base", "actor", "rlhf"}


def test_without_a_tracker_there_are_no_events(tmp_path):
    assert not event_files(one_step(tmp_path, "base", "none"))


ALONE = """
import sys
from pathlib import Path
from lab.runs import Stage

with Stage(sys.argv[1], "base", {}, tracker="tensorboard") as stage:
    stage.log({"step": 1, "loss": 1.0})
"""


def test_tensorflow_is_not_imported_and_nothing_is_printed(tmp_path, root):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    env = {"PYTHONPATH": f"{root}:{tmp_path}", "OMP_NUM_THREADS": "1", "PATH": ""}
    call = [sys.executable, "-W", "always", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert event_files(tmp_path / "model" / "base")


# ---------------------------------------------------------------------------------- other trackers
OTHERS = {  # tracker: (class of accelerate, class of its texts, variables that ask for a network)
    "wandb": (trackers.WandBTracker, "Html", ("WANDB_MODE", "WANDB_API_KEY")),
    "trackio": (trackers.TrackioTracker, "Markdown", ()),
    "swanlab": (trackers.SwanLabTracker, "Text", ("SWANLAB_MODE", "SWANLAB_API_KEY")),
}


class Run:
    """A run of a package that stands in for wandb, trackio or swanlab."""

    def __init__(self, **given):
        self.given, self.lines, self.finished = given, [], False
        print("A banner.")

    def log(self, values, step):
        if self.given.get("name") == "critic":
            raise ConnectionError("the server is gone")
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture(params=OTHERS)
def package(request, monkeypatch):
    """A module that stands in for a tracker's package; `runs` are the runs that it started."""
    kind, text, variables = OTHERS[request.param]
    module = ModuleType(request.param)
    module.__spec__, module.runs, module.config = ModuleSpec(request.param, None), [], {}
    module.kind, module.variables = kind, variables
    setattr(module, text, lambda told: f"{text}: {told}")

    def init(**given):
        module.runs.append(Run(**given))
        return module.runs[-1]

    module.init = init
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_other_trackers_receive_the_same(package, tmp_path, capsys):
    one_step(tmp_path, "rlhf", package.__name__)
    (run,) = package.runs
    assert run.given["project"] == "simple-rlhf-tiny" and run.given["name"] == "rlhf"
    assert run.given["config"] == {"seed": 7}
    (zero, samples), (one, metrics), (_, alerts) = run.lines
    assert (zero, one, metrics["loss"]) == (0, 1, 0.5) and run.finished
    assert not {"kl", "step", "steps"} & set(metrics)
    kind = OTHERS[package.__name__][1]
    assert samples["samples"].startswith(f"{kind}: ") and "The KL is high." in alerts["alerts"]
    assert capsys.readouterr().out == "rlhf: The KL is high.\n", "no banner"


def test_no_network_unless_the_environment_asks(package, tmp_path, monkeypatch):
    one_step(tmp_path, "base", package.__name__)
    for name in package.variables:
        with monkeypatch.context() as patch:
            patch.setenv(name, "online")
            one_step(tmp_path, "base", package.__name__)
    offline, *asked = [run.given.get("mode") for run in package.runs]
    assert asked == [None] * len(package.variables), "the package itself reads its variables"
    assert offline == ("offline" if package.variables else None), "trackio is local by default"


def test_the_trackers_are_those_of_accelerate(package, tmp_path, monkeypatch):
    started, start = [], package.kind.start
    monkeypatch.setattr(package.kind, "start", lambda self: (started.append(self), start(self)))
    one_step(tmp_path, "base", package.__name__)
    assert [type(tracker) for tracker in started] == [package.kind]


def test_several_trackers_at_once(package, tmp_path):
    folder = one_step(tmp_path, "base", f"tensorboard, {package.__name__}")
    assert event_files(folder) and package.runs[0].lines


def test_a_tracker_that_fails_does_not_stop_the_training(package, tmp_path, capsys):
    folder = one_step(tmp_path, "critic", f"{package.__name__}, tensorboard")
    said = f"critic: the tracker {package.__name__} stopped (the server is gone). The training goes"
    assert capsys.readouterr().out.count(said) == 1
    assert scalars(folder) == logged(folder)


def test_a_tracker_that_does_not_start_is_a_sentence(package, tmp_path, monkeypatch):
    def refuse(**given):
        raise RuntimeError("this key is not valid\nTraceback and so on")

    monkeypatch.setattr(package, "init", refuse)
    with pytest.raises(CourseError, match=r"did not start \(this key is not valid\)\. Solve this"):
        one_step(tmp_path, "base", package.__name__)
    monkeypatch.undo()
    assert one_step(tmp_path, "base"), "its lock is free again"


def test_a_resumed_run_has_a_name_of_its_own(course, tmp_path, package):
    (tmp_path / "dataset").symlink_to(course / "dataset")
    interrupted = util.train_base(config(tmp_path, tracker=package.__name__))
    for _ in range(3):
        next(interrupted)
    interrupted.close()
    list(util.train_base(config(tmp_path, tracker=package.__name__)))
    names = [run.given["name"] for run in package.runs]
    assert names == ["base", "base, resumed after step 2"]
    assert [[step for step, _ in run.lines] for run in package.runs] == [[1, 2, 3], [3, 4, 5, 6]]


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab", "tensorboard"])
def test_a_missing_package_is_an_error_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    with pytest.raises(CourseError, match=f"tracker = '{name}' needs the package {name}: pip "):
        one_step(tmp_path, "base", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, told",
    [
        ("wandbb", "did you mean 'wandb'"),
        ("", "choose from: tensorboard, wandb"),
        ("tensorboard; wandb", "is not known"),
    ],
)
def test_an_unknown_tracker_is_an_error(given, told):
    with pytest.raises(CourseError, match=told):
        util.Config("smoke", tracker=given)
