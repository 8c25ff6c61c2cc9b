"""Runs all five notebooks with other models and other data, or checks the error that says why not.

The models are tiny and random, built from the config classes of their families. Their tokenizers
are byte-level BPEs with the special tokens and the chat template of the family.
"""

import itertools
import json
import re

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from warm import Warm

from lab import world
from lab.runs import NOTEBOOKS

# --------------------------------------------------------------------------------------------------
# Models

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
SIDES = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZE = dict(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
WIDE = SIZE | dict(hidden_size=32, intermediate_size=64, num_key_value_heads=1)
OPT = SIZE | dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=256)
MODELS = {  # name: (config class, its arguments, special tokens, chat template, stop tokens)
    "opt": (
        hf.OPTConfig, OPT, dict(bos="</s>", eos="</s>", pad="<pad>", starts=True), None, (),
    ),
    "qwen2": (
        hf.Qwen2Config, WIDE | dict(tie_word_embeddings=True),
        dict(eos="<|im_end|>", pad="<|endoftext|>", more=["<|im_start|>"], spare=40), CHATML,
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "llama": (hf.LlamaConfig, WIDE, dict(bos="<s>", eos="</s>", starts=True), INST, ()),
    "gpt2": (hf.GPT2Config, GPT2, dict(bos="<|endoftext|>", eos="<|endoftext|>"), None, ()),
    "gemma": (
        hf.GemmaConfig, WIDE | dict(head_dim=16),
        dict(
            bos="<bos>", eos="<eos>", pad="<pad>", starts=True,
            more=["<start_of_turn>", "<end_of_turn>"],
        ),
        TURNS, ("<eos>", "<end_of_turn>"),
    ),
    "sharded": (
        hf.MistralConfig, WIDE, dict(bos="<s>", eos="</s>", pad="</s>", starts=True), SIDES, (),
    ),
}  # fmt: skip


def tokenizer_of(texts, template, *, eos, bos=None, pad=None, more=(), starts=False, spare=0):
    """A byte-level BPE trained on the rows, with the special tokens and template of a family."""
    special = list(dict.fromkeys(filter(None, [pad, eos, bos, *more])))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    how = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, **how))
    if starts:  # every text starts with a bos, as with Llama, Gemma and OPT
        first = dict(special_tokens=[(bos, inner.token_to_id(bos))])
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", **first)
    names = {"eos_token": eos, "bos_token": bos, "pad_token": pad}
    names = {name: token for name, token in names.items() if token}
    names |= dict(chat_template=template, additional_special_tokens=list(more))
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def make_model(name, texts, folder):
    """Saves a model and its tokenizer into a folder, with the files that a hub has."""
    kind, numbers, special, template, ends = MODELS[name]
    tokenizer = tokenizer_of(texts, template, **special)
    ids = dict(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    shape = kind(vocab_size=len(tokenizer) + special.get("spare", 0), **numbers, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(shape)
    if ends:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends))
    model.save_pretrained(folder, max_shard_size="40KB" if name == "sharded" else "1GB")
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Data


def embedded(count, split):
    return world.rows(world.World(), split, count)


def several_turns(count, split):
    """Rows whose prompts hold the earlier turns of a conversation."""
    for i in range(count):
        began = f"Human: Name a {split} {i}. Assistant: It is {i + 3}. Human: And {i % 7} more?"
        yield dict(prompt=f"{began} Assistant:", **answers(f"Then it is {i + 3 + i % 7}.", "No!"))


def chinese(count, split):
    for i in range(count):
        prompt = f"请问{split}第{i}号苹果和{i % 9}个梨一共多少钱？"
        yield dict(prompt=prompt, **answers(f"一共是{i + i % 9}元。", "我不知道，别问了！"))


def without_pairs(count, split):
    for i in range(count):
        yield dict(prompt=f"How far is it to {split} {i}?", response=f"It is {i % 13} miles.")


def newlines(count, split):
    for i in range(count):
        prompt = f"Sort these:\n- {split} {i}\n- pear {i % 5}\n\nOne a line, please.\n"
        yield dict(prompt=prompt, **answers(f"pear {i % 5}\n{split} {i}\n", "\n\nNo.\n"))


