"""Several processes train as one: same metrics, same samples, and none waits for a dead one."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import accelerate
import pytest

import util
from lab import CourseError, processes
from lab.runs import read_record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")
SMALL = dict(
    preset="smoke", pretrain_steps=6, pretrain_documents=400, sft_share=0.3, validation_rows=7,
    preference_share=0.5, prompt_share=0.1, actor_batch=15, critic_batch=15, norm_prompts=3,
    dpo_batch=15, steps=2, rollout=12, minibatch=7, answers=2, tracker="none",
)  # fmt: skip
ALGORITHMS = {
    "ppo": {},
    "grpo": {"algorithm": "grpo", "kl_in": "loss"},
    "rloo": {"algorithm": "rloo"},
    "dpo": {"algorithm": "dpo"},
    "lora": {"lora_rank": 2, "stop_kl": 1e-9},
    "own": {"reward": "model - 0.1*length", "reward_norm": True},
}


def config(folder, **changes):
    return util.Config(root=str(folder), **SMALL | changes)


def train(folder, stage, **changes):
    return list(getattr(util, f"train_{stage}")(config(folder, **changes)))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fork(count, work):
    """Runs work() in `count` processes that train together; returns their ids."""
    env = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = free_port()
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update({k: str(v) for k, v in env.items()} | {"RANK": str(rank)})
            os.environ["LOCAL_RANK"] = str(rank)
            os._exit(in_child(work))
    return children


def in_child(work):
    try:
        processes.start("cpu")
        work()
        processes.stop()
    except KeyboardInterrupt:
        return 130
    except CourseError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def together(count, work):
    """Runs work() in several processes; returns their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in fork(count, work)]


@pytest.fixture(scope="module")
def courses(tmp_path_factory, root):
    """Courses that 1, 2 and 3 processes trained with the same parameters."""
    accelerate.PartialState()  # as after a training with a tracker: it says that we are alone
    folders = {}
    for count in (1, 2, 3):
        folder = folders[count] = tmp_path_factory.mktemp(f"by-{count}")
        (folder / "dataset").mkdir()
        for name in ("train.json", "eval.json"):
            lines = (root / "dataset" / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "dataset" / name).write_text("".join(lines[:200]), encoding="utf-8")

        def every_stage(folder=folder, count=count):
            for stage, changes in (("base", {}), ("actor", {}), ("critic", {"ensemble": 2})):
                train(folder, stage, **changes)
            for name, changes in ALGORITHMS.items() if count < 3 else [("ppo", {})]:
                train(folder, "rlhf", **changes)
                if processes.first():
                    (folder / "model" / "rlhf").rename(folder / "model" / f"rlhf-{name}")
                processes.any_of(False)  # all wait for it

        if count == 1:
            every_stage()
        else:
            assert together(count, every_stage) == [0] * count
    return folders


def metrics(folder, stage):
    """The metrics of a stage, without times, memory and shares that a tie can tip over."""
    lines = (folder / "model" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    left_out = ("second", "memory", "accuracy")
    return [
        {k: v for k, v in json.loads(line).items() if not any(part in k for part in left_out)}
        for line in lines
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for line, other in zip(found, expected):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=2e-5), name


STAGES = ["base", "actor", "critic", *(f"rlhf-{name}" for name in ALGORITHMS)]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_metrics_of_one(courses, stage):
    assert_same(metrics(courses[2], stage), metrics(courses[1], stage))
    record = json.loads((courses[2] / "model" / stage / "stage.json").read_text(encoding="utf-8"))
    assert record["processes"] == 2
    assert read_record(courses[1], "actor")["processes"] == 1


@pytest.mark.parametrize("stage", ["base", "actor", "critic", "rlhf-ppo"])
def test_three_processes_share_batches_that_do_not_divide_by_three(courses, stage):
    assert_same(metrics(courses[3], stage), metrics(courses[1], stage))


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "dpo"])
def test_two_processes_sample_the_answers_of_one(courses, name):
    texts = []
    for count in (1, 2):
        path = courses[count] / "model" / f"rlhf-{name}" / "samples.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines)
        texts.append([(row["step"], row["prompt"], row["response"]) for row in rows])
    assert texts[0] == texts[1] and any(response for *_, response in texts[0])


