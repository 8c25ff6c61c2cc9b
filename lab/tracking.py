"""Where metrics go: the trackers of accelerate, and the metrics of a rollout and of its updates.

A tracker is started by `lab.runs.Stage`, beside metrics.jsonl. Nothing connects to a network unless
the environment asks for it: WANDB_MODE, WANDB_API_KEY, SWANLAB_MODE, SWANLAB_API_KEY,
TRACKIO_SPACE_ID and TRACKIO_SERVER_URL have the meaning that their packages give them.
"""

import html
import importlib.util
import io
import os
import sys
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from statistics import mean
from types import ModuleType

from lab import CourseError, measures
from lab.errors import explained
from lab.hub import reason_of
from lab.settings import nearest

TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab", "none")
PROJECT = "simple-rlhf-tiny"  # the name of the project in wandb, trackio and swanlab


def tracker_names(text):
    """Returns the trackers in a text like "tensorboard, wandb"; raises if one is not known."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise CourseError(f"tracker = {name!r} is not known{nearest(name, TRACKERS)}")
    return [name for name in dict.fromkeys(names) if name != "none"]


class Trackers:
    """The trackers of one stage. A tracker that fails is left out, and the training goes on."""

    def __init__(self, text, say):
        self.names, self.say, self.running = tracker_names(text), say, []
        for name in self.names:
            if importlib.util.find_spec(name) is None:
                raise CourseError(
                    f"tracker = {text!r} needs the package {name}: pip install {name}, or choose "
                    'another tracker ("none" for no tracker).'
                )

    def start(self, stage, folder, config, after):
        """Starts all trackers with the parameters of a stage that goes on after step `after`."""
        config = {name: value for name, value in config.items() if name != "root"}
        title = f"{stage}, resumed after step {after}" if after else stage
        for name in self.names:
            try:
                self.running.append(started(name, title, folder, config, after))
            except Exception as error:  # each package has its own types
                self.close()
                if explained(error):
                    raise
                raise CourseError(
                    f"The tracker {name} did not start ({reason_of(error)}). Solve this, or choose "
                    f'another tracker ("none" for no tracker).'
                ) from error

    def log(self, metrics, step):
        """Logs the numbers of one step; a number that was not finite is left out."""
        left_out = ("step", "steps")
        values = {k: v for k, v in metrics.items() if v is not None and k not in left_out}
        self.each(lambda tracker: log_numbers(tracker, values, step))

    def text(self, name, text, step):
        """Logs a text, which keeps its lines."""
        self.each(lambda tracker: tracker.log({name: as_medium(tracker.name, text)}, step=step))

    def close(self):
        """Finishes all trackers."""
        self.each(lambda tracker: tracker.finish())
        self.running = []

    def each(self, task):
        for tracker in list(self.running):
            try:
                quietly(task, tracker)
            except Exception as error:
                self.running.remove(tracker)
                self.say(
                    f"the tracker {tracker.name} stopped ({reason_of(error)}). The training goes "
                    "on, and metrics.jsonl receives all metrics."
                )


def started(name, title, folder, config, after):
    """Returns a tracker of accelerate that has started and knows the parameters."""
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's trackers ask it whether this is the main process
    place = str(folder.parent)
    if name == "tensorboard":
        # TensorBoard writes files without TensorFlow if this module exists. TensorFlow would take
        # seconds to import, and prints notices.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard.summary import hparams

        how = {"purge_step": after + 1} if after else {}
        tracker = tracking.TensorBoardTracker("", folder, max_queue=1000, **how)
        tracker.start()
        for summary in hparams(config, {}):  # add_hparams would write them to a folder of its own
            tracker.writer.file_writer.add_summary(summary)
        return tracker
    how = {"name": title, "config": config}
    if name == "wandb":
        how |= {"dir": place, "settings": {"silent": True, "console": "off"}}
        if not asked("WANDB_MODE", "WANDB_API_KEY"):
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            how["mode"] = "offline"
        tracker = tracking.WandBTracker(PROJECT, **how)
    elif name == "trackio":
        hardware = {"auto_log_cpu": False, "auto_log_gpu": False}
        tracker = tracking.TrackioTracker(PROJECT, embed=False, **hardware, **how)
    else:
        how["logdir"] = os.path.join(place, "swanlog")
        if not asked("SWANLAB_MODE", "SWANLAB_API_KEY"):
            how["mode"] = "offline"
        tracker = tracking.SwanLabTracker(PROJECT, **how)
    quietly(lambda tracker: tracker.start(), tracker)
    return tracker


def log_numbers(tracker, values, step):
    """Logs numbers: to TensorBoard as one event, which is ten times as fast as one for each."""
    if tracker.name != "tensorboard":
        return tracker.log(values, step=step)
    from tensorboard.compat.proto.summary_pb2 import Summary

    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    tracker.writer.file_writer.add_summary(Summary(value=points), step)
    tracker.writer.flush()


def asked(*names):
    """Returns whether the environment sets one of these variables."""
    return any(os.environ.get(name) for name in names)


def quietly(task, tracker):
    """Runs task(tracker) without what the tracker prints, for example its banner."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        task(tracker)


