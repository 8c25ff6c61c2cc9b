"""The fast path says what the plain one says; it is taken where it should be, and only there."""

import copy
import functools
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import util
from lab import swift

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
# One text twice, two answers to one prompt, a start that is a prompt in one row and not in another.
ALIKE = [[5, 9, 3], [7, 2], [5, 9], [5, 9, 3], [5, 9, 3]]
REPLIES = [[8, 8, 1], [1], [3, 8, 12, 1], [8, 8, 1], [8, 30, 31, 1]]
BATCHES = {"padded": (PROMPTS, ANSWERS), "full": (EQUAL, FULL), "alike": (ALIKE, REPLIES)}
STOPS = list(range(3, VOCABULARY, 7))


def made(name, scorer=False, kind=None, **changes):
    """A model in eval mode. Biases and norms are random too, or nobody would miss them."""
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
    """One model of each family; tests leave its weights alone."""
    return made(name)


@pytest.fixture(params=[("padded", 1), ("padded", 8), ("full", 1), ("alike", 8)], ids=str)
def tokens(request, monkeypatch, pad_left, pad_right):
    """The four tensors of scoring: for each of the ways in which rows attend side by side."""
    name, groups = request.param
    prompts, answers = BATCHES[name]
    monkeypatch.setattr(swift, "GROUPS", groups)
    found = *pad_left(prompts, 44), *pad_right(answers, 44)
    read = util.before_each_token(*found)
    made = swift.layout(*read, util.before_answers(found[0], found[3]))
    assert len(made.groups) == min(groups, len(prompts))
    assert (made.slots is None) == (request.param in [("padded", 8), ("full", 1)])
    return found


@contextmanager
def plainly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swift, "FAMILIES", {})
        yield


@contextmanager
def watched(kind, when=lambda module: True):
    """The shape of what enters, for each call of a module of this kind."""
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
    body = swift.inner(model).base_model
    return getattr(body, "h", None) or getattr(body, "decoder", body).layers


def bodies(model):
    return watched(type(layers_of(model)[0]))


def both(model, work):
    """What `work` gives on the fast path and on the plain one; and it does take the two."""
    with bodies(model) as calls:
        fast = work()
        assert not calls, "the model's own forward was called"
        with plainly():
            slow = work()
        assert calls
    return fast, slow


def refused(model, work):
    """The same where the fast path must not be taken."""
    with bodies(model) as calls:
        found = work()
        assert calls, "the model's own forward was not called"
    with plainly():
        return found, work()


def apart(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def write(model, prompts, pad_left, temperature=1.0, stops=STOPS):
    """Ids, mask and log-probs of answers that end early in some rows."""
    return util.generate(
        model, *pad_left(prompts, 44), max_new_tokens=16, temperature=temperature,
        eos_token_id=stops, pad_token_id=PAD, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip


def same_answers(fast, slow):
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    return (fast[2] - slow[2]).abs().max() < 1e-5


def gradients(model, loss_of):
    model.zero_grad()
    loss_of().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, tokens):
    """Something in which each log-prob and each entropy has a weight of its own."""
    logprobs, entropy = util.response_logprobs(model, *tokens, temperature=0.8)
    weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    return (weights * logprobs - 0.5 * weights.flip(0) * entropy).sum()


def same_gradients(fast, slow):
    assert fast.keys() == slow.keys() and slow
    largest = max(g.abs().max().item() for g in slow.values())
    return largest > 0.1 and apart(fast.values(), slow.values()) < 1e-5 * largest


# ------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_logprobs_and_entropies(model, tokens, temperature):
    work = functools.partial(util.response_logprobs, model, *tokens, temperature=temperature)
    fast, slow = both(model, work)
    assert apart(fast, slow) < 1e-5 and slow[1].max() > 0.5
    assert torch.equal(work(entropy=False)[0], fast[0]) and not work(entropy=False)[1].any()


@torch.no_grad()
def test_values_and_scores(name, tokens):
    scorer = made(name, scorer=True)
    for work in (util.answer_values, util.answer_scores):
        fast, slow = both(scorer, lambda work=work: work(scorer, *tokens))
        assert apart([fast], [slow]) < 1e-5 and slow.std() > 0.05


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
    assert not temperature or len(lengths) > 2  # several left, at different times
    if temperature:
        scored, _ = util.response_logprobs(model, *pad_left(prompts * 2, 44), *fast[:2])
        assert (scored - fast[2]).abs().max() < 1e-5


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["unequal", "equal"])
def test_a_prompt_that_is_to_be_answered_several_times_is_read_once(model, pad_left, prompts):
    several = [prompt for prompt in prompts for _ in range(5)]
    embedded = model.get_input_embeddings()
    with watched(type(embedded), lambda module: module is embedded) as shapes:
        fast, slow = both(model, lambda: write(model, several, pad_left, stops=None))
    assert same_answers(fast, slow) and len({tuple(row) for row in fast[0].tolist()}) > 8
    assert shapes[0].numel() == sum(map(len, prompts)) and shapes[1].numel() == len(several)
    read = [shape for shape in shapes if len(shape) == 2 and shape[1] > 1]
    assert [tuple(shape) for shape in read] == [(len(prompts), max(map(len, prompts)))]


