"""Fifteen model families, unusual tokenizers, and models that bring code of their own."""

import copy
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import lab.models
import util
from lab import CourseError, fast_path
from lab.data import turns
from lab.tokens import own_frame
from tests.conftest import rollout_of

PAD, EOS, UNK, VOCABULARY = 0, 1, 2, 64
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [33, 20]]
ANSWERS = [[8, 8, 1], [30, 31, 32, 33, 1], [1], [12, 50]]
IDS = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
LAYERS = dict(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=96)
WIDE = dict(initializer_range=0.3)  # random weights that give peaked distributions
OPT = dict(hidden_size=16, ffn_dim=32, init_std=0.3, dropout=0.3, attention_dropout=0.3)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=96, resid_pdrop=0.3)
LLAMA = dict(hidden_size=16, intermediate_size=32, num_key_value_heads=1, attention_dropout=0.3)
GEMMA = LLAMA | dict(head_dim=8)
KINDS = {  # name: (config class, its arguments)
    "opt-125m": (hf.OPTConfig, OPT | LAYERS | dict(word_embed_proj_dim=16, layerdrop=0.5)),
    "opt-350m": (
        hf.OPTConfig,
        OPT | LAYERS | dict(word_embed_proj_dim=8, do_layer_norm_before=False),
    ),
    "gpt2": (hf.GPT2Config, GPT2 | WIDE),
    "dialogpt": (hf.GPT2Config, GPT2 | WIDE | dict(pad_token_id=None)),
    "qwen2.5": (hf.Qwen2Config, LLAMA | LAYERS | WIDE | dict(tie_word_embeddings=True)),
    "qwen3": (hf.Qwen3Config, GEMMA | LAYERS | WIDE),
    "llama": (hf.LlamaConfig, LLAMA | LAYERS | WIDE),
    "mistral": (hf.MistralConfig, LLAMA | LAYERS | WIDE | dict(sliding_window=4)),
    "mistral-wide": (hf.MistralConfig, LLAMA | LAYERS | WIDE | dict(sliding_window=80)),
    "pythia": (
        hf.GPTNeoXConfig,
        LAYERS | WIDE | dict(hidden_size=16, intermediate_size=32, hidden_dropout=0.3),
    ),
    "gemma": (hf.GemmaConfig, GEMMA | LAYERS | WIDE),
    "gemma2": (
        hf.Gemma2Config,
        GEMMA | LAYERS | WIDE | dict(query_pre_attn_scalar=8, sliding_window=4),
    ),
    "gemma3": (
        hf.Gemma3TextConfig,
        GEMMA | LAYERS | WIDE | dict(query_pre_attn_scalar=8, sliding_window=4),
    ),
    "phi": (hf.PhiConfig, LLAMA | LAYERS | WIDE | dict(resid_pdrop=0.3)),
    "phi3": (hf.Phi3Config, LLAMA | LAYERS | WIDE | dict(resid_pdrop=0.3)),
}
FRIENDLY = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
CHATML = FRIENDLY + "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def made(name, vocabulary=VOCABULARY, seed=0):
    """A causal model of the family with random weights."""
    kind, shape = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = kind(**IDS | shape | dict(vocab_size=vocabulary))
        return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """One model of each family. Tests must not change its weights."""
    return made(request.param)


@pytest.fixture(scope="module")
def scorer(model, tmp_path_factory):
    """A scorer loaded from the causal checkpoint. Tests must change copies only."""
    folder = tmp_path_factory.mktemp("causal")
    model.save_pretrained(folder)
    return util.load_scorer(folder, util.Config("tiny", device="cpu"))


@pytest.fixture
def cfg(tmp_path):
    small = dict(max_prompt=24, max_new_tokens=8, rollout=8, minibatch=8, warmup=0.0)
    return util.Config("smoke", device="cpu", root=str(tmp_path), **small)


def words(size=VOCABULARY, **special):
    """A word-level tokenizer: w5, w6, ... and the two words that open a turn."""
    known = ["<pad>", "</s>", "<unk>", "Human:", "Assistant:"]
    known += [f"w{i}" for i in range(len(known), size)]
    inside = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>") | special
    return hf.PreTrainedTokenizerFast(tokenizer_object=inside, **special)


def padded(pad_left, pad_right, junk=44, extra=3):
    return *pad_left(PROMPTS, junk, extra), *pad_right(ANSWERS, junk, extra)


