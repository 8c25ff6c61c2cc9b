"""Every parameter has an effect: each test changes one field and expects a different result.

A field without an effect cannot have a line in the table below, so no such field can exist.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lab.models
import util
from lab import CourseError, categories, world

SMALL = dict(
    device="cpu", pretrain_documents=200, pretrain_steps=3, steps=2, rollout=8, minibatch=4,
    ppo_epochs=2, checkpoint_minutes=0, sft_share=0.2, preference_share=0.3, prompt_share=0.1,
    validation_rows=8, actor_batch=16, critic_batch=24, max_new_tokens=12, test_rows=8,
    eval_batch=8, best_of_rows=3, dpo_batch=32, norm_prompts=4, norm_answers=2, ensemble=2,
)  # fmt: skip
STAGES = {"base": (), "actor": ("base",), "critic": ("base", "actor")}
STAGES |= {"rlhf": ("base", "actor", "critic")}
OWN = """
import json

def read(path):
    return [{"prompt": "mine"}] * 20

def count(prompts, responses):
    return [len(text) for text in responses]
"""
OTHER = "".join(["question,answer\n", *(f"{i}?,It is {i}.\n" for i in range(40))])
CONFIGURATION = """
from transformers import PretrainedConfig

class Own(PretrainedConfig):
    model_type = "own"
"""


class Place(NamedTuple):
    """The folders and patches with which an entry of the table computes its result."""

    finished: Path  # a course with trained base, actor and critic
    folder: Path  # an empty folder
    patch: pytest.MonkeyPatch

    def new(self, stage):
        """Makes a course folder with the inputs of a stage, but without the stage itself."""
        root = self.folder / f"{len(list(self.folder.iterdir()))}"
        (root / "model").mkdir(parents=True)
        for name in ("dataset", *(f"model/{source}" for source in STAGES[stage])):
            (root / name).symlink_to(self.finished / name)
        return root


def config(root, values):
    return util.Config("smoke", root=str(root), **(SMALL | values))


def figures(lines):
    """The metrics as they were written, without times and memory."""
    rows = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows
    ]


def left(folder):
    """The output of a stage: weights, metrics, samples and the names of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [str(path.relative_to(folder)) for path in files]
    for path in files:
        if path.suffix == ".safetensors":
            found.append(hashlib.md5(path.read_bytes()).hexdigest())
        elif path.name == "metrics.jsonl":
            found += figures(path.read_text().splitlines())
        elif path.name in ("samples.jsonl", "config.json"):
            found.append(path.read_text().replace(str(folder.parents[1]), ""))
    return found


def run(stage):
    """Runs a whole stage; the result is what it prints and the files that it writes."""

    def look(place, values):
        root = place.new(stage)
        list(getattr(util, f"train_{stage}")(config(root, values)))
        return left(root / "model" / stage)

    return look


def halfway(place, values):
    """The names of the checkpoints of an unfinished run."""
    root = place.new("base")
    train = util.train_base(config(root, values))
    next(train), next(train), next(train)
    train.close()
    return sorted(p.name for p in (root / "model" / ".base.checkpoints").glob("*"))


def resumed(place, values):
    """Resumes a stopped run; the result is its output and the number of its steps."""
    root = place.new("base")
    train = util.train_base(config(root, {}))
    next(train), next(train)
    train.close()
    return len(list(util.train_base(config(root, values))))


def started(place, values):
    """What a training yields, where new processes would yield their number."""
    place.patch.setattr(lab.processes, "launch", lambda _, cfg, rows: iter([cfg.num_processes]))
    train = util.train_base(config(place.new("base"), values))
    first = next(train)
    train.close()
    return first if isinstance(first, int) else "steps"


def split(place, values):
    """Whether two processes share the weights of a model."""
    place.patch.setattr(lab.processes, "joined", lambda: 2)
    return [lab.sharding.wanted(config(place.folder, values))]


def rows_of(share):
    def look(place, values):
        place.patch.chdir(place.folder)
        return util.load_rows(config(place.finished, values), share)

    return look


def pairs(place, values):
    """The pairs of a course in which a person has compared two answers."""
    root = place.folder / "compared"
    shutil.copytree(place.finished / "dataset", root / "dataset", dirs_exist_ok=True)
    row = {"prompt": "p", "left": "a", "right": "b", "choice": "left", "by": "person"}
    (root / "dataset" / "feedback.jsonl").write_text(json.dumps(row))
    return util.preference_rows(config(root, values), print)


def preferred(place, values):
    """The pairs to learn from."""
    place.patch.chdir(place.folder)
    return util.preference_rows(config(place.finished, dict(labels=16) | values))


