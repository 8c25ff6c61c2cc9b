"""Shared fixtures and helpers: a tokenizer and random models of four families, made in seconds."""
# ruff: noqa: E402

import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test of this suite may need a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tensors are tiny, so a second thread only waits. Child processes inherit this value.
# `make test-machines` sets other values.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

import util
from lab import world

settings.register_profile("course", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("course")

FAMILIES = ("opt", "gpt2", "llama", "qwen2")
PAD, EOS, VOCABULARY = 0, 1, 61


# The longest files run first, so that both cores finish together.
LONG = ["test_matrix.py", "test_course.py"]


def pytest_collection_modifyitems(items):
    names = dict.fromkeys([*LONG, *(item.path.name for item in items)])
    items.sort(key=lambda item: list(names).index(item.path.name))


@pytest.fixture(scope="module", autouse=True)
def threads(request):
    """Sets OMP_NUM_THREADS threads, or one in files that fork: threads do not survive a fork."""
    forks = "os.fork()" in request.path.read_text(encoding="utf-8")
    torch.set_num_threads(1 if forks else int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def root():
    """The folder of the repository."""
    return Path(__file__).resolve().parents[1]


def shape_of(family, vocabulary):
    """A config of the family whose random weights are large enough to give peaked distributions."""
    if family == "opt":
        return OPTConfig(
            vocab_size=vocabulary, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=200, init_std=0.4,
            pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        )  # fmt: skip
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=200,
            initializer_range=0.4, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        )  # fmt: skip
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=200,
        initializer_range=0.4, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip


def random_model(family="opt", vocabulary=VOCABULARY, seed=0, **changes):
    """A causal model with random weights, in eval mode. `changes` are set on its config."""
    shape = shape_of(family, vocabulary)
    for name, value in changes.items():
        setattr(shape, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()


def document_text(document):
    """A document of the world as one text; a document is a text or a (question, answer) pair."""
    return document if isinstance(document, str) else " ".join(document)


def left_padded(rows, value=PAD, extra=0):
    """Pads lists of ids on the left; returns (ids, mask). It does not use the padding of util."""
    width = max(map(len, rows)) + extra
    ids = [[value] * (width - len(row)) + row for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def right_padded(rows, value=PAD, extra=0):
    """Pads lists of ids on the right; returns (ids, mask)."""
    width = max(map(len, rows)) + extra
    ids = [row + [value] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def rollout_of(crew, prompts, cfg, name="test", **how):
    """A rollout with its advantages, as the loop of 3_rlhf computes it."""
    rollout = util.make_rollout(crew, prompts, cfg, util.rng_for(cfg, name), **how)
    advantages_of = util.ADVANTAGES.get(cfg.algorithm, util.centred_advantages)
    rollout.advantages, rollout.returns = advantages_of(rollout, cfg)
    return rollout


def run_loop(crew, cfg, prompts, say=print):
    """Runs the loop of 3_rlhf without a folder; returns the metrics of its steps."""
    stage = SimpleNamespace(
        past=[],
        say=say,
        steps=lambda total, optimiser: range(total),
        samples=lambda rows: None,
        append=lambda name, rows: None,
    )
    rows = [{"prompt": prompt} for prompt in prompts]
    with mock.patch.object(util, "load_rows", lambda *_, **__: rows):
        return list(util.rlhf_loop(crew, cfg, stage, util.LOSSES[cfg.algorithm]))


@pytest.fixture(scope="session")
def make_model():
    return random_model


@pytest.fixture(scope="session")
def pad_left():
    return left_padded


@pytest.fixture(scope="session")
def pad_right():
    return right_padded


@pytest.fixture(scope="session")
def model():
    """A random model. Tests must not change it. test_families.py covers the other families."""
    return random_model()


@pytest.fixture(scope="session")
def tokenizer():
    texts = [document_text(d) for d in world.documents(world.World(seed=0), 300)]
    return util.train_tokenizer(texts + [world.TEMPLATE], 600)


@pytest.fixture(scope="session")
def text_model(tokenizer):
    """A random model with the vocabulary of the tokenizer."""
    return random_model("opt", len(tokenizer))


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows to tmp_path/dataset/train.json and returns tmp_path, the root of a course."""

    def write(rows, name="train.json"):
        folder = tmp_path / "dataset"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write