def answers(good, bad):
    return dict(response=good, chosen=good, rejected=bad)


DATA = dict(
    embedded=embedded, turns=several_turns, chinese=chinese, pairless=without_pairs, lines=newlines
)


def write_rows(data, folder):
    """Writes dataset/ of a course; returns its texts."""
    texts = []
    folder.mkdir(parents=True)
    for name, split, count in (("train", "train", 80), ("eval", "eval", 12)):
        rows = list(DATA[data](count, split))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.json").write_text("".join(lines), encoding="utf-8")
        texts += [text for row in rows for text in row.values() if isinstance(text, str)]
    return texts


# --------------------------------------------------------------------------------------------------
# The matrix

FACTORS = {
    "model": tuple(MODELS),
    "data": tuple(DATA),
    "algorithm": ("ppo", "grpo", "rloo", "dpo"),
    "precision": ("float32", "bf16"),
    "lora_rank": (0, 4),
}


def cases():
    """Every model with every data set, and every other pair of values at least once."""
    for (i, model), (j, data) in itertools.product(enumerate(MODELS), enumerate(DATA)):
        algorithm = FACTORS["algorithm"][(i + j) % 4]
        yield model, data, algorithm, FACTORS["precision"][(i + j // 2) % 2], (i // 2 + j) % 2 * 4


CASES = list(cases())
SMALL = dict(
    preset="smoke", device="cpu", fallback=False, sft_share=0.4, preference_share=0.4,
    prompt_share=0.2, validation_rows=4, actor_batch=14, critic_batch=16, norm_prompts=2,
    norm_answers=2, max_new_tokens=10, rollout=4, minibatch=2, ppo_epochs=1, steps=2, dpo_batch=16,
    test_rows=8, best_of=2, best_of_rows=4, answers=1,
)  # fmt: skip
NO_PAIRS = "CourseError: .*train.json, line 1 .*: the field 'chosen' is missing; the row has prompt"
NO_MODEL = "CourseError: .*3_rlhf.ipynb"


def test_every_pair_of_values_occurs():
    for one, two in itertools.combinations(range(len(FACTORS)), 2):
        values = list(FACTORS.values())
        pairs = {(case[one], case[two]) for case in CASES}
        assert pairs == set(itertools.product(values[one], values[two]))


@pytest.fixture(scope="module")
def warm():
    server = Warm()
    yield server
    server.close()


def stops(data, algorithm):
    """{notebook: the error with which it must stop}"""
    if data != "pairless":
        return {}
    later = {"3_rlhf.ipynb": NO_PAIRS, "4_test.ipynb": NO_MODEL} if algorithm == "dpo" else {}
    return {"2_critic.ipynb": NO_PAIRS} | later


@pytest.mark.parametrize("model, data, algorithm, precision, lora_rank", CASES)
def test_the_notebooks_run(model, data, algorithm, precision, lora_rank, warm, tmp_path):
    make_model(model, write_rows(data, tmp_path / "dataset"), tmp_path / "brought")
    given = SMALL | dict(root=str(tmp_path), base_model=str(tmp_path / "brought"))
    given |= dict(algorithm=algorithm, precision=precision, lora_rank=lora_rank)
    if algorithm in ("grpo", "rloo"):
        given["answers"] = 2
    if data == "pairless":  # a rule gives the reward; the value model starts from the actor
        given |= dict(reward="sentence", value_init="actor")
    said, expected = tmp_path / "said.txt", stops(data, algorithm)
    for notebook in NOTEBOOKS.values():
        error = warm.run(notebook, said, **given) or ""
        assert re.match(expected.get(notebook, "$"), error), f"{error}\n{said.read_text()[-2000:]}"
    assert "Warning" not in said.read_text()
    written = {path.name for path in (tmp_path / "model").iterdir() if path.name[0] != "."}
    stages = {"base", "actor", "critic", "rlhf", "report"}
    missing = {stage for stage, notebook in NOTEBOOKS.items() if notebook in expected}
    assert written == stages - missing
