"""The fast path gives the same numbers as the plain path and runs only where it may."""

import copy
import functools
import os
import re
import subprocess
import sys
import tomllib
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import util
from lab import agreement, decoding, fast_path, matmul, plain_path, sharding

PAD, EOS, VOCABULARY = 0, 1, 61
IDS = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
OPT = SIZE | dict(word_embed_proj_dim=32, ffn_dim=48, init_std=0.2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
SHARED = SIZE | dict(intermediate_size=48, num_key_value_heads=2, initializer_range=0.2)
KINDS = {
    "opt": (hf.OPTConfig, OPT),
    "gpt2": (hf.GPT2Config, GPT2),
    "llama": (hf.LlamaConfig, SHARED),
    "mistral": (hf.MistralConfig, SHARED | dict(sliding_window=None)),
    "qwen2": (hf.Qwen2Config, SHARED),
    "qwen3": (hf.Qwen3Config, SHARED | dict(head_dim=16)),
}
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [33, 20]]
ANSWERS = [[8, 8, 1], [30, 31, 32, 33, 1], [1], [12, 50]]
EQUAL = [[5, 9, 3, 11], [7, 8, 9, 10], [2, 4, 6, 8], [33, 20, 21, 22]]
FULL = [[12, 50, 3, 8, 8, 1], [30, 31, 32, 33, 40, 1], [9, 8, 7, 6, 1], [12, 50, 51, 52, 53, 1]]
# The same text twice, several answers to one prompt, and a prompt that starts another prompt.
ALIKE = [[5, 9, 3], [7, 2], [5, 9], [5, 9, 3], [5, 9, 3]]
REPLIES = [[8, 8, 1], [1], [3, 8, 12, 1], [8, 8, 1], [8, 30, 31, 1]]
BATCHES = {"padded": (PROMPTS, ANSWERS), "full": (EQUAL, FULL), "alike": (ALIKE, REPLIES)}
STOPS = list(range(3, VOCABULARY, 7))


def made(name, scorer=False, kind=None, **changes):
    """A model in eval mode. Biases and norms are random too, so a test sees if one is left out."""
    config, shape = KINDS[name]
    auto = hf.AutoModelForSequenceClassification if scorer else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config(**IDS | shape | changes, **(dict(num_labels=1) if scorer else {}))
        model = kind(config) if kind else auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """One model of each family. Tests must not change its weights."""
    return made(name)


@pytest.fixture(params=[("padded", 1), ("padded", 8), ("full", 1), ("alike", 8)], ids=str)
def tokens(request, monkeypatch, pad_left, pad_right):
    """The four tensors for scoring, for each way in which the fast path groups rows."""
    name, groups = request.param
    prompts, answers = BATCHES[name]
    monkeypatch.setattr(fast_path, "GROUPS", groups)
    found = *pad_left(prompts, 44), *pad_right(answers, 44)
    read = util.before_each_token(*found)
    made = fast_path.layout(*read, util.before_answers(found[0], found[3]))
    assert len(made.groups) == min(groups, 4)  # one batch has four different rows
    assert (made.slots is None) == (request.param in [("padded", 8), ("full", 1)])
    return found


@contextmanager
def plainly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "FAMILIES", {})
        yield


