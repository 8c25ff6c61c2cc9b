"""Runs all five notebooks with other models and other data, or checks the error that says why not.

The models are tiny and random, built from the config classes of their families. Their tokenizers
are byte-level BPEs with the special tokens and the chat template of the family.
"""

import itertools
import json
import re

import pandas as pd
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


def embedded():
    """The course's own files."""
    for split, count in (("train", 80), ("eval", 12)):
        yield f"dataset/{split}.json", list(world.rows(world.World(), split, count))


def lines():
    """Texts of several lines in a Parquet file, from which some rows are kept back."""
    good = [f"pear {i % 5}\n{i}\n" for i in range(80)]
    prompts = [f"Sort these:\n- {i}\n- pear {i % 5}\n\nOne a line, please.\n" for i in range(80)]
    rows = [
        dict(prompt=prompt, response=text, chosen=text, rejected="\n\nNo.\n")
        for prompt, text in zip(prompts, good)
    ]
    yield "rows.parquet", rows


def sharegpt():
    """Chinese conversations of several turns with a system prompt, without pairs."""
    rows = []
    for i in range(80):
        said = [
            f"第{i}个篮子里有几个苹果？",
            f"有{i}个。",
            f"再加{i % 9}个呢？",
            f"一共{i + i % 9}个。",
        ]
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        rows.append({"conversations": [{"from": "system", "value": "请说中文。"}, *turns]})
    yield "chat.json", rows


def dialogues():
    """A folder with pairs of whole dialogues, without responses."""
    for split, count in (("train", 80), ("test", 12)):
        rows = []
        for i in range(count):
            asked = f"\n\nHuman: A {split}?\n\nAssistant: Which?\n\nHuman: {i}.\n\nAssistant:"
            rows.append({"chosen": f"{asked} It is {i + 3}.", "rejected": f"{asked} No!"})
        yield f"hh/{split}.jsonl", rows


def bare():
    """Instructions with answers, and a list of bare prompts; there are no pairs."""
    rows = [
        {
            "instruction": f"Say how far town {i} is.",
            "input": "In miles." * (i % 2),
            "output": f"{i}.",
        }
        for i in range(80)
    ]
    yield "alpaca.json", rows
    yield "prompts.json", [f"How far is it to {i}?" for i in range(20)]


DATA = {  # name: (files of records, parameters)
    "embedded": (embedded, {}),
    "parquet": (lines, dict(data="rows.parquet")),
    "sharegpt": (sharegpt, dict(data="chat.json", negatives="cut")),
    "hh": (dialogues, dict(data="hh")),
    "bare": (bare, dict(data="alpaca.json", prompt_data="prompts.json")),
}


def texts_in(value):
    """Yields all texts inside a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def write_data(name, root):
    """Writes the files of a data set; returns its texts."""
    texts = []
    for path, records in DATA[name][0]():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            pd.DataFrame(records).to_parquet(root / path)
        else:
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            text = "\n".join(lines) if "chat" not in path else f"[{','.join(lines)}]"
            (root / path).write_text(text, encoding="utf-8")
        texts += texts_in(records)
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
NO_PAIRS = "CourseError: .*alpaca.json, line 1 .*: the field 'chosen' is missing; .*negatives = "
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
    if data != "bare":
        return {}
    later = {"3_rlhf.ipynb": NO_PAIRS, "4_test.ipynb": NO_MODEL} if algorithm == "dpo" else {}
    return {"2_critic.ipynb": NO_PAIRS} | later


@pytest.mark.parametrize("model, data, algorithm, precision, lora_rank", CASES)
def test_the_notebooks_run(model, data, algorithm, precision, lora_rank, warm, tmp_path):
    make_model(model, write_data(data, tmp_path), tmp_path / "brought")
    given = SMALL | DATA[data][1] | dict(root=str(tmp_path), base_model=str(tmp_path / "brought"))
    given |= dict(algorithm=algorithm, precision=precision, lora_rank=lora_rank)
    if algorithm in ("grpo", "rloo"):
        given["answers"] = 2
    if data == "bare":  # a rule gives the reward; the value model starts from the actor
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
