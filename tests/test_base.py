"""0_download: which base model is taken, and what happens when one does not load."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import util
from lab.runs import CourseError


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A model of your own, in a folder: a small GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("ready")
    tokenizer = util.train_tokenizer(["one two three four"] * 4, 300)
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.json").write_text('{"prompt": "Human: Hi Assistant:"}\n')
    return tmp_path


def test_without_a_gpu_auto_is_tiny():
    source, why, _ = util.choose_base(util.Config("smoke", device="cpu"))
    assert source == "tiny" and "no GPU" in why


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder/anywhere"])
def test_a_model_that_cannot_be_had_is_replaced_by_tiny_and_the_reason_is_told(name):
    source, why, _ = util.choose_base(util.Config("smoke", base_model=name))
    assert source == "tiny" and why.startswith(f"{name} does not load (")
    assert "\n" not in why


def test_without_fallback_it_is_an_error():
    with pytest.raises(CourseError, match="nobody/nothing"):
        util.choose_base(util.Config("smoke", base_model="nobody/nothing", fallback=False))


def test_a_local_folder_is_copied_as_it_is(ready, root):
    cfg = util.Config("smoke", root=str(root), base_model=str(ready))
    assert len(list(util.train_base(cfg))) == 1
    tokenizer, model = util.load_pair(cfg, "base")
    ids = torch.tensor([tokenizer("one two three")["input_ids"]])
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(ready)(ids).logits
        assert torch.equal(model(ids).logits, expected)
    record = json.loads((root / "model" / "base" / "stage.json").read_text())
    assert record["metrics"]["preset"] == "colab"
    assert (root / "tokenizer" / "tokenizer.json").exists()


def test_a_model_is_loaded_once(ready, root, monkeypatch):
    loads, load = [], util.models.load
    monkeypatch.setattr(util.models, "load", lambda *a, **k: loads.append(a[1]) or load(*a, **k))
    cfg = util.Config("smoke", root=str(root), base_model=str(ready))
    base = util.choose_base(cfg)
    assert base.source == str(ready) and "The base model is" in base.why
    list(util.train_base(cfg, base))
    assert loads == [str(ready)]


def test_later_notebooks_take_the_preset_that_suits_the_base_model(ready, root):
    assert util.Config.of(root=str(root)).actor_lr == util.Config("tiny").actor_lr
    list(util.train_base(util.Config(root=str(root), base_model=str(ready))))
    assert util.Config.of(root=str(root)).actor_lr == util.Config("colab").actor_lr
    assert util.Config.of("tiny", root=str(root)).actor_lr == util.Config("tiny").actor_lr
    assert util.Config.of(root=str(root), actor_lr=0.5).actor_lr == 0.5


def test_texts_longer_than_the_model_can_read_are_refused_in_numbers(ready, root):
    wanted = dict(base_model=str(ready), max_prompt=120, fallback=False)
    with pytest.raises(CourseError, match="= 136, but .* reads at most 128 tokens"):
        list(util.train_base(util.Config("smoke", root=str(root), **wanted)))
    assert not (root / "model" / "base").exists()


def test_the_other_notebooks_take_the_data_over_from_0_download(tmp_path):
    record = dict(stage="base", id="", files={}, inputs={}, metrics={"preset": "tiny"})
    record["config"] = dict(preset="auto", data="mine.csv", eval_share=0.2, kl_coef=9.0)
    (tmp_path / "model" / "base").mkdir(parents=True)
    (tmp_path / "model" / "base" / "stage.json").write_text(json.dumps(record))
    cfg = util.Config.of(root=str(tmp_path), data=None)
    assert (cfg.data, cfg.eval_share) == ("mine.csv", 0.2)
    assert cfg.kl_coef == util.Config("tiny").kl_coef, "nothing but the data"
    assert util.Config.of(root=str(tmp_path), data="other.csv").data == "other.csv"
    assert util.Config.of(root=str(tmp_path), data="").data == "", "back to dataset/"
