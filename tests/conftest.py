"""What the tests share: a tokenizer and random models of four families, made in seconds."""
# ruff: noqa: E402

import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test of this suite may need a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: a second thread only waits. What a test starts inherits it; test-machines sets it.
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


LONG = ["test_matrix.py", "test_course.py"]  # begin with them, so that both cores end together


def pytest_collection_modifyitems(items):
    names = dict.fromkeys([*LONG, *(item.path.name for item in items)])
    items.sort(key=lambda item: list(names).index(item.path.name))


@pytest.fixture(scope="module", autouse=True)
def threads(request):
    """As many as OMP_NUM_THREADS says; one where tests fork, as threads do not survive a fork."""
    forks = "os.fork()" in request.path.read_text(encoding="utf-8")
    torch.set_num_threads(1 if forks else int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return Path(__file__).resolve().parents[1]


def shape_of(family, vocabulary):
    """A config of the family, wide of scale so that random weights have opinions."""
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
    """A causal model with random weights, in eval mode. `changes` go into its config."""
    shape = shape_of(family, vocabulary)
    for name, value in changes.items():
        setattr(shape, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()


def document_text(document):
    """A document of the world as one text, whether it comes whole or as (question, answer)."""
    return document if isinstance(document, str) else " ".join(document)


def left_padded(rows, value=PAD, extra=0):
    """Lists of ids as (ids, mask), written apart from util's own padding."""
    width = max(map(len, rows)) + extra
    ids = [[value] * (width - len(row)) + row for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def right_padded(rows, value=PAD, extra=0):
    width = max(map(len, rows)) + extra
    ids = [row + [value] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def rollout_of(crew, prompts, cfg, name="test", **how):
    """A rollout with its advantages, as the loop of 3_rlhf makes it."""
    rollout = util.make_rollout(crew, prompts, cfg, util.rng_for(cfg, name), **how)
    advantages_of = util.ADVANTAGES.get(cfg.algorithm, util.centred_advantages)
    rollout.advantages, rollout.returns = advantages_of(rollout, cfg)
    return rollout


def run_loop(crew, cfg, prompts, say=print):
    """The loop of 3_rlhf without a folder: the metrics of its steps."""
    stage = SimpleNamespace(
        past=[],
        say=say,
        steps=lambda total, optimiser: range(total),
        samples=lambda rows: None,
        append=lambda name, rows: None,
        alert=lambda *alerts, **how: None,
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
    """A random model; tests leave its weights alone. What families differ in: test_families.py."""
    return random_model()


@pytest.fixture(scope="session")
def tokenizer():
    texts = [document_text(d) for d in world.documents(world.World(seed=0), 300)]
    return util.train_tokenizer(texts + [world.TEMPLATE], 600)


@pytest.fixture(scope="session")
def text_model(tokenizer):
    """A random model that knows the tokenizer's vocabulary."""
    return random_model("opt", len(tokenizer))


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as tmp_path/dataset/train.json and returns tmp_path, a course's root."""

    def write(rows, name="train.json"):
        folder = tmp_path / "dataset"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write