def other_root(place, values):
    """The rows of another folder, which has no rows."""
    return util.load_rows(util.Config("smoke", **({"root": str(place.finished)} | values)), "sft")


def pieces(place, values):
    """The answers to the eval prompts, which show the pieces in which they were generated."""
    cfg = config(place.finished, values)
    tokenizer, model = util.load_pair(cfg, "actor")
    prompts = [row["prompt"] for row in util.load_eval_rows(cfg)]
    parts = util.generate_answers(model, tokenizer, prompts, cfg, util.rng_for(cfg, "test"))
    return [[x.tolist() for x in part] for part in parts]


def encoded(place, values):
    tokenizer = util.load_tokenizer(place.finished / "model" / "base")
    texts = ["Human: " + "word " * 200 + "Assistant:"], ["word " * 200]
    tokens = util.encode_pairs(tokenizer, *texts, config(place.finished, values), "cpu")
    return [x.tolist() for x in tokens]


class Layer(torch.nn.Linear):
    """The smallest possible model."""

    device = torch.device("cpu")


def updates(place, values):
    """The weights of a small layer after three updates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Layer(3, 2)
    rows = torch.arange(12.0).view(4, 3)
    optimiser = util.Optimiser(config(place.finished, values), [(layer, 0.1)], 10, batch=4)
    for step in range(3):
        loss_of = lambda part, step=step: ((layer(part) - step).square().mean(), len(part), {})  # noqa: E731
        optimiser.step(rows, loss_of, step)
    return [p.tolist() for p in layer.parameters()]


def cut(place, values):
    """The numbers of rows that the loss of an update gets at once."""
    layer, seen = Layer(3, 2), []

    def loss_of(part):
        seen.append(len(part))
        return layer(part).sum(), len(part), {}

    cfg = config(place.finished, values)
    util.Optimiser(cfg, [(layer, 0.1)], 10, batch=8).step(torch.ones(8, 3), loss_of, 0)
    return seen


def no_room(place, values):
    """A single row does not fit on a GPU; the device "meta" stands for the GPU."""
    moved = []

    class Moves(util.Optimiser):
        def leave_gpu(self):
            moved.append("to the CPU")
            self.state["rows"] = 1

    def work(size):
        if not moved:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return moved

    model = torch.nn.Linear(2, 2, device="meta")
    optimiser = Moves(config(place.finished, values), [(model, 0.1)], 1, batch=1)
    optimiser.state["rows"] = 1
    return optimiser.fit(work, "rows")


def stranger(place, values):
    """Loads the config of a model that brings code of its own."""
    place.patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place.folder))
    folder = place.folder / "stranger"
    folder.mkdir(exist_ok=True)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (folder / "config.json").write_text(json.dumps(own))
    return type(lab.models.shape_of(folder, config(place.finished, values))).__name__


def checkpointing(place, values):
    cfg = config(place.finished, values)
    model = lab.models.trainable(util.load_pair(cfg, "actor")[1], cfg)
    return model.is_gradient_checkpointing, model.training


def scores(place, values):
    """The combined reward of two reward models."""
    return util.load_reward(config(place.finished, values))(["Human: Hi Assistant:"], ["one two"])


def crew_of(cfg):
    tokenizer, policy = util.load_pair(cfg, "actor")
    return util.Crew(tokenizer, policy, policy, lambda prompts, texts: [len(t) for t in texts])


def evaluated(place, values):
    place.patch.chdir(place.folder)
    cfg = config(place.finished, values)
    rows = util.load_eval_rows(cfg)
    return util.evaluate(crew_of(cfg), rows, cfg, util.rng_for(cfg, "test"))


def perplexity(place, values):
    (place.finished / "plain.txt").write_text("Human: who are you? Assistant: nobody")
    cfg = config(place.finished, values)
    tokenizer, model = util.load_pair(cfg, "actor")
    return util.perplexity(model, tokenizer, cfg)


def graded(place, values):
    """The categories of the judge, as nothing else grades the models of the embedded world."""
    judge = {"kinds": {"sql": 0.5}, "intervals": {"sql": [0.4, 0.6]}}
    return categories.graded(config(place.finished, values), judge, list)


def eval_rows(place, values):
    place.patch.chdir(place.folder)
    return util.load_eval_rows(config(place.finished, values))


def best(place, values):
    cfg = config(place.finished, values)
    return util.best_of(crew_of(cfg), util.load_eval_rows(cfg), cfg, util.rng_for(cfg, "test"))


def chosen(place, values):
    return util.choose_base(config(place.finished, values))


def of(function):
    """An entry whose result depends on the parameters alone."""
    return lambda place, values: repr(function(config(place.finished, values)))


BASE, ACTOR, CRITIC, RLHF = map(run, ("base", "actor", "critic", "rlhf"))
ADAPTERS, TARGET = dict(lora_rank=2), dict(kl_target=0.5)
LABELLED = dict(labeller="own_functions.count")
DPO, GRPO = dict(algorithm="dpo"), dict(algorithm="grpo")
NOBODY = dict(base_model="nobody/nothing")
RISING = dict(steps=3, policy_lr=1e-2, kl_estimator="k3")  # KL > 0 after an update
TABLE = {  # field: (another value, function that computes a result, other settings)
    "preset": ("colab", lambda place, values: repr(util.Config(values.get("preset", "smoke"))), {}),
    "root": ("/nowhere", other_root, {}),
    "seed": (1, of(lambda cfg: util.rng_for(cfg, "test").initial_seed()), {}),
    "device": ("abacus", of(util.pick_device), {}),
    "max_prompt": (7, encoded, {}),
    "max_new_tokens": (7, encoded, {}),
    "data": ("other.csv", rows_of("sft"), {}),
    "sft_data": ("other.csv", rows_of("sft"), {}),
    "preference_data": ("other.csv", rows_of("preference"), {}),
    "prompt_data": ("other.csv", rows_of("prompt"), {}),
    "eval_data": ("other.csv", eval_rows, {}),
    "max_rows": (30, rows_of("sft"), {}),
    "sft_share": (0.1, rows_of("sft"), {}),
    "preference_share": (0.1, rows_of("preference"), {}),
    "prompt_share": (0.2, rows_of("prompt"), {}),
    "eval_share": (0.5, eval_rows, dict(data="other.csv")),
    "negatives": ("cut", rows_of("preference"), dict(data="other.csv")),
    "eval_batch": (3, pieces, {}),
    "memory": (0.6, cut, {}),
    "validation_rows": (4, ACTOR, {}),
    "weight_decay": (0.5, updates, {}),
    "beta1": (0.5, updates, {}),
    "beta2": (0.5, updates, {}),
    "grad_clip": (1e-3, updates, {}),
    "lr_floor": (0.9, updates, {}),
    "warmup": (0.5, updates, {}),
    "resume": (False, resumed, {}),
    "resume_changed": (True, resumed, dict(pretrain_lr=1e-5)),
    "checkpoint_minutes": (2.0, halfway, {}),
    "tracker": ("none", ACTOR, {}),
    "num_processes": (2, started, {}),
    "shard": (True, split, {}),
    "micro_batch": (3, cut, {}),
    "cpu_fallback": (True, no_room, {}),
    "reader": ("own_functions.read", rows_of("sft"), {}),
    "trust_remote_code": (True, stranger, {}),
    "precision": ("bf16", ACTOR, {}),
    "lora_rank": (2, ACTOR, {}),
    "lora_alpha": (1.0, ACTOR, ADAPTERS),
    "load_in_4bit": (True, of(lab.models.in_4_bits), ADAPTERS),
    "gradient_checkpointing": (True, checkpointing, {}),
    "base_model": ("nobody/nothing", chosen, {}),
    "fallback": (False, chosen, NOBODY),
    "vocab_size": (500, BASE, {}),
    "hidden_size": (16, BASE, {}),
    "layers": (1, BASE, {}),
    "heads": (2, BASE, {}),
    "init_std": (0.02, BASE, {}),
    "pretrain_data": ("dataset/eval.json", BASE, {}),
    "pretrain_documents": (150, BASE, {}),
    "pretrain_steps": (2, BASE, {}),
    "pretrain_batch": (3, BASE, {}),
    "pretrain_length": (100, BASE, {}),
    "pretrain_lr": (1e-3, BASE, {}),
    "actor_lr": (1e-4, ACTOR, {}),
    "actor_batch": (8, ACTOR, {}),
    "actor_epochs": (2, ACTOR, {}),
    "critic_lr": (1e-4, CRITIC, {}),
    "critic_batch": (12, CRITIC, {}),
    "critic_epochs": (2, CRITIC, {}),
    "critic_kind": ("careful", CRITIC, {}),
    "labeller": ("own_functions.count", preferred, {}),
    "labels": (6, preferred, LABELLED),
    "label_noise": (0.9, preferred, LABELLED),
    "score_penalty": (1.0, CRITIC, {}),
    "ensemble": (1, CRITIC, {}),
    "watchdog": (0.0, CRITIC, {}),
    "norm_prompts": (3, CRITIC, {}),
    "norm_answers": (3, CRITIC, {}),
    "feedback_weight": (3, pairs, {}),
    "algorithm": ("rloo", RLHF, {}),
    "reward": ("model - 0.1*length", RLHF, {}),
    "ensemble_rule": ("min", scores, {}),
    "ensemble_k": (3.0, scores, dict(ensemble_rule="cautious")),
    "steps": (1, RLHF, {}),
    "rollout": (12, RLHF, {}),
    "answers": (2, RLHF, {}),
    "ppo_epochs": (1, RLHF, {}),
    "minibatch": (8, RLHF, {}),
    "policy_lr": (1e-5, RLHF, {}),
    "value_lr": (1e-5, RLHF, {}),
    "temperature": (0.5, RLHF, {}),
    "kl_in": ("loss", RLHF, {}),
    "kl_estimator": ("k3", RLHF, {}),
    "kl_coef": (2.0, RLHF, {}),
    "kl_target": (0.5, RLHF, {}),
    "kl_horizon": (20, RLHF, TARGET),
    "gamma": (0.5, RLHF, {}),
    "lam": (0.5, RLHF, {}),
    "clip_ratio": (1e-6, RLHF, {}),
    "value_clip": (1e-6, RLHF, {}),
    "value_coef": (0.1, RLHF, {}),
    "entropy_coef": (0.1, RLHF, {}),
    "whiten": (False, RLHF, {}),
    "group_scale": (False, RLHF, GRPO),
    "loss_mean": ("answer", RLHF, {}),
    "value_init": ("actor", RLHF, {}),
    "reward_norm": (True, RLHF, {}),
    "reward_clip": (0.1, RLHF, {}),
    "missing_eos_penalty": (1.0, RLHF, {}),
    "length_penalty": (0.1, RLHF, {}),
    "safety": ("rules", RLHF, {}),
    "safety_penalty": (5.0, RLHF, dict(safety="lab.rewards.length")),
    "stop_kl": (1e-9, RLHF, {}),
    "kl_limit": (1e-6, RLHF, RISING),
    "stop_on_alert": ("kl", RLHF, RISING | dict(kl_limit=1e-6)),
    "sample_every": (2, RLHF, dict(steps=3)),
    "dpo_beta": (0.9, RLHF, DPO),
    "dpo_lr": (1e-5, RLHF, DPO),
    "dpo_batch": (16, RLHF, DPO),
    "dpo_epochs": (2, RLHF, DPO),
    "dpo_loss": ("ipo", RLHF, DPO),
    "dpo_smoothing": (0.2, RLHF, DPO),
    "dpo_nll": (0.5, RLHF, DPO),
    "test_rows": (5, evaluated, {}),
    "best_of": (2, best, {}),
    "best_of_rows": (2, best, {}),
    "metric": ("own_functions.count", evaluated, {}),
    "plain_text": ("dataset/eval.json", perplexity, dict(plain_text="plain.txt")),
    "categories": ("none", graded, {}),
    "extra_models": ("other", of(util.models_to_test), {}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the first three stages trained."""
    folder = tmp_path_factory.mktemp("finished")
    world.write(world.World(rows=200, eval_rows=24), folder / "dataset")
    for stage in ("base", "actor", "critic"):
        list(getattr(util, f"train_{stage}")(config(folder, {})))
    return folder