def opinionated(scorer, seed=1):
    """A copy of a scorer whose head is random."""
    scorer = copy.deepcopy(scorer)
    with torch.no_grad():
        scorer.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return scorer


# ------------------------------------------------------------------------------------------------
# Families


@torch.no_grad()
def test_padding_is_invisible(model, pad_left, pad_right):
    logits = util.answer_logits(model, *padded(pad_left, pad_right))
    logprobs, _ = util.response_logprobs(model, *padded(pad_left, pad_right))
    lengths = [len(answer) for answer in ANSWERS]
    for rows, said, prompt, answer in zip(logits.split(lengths), logprobs, PROMPTS, ANSWERS):
        whole = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert (rows - whole).abs().max() < 1e-4
        expected = whole.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (said[: len(answer)] - expected).abs().max() < 1e-4
        assert not said[len(answer) :].any()
    closer = util.answer_logits(model, *padded(pad_left, pad_right, junk=17, extra=0))
    assert (closer - logits).abs().max() < 1e-4


@torch.no_grad()
def slow(model, prompt, luck, temperature, stops):
    """Generates one row with a full pass per token: no cache, padding, mask or position ids."""
    ids = list(prompt)
    for lot in luck:
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
        ids.append(int(util.pick(logits, lot[None], temperature, 0, 1.0)[0]))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_cache_changes_nothing_also_when_rows_leave_the_batch(model, pad_left, temperature):
    stops = list(range(5, VOCABULARY, 9))
    prompts = PROMPTS * 2
    ids, mask, logprobs = util.generate(
        model, *pad_left(prompts, 17, 2), max_new_tokens=14, temperature=temperature,
        eos_token_id=stops, pad_token_id=PAD, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    luck = util.draw_uniforms(len(prompts), 14, torch.Generator().manual_seed(3), "cpu")
    expected = [slow(model, p, row, temperature, stops) for p, row in zip(prompts, luck)]
    assert [row[real].tolist() for row, real in zip(ids, mask)] == expected
    if temperature:
        assert len({len(answer) for answer in expected}) > 1  # some answers ended early
        scored, _ = util.response_logprobs(model, *pad_left(prompts, 17, 2), ids, mask)
        assert (scored - logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_model_round_trips_through_plain_transformers(model, cfg, tmp_path, dtype):
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == str(dtype)[6:]
    ours = util.load_actor(tmp_path / "half", cfg)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    lab.models.save(ours, words(), tmp_path / "ours")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    ids = torch.tensor([PROMPTS[2] + ANSWERS[1]])
    assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert (ours(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1
    assert plain.config.eos_token_id == EOS and plain.config.pad_token_id == PAD


@torch.no_grad()
def test_a_scorer_begins_at_zero_and_agrees_with_the_plain_class(
    model, scorer, cfg, tmp_path, pad_left, pad_right
):
    tokens = padded(pad_left, pad_right)
    assert not util.answer_scores(scorer, *tokens).any()
    ours = opinionated(scorer)
    lab.models.save(ours, words(), tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1 and {p.dtype for p in plain.parameters()} == {torch.float32}
    again = util.load_scorer(tmp_path, cfg)
    assert torch.equal(util.answer_scores(again, *tokens), util.answer_scores(ours, *tokens))
    scores, values = util.answer_scores(ours, *tokens), util.answer_values(ours, *tokens)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        text = prompt + answer
        theirs = [plain(input_ids=torch.tensor([text[:n]])).logits.item() for n in range(1, 13)]
        real = torch.ones(1, len(text), dtype=torch.bool)
        every = fast_path.scores(ours, torch.tensor([text]), real, real)
        assert every.tolist() == pytest.approx(theirs[: len(text)], abs=1e-4)
        assert scores[b].item() == pytest.approx(theirs[len(text) - 1], abs=1e-4)
        before = theirs[len(prompt) - 1 : len(text) - 1]
        assert values[b, : len(answer)].tolist() == pytest.approx(before, abs=1e-4)
    assert scores.std() > 0.01


@torch.no_grad()
def test_without_dropout_train_mode_says_what_eval_mode_says(model, cfg, pad_left, pad_right):
    tokens, noisy = padded(pad_left, pad_right), copy.deepcopy(model).train()
    expected = util.answer_logits(model, *tokens)
    assert not torch.equal(util.answer_logits(noisy, *tokens), expected)  # its dropout acts
    quiet = lab.models.trainable(noisy, cfg, drop=False).train()
    assert torch.equal(util.answer_logits(quiet, *tokens), expected)


ROWS = [
    {"prompt": "Human: w5 w6 w7 Assistant:", "response": "w8 w9", "rejected": "w10"},
    {"prompt": "Human: w11 Assistant:", "response": "w12", "rejected": "w13 w14 w15"},
    {"prompt": "Human: w16 w17 Assistant:", "response": "w18 w19 w20", "rejected": "w21"},
]
ROWS = [row | {"chosen": row["response"]} for row in ROWS]


def count_words(prompts, responses):
    return [float(len(text.split())) for text in responses]


def crew_of(model, scorer):
    policy, values = copy.deepcopy(model), copy.deepcopy(scorer)
    return util.Crew(words(), policy, model, count_words, values)


def task(name, model, scorer, cfg):
    """(loss_of, models to train, rows) of one of the five training methods."""
    crew = crew_of(model, scorer)
    if name == "sft":
        return partial(util.sft_loss, crew.policy, crew.tokenizer, cfg), [crew.policy], ROWS
    if name == "critic":
        members = [crew.value_model]
        return partial(util.critic_loss, members, crew.tokenizer, cfg), members, [[r] for r in ROWS]
    if name == "dpo":
        with torch.no_grad():
            reference = util.pair_logprobs(model, crew.tokenizer, ROWS, cfg)[:2]

        def loss_of(rows):
            pairs = util.pair_logprobs(crew.policy, crew.tokenizer, ROWS, cfg)[:2]
            loss, stats = util.dpo_loss(*pairs, *reference, beta=cfg.dpo_beta)
            return loss, len(rows), stats

        return loss_of, [crew.policy], ROWS
    prompts = [row["prompt"] for row in ROWS[:2] for _ in range(4)]
    crew.value_model = crew.value_model if name == "ppo" else None
    rollout = rollout_of(crew, prompts, cfg.changed(kl_coef=0.05, algorithm=name), "rollout")
    learning = [crew.policy] + ([crew.value_model] if name == "ppo" else [])
    losses = util.losses_of(crew, rollout, cfg, util.LOSSES[name])
    return losses, learning, list(range(len(prompts)))


@pytest.mark.parametrize("name", ["sft", "critic", "ppo", "grpo", "dpo"])
def test_every_way_to_learn_lowers_its_own_loss(model, scorer, cfg, name):
    if name in ("ppo", "grpo"):
        # The wide clip keeps the rewards different from each other.
        changes = dict(algorithm=name, answers=4, reward_clip=99.0)
        cfg = util.Config(**vars(cfg) | changes)
    loss_of, learning, rows = task(name, model, scorer, cfg)
    optimiser = util.Optimiser(cfg, [(m, 3e-3) for m in learning], 5, batch=len(rows))
    history = [optimiser.step(rows, loss_of, 0) for _ in range(5)]
    assert history[-1]["loss"] < history[0]["loss"] - 1e-3
    assert optimiser.state["skipped"] == 0
    if name in ("ppo", "grpo"):
        assert history[0]["ratio_error"] < 1e-3
    if name == "dpo":
        assert history[0]["margin"] == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------------------------------------
# Tokenizers


def kept(tokenizer, folder, model="llama", rows=None):
    """Saves a tokenizer and a model with `rows` embeddings (default: one per token)."""
    made(model, rows or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_without_a_pad_pads_with_its_eos_and_masks_come_from_lengths(cfg, tmp_path):
    kept(words(pad_token=None, bos_token="</s>"), tmp_path / "a", "dialogpt")
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == EOS
    prompts, answers = ["Human: w5 Assistant:", "Human: w5 w6 w7 Assistant:"], ["w8", "w9 w10"]
    tokens = util.encode_pairs(tokenizer, prompts, answers, cfg, "cpu")
    assert tokens[3].sum(1).tolist() == [2, 3] and tokens[1].sum(1).tolist() == [3, 5]
    assert util.ended(*tokens[2:], EOS).all()  # the eos counts; the padding after it does not
    assert util.decode(tokenizer, *tokens[2:]) == answers
    with torch.no_grad():
        logprobs, _ = util.response_logprobs(model, *tokens)
        short = [x[:1] for x in tokens]
        alone, _ = util.response_logprobs(
            model, short[0][:, 2:], short[1][:, 2:], short[2][:, :2], short[3][:, :2]
        )
    assert torch.allclose(logprobs[0, :2], alone[0], atol=1e-5)


@torch.no_grad()
def test_a_plain_scorer_sees_the_eos_also_where_the_pad_is_one(cfg, tmp_path):
    kept(words(pad_token=None), tmp_path / "a", "dialogpt")
    tokenizer = util.load_tokenizer(tmp_path / "a", cfg)
    ours = opinionated(util.load_scorer(tmp_path / "a", cfg))
    lab.models.save(ours, tokenizer, tmp_path / "critic")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    tokens = util.encode_pairs(tokenizer, ["Human: w5 Assistant:"], ["w6 w7"], cfg, "cpu")
    ids = torch.cat([tokens[0], tokens[2]], dim=1)
    assert ids[0, -1] == EOS
    expected = util.answer_scores(ours, *tokens)
    assert torch.allclose(plain(input_ids=ids).logits[:, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="batch sizes > 1"):  # transformers refuses
        plain(input_ids=ids.repeat(2, 1))


@torch.no_grad()
def test_a_tokenizer_without_an_eos_gets_one_and_the_model_a_row_for_it(cfg, tmp_path):
    bare = words(eos_token=None)
    bare._tokenizer = Tokenizer.from_str(bare._tokenizer.to_str().replace("</s>", "none"))
    kept(bare, tmp_path / "a")
    loaded = [lab.models.load_both(cfg, tmp_path / "a", "a") for _ in range(2)]
    tokenizer, model = loaded[0]
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == VOCABULARY
    old, new = (m.get_input_embeddings().weight for m in (made("llama"), model))
    assert len(new) == VOCABULARY + 1 and torch.equal(new[:-1], old)
    assert (new[-1] - old.mean(0)).abs().max() < 0.1  # close to the mean, neither 0 nor large
    head = model.get_output_embeddings().weight
    assert (head[-1] - head[:-1].mean(0)).abs().max() < 0.1
    assert torch.equal(new, loaded[1][1].get_input_embeddings().weight)  # the same each load
    lab.models.save(model, tokenizer, tmp_path / "b")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert VOCABULARY in torch.tensor(plain.generation_config.eos_token_id)
    assert plain.config.vocab_size == len(hf.AutoTokenizer.from_pretrained(tmp_path / "b"))
    ids = torch.tensor([[5, 6, VOCABULARY]])
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    model.get_output_embeddings().weight[:-1] = -model.get_output_embeddings().weight[-1]
    prompt = util.encode_prompts(tokenizer, ["Human: w5 Assistant:"] * 8, cfg, "cpu")
    ids, mask, _ = util.generate(
        model, *prompt, **util.sampling(cfg, model, tokenizer), generator=util.rng_for(cfg)
    )
    assert util.ended(ids, mask, tokenizer.eos_token_id).any()  # generation stops at this eos


def test_nothing_asks_for_a_bos(cfg, tmp_path):
    kept(words(), tmp_path / "a")
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    assert tokenizer.bos_token is None
    assert util.encode_prompt(tokenizer, "Human: w5 Assistant:", 9) == [3, 5, 4]
    lab.models.save(model, tokenizer, tmp_path / "b")
    assert util.load_tokenizer(tmp_path / "b", cfg).bos_token is None


def test_rows_beyond_the_tokenizer_stay_and_decode_to_nothing_bad(cfg, tmp_path):
    bpe = util.train_tokenizer(["one two three four"] * 4, 300)
    rows = len(bpe) + 20
    kept(bpe, tmp_path / "a", "qwen2.5", rows)
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    assert len(tokenizer) < rows == model.get_input_embeddings().num_embeddings
    one = tokenizer("one")["input_ids"]
    ids = torch.tensor([[*one, len(tokenizer), rows - 1, tokenizer.eos_token_id]])
    assert util.decode(tokenizer, ids, ids >= 0) == ["one"]
    lab.models.save(model, tokenizer, tmp_path / "b")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert plain.get_input_embeddings().num_embeddings == rows


def test_added_tokens_get_rows_but_a_larger_base_vocabulary_is_refused(cfg, tmp_path):
    more = words()
    more.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    kept(more, tmp_path / "a", rows=VOCABULARY)
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == VOCABULARY + 2
    scorer = tmp_path / "b"
    lab.models.save(model, tokenizer, scorer)
    util.load_scorer(scorer, cfg)
    kept(words(70), tmp_path / "c", rows=VOCABULARY)
    with pytest.raises(
        CourseError, match="has 70 tokens, but its model only 64: they do not belong"
    ):
        lab.models.load_both(cfg, tmp_path / "c", "c")


def chatty(folder, template=CHATML):
    tokenizer = words()
    tokenizer.add_tokens([f"<|{name}|>" for name in ("user", "assistant", "end")])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_template_of_its_own_is_used_and_the_cut_keeps_the_header(cfg, tmp_path):
    tokenizer = util.load_tokenizer(chatty(tmp_path), cfg)
    assert tokenizer.chat_template == CHATML and not own_frame(tokenizer)

    def told(prompt, limit=99):
        return tokenizer.convert_ids_to_tokens(util.encode_prompt(tokenizer, prompt, limit))

    assert told("Human: w5 w6 Assistant:") == "<|user|> w5 w6 <|end|> <|assistant|>".split()
    several = "Human: w5 Assistant: w6 w7 Human: w8 Assistant:"
    whole = "<|user|> w5 <|end|> <|assistant|> w6 w7 <|end|> <|user|> w8 <|end|> <|assistant|>"
    assert told(several) == whole.split()
    assert told(several, 4) == whole.split()[-4:] and told(several, 1) == ["<|assistant|>"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")  # the template ends an answer with it
    assert util.encode_answer(tokenizer, " w9 w10 ", 9) == [9, 10, end]  # without a space before it


def test_the_space_before_an_answer_is_the_one_that_the_template_writes(tokenizer):
    other = copy.deepcopy(tokenizer)
    for template, space in ((None, " "), (CHATML, " "), (CHATML.replace("|> ", "|>"), "")):
        other.chat_template = template
        ids = util.encode_answer(other, " Hi. ", 9)[:-1]
        assert other.decode(ids).rstrip() == space + "Hi."


def test_without_a_template_the_frame_of_the_course_is_saved_with_the_tokenizer(cfg, tmp_path):
    kept(words(), tmp_path / "a")
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    lab.models.save(model, tokenizer, tmp_path / "b")
    plain = hf.AutoTokenizer.from_pretrained(tmp_path / "b")
    say = partial(plain.apply_chat_template, tokenize=False)
    one = [{"role": "user", "content": "a"}]
    assert say(one, add_generation_prompt=True) == "Human: a Assistant:"
    both = turns("Human: a Assistant: b Human: c Assistant:")
    assert say(both, add_generation_prompt=True) == "Human: a Assistant: b Human: c Assistant:"
    assert say(both[:2]) == "Human: a Assistant: b"
    again = util.load_tokenizer(tmp_path / "b", cfg)
    assert own_frame(again)
    prompt = "Human: w5 Assistant: w6 Human: w7 Assistant:"
    framed = plain(say(turns(prompt), add_generation_prompt=True))["input_ids"]
    assert util.encode_prompt(again, prompt, 99) == framed


HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('MARKER') }}",
    "attr": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change": "{{ messages.clear() }}",
    "file": "{% include '/etc/passwd' %}",
    "broken": "{% for m in messages %}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "silent": "{{ 'You are mine.' }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_does_nothing_and_is_named(name, cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    chatty(folder, HOSTILE[name])
    with pytest.raises(CourseError) as told:
        util.load_tokenizer(folder, cfg)
    assert f"The chat template in {folder}" in str(told.value) and "\n" not in str(told.value)
    assert str(told.value).count("fix it") == 1
    assert "<class" not in str(told.value) and "root:" not in str(told.value)
    assert not (tmp_path / "MARKER").exists()


def test_a_template_that_fails_on_some_dialogues_only_is_named_too(cfg, tmp_path):
    picky = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    tokenizer = util.load_tokenizer(chatty(tmp_path, picky + CHATML), cfg)
    messages = turns("Human: w5 Assistant: w6 Human: w7 Assistant:")
    assert lab.models.in_template(tokenizer, messages[:1]).endswith("<|end|> <|assistant|>")
    with pytest.raises(CourseError, match="one turn only.*fix it, or delete it"):
        lab.models.in_template(tokenizer, messages)


def test_a_template_without_system_prompts_gets_them_in_the_first_question(cfg, tmp_path):
    refusal = "{{ raise_exception('System role not supported') }}"
    picky = f"{{% if messages[0]['role'] == 'system' %}}{refusal}{{% endif %}}"
    tokenizer = util.load_tokenizer(chatty(tmp_path, picky + CHATML), cfg)
    told = lab.models.in_template(
        tokenizer, turns("Be kind. Human: w5 Assistant: w6 Human: w7 Assistant:")
    )
    same = turns("Human: Be kind.\n\nw5 Assistant: w6 Human: w7 Assistant:")
    assert told == lab.models.in_template(tokenizer, same)
    with pytest.raises(CourseError, match="System role not supported"):
        lab.models.in_template(tokenizer, [{"role": "system", "content": "Be kind."}])


@pytest.mark.parametrize("odd", [dict(temperature=0.6), dict(top_p=0.9), dict(pad_token_id=-1)])
def test_generation_settings_that_contradict_each_other_do_not_stop_a_save(cfg, tmp_path, odd):
    kept(words(), tmp_path / "a")
    settings = hf.GenerationConfig(eos_token_id=[EOS, 9], bos_token_id=EOS).to_dict() | odd
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(settings))
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    changed = copy.deepcopy(model)
    changed.generation_config.max_length = 30
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        changed.save_pretrained(tmp_path / "c")
    lab.models.save(model, tokenizer, tmp_path / "b")
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    assert (saved.eos_token_id, saved.pad_token_id) == ([EOS, 9], PAD)


def test_all_ends_that_a_model_knows_stay_and_its_tokenizers_joins_them(cfg, tmp_path):
    kept(words(), tmp_path / "a")
    tokenizer, model = lab.models.load_both(cfg, tmp_path / "a", "a")
    model.generation_config.eos_token_id = [9, 10]
    lab.models.save(model, tokenizer, tmp_path / "b")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert plain.generation_config.eos_token_id == [9, 10, EOS]
    assert plain.config.eos_token_id == EOS


# ------------------------------------------------------------------------------------------------
# Models with code of their own

THEIR_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast,
)
from .sums_mine import running_mean

class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=64, hidden_size=16, num_hidden_layers=1, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**more)

class MinePreTrained(PreTrainedModel):
    config_class, base_model_prefix = MineConfig, "body"

    def _init_weights(self, module):
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.data.normal_(std=0.3)

class MineModel(MinePreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = torch.nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **more):
        x = read = self.embed(input_ids)
        if past_key_values is not None:
            read = past_key_values.update(x[:, None], x[:, None], 0)[0][:, 0]
        mask = torch.ones_like(read[..., 0]) if attention_mask is None else attention_mask
        both = torch.cat([x, running_mean(read, mask)[:, -x.shape[1] :]], -1)
        return BaseModelOutputWithPast(last_hidden_state=torch.tanh(self.mix(both)))

class MineForCausalLM(MinePreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.body = MineModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **more):
        hidden = self.body(input_ids, attention_mask, past_key_values).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))

class MineForSequenceClassification(MinePreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.body = MineModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **more):
        hidden = self.body(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden)[:, -1])
"""
THEIR_SUMS = """
def running_mean(x, mask):
    x = x * mask[..., None]
    return x.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]
"""
FILES = {"modeling_mine.py": THEIR_CODE, "sums_mine.py": THEIR_SUMS}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A model folder of a user: weights, config, a tokenizer and two files of code."""
    top = tmp_path / "top"
    for folder in (top / "mine", top / "theirs"):
        folder.mkdir(parents=True)
        for name, text in FILES.items():
            (folder / name).write_text(text)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(top)
        code = importlib.import_module("mine.modeling_mine")
    config = code.MineConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS)
    config.auto_map = {
        "AutoConfig": "modeling_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mine.MineForSequenceClassification",
    }
    code.MineForCausalLM(config).save_pretrained(top / "theirs")
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]
    words().save_pretrained(top / "theirs")
    return top / "theirs"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """transformers copies code of models into a cache. Here the cache is a temporary folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = list(sys.path)
    sys.path[:] = [path for path in before if not Path(path, "transformers_modules").exists()]
    forget_their_code()
    yield tmp_path / "modules"
    sys.path[:] = before
    forget_their_code()


def forget_their_code():
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_their_code_runs_only_when_it_is_asked_for(theirs, cfg, modules):
    (ask, remedy) = ("does not load, because it needs Python code", "set trust_remote_code = True.")
    for load in (util.load_actor, util.load_scorer):
        with pytest.raises(CourseError) as told:
            load(theirs, cfg)
        assert str(told.value).startswith(f"{theirs} {ask}") and str(told.value).endswith(remedy)
    assert not list(modules.rglob("*mine*")) and not any("_mine" in name for name in sys.modules)


@torch.no_grad()
def test_their_code_travels_with_every_model_that_is_saved(
    theirs, cfg, modules, tmp_path, pad_left
):
    trusting = util.Config(**vars(cfg) | dict(trust_remote_code=True))
    tokenizer, model = lab.models.load_both(trusting, theirs, "theirs")
    lab.models.save(model, tokenizer, tmp_path / "base")
    tokenizer, actor = lab.models.load_both(trusting, tmp_path / "base", "base")
    lab.models.save(actor, tokenizer, tmp_path / "actor")
    scorer = opinionated(util.load_scorer(tmp_path / "actor", trusting))
    lab.models.save(scorer, tokenizer, tmp_path / "critic")
    _, policy = lab.models.load_both(trusting, tmp_path / "actor", "actor")
    lab.models.save(policy, tokenizer, tmp_path / "rlhf")
    ids = torch.tensor([PROMPTS[2] + ANSWERS[1]])
    for name in ("base", "actor", "critic", "rlhf"):
        for file, text in FILES.items():
            assert (tmp_path / name / file).read_text() == text, f"{name} has no {file}"
    for name in ("base", "actor", "rlhf"):
        plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(plain(ids).logits, model(ids).logits)
    kind = hf.AutoModelForSequenceClassification
    plain = kind.from_pretrained(tmp_path / "critic", trust_remote_code=True)
    assert torch.equal(plain(ids).logits, scorer(ids).logits) and plain(ids).logits.any()
    stops, luck = list(range(5, VOCABULARY, 9)), torch.Generator().manual_seed(3)
    prompt, lots = (
        pad_left(PROMPTS),
        util.draw_uniforms(4, 14, torch.Generator().manual_seed(3), "cpu"),
    )
    answers, mask, logprobs = util.generate(
        policy, *prompt, max_new_tokens=14, eos_token_id=stops, pad_token_id=PAD, generator=luck
    )
    expected = [slow(policy, p, row, 1.0, stops) for p, row in zip(PROMPTS, lots)]
    assert [row[real].tolist() for row, real in zip(answers, mask)] == expected
    scored, _ = util.response_logprobs(policy, *prompt, answers, mask)
    assert (scored - logprobs).abs().max() < 1e-4
    for name in ("actor", "critic"):
        with pytest.raises(CourseError, match="then set trust_remote_code = True"):
            util.load_scorer(tmp_path / name, cfg)


def test_a_tokenizer_with_code_of_its_own_travels_too(cfg, modules, tmp_path):
    kept(words(), tmp_path / "a")
    code = "from transformers import PreTrainedTokenizerFast\n\n\n"
    code += "class MineTokenizer(PreTrainedTokenizerFast):\n    proof = 7\n"
    (tmp_path / "a" / "tokenization_mine.py").write_text(code)
    file = tmp_path / "a" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "MineTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    file.write_text(json.dumps(settings))
    with pytest.raises(CourseError, match="needs Python code .* then set trust_remote_code = True"):
        util.load_tokenizer(tmp_path / "a", cfg)
    trusting = util.Config(**vars(cfg) | dict(trust_remote_code=True))
    tokenizer, model = lab.models.load_both(trusting, tmp_path / "a", "a")
    lab.models.save(model, tokenizer, tmp_path / "b")
    assert util.load_tokenizer(tmp_path / "b", trusting).proof == 7
    assert (tmp_path / "b" / "tokenization_mine.py").read_text() == code


def test_a_model_that_cannot_go_on_from_a_cache_is_refused(theirs, cfg, modules):
    code = THEIR_CODE.replace("past_key_values=None, **more", "**more")
    (theirs / "modeling_mine.py").write_text(code.replace("past_key_values", "None"))
    trusting = util.Config(**vars(cfg) | dict(trust_remote_code=True))
    with pytest.raises(CourseError, match="theirs cannot be used: .* past_key_values"):
        lab.models.load_both(trusting, theirs, "theirs")