@contextmanager
def watched(kind, when=lambda module: True):
    """Records the shape of the input for each call of a module of this class."""
    shapes, own = [], kind.forward

    @functools.wraps(own)
    def forward(self, *args, **more):
        if when(self):
            shapes.append([*args, *more.values()][0].shape)
        return own(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        yield shapes


def layers_of(model):
    body = sharding.unwrapped(model).base_model
    return getattr(body, "h", None) or getattr(body, "decoder", body).layers


@contextmanager
def bodies(model):
    """Records calls of the model's own layers, except those of the comparison."""
    own = agreement.agree
    with watched(type(layers_of(model)[0])) as shapes, pytest.MonkeyPatch.context() as patch:

        def agree(*args):
            known = len(shapes)
            found = own(*args)
            del shapes[known:]
            return found

        patch.setattr(fast_path, "agree", agree)
        patch.setattr(decoding, "agree", agree)
        patch.setattr(plain_path, "agree", agree)
        yield shapes


def both(model, work):
    """The results of `work` on the fast and the plain path; checks that each path really ran."""
    with bodies(model) as calls:
        fast = work()
        assert not calls, "the model's own forward was called"
        with plainly():
            slow = work()
        assert calls
    return fast, slow


def refused(model, work):
    """Checks that `work` does not take the fast path; returns its result and the plain one."""
    with bodies(model) as calls:
        found = work()
        assert calls, "the model's own forward was not called"
    with plainly():
        return found, work()


def apart(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def write(model, prompts, pad_left, temperature=1.0, stops=STOPS):
    """Generates answers, some of which end early; returns ids, mask and logprobs."""
    return util.generate(
        model, *pad_left(prompts, 44), max_new_tokens=16, temperature=temperature,
        eos_token_id=stops, pad_token_id=PAD, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip


def same_answers(fast, slow):
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    return (fast[2] - slow[2]).abs().max() < 1e-4


def gradients(model, loss_of):
    model.zero_grad()
    loss_of().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, tokens):
    """A loss in which each logprob and each entropy has a different weight."""
    logprobs, entropy = util.response_logprobs(model, *tokens, temperature=0.8)
    weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    return (weights * logprobs - 0.5 * weights.flip(0) * entropy).sum()


def same_gradients(fast, slow):
    assert fast.keys() == slow.keys() and slow
    largest = max(g.abs().max().item() for g in slow.values())
    return largest > 0.1 and apart(fast.values(), slow.values()) < 1e-4 * largest


# ------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_logprobs_and_entropies(model, tokens, temperature):
    work = functools.partial(util.response_logprobs, model, *tokens, temperature=temperature)
    fast, slow = both(model, work)
    assert apart(fast, slow) < 1e-4 and slow[1].max() > 0.5
    assert torch.equal(work(entropy=False)[0], fast[0]) and not work(entropy=False)[1].any()


@torch.no_grad()
def test_values_and_scores(name, tokens):
    scorer = made(name, scorer=True)
    for work in (util.answer_values, util.answer_scores):
        fast, slow = both(scorer, lambda work=work: work(scorer, *tokens))
        assert apart([fast], [slow]) < 1e-4 and slow.std() > 0.05


def test_gradients(model, tokens):
    fast, slow = both(model, lambda: gradients(model, lambda: loss_of(model, tokens)))
    assert same_gradients(fast, slow)


def test_gradients_of_values(name, tokens):
    scorer = made(name, scorer=True)
    work = functools.partial(gradients, scorer, lambda: util.answer_values(scorer, *tokens).sum())
    assert same_gradients(*both(scorer, work))


def test_the_loss_of_whole_texts(model):
    ids = torch.tensor(EQUAL)
    with bodies(model) as calls:
        found = util.next_token_loss(model, ids)
        assert not calls
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers(model, pad_left, prompts, temperature):
    fast, slow = both(model, lambda: write(model, prompts * 2, pad_left, temperature))
    assert same_answers(fast, slow)
    lengths = fast[1].sum(1).unique()
    assert not temperature or len(lengths) > 2  # answers end at different steps
    if temperature:
        scored, _ = util.response_logprobs(model, *pad_left(prompts * 2, 44), *fast[:2])
        assert (scored - fast[2]).abs().max() < 1e-4


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["unequal", "equal"])
def test_a_prompt_that_is_to_be_answered_several_times_is_read_once(model, pad_left, prompts):
    several = [prompt for prompt in prompts for _ in range(5)]
    embedded = model.get_input_embeddings()
    write(model, several, pad_left)  # the first call also runs the comparison
    with watched(type(embedded), lambda module: module is embedded) as shapes:
        fast, slow = both(model, lambda: write(model, several, pad_left, stops=None))
    assert same_answers(fast, slow) and len({tuple(row) for row in fast[0].tolist()}) > 8
    assert shapes[0].numel() == sum(map(len, prompts)) and shapes[1].numel() == len(several)
    read = [shape for shape in shapes if len(shape) == 2 and shape[1] > 1]
    assert [tuple(shape) for shape in read] == [(len(prompts), max(map(len, prompts)))]


@torch.no_grad()
def test_what_rows_have_in_common_at_their_start_is_read_once(model, pad_left, pad_right):
    """Pairs of a reward model and groups of GRPO share prompts, so most of their tokens repeat."""
    tokens = *pad_left(ALIKE, 44), *pad_right(REPLIES, 44)
    # The last column predicts nothing, so the fast path does not read it.
    texts = [prompt + answer[:3] for prompt, answer in zip(ALIKE, REPLIES)]
    different = {tuple(text[: n + 1]) for text in texts for n in range(len(text))}
    embedded = model.get_input_embeddings()
    util.response_logprobs(model, *tokens)  # the first call also runs the comparison
    with watched(type(embedded), lambda module: module is embedded) as shapes:
        util.response_logprobs(model, *tokens)
    assert [shape.numel() for shape in shapes] == [len(different)] == [12]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@torch.no_grad()
def test_rotations_that_are_stretched_for_good(kind, tokens, pad_left):
    more = dict(llama3=dict(low_freq_factor=1.0, high_freq_factor=4.0)).get(kind, {})
    more |= dict(original_max_position_embeddings=8) if kind != "linear" else {}
    model = made("llama", rope_parameters=dict(rope_type=kind, factor=4.0, rope_theta=1e4) | more)
    fast, slow = both(model, lambda: util.response_logprobs(model, *tokens))
    assert apart(fast, slow) < 1e-4
    assert apart(slow, util.response_logprobs(made("llama"), *tokens)) > 1e-2  # it has an effect
    assert same_answers(*both(model, lambda: write(model, PROMPTS, pad_left)))


def adapted(name):
    """A policy with an adapter that changes its output."""
    shape = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        policy = get_peft_model(made(name), shape).eval()
        for part, parameter in policy.named_parameters():
            if "lora_B" in part:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return policy


def test_with_an_adapter_and_without_it(name, model, tokens, pad_left):
    policy, several = adapted(name), [prompt for prompt in PROMPTS for _ in range(2)]
    with torch.no_grad():
        expected = util.response_logprobs(model, *tokens)
    for state in (nullcontext, policy.disable_adapter):
        with state():
            with torch.no_grad():
                found, slow = both(policy, lambda: util.response_logprobs(policy, *tokens))
            assert apart(found, slow) < 1e-4
            assert (apart(found, expected) < 1e-4) == (state is not nullcontext)
            fast, slow = both(policy, lambda: write(policy, several, pad_left))
            assert same_answers(fast, slow)
    fast, slow = both(policy, lambda: gradients(policy, lambda: loss_of(policy, tokens)))
    assert same_gradients(fast, slow) and all("lora_" in part for part in fast)
    policy.merge_adapter()
    fast, slow = both(policy, lambda: write(policy, several, pad_left))
    assert same_answers(fast, slow)


@torch.no_grad()
def test_half_precision(model, tokens, pad_left):
    exact, _ = util.response_logprobs(model, *tokens)
    with torch.autocast("cpu", torch.bfloat16):
        (fast, _), (slow, _) = both(model, lambda: util.response_logprobs(model, *tokens))
        written = write(model, PROMPTS * 2, pad_left)
        scored, _ = util.response_logprobs(model, *pad_left(PROMPTS * 2, 44), *written[:2])
    assert fast.dtype == torch.float32 and (fast - exact).abs().max() > 1e-4  # not float32
    error = (slow - exact).abs().max()
    assert (fast - exact).abs().max() < 3 * error and error < 0.3
    assert (scored - written[2]).abs().max() < 0.3


@pytest.mark.parametrize("name", KINDS)
def test_weights_packed_for_the_machine(name, monkeypatch, pad_left):
    used, ask = [], decoding.worth_packing
    monkeypatch.setattr(decoding, "BIG", 1)
    monkeypatch.setattr(decoding, "worth_packing", lambda w: used.append(ask(w)) or used[-1])
    for model in (made(name), adapted(name)):
        assert same_answers(*both(model, lambda model=model: write(model, PROMPTS * 2, pad_left)))
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    assert used and all(used)


def test_many_tokens_without_gradients_go_through_the_head_in_pieces(model, pad_left, pad_right):
    answers = [[(7 * i + t) % 59 + 2 for t in range(40 - i)] for i in range(5)]
    tokens = *pad_left(EQUAL + EQUAL[:1]), *pad_right(answers)
    whole = util.response_logprobs(model, *tokens)
    with torch.no_grad():
        util.response_logprobs(model, *tokens)
    with torch.no_grad(), watched(torch.nn.Linear, lambda m: m is model.lm_head) as shapes:
        pieces = util.response_logprobs(model, *tokens)
    assert [len(shape) for shape in shapes] == [2, 2] and [s[0] for s in shapes] == [128, 62]
    assert whole[0].requires_grad and not pieces[0].requires_grad
    assert apart(whole, pieces) < 1e-4


# ------------------------------------------------------------------------------------------------
# Dropout

DROPS = [
    ("opt", "dropout"), ("opt", "attention_dropout"), ("gpt2", "embd_pdrop"),
    ("gpt2", "resid_pdrop"), ("gpt2", "attn_pdrop"), ("llama", "attention_dropout"),
    ("mistral", "attention_dropout"), ("qwen2", "attention_dropout"),
    ("qwen3", "attention_dropout"),
]  # fmt: skip


@pytest.mark.parametrize("name, part", DROPS)
@torch.no_grad()
def test_dropout_acts_as_it_does_on_the_plain_path(name, part, pad_left, pad_right):
    tokens = *pad_left(ALIKE, 44), *pad_right(REPLIES, 44)
    off = {other: 0.0 for kind, other in DROPS if kind == name}
    model, quiet = made(name, **off | {part: 0.2}), made(name, **off).train()
    (calm, _), _ = both(quiet, lambda: util.response_logprobs(quiet, *tokens))
    still, _ = both(model, lambda: util.response_logprobs(model, *tokens)[0])
    assert torch.equal(calm, still)  # p = 0 in train mode and p > 0 in eval mode

    def spread():
        return torch.stack([util.response_logprobs(model, *tokens)[0] for _ in range(150)]).std(0)

    model.train()
    torch.manual_seed(0)
    fast, slow = both(model, spread)
    real = tokens[3]
    assert slow[real].mean() > 0.02
    assert 0.85 < fast[real].mean() / slow[real].mean() < 1.15


# ------------------------------------------------------------------------------------------------
# Cases for the plain path


@torch.no_grad()
def test_rows_with_gaps_or_without_a_prompt(model, pad_left, pad_right):
    for hide in [(0, slice(0, 7)), (2, slice(3, 5))]:
        tokens = [*pad_left(PROMPTS, 44), *pad_right(ANSWERS, 44)]
        if hide[0] == 0:
            tokens = [x[:2] for x in tokens]
        tokens[1][hide] = False
        assert fast_path.decoder_of(model) is not None
        fast, slow = refused(model, lambda tokens=tokens: util.response_logprobs(model, *tokens))
        assert all(torch.equal(a, b) for a, b in zip(fast, slow)) and fast[0][1].any()
        ids, mask = tokens[:2]
        work = functools.partial(util.generate, model, ids, mask, max_new_tokens=4, temperature=0)
        work = functools.partial(work, eos_token_id=None, pad_token_id=PAD)
        assert all(torch.equal(a, b) for a, b in zip(*refused(model, work)))
    first = torch.zeros_like(mask).scatter(1, mask.int().argmax(1, keepdim=True), True)
    assert not mask[2].all() and fast_path.layout(ids, mask, first) is None  # also before the gap


HOOKS = "forward_hook", "forward_pre_hook"


@pytest.mark.parametrize("kind", [f"register_{hook}" for hook in HOOKS])
def test_a_hook_on_a_layer_is_called(name, tokens, pad_left, kind):
    model, seen = made(name), []
    expected, answers = util.response_logprobs(model, *tokens), write(model, PROMPTS, pad_left)
    handle = getattr(layers_of(model)[1], kind)(lambda *_: seen.append(1))
    assert fast_path.decoder_of(model) is None
    assert apart(util.response_logprobs(model, *tokens), expected) < 1e-4 and len(seen) == 1
    assert same_answers(write(model, PROMPTS, pad_left), answers) and len(seen) > 4
    handle.remove()
    both(model, lambda: util.response_logprobs(model, *tokens))


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_on_the_way_back_is_called(name, tokens, kind):
    model, seen = made(name), []
    expected = gradients(model, lambda: loss_of(model, tokens))
    getattr(layers_of(model)[1], f"register_{kind}")(lambda *_: seen.append(1))
    assert fast_path.decoder_of(model) is None
    assert same_gradients(gradients(model, lambda: loss_of(model, tokens)), expected)
    assert len(seen) == 1


def test_a_forward_that_somebody_put_in_place_is_called(name, tokens):
    model = made(name)
    layer, expected = layers_of(model)[1], util.response_logprobs(model, *tokens)
    own = layer.forward

    def mixed(*args, **more):
        out = own(*args, **more)
        first = out[0] if isinstance(out, tuple) else out
        mixture = first + first.roll(1, -1)
        return (mixture, *out[1:]) if isinstance(out, tuple) else mixture

    layer.forward = mixed
    assert fast_path.decoder_of(model) is None
    assert apart(util.response_logprobs(model, *tokens), expected) > 1e-3


def test_recomputed_activations_stay_recomputed(name, tokens):
    off = {other: 0.0 for kind, other in DROPS if kind == name}
    model = made(name, **off)
    expected = gradients(model, lambda: loss_of(model, tokens))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()  # a hook of the embedding, which the fast path calls too
    assert fast_path.decoder_of(model) is not None  # in eval mode
    assert fast_path.decoder_of(model.train()) is None
    work = functools.partial(gradients, model, lambda: loss_of(model, tokens))
    fast, slow = refused(model, work)
    assert same_gradients(fast, expected) and same_gradients(fast, slow)


class Louder(hf.LlamaForCausalLM):
    def forward(self, *args, **more):
        out = super().forward(*args, **more)
        out.logits = 3 * out.logits
        return out


class Shifted(hf.LlamaModel):
    def forward(self, *args, **more):
        out = super().forward(*args, **more)
        out.last_hidden_state = out.last_hidden_state + 0.3
        return out


def shifted(config):
    model = hf.LlamaForCausalLM(config)
    model.model.__class__ = Shifted
    return model


DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
ODD = {  # name: (family, unusual setting)
    "window": ("mistral", dict(sliding_window=3)),
    "half a window": (
        "qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "norms behind": ("opt", dict(do_layer_norm_before=False)),
    # Eager, because the oldest releases ignore these two settings in their other attention.
    "scaled by layer": (
        "gpt2", dict(scale_attn_by_inverse_layer_idx=True, attn_implementation="eager"),
    ),
    "not scaled": ("gpt2", dict(scale_attn_weights=False, attn_implementation="eager")),
    "dynamic rope": ("llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=5)),
    "a forward of its own": ("llama", dict(kind=Louder)),
    "a body of its own": ("llama", dict(kind=shifted)),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@torch.no_grad()
def test_a_model_that_does_something_of_its_own(odd, tokens, pad_left):
    family, changes = ODD[odd]
    model = made(family, **changes)
    assert fast_path.decoder_of(model) is None
    for work in (
        lambda model: util.response_logprobs(model, *tokens),
        lambda model: write(model, PROMPTS, pad_left),
    ):
        fast, slow = refused(model, lambda work=work: work(copy.deepcopy(model)))
        assert all(torch.equal(a, b) for a, b in zip(fast, slow))
    if odd != "dynamic rope":  # its cached keys are rotated differently
        ids, mask, logprobs = write(model, PROMPTS, pad_left)
        scored, _ = util.response_logprobs(model, *pad_left(PROMPTS, 44), ids, mask)
        assert (scored - logprobs).abs().max() < 1e-4
    if family != "opt":  # the same weights with usual settings
        usual = made(family)
        usual.load_state_dict(model.state_dict())
        found = util.response_logprobs(usual, *tokens), util.response_logprobs(model, *tokens)
        assert apart(*found) > 1e-3


def test_every_family_is_tested():
    assert {type(made(name).base_model) for name in KINDS} == set(fast_path.FAMILIES)


# ------------------------------------------------------------------------------------------------
# Matrix products


@pytest.mark.parametrize("width, quicker, inside", [
    (512, True, "medium"), (512, False, "highest"), (256, True, "highest"),
])  # fmt: skip
def test_only_wide_models_multiply_otherwise_and_only_within(monkeypatch, width, quicker, inside):
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: quicker)
    model = made("llama", hidden_size=width)
    with pytest.raises(ZeroDivisionError), matmul.fast_matmul(model):
        assert torch.get_float32_matmul_precision() == inside
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("gain, exact", [(2.0, True), (2.0, False), (1.0, True)])
def test_products_have_to_be_faster_and_exact(monkeypatch, capsys, gain, exact):
    own = torch.mm

    def mm(a, b):
        rounds = torch.get_float32_matmul_precision() == "medium" and not exact
        return own(a.bfloat16().float(), b) if rounds and a.dtype == torch.float32 else own(a, b)

    def timed(function, *arguments):
        return 1.0 / (gain if torch.get_float32_matmul_precision() == "medium" else 1)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(matmul, "timed", timed)
    if exact:  # independent of this machine's own "medium" precision
        monkeypatch.setattr(torch, "mm", lambda a, b: own(a.double(), b.double()).to(a.dtype))
    luck = torch.get_rng_state()
    assert matmul.onednn_is_better.__wrapped__(64) == (exact and gain > 1.2)
    assert torch.equal(torch.get_rng_state(), luck)
    assert torch.get_float32_matmul_precision() == "highest"
    assert ("times as fast" in capsys.readouterr().out) == (exact and gain > 1.2)


# ------------------------------------------------------------------------------------------------
# The comparison with the model's own forward


def other_rotary(patch):
    """Imitates a release of transformers whose rotary embedding turns the other way."""
    from transformers.models.llama import modeling_llama

    rotate_half = modeling_llama.rotate_half
    patch.setattr(modeling_llama, "rotate_half", lambda x: -rotate_half(x))


def other_layers(patch, **changes):
    """Makes the fast path of OPT compute a different layer."""

    def layers(body):
        decoder = fast_path.opt(body)
        made = [{name: way(layer) for name, way in changes.items()} for layer in decoder.layers]
        decoder.layers = [replace(layer, **new) for layer, new in zip(decoder.layers, made)]
        return decoder

    patch.setattr(fast_path, "FAMILIES", {hf.OPTModel: layers})


def other_activation(patch):
    other_layers(patch, act=lambda layer: torch.nn.functional.gelu)


def other_scale(patch):
    """Doubles the queries of the fast path."""
    qkv = fast_path.qkv
    patch.setattr(fast_path, "qkv", lambda *args: (2 * (found := qkv(*args))[0], *found[1:]))


def other_names(patch):
    """Imitates a release that renamed a module."""

    def layers(body):
        return body.decoder.final_norm

    patch.setattr(fast_path, "FAMILIES", {hf.OPTModel: layers})


def other_gradients(patch):
    """Keeps the values and halves a gradient."""

    def halved(layer):
        def act(x):
            y = layer.act(x)
            return y.detach() + 0.5 * (y - y.detach())

        return act

    other_layers(patch, act=halved)


WRONG = {
    other_rotary: ("llama", "its values are off by"),
    other_activation: ("opt", "its values are off by"),
    other_scale: ("gpt2", "its values are off by"),
    other_names: ("opt", "'OPTDecoder' object has no attribute 'final_norm'"),
}
WORKS = ["scoring", "generating", "values", "training"]


def work_of(kind, name, tokens, pad_left):
    """A fresh model and a function that returns the tensors to compare."""
    model = made(name, scorer=kind == "values")
    works = {
        "scoring": torch.no_grad()(lambda: util.response_logprobs(model, *tokens)),
        "generating": lambda: write(model, PROMPTS * 2, pad_left),
        "values": torch.no_grad()(lambda: [util.answer_values(model, *tokens)]),
        "training": lambda: [*gradients(model, lambda: loss_of(model, tokens)).values()],
    }
    return model, works[kind]


def own_work(model, work):
    with plainly():
        return work()


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("kind", WORKS)
def test_the_fast_path_steps_aside_where_the_models_own_forward_says_otherwise(
    wrong, kind, monkeypatch, capsys, pad_left, pad_right
):
    name, reason = WRONG[wrong]
    tokens = *pad_left(PROMPTS, 44), *pad_right(ANSWERS, 44)
    wrong(monkeypatch)
    model, work = work_of(kind, name, tokens, pad_left)
    with bodies(model) as calls:
        found = [work(), work()]
    assert calls
    for fast in found:
        assert all(torch.equal(a, b) for a, b in zip(fast, own_work(model, work), strict=True))
    said = capsys.readouterr().out
    assert said.count("\n") == said.count("The fast path is off for") == 1
    assert type(model).__name__ in said and reason in said and hf.__version__ in said
    untouched, usual = work_of(kind, "qwen2", tokens, pad_left)
    if wrong is other_rotary:  # other models still take the fast path
        both(untouched, usual)


def test_gradients_are_compared_too(monkeypatch, capsys, pad_left, pad_right):
    tokens = *pad_left(PROMPTS, 44), *pad_right(ANSWERS, 44)
    other_gradients(monkeypatch)
    model, work = work_of("training", "opt", tokens, pad_left)
    score = torch.no_grad()(lambda: util.response_logprobs(model, *tokens))
    both(model, score)
    assert not capsys.readouterr().out
    found = work()
    assert "its gradients are off by" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(found, own_work(model, work), strict=True))
    refused(model, score)  # from here on it takes the plain path only
    assert not capsys.readouterr().out


def test_an_adapter_is_another_use(monkeypatch, capsys, pad_left):
    policy = adapted("llama")
    weight = decoding.merged_weight
    forget = lambda m: weight(m.base_layer if hasattr(m, "base_layer") else m)  # noqa: E731
    monkeypatch.setattr(decoding, "merged_weight", forget)
    work = functools.partial(write, policy, PROMPTS * 2, pad_left)
    with policy.disable_adapter():
        both(policy, work)
    assert not capsys.readouterr().out
    found = work()
    assert "The fast path is off for LlamaForCausalLM" in capsys.readouterr().out
    with plainly():
        assert all(torch.equal(a, b) for a, b in zip(found, work()))


@pytest.mark.parametrize("name, part", [("opt", "dropout"), ("gpt2", "embd_pdrop")])
def test_the_comparison_leaves_no_trace_and_reads_little(name, part, pad_left, pad_right):
    model = made(name, **{part: 0.2}).train()
    layers_of(model)[0].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    tokens = *pad_left([[5, 9, 3] * 40] * 30, 44), *pad_right([[8, 1]] * 30, 44)
    read, own = [], fast_path.run_packed
    layers = watched(type(layers_of(model)[0]))
    with pytest.MonkeyPatch.context() as patch, layers as calls:
        patch.setattr(fast_path, "run_packed", lambda d, b: read.append(len(b.ids)) or own(d, b))
        torch.manual_seed(5)
        util.response_logprobs(model, *tokens)
        once = torch.get_rng_state()
        assert len(read) == 2 and read[0] <= 16 and all(c[0] * c[1] <= 16 for c in calls) and calls
        torch.manual_seed(5)
        util.response_logprobs(model, *tokens)
        assert torch.equal(torch.get_rng_state(), once)
        assert len(read) == 3 and len(calls) == 2
    assert modes == [module.training for module in model.modules()]
    assert all((parameter.grad == 7).all() for parameter in model.parameters())


def test_memory_that_runs_out_in_the_comparison_is_no_difference(monkeypatch, tokens):
    def full(*_):
        raise MemoryError

    model = made("opt")
    with monkeypatch.context() as patch:
        patch.setattr(fast_path, "run_packed", full)
        with pytest.raises(MemoryError):
            util.response_logprobs(model, *tokens)
    both(model, lambda: util.response_logprobs(model, *tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_agree(name, dtype, tokens, pad_left, capsys):
    model = made(name).to(dtype)
    work = functools.partial(gradients, model, lambda: loss_of(model, tokens))
    fast, slow = both(model, work)
    fast, slow = (torch.cat([g.float().flatten() for g in x.values()]) for x in (fast, slow))
    assert (fast - slow).norm() < 0.2 * slow.norm()  # single elements have larger rounding errors
    both(model, lambda: write(model, PROMPTS, pad_left))
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Memory of the plain path

BIG = 3001
SOFT = SHARED | dict(head_dim=8, vocab_size=BIG, initializer_range=0.3)
OTHERS = {
    "pythia": (hf.GPTNeoXConfig, SIZE | dict(intermediate_size=48)),
    "phi": (hf.PhiConfig, SHARED),
    "gemma2": (hf.Gemma2Config, SOFT | dict(final_logit_softcapping=2.0)),
    "cohere": (hf.CohereConfig, SHARED | dict(logit_scale=0.3)),
    "granite": (hf.GraniteConfig, SHARED | dict(logits_scaling=5.0)),
}


class Sizes(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def other(name):
    kind, shape = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = kind(**IDS | shape | dict(vocab_size=BIG, initializer_range=0.3))
        return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_the_plain_path_makes_only_those_logits_that_somebody_wants(
    name, learns, pad_left, pad_right, capsys
):
    model, answers = other(name), [[7] * 50, *ANSWERS[1:]]
    tokens = *pad_left(PROMPTS, 44), *pad_right(answers, 44)
    wanted = sum(map(len, answers))
    with torch.set_grad_enabled(learns):
        util.answer_logits(model, *tokens)
        with Sizes() as sizes:
            logits = util.answer_logits(model, *tokens)
        with Sizes() as scoring:
            logprobs, _ = util.response_logprobs(model, *tokens)
    assert logits.shape == (wanted, BIG) and logits.requires_grad == learns
    assert sizes.largest == scoring.largest == wanted * BIG
    ids = [torch.tensor([prompt + answer]) for prompt, answer in zip(PROMPTS, answers)]
    own = [
        model(input_ids=row).logits[0, len(prompt) - 1 : -1] for row, prompt in zip(ids, PROMPTS)
    ]
    assert (logits - torch.cat(own)).abs().max() < 1e-4
    assert not capsys.readouterr().out


def test_a_model_whose_logits_depend_on_their_neighbours_gets_whole_rows(pad_left, pad_right):
    class Mixing(hf.PhiForCausalLM):
        def forward(self, *args, **more):
            out = super().forward(*args, **more)
            out.logits = out.logits - out.logits.mean(1, keepdim=True)
            return out

    config = hf.PhiConfig(**IDS | SHARED)
    with torch.random.fork_rng(devices=[]):
        model = Mixing(config).eval()
    ids, mask = pad_left([[5, 9, 3, 7, 8], [7, 2, 6, 4, 3]])
    wanted = mask.clone()
    found, _ = fast_path.hidden_states(model, ids, mask, wanted)
    own = model(input_ids=ids).logits.flatten(0, 1)
    assert (found - own).abs().max() < 1e-4
    assert agreement.is_off(model, "short head")


def test_hooks_on_the_plain_path_see_each_batch_once(pad_left, pad_right):
    model, seen = other("phi"), []
    layers_of(model)[0].register_forward_hook(lambda *_: seen.append(1))
    util.response_logprobs(model, *pad_left(PROMPTS, 44), *pad_right(ANSWERS, 44))
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------
# Machines and releases


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_layout_waits_for_a_gpu_once(pad_left, pad_right):
    tokens = [x.cuda() for x in (*pad_left(ALIKE, 44), *pad_right(REPLIES, 44))]
    args = *util.before_each_token(*tokens), util.before_answers(tokens[0], tokens[3])
    fast_path.layout(*args)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as waits:
            made = fast_path.layout(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
    host = fast_path.layout(*(x.cpu() for x in args))
    assert torch.equal(made.ids.cpu(), host.ids) and torch.equal(made.wanted.cpu(), host.wanted)


def test_the_tested_releases_begin_where_the_project_begins(root):
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(need for need in needs if need.startswith("transformers>="))
    assert agreement.TESTED[0] == floor.removeprefix("transformers>=") + ".0"


@pytest.mark.slow
@pytest.mark.parametrize("release", agreement.TESTED)
def test_this_file_passes_with_the_oldest_and_the_newest_release(release, root, tmp_path):
    """Needs a network: pip installs transformers and the versions that it requires."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path), f"transformers=={release}"], check=True)
    needs = next(metadata.distributions(path=[str(tmp_path)])).requires
    own = re.compile(r"(tokenizers|huggingface-hub|safetensors)[^;]*$")
    subprocess.run([*pip, str(tmp_path), *filter(own.match, needs)], check=True)
    paths = os.pathsep.join([str(tmp_path), str(root)])
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_fast_path.py", "-q", "-m", "not slow"],
        cwd=root, env=os.environ | {"PYTHONPATH": paths, "EXPECTED_TRANSFORMERS": release},
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-3000:]


def test_the_release_is_the_one_that_was_asked_for():
    assert hf.__version__ == os.environ.get("EXPECTED_TRANSFORMERS", hf.__version__)