def as_medium(name, text):
    """Returns a text in the form that a tracker shows with its lines."""
    if name == "wandb":
        import wandb

        return wandb.Html(f"<pre>{html.escape(text)}</pre>")
    if name == "swanlab":
        import swanlab

        return swanlab.Text(text)
    block = textwrap.indent(text, "    ")  # for markdown a block of code
    if name == "trackio":
        import trackio

        return trackio.Markdown(block)
    return block


def as_text(rows):
    """Returns sample answers as a text: the numbers of each, then its prompt and its answer."""
    parts = []
    for row in rows:
        numbers = [f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, int | float)]
        texts = [value for value in row.values() if isinstance(value, str)]
        parts.append("\n".join([", ".join(numbers), *texts]))
    return "\n\n".join(parts)


def is_event_file(path):
    """Returns whether TensorBoard wrote a file."""
    return ".tfevents." in path.name


def rename_event_files(folder, name):
    """Gives the event files of a finished stage, one per interrupted run, names that do not depend
    on the time, the process and the machine."""
    for i, path in enumerate(sorted(path for path in folder.iterdir() if is_event_file(path))):
        path.rename(folder / f"events.out.tfevents.{i:04d}.{name}")


# --------------------------------------------------------------------------------------------------
# Metrics


def timed(metrics, start, **done):
    """Adds the seconds since `start` to the metrics, and e.g. tokens_per_second for tokens=n."""
    seconds = time.perf_counter() - start
    speed = {f"{what}_per_second": count / seconds for what, count in done.items()}
    return metrics | {"seconds": seconds} | speed


def mean_of(updates):
    """Averages the stats of all updates. Ratio errors are those of the first update, where the
    ratio should be 1."""
    means = {name: sum(d[name] for d in updates) / len(updates) for name in updates[0]}
    means |= {"skipped": updates[-1]["skipped"], "updates": len(updates)}
    return means | {name: x for name, x in updates[0].items() if name.startswith("ratio_error")}


def rollout_metrics(rollout, cfg):
    """Returns the metrics of a rollout: reward, KL, lengths, endings, repetition and speed."""
    from lab.rewards import repetition  # it needs torch, and a tracker does not

    metrics = {
        "reward": rollout.scores.mean().item(),
        "kl": rollout.kl.mean().item(),
        "length": rollout.mask.sum(1).float().mean().item(),
        "eos": rollout.ended.float().mean().item(),
        "empty": sum(not text for text in rollout.responses) / len(rollout.responses),
    }
    metrics |= {
        "repetition": mean(repetition(rollout.prompts, rollout.responses)),
        "sameness": measures.said_before(rollout.prompts, rollout.responses),
    }
    if rollout.unsafe is not None:
        metrics["unsafe"] = rollout.unsafe.float().mean().item()
    metrics |= {f"seconds_{name}": spent for name, spent in rollout.seconds.items()}
    metrics["tokens_per_second"] = rollout.mask.sum().item() / rollout.seconds["generate"]
    metrics |= {f"reward_{name}": mean for name, mean in rollout.parts.items()}
    if cfg.answers > 1:  # a group whose scores are all equal has no gradient
        groups = rollout.scores.view(-1, cfg.answers)
        metrics["zero_deviation"] = (groups.std(1) < 1e-6).float().mean().item()
    return metrics