@pytest.fixture(scope="module")
def known():
    """The results with unchanged fields, computed once."""
    return {}


def outcome(look, place, values):
    """[printed text and error message, result]; the result is None if it is an error or a text."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            found = look(place, values)
        except (CourseError, torch.OutOfMemoryError) as error:
            found = f"{type(error).__name__}: {error}"
    text = said.getvalue() + (found if isinstance(found, str) else "")
    return [text.replace(str(place.folder), "."), None if isinstance(found, str) else found]


def test_every_field_has_a_line():
    assert list(TABLE) == list(util.Config.__dataclass_fields__)


@pytest.mark.parametrize("name", TABLE)
def test_another_value_gives_another_result(name, finished, known, tmp_path, monkeypatch):
    other, look, given = TABLE[name]
    (tmp_path / "own_functions.py").write_text(OWN)
    (tmp_path / "other.csv").write_text(OTHER)
    monkeypatch.delitem(sys.modules, "own_functions", raising=False)
    place = Place(finished, tmp_path, monkeypatch)
    assert getattr(config(finished, given), name, None) != other
    key = look, repr(given)
    if key not in known:
        known[key] = outcome(look, place, given)
        assert outcome(look, place, given) == known[key], "twice the same gives the same"
    assert outcome(look, place, given | {name: other}) != known[key]


def test_a_field_that_nobody_reads_would_be_seen(finished, known, tmp_path, monkeypatch):
    """A parameter of another stage stands for such a field: it must not change the result."""
    place = Place(finished, tmp_path, monkeypatch)
    for look, name, other in ((ACTOR, "dpo_nll", 0.5), (CRITIC, "gamma", 0.5), (BASE, "lam", 0.5)):
        assert outcome(look, place, {name: other}) == outcome(look, place, {})