@torch.no_grad()
def test_what_rows_have_in_common_at_their_start_is_read_once(model, pad_left, pad_right):
    """A reward model reads pairs, GRPO groups: most of what they read is the same prompt."""
    tokens = *pad_left(ALIKE, 44), *pad_right(REPLIES, 44)
    # Nobody reads the last column: it foresees nothing.
    texts = [prompt + answer[:3] for prompt, answer in zip(ALIKE, REPLIES)]
    different = {tuple(text[: n + 1]) for text in texts for n in range(len(text))}
    embedded = model.get_input_embeddings()
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
    assert apart(fast, slow) < 1e-5
    assert apart(slow, util.response_logprobs(made("llama"), *tokens)) > 1e-2  # it does matter
    assert same_answers(*both(model, lambda: write(model, PROMPTS, pad_left)))


def adapted(name):
    """A policy with an adapter that has something to say."""
    shape = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(made(name), shape).eval()
    with torch.no_grad():
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
            assert apart(found, slow) < 1e-5
            assert (apart(found, expected) < 1e-5) == (state is not nullcontext)
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
    assert fast.dtype == torch.float32 and (fast - exact).abs().max() > 1e-4  # halves they are
    error = (slow - exact).abs().max()
    assert (fast - exact).abs().max() < 3 * error and error < 0.3
    assert (scored - written[2]).abs().max() < 0.3


@pytest.mark.parametrize("name", KINDS)
def test_weights_packed_for_the_machine(name, monkeypatch, pad_left):
    used, ask = [], swift.worth_reordering
    monkeypatch.setattr(swift, "WORTH_PACKING", 1)
    monkeypatch.setattr(swift, "worth_reordering", lambda w: used.append(ask(w)) or used[-1])
    for model in (made(name), adapted(name)):
        assert same_answers(*both(model, lambda model=model: write(model, PROMPTS * 2, pad_left)))
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    assert used and all(used)


def test_many_tokens_without_gradients_go_through_the_head_in_pieces(model, pad_left, pad_right):
    answers = [[(7 * i + t) % 59 + 2 for t in range(40 - i)] for i in range(5)]
    tokens = *pad_left(EQUAL + EQUAL[:1]), *pad_right(answers)
    whole = util.response_logprobs(model, *tokens)
    with torch.no_grad(), watched(torch.nn.Linear, lambda m: m is model.lm_head) as shapes:
        pieces = util.response_logprobs(model, *tokens)
    assert [len(shape) for shape in shapes] == [2, 2] and [s[0] for s in shapes] == [128, 62]
    assert whole[0].requires_grad and not pieces[0].requires_grad
    assert apart(whole, pieces) < 1e-5


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
def test_dropout_acts_as_it_does_on_the_plain_path(name, part, tokens):
    off = {other: 0.0 for kind, other in DROPS if kind == name}
    model, quiet = made(name, **off | {part: 0.2}), made(name, **off).train()
    (calm, _), _ = both(quiet, lambda: util.response_logprobs(quiet, *tokens))
    still, _ = both(model, lambda: util.response_logprobs(model, *tokens)[0])
    assert torch.equal(calm, still)  # as many as none in train mode, none at all in eval mode

    def spread():
        return torch.stack([util.response_logprobs(model, *tokens)[0] for _ in range(150)]).std(0)

    model.train()
    torch.manual_seed(0)
    fast, slow = both(model, spread)
    real = tokens[3]
    assert slow[real].mean() > 0.02
    assert 0.85 < fast[real].mean() / slow[real].mean() < 1.15


# ------------------------------------------------------------------------------------------------
# Where the plain path has to do it