def test_both_reward_models_get_the_same_scale(courses):
    for member in (".", "member-1"):
        scales = []
        for count in (1, 2, 3):
            path = courses[count] / "model" / "critic" / member / "config.json"
            shape = json.loads(path.read_text(encoding="utf-8"))
            scales.append((shape["reward_mean"], shape["reward_std"]))
        assert scales[1] == pytest.approx(scales[0], abs=1e-5)
        assert scales[2] == pytest.approx(scales[0], abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Stops and errors


@pytest.fixture
def place(courses, tmp_path):
    """A course with base, actor and critic."""
    (tmp_path / "model").mkdir()
    shutil.copytree(courses[1] / "dataset", tmp_path / "dataset")
    for stage in ("base", "actor", "critic"):
        shutil.copytree(courses[1] / "model" / stage, tmp_path / "model" / stage)
    return tmp_path


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(courses, place, before, after):
    def stopped():
        for line in util.train_actor(config(place, actor_epochs=2)):
            if line["step"] == 3 and processes.rank() == before - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one of them is enough

    train(place, "actor", actor_epochs=2)
    whole = metrics(place, "actor")  # never stopped
    assert together(before, stopped) == [130] * before
    assert list((place / "model" / ".actor.checkpoints").iterdir())
    assert together(after, lambda: train(place, "actor", actor_epochs=2)) == [0] * after
    assert_same(metrics(place, "actor"), whole)


def test_where_a_process_dies_the_others_stop_with_a_sentence_and_nothing_is_lost(place, capfd):
    def killed():
        for line in util.train_actor(config(place, checkpoint_minutes=0)):
            if line["step"] == 3 and processes.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    start = time.monotonic()
    assert together(2, killed) == [2, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    assert "Another process of this training has stopped" in said and "last checkpoint" in said
    train(place, "actor", checkpoint_minutes=0)
    notes = " ".join(read_record(place, "actor")["notes"])
    assert "resuming the interrupted run after step" in notes


def test_an_error_in_one_process_is_raised_in_all(place, capfd):
    def reward(prompts, responses):
        return [math.nan if processes.rank() else 1.0 for _ in prompts]

    assert together(2, lambda: list(util.train_rlhf(config(place), reward))) == [2, 2]
    assert capfd.readouterr().err.count("finite number") == 2


def test_more_processes_than_rows(place):
    def few():
        train(place, "actor", actor_batch=1, sft_share=0.06)

    train(place, "actor", actor_batch=1, sft_share=0.06)
    alone = metrics(place, "actor")
    assert together(2, few) == [0, 0]
    assert_same(metrics(place, "actor"), alone)


# ------------------------------------------------------------------------------------------------
# Starting


def test_a_notebook_starts_several_processes_with_its_own_pairs(place):
    cfg = config(place, critic_batch=8)
    rows = util.preference_rows(cfg)[:30]
    alone, found = (list(util.train_critic(c, rows)) for c in (cfg, cfg.changed(num_processes=2)))
    assert read_record(place, "critic")["processes"] == 2
    assert [line["loss"] for line in found] == pytest.approx(
        [line["loss"] for line in alone], abs=1e-4
    )


def test_the_command_of_the_readme_trains_the_whole_course(tmp_path):
    (tmp_path / "dataset").symlink_to(processes.HOME / "dataset")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "lab", "course", "--set", "preset=smoke", "--set", "device=cpu"]
    line += ["--set", f"root={tmp_path}"]
    done = subprocess.run(line, cwd=processes.HOME, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_record(tmp_path, "rlhf")["processes"] == 2
    assert re.search(r"3_rlhf +2/2 steps", done.stdout) and "held-out questions" in done.stdout
    assert "Loading weights" not in done.stderr


@pytest.mark.slow
def test_an_error_in_started_processes_reaches_the_notebook(place):
    shutil.rmtree(place / "model" / "critic")
    with pytest.raises(CourseError, match="model/critic does not exist yet: run 2_critic"):
        list(util.train_rlhf(config(place, num_processes=2)))


def test_functions_of_a_notebook_need_a_name_in_several_processes(place):
    with pytest.raises(CourseError, match="by name only"):
        list(util.train_rlhf(config(place, num_processes=2), reward=lambda p, r: [0.0] * len(p)))


def test_accelerate_that_started_one_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(CourseError, match="torchrun --nproc-per-node"):
        processes.start("cpu")