@torch.no_grad()
def test_rows_with_gaps_or_without_a_prompt(model, pad_left, pad_right):
    for hide in [(0, slice(0, 7)), (2, slice(3, 5))]:
        tokens = [*pad_left(PROMPTS, 44), *pad_right(ANSWERS, 44)]
        if hide[0] == 0:
            tokens = [x[:2] for x in tokens]
        tokens[1][hide] = False
        assert swift.decoder_of(model) is not None
        fast, slow = refused(model, lambda tokens=tokens: util.response_logprobs(model, *tokens))
        assert all(torch.equal(a, b) for a, b in zip(fast, slow)) and fast[0][1].any()
        ids, mask = tokens[:2]
        work = functools.partial(util.generate, model, ids, mask, max_new_tokens=4, temperature=0)
        work = functools.partial(work, eos_token_id=None, pad_token_id=PAD)
        assert all(torch.equal(a, b) for a, b in zip(*refused(model, work)))
    first = torch.zeros_like(mask).scatter(1, mask.int().argmax(1, keepdim=True), True)
    assert not mask[2].all() and swift.layout(ids, mask, first) is None  # before the gap, too


HOOKS = "forward_hook", "forward_pre_hook"


@pytest.mark.parametrize("kind", [f"register_{hook}" for hook in HOOKS])
def test_a_hook_on_a_layer_is_called(name, tokens, pad_left, kind):
    model, seen = made(name), []
    expected, answers = util.response_logprobs(model, *tokens), write(model, PROMPTS, pad_left)
    handle = getattr(layers_of(model)[1], kind)(lambda *_: seen.append(1))
    assert swift.decoder_of(model) is None
    assert apart(util.response_logprobs(model, *tokens), expected) < 1e-5 and len(seen) == 1
    assert same_answers(write(model, PROMPTS, pad_left), answers) and len(seen) > 4
    handle.remove()
    both(model, lambda: util.response_logprobs(model, *tokens))


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_on_the_way_back_is_called(name, tokens, kind):
    model, seen = made(name), []
    expected = gradients(model, lambda: loss_of(model, tokens))
    getattr(layers_of(model)[1], f"register_{kind}")(lambda *_: seen.append(1))
    assert swift.decoder_of(model) is None
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
    assert swift.decoder_of(model) is None
    assert apart(util.response_logprobs(model, *tokens), expected) > 1e-3


def test_recomputed_activations_stay_recomputed(name, tokens):
    off = {other: 0.0 for kind, other in DROPS if kind == name}
    model = made(name, **off)
    expected = gradients(model, lambda: loss_of(model, tokens))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()  # a hook, and of the embedding: the fast path calls it too
    assert swift.decoder_of(model) is not None  # eval mode
    assert swift.decoder_of(model.train()) is None
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
ODD = {  # name: (family, what is odd)
    "window": ("mistral", dict(sliding_window=3)),
    "half a window": (
        "qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "norms behind": ("opt", dict(do_layer_norm_before=False)),
    "scaled by layer": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    "not scaled": ("gpt2", dict(scale_attn_weights=False)),
    "dynamic rope": ("llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=5)),
    "a forward of its own": ("llama", dict(kind=Louder)),
    "a body of its own": ("llama", dict(kind=shifted)),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@torch.no_grad()
def test_a_model_that_does_something_of_its_own(odd, tokens, pad_left):
    family, changes = ODD[odd]
    model = made(family, **changes)
    assert swift.decoder_of(model) is None
    for work in (
        lambda model: util.response_logprobs(model, *tokens),
        lambda model: write(model, PROMPTS, pad_left),
    ):
        fast, slow = refused(model, lambda work=work: work(copy.deepcopy(model)))
        assert all(torch.equal(a, b) for a, b in zip(fast, slow))
    if family != "opt":  # the same weights, used in the usual way
        usual = made(family)
        usual.load_state_dict(model.state_dict())
        found = util.response_logprobs(usual, *tokens), util.response_logprobs(model, *tokens)
        assert apart(*found) > 1e-3


def test_every_family_is_tested():
    assert {type(made(name).base_model) for name in KINDS} == set(swift.FAMILIES)


# ------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("width, quicker, inside", [
    (512, True, "medium"), (512, False, "highest"), (256, True, "highest"),
])  # fmt: skip
def test_only_wide_models_multiply_otherwise_and_only_within(monkeypatch, width, quicker, inside):
    monkeypatch.setattr(swift, "quicker", lambda: quicker)
    model = made("llama", hidden_size=width)
    with pytest.raises(ZeroDivisionError), swift.products(model):
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
    monkeypatch.setattr(swift, "timed", timed)
    if exact:  # whatever this machine's own "medium" does
        monkeypatch.setattr(torch, "mm", lambda a, b: own(a.double(), b.double()).to(a.dtype))
    luck = torch.get_rng_state()
    assert swift.quicker.__wrapped__(64) == (exact and gain > 1.2)
    assert torch.equal(torch.get_rng_state(), luck)
    assert torch.get_float32_matmul_precision() == "highest"
    assert ("times as fast" in capsys.readouterr().out) == (exact and gain > 1.2)
