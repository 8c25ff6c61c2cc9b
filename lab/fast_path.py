"""Forward passes of any causal language model, and a fast path for six families.

OPT, GPT-2, Llama, Mistral, Qwen2 and Qwen3 are fast for four reasons. Rows are packed one behind
the other without padding; only attention puts them side by side. Tokens that rows share at their
start are computed once. Behind the last attention only the wanted positions go on. Generation
multiplies by fused weights, and its keys and values have room from the beginning.

This repeats code of transformers, which may change. So `agree` compares the fast path with the
model's own forward, the plain path, on the first batch of each model and use. Where they differ, it
says so, and the plain path does the work, as it does for every other model. TESTED names the
releases that the tests of this file run with; beyond them the comparison alone decides.
Whoever wants the plain path only empties FAMILIES.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from lab.trouble import out_of_memory

TESTED = "5.0.0", "5.24.0"  # oldest and newest release of transformers
WIDE = 512  # hidden size from which oneDNN's products are worth their call
BIG = 2**19  # elements from which a matrix is worth packing for oneDNN
GROUPS = 8  # of rows of similar length that attend side by side on a CPU; a GPU takes all at once
# How far two paths to the same numbers may lie apart, as a share of their norm.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# {model: {path: {(use, ...): whether it agrees with the model's own forward}}}, filled by `agree`
CHECKED = WeakKeyDictionary()


# --------------------------------------------------------------------------------------------------
# Any model


def unwrapped(model):
    """The model inside its adapters, which are part of its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward(model, ids, mask, **extra):
    """The model's own forward over padded rows, with those arguments that it knows.

    Positions count real tokens only: padding on the left must not shift the text.
    """
    known = inspect.signature(model.forward).parameters
    extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    extra = {name: value for name, value in extra.items() if name in known}
    return model(input_ids=ids, attention_mask=mask.long(), **extra)


def hidden_states(model, ids, mask, wanted):
    """Last hidden states where `wanted`, (B, T), is set, and the head that makes logits of them.

    On the plain path these are the logits already, (N, V), and the head leaves them alone.
    """
    model = unwrapped(model)
    hidden = packed_forward(model, ids, mask, wanted)
    if hidden is not None:
        return hidden, model.lm_head
    return plain_logits(model, ids, mask, wanted), torch.nn.Identity()


def scores(scorer, ids, mask, wanted):
    """The scorer's numbers where `wanted`, (B, T), is set, (N,)."""
    scorer = unwrapped(scorer)
    hidden = packed_forward(scorer, ids, mask, wanted)
    if hidden is None:
        hidden = forward(scorer.base_model, ids, mask, use_cache=False).last_hidden_state[wanted]
    return scorer.score(hidden)[:, 0].float()


def plain_logits(model, ids, mask, wanted):
    """The model's own logits where `wanted` is set, (N, V).

    Its head, and whatever it does to logits behind, gets these positions as one row. Where that is
    not the same, the head gets all rows from the first wanted column on.
    """

    def narrow(ids, mask, wanted):
        def keep_wanted(module, args):
            return args[0][wanted][None], *args[1:]

        with model.get_output_embeddings().register_forward_pre_hook(keep_wanted):
            return forward(model, ids, mask, use_cache=False).logits.squeeze(0)

    def whole(ids, mask, wanted):
        columns = ids.shape[1] - int(wanted.any(0).int().argmax())
        logits = forward(model, ids, mask, use_cache=False, logits_to_keep=columns).logits
        return logits[:, -columns:][wanted[:, -columns:]]

    def check(way):
        return lambda ids, mask: way(ids, mask, mask)

    hooked = any(map(has_hooks, model.modules()))  # somebody's hook shall see each batch once
    if not hooked and agree(model, "short head", "", ids, mask, check(narrow), check(whole)):
        return narrow(ids, mask, wanted)
    return whole(ids, mask, wanted)


def start_decoding(model, prompt_ids, prompt_mask, room):
    """A decoder that has read the prompts and can go on for `room` tokens, and the logits behind
    them, (B, V)."""
    model, last = unwrapped(model), torch.zeros_like(prompt_mask)
    last[:, -1] = True
    decoder = decoder_of(model)
    batch = layout(prompt_ids, prompt_mask, last) if decoder else None
    if batch:
        cached = CachedDecoder(model, decoder, room)
        paths = cached.replay, lambda ids, mask: replay(model, ids, mask)
        if agree(model, "fast path", "generating", prompt_ids, prompt_mask, *paths):
            return cached, cached.read(batch)
    plain, prompts = PlainDecoder(model), torch.stack([prompt_ids, prompt_mask.long()], 1)
    prompts, copies = prompts.unique(dim=0, return_inverse=True)  # read once, answered often
    logits = plain.read(prompts[:, 0], prompts[:, 1].bool())
    plain.keep(copies)
    return plain, logits[copies]


class PlainDecoder:
    """Generation with the model's own forward and cache."""

    def __init__(self, model):
        self.model, self.cache = model, transformers.DynamicCache(config=model.config)

    def read(self, ids, mask):
        """Logits behind the last column of ids, (B, V); the mask covers all that was read."""
        self.mask, more = mask, dict(past_key_values=self.cache, logits_to_keep=1)
        return forward(self.model, ids, mask, use_cache=True, **more).logits[:, -1]

    def next(self, token):
        """Logits behind one more token in each row, (B, V)."""
        return self.read(token[:, None], F.pad(self.mask, (0, 1), value=True))

    def keep(self, rows):
        """Goes on with these rows only; a row may be named several times."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


@contextmanager
def fast_matmul(model):
    """Inside, a wide model on the CPU multiplies with oneDNN, if that is faster and as exact."""
    before = torch.get_float32_matmul_precision()
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    if model.device.type == "cpu" and width >= WIDE and onednn_is_better():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def onednn_is_better(size=1024):
    """Whether precision "medium", oneDNN's way, is faster here and yet float32; measured once.

    On some processors it rounds to half precision instead: then nothing changes.
    """
    rng = torch.Generator().manual_seed(0)
    x, before = torch.randn(2, size, size, generator=rng), torch.get_float32_matmul_precision()
    seconds, error = {}, {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        seconds[precision] = min(timed(torch.mm, *x) for _ in range(4))
        error[precision] = (torch.mm(*x) - torch.mm(*x.double())).abs().max() / size**0.5
    torch.set_float32_matmul_precision(before)
    gain = seconds["highest"] / seconds["medium"]
    if error["medium"] > 4 * error["highest"] or gain < 1.2:
        return False
    print(f"oneDNN multiplies matrices {gain:.1f} times as fast here, as exactly: it does so.")
    return True


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# The comparison with the model's own forward


def agree(model, path, use, ids, mask, fast, plain):
    """Whether `fast` and `plain` give the same for the first tokens of a few rows of this batch:
    the same values and, where the model learns, the same gradients.

    Each model compares once for each use, precision and kind of layers; after one difference it
    takes the plain path for good. Without dropout, so no random number is drawn; modes and `.grad`
    stay as they are.
    """
    known = CHECKED.setdefault(model, {}).setdefault(path, {})
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    state = "merged", "disable_adapters"  # of an adapter
    kinds = {(type(m), *(getattr(m, name, None) for name in state)) for m in model.modules()}
    key = use, learns, tolerance(model), frozenset(kinds)
    if False in known.values() or key in known:
        return all(known.values())
    texts = [ids[i][mask[i]][: 8 - n] for n, i in enumerate(sorted({0, len(ids) // 2}))]
    texts = [text for text in texts if len(text)]
    if not texts:
        return False
    real = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).bool()
    sample, modes = (pad_sequence(texts, batch_first=True), real), [*map(mode, model.modules())]
    model.eval()
    try:
        expected = outcome(model, plain(*sample), learns)
        found = outcome(model, fast(*sample), learns)
        off = {name: distance(found[name], expected[name]) for name in expected}
        reason = [f"its {name} are off by {x:.1g}" for name, x in off.items() if x > key[2]]
    except Exception as error:  # whatever another release has renamed
        if out_of_memory(error):
            raise
        reason = [f"{type(error).__name__}: {error}"]
    finally:
        for module, training in modes:
            module.training = training
    known[key] = not reason
    for sentence in reason[:1]:
        step_aside(model, path, sentence)
    return known[key]


def step_aside(model, path, reason):
    CHECKED.setdefault(model, {}).setdefault(path, {})["refused"] = False
    versions = "transformers {}, tested with {} to {}".format(transformers.__version__, *TESTED)
    print(
        f"The {path} steps aside for {type(model).__name__}: {reason} ({versions}). The model's "
        "own forward does the work: as exact, but slower or with more memory."
    )


def mode(module):
    return module, module.training


def tolerance(model):
    """That of the least exact numbers that the model's products are made of."""
    device, dtypes = model.device.type, {p.dtype for p in model.parameters()}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # of 4 bits
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if device != "cpu" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many digits
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in dtypes)


def outcome(model, x, learns):
    """What comes out, and the gradients that it sends to the first and the last layer."""
    x = x.float() - x.float().mean(-1, keepdim=True)  # a softmax does not see a common shift
    layers = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), [model])
    weights = [*layers[0].parameters(), *layers[-1].parameters()]
    weights = [weight for weight in weights if weight.requires_grad]
    if not learns or not weights:
        return {"values": x.detach()}
    total = (x * torch.arange(x.numel(), device=x.device).cos().view_as(x)).sum()
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads)]
    return {"values": x.detach(), "gradients": torch.cat([g.flatten() for g in flat])}


def distance(found, expected):
    """How far apart they are, as a share of the norm; what is no number in both is the same."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-20))


def replay(model, ids, mask):
    """Logits (B, 3, V) behind each row, and behind its first token once more, and again."""
    ends = mask.sum(1, keepdim=True)  # (B, 1)
    more = ends + torch.arange(2, device=ids.device)
    ids = F.pad(ids, (0, 2)).scatter(1, more, ids[:, :1].expand_as(more))
    mask = F.pad(mask, (0, 2)).scatter(1, more, True)
    logits = forward(model, ids, mask, use_cache=False).logits
    places = ends - 1 + torch.arange(3, device=ids.device)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], places]


# --------------------------------------------------------------------------------------------------
# Families


@dataclass
class Layer:
    """One decoder layer, in parts that go by the same names in every family."""

    norm1: Callable
    qkv: list  # one matrix or three
    qk_norms: tuple  # of queries and keys, where a family has them
    out: Callable
    norm2: Callable
    up: list
    act: Callable
    down: Callable
    dropout: float = 0.0  # of what is added to the residual stream
    attention_dropout: float = 0.0


@dataclass
class Decoder:
    embed: Callable  # (ids, positions) -> (N, D)
    rotary: Callable | None  # positions -> cosines and sines, (N, 1, d)
    layers: list
    norm: Callable
    heads: int
    kv_heads: int
    head_dim: int


def opt(body):
    decoder, config = body.decoder, body.config
    skips = body.training and decoder.layerdrop  # whole layers, now and then
    if not config.do_layer_norm_before or decoder.project_in or skips:
        return None
    layers = [
        Layer(
            layer.self_attn_layer_norm, [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"], (),
            layer.self_attn.out_proj, layer.final_layer_norm, [layer.fc1], layer.activation_fn,
            layer.fc2, layer.dropout, layer.self_attn.dropout,
        )
        for layer in decoder.layers
    ]  # fmt: skip

    def embed(ids, positions):
        return decoder.embed_tokens(ids) + decoder.embed_positions(None, position_ids=positions)

    heads = config.num_attention_heads
    norm = decoder.final_layer_norm or torch.nn.Identity()
    return Decoder(embed, None, layers, norm, heads, heads, config.hidden_size // heads)


def gpt2(body):
    config = body.config
    scaled = config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn
    if scaled or not config.scale_attn_weights or config.add_cross_attention:
        return None
    layers = [
        Layer(
            layer.ln_1, [layer.attn.c_attn], (), layer.attn.c_proj, layer.ln_2, [layer.mlp.c_fc],
            layer.mlp.act, layer.mlp.c_proj, layer.mlp.dropout.p, layer.attn.attn_dropout.p,
        )
        for layer in body.h
    ]  # fmt: skip

    def embed(ids, positions):
        return body.drop(body.wte(ids) + body.wpe(positions))

    heads = config.num_attention_heads
    return Decoder(embed, None, layers, body.ln_f, heads, heads, config.hidden_size // heads)


def llama(body):
    """Llama, Mistral and Qwen: rotary positions, gated MLPs, fewer keys than queries."""
    config = body.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "sliding_window", None) and "sliding_attention" in kinds
    if slides or body.rotary_emb.rope_type in ("dynamic", "longrope"):
        return None
    layers = []
    for layer in body.layers:
        attn, mlp = layer.self_attn, layer.mlp
        qk_norms = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else ()
        layers.append(
            Layer(
                layer.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj], qk_norms,
                attn.o_proj, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj],
                lambda gate, up, act=mlp.act_fn: act(gate) * up, mlp.down_proj,
                attention_dropout=attn.attention_dropout,
            )
        )  # fmt: skip

    def rotary(positions):
        return [x[0][:, None] for x in body.rotary_emb(body.norm.weight, positions[None])]

    return Decoder(
        lambda ids, positions: body.embed_tokens(ids), rotary, layers, body.norm,
        config.num_attention_heads, config.num_key_value_heads, body.layers[0].self_attn.head_dim,
    )  # fmt: skip


FAMILIES = {
    transformers.OPTModel: opt,
    transformers.GPT2Model: gpt2,
    transformers.LlamaModel: llama,
    transformers.MistralModel: llama,
    transformers.Qwen2Model: llama,
    transformers.Qwen3Model: llama,
}


def has_hooks(module):
    """Whether a module's forward has been replaced or watched; the fast path calls embeddings."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    watched = any(hooks) and not isinstance(module, torch.nn.Embedding)
    return watched or "forward" in vars(module) or hasattr(module, "_hf_hook")


def decoder_of(model):
    """The parts of a model whose forward is just what transformers ships; None for any other."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if type(body) not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return None
    if False in CHECKED.get(model, {}).get("fast path", {}).values():
        return None
    for module in model.modules():
        if has_hooks(module) or (module.training and getattr(module, "gradient_checkpointing", 0)):
            return None
    try:
        decoder = FAMILIES[type(body)](body)
    except AttributeError as error:
        step_aside(model, "fast path", error)
        return None
    if decoder and not body.training:
        still = dict(dropout=0.0, attention_dropout=0.0)
        decoder.layers = [replace(layer, **still) for layer in decoder.layers]
    return decoder


# --------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class PackedBatch:
    """The real tokens of a batch one behind the other; what rows share at their start only once."""

    lengths: torch.Tensor  # (B,), of the rows
    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,), counted from the row's first real token
    wanted: torch.Tensor  # which tokens are wanted, in the order of the batch
    copies: torch.Tensor | None  # which of `wanted` each wanted position takes; None: one each
    twins: torch.Tensor | None  # (B,), the row that attends for each; None: every row for itself
    groups: list  # (rows, length): rows of similar length, which attend side by side
    slots: torch.Tensor | None  # the token in each slot of each group's rows; None: one in each
    home: torch.Tensor | None  # (N,), the slot in which each token is at home

    def attention(self, q, k, v, dropout=0.0, store=None):
        """What each token sees of its own row up to itself, (N, heads * d).

        `store(rows, k, v)` may take the keys and values of each group along.
        """
        if self.slots is not None:
            q, k, v = (x.index_select(0, self.slots) for x in (q, k, v))
        sizes, seen = [len(rows) * length for rows, length in self.groups], []
        head_dim = q.shape[-1]
        for (rows, length), *parts in zip(self.groups, *(x.split(sizes) for x in (q, k, v))):
            # (rows * length, heads, d) -> (rows, heads, length, d), padded on the right
            shape = len(rows), length, -1, head_dim
            q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
            if store:
                store(rows, k, v)
            if q.shape[1] > k.shape[1]:  # several queries share a key
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            seen.append(out.transpose(1, 2).reshape(len(rows) * length, -1))
        seen = torch.cat(seen)
        return seen if self.home is None else seen.index_select(0, self.home)


def layout(ids, mask, wanted):
    """Padded rows (B, T) as a packed batch. None where a row has gaps or no tokens, or something is
    wanted where there is no token.

    All of it is worked out on the CPU: a GPU waits for one copy there and starts one back.
    """
    device = ids.device
    ids, mask, wanted = torch.stack([ids, mask.long(), wanted.long()]).cpu()
    lengths, start = mask.sum(1), mask.argmax(1)
    L = max(int(lengths.max()), 1)
    slot = torch.arange(L)
    columns = (start[:, None] + slot).clamp(max=mask.shape[1] - 1)  # (B, L): rows moved to the left
    real = slot < lengths[:, None]
    asked = wanted.gather(1, columns).bool() & real
    gaps = not mask.gather(1, columns)[real].all() or not lengths.all()
    if gaps or asked.sum() != wanted.sum():
        return None
    ids = ids.gather(1, columns).masked_fill(~real, -1)
    # Rows that start alike are neighbours in alphabetical order: the first of them has the tokens.
    texts = ids.tolist()
    order = torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))
    same = (ids[order[1:]] == ids[order[:-1]]).int().cummin(1).values  # as the row above, so far
    first = torch.where(F.pad(same, (0, 0, 1, 0)) > 0, 0, torch.arange(len(ids))[:, None])
    owner = torch.empty_like(columns)  # (B, L), the row that has each token
    owner[order] = order[first.cummax(0).values]
    own = real & (owner == torch.arange(len(ids))[:, None])
    twins = owner.gather(1, lengths[:, None] - 1)[:, 0]  # all of a copy belongs to its twin
    order = lengths.argsort(stable=True)
    order = order[own.any(1)[order]]  # the rows that attend, short ones first
    number = torch.empty_like(columns)  # of each slot's token among all
    number[order] = own[order].flatten().cumsum(0).view(-1, L) - 1
    number = number.gather(0, owner).masked_fill(~real, 0)  # nobody looks at an empty slot
    rows = order.split(-(-len(order) // (GROUPS if device.type == "cpu" else 1)))
    sizes = [int(lengths[part].max()) for part in rows]
    slots, home = (
        torch.cat([x[part, :size].flatten() for part, size in zip(rows, sizes)])
        for x in (number, own)
    )
    home = home.nonzero()[:, 0]
    tokens, copies = number[asked].unique(return_inverse=True)
    if len(tokens) == len(copies):
        tokens, copies = number[asked], None
    twins = twins if len(order) < len(ids) else None
    if len(slots) == len(home):
        slots = home = None
    own, ids = own[order], ids[order]
    found = lengths, ids[own], own.nonzero()[:, 1], tokens, copies, twins
    *found, slots, home = move([*rows, *found, slots, home], device)
    rows, found = found[: len(rows)], found[len(rows) :]
    return PackedBatch(*found, list(zip(rows, sizes)), slots, home)


def move(vectors, device):
    """Vectors of numbers, or None in their place, to the device: in one piece."""
    if device.type == "cpu":
        return vectors
    whole = torch.cat([x for x in vectors if x is not None])
    whole = whole.pin_memory() if device.type == "cuda" else whole
    parts = whole.to(device, non_blocking=True).split([len(x) for x in vectors if x is not None])
    parts = iter(parts)
    return [x if x is None else next(parts) for x in vectors]


def packed_forward(model, ids, mask, wanted):
    """Last hidden states where `wanted` is set, (N, D); None where the plain path has to do it."""
    decoder = decoder_of(model)
    batch = layout(ids, mask, wanted) if decoder else None
    if batch is None:
        return None
    scorer = not hasattr(model, "lm_head")

    def fast(ids, mask):
        hidden = run_packed(decoder_of(model), layout(ids, mask, mask))
        return hidden if scorer else model.lm_head(hidden)

    def plain(ids, mask):
        if scorer:
            return forward(model.base_model, ids, mask, use_cache=False).last_hidden_state[mask]
        return forward(model, ids, mask, use_cache=False).logits[mask]

    if not agree(model, "fast path", "scoring", ids, mask, fast, plain):
        return None
    return run_packed(decoder, batch)


def run_packed(decoder, batch):
    def attend(i, q, k, v):
        return batch.attention(q, k, v, decoder.layers[i].attention_dropout)

    hidden = run_layers(decoder, batch.ids, batch.positions, attend, batch.wanted)
    return hidden if batch.copies is None else hidden.index_select(0, batch.copies)


def run_layers(decoder, ids, positions, attend, wanted=None):
    """All layers, for N tokens; behind the last attention only those that are wanted, (N, D)."""
    x = decoder.embed(ids, positions)
    angles = decoder.rotary(positions) if decoder.rotary else None
    for i, layer in enumerate(decoder.layers):
        seen = attend(i, *qkv(decoder, layer, layer.norm1(x), angles))
        if wanted is not None and i == len(decoder.layers) - 1:
            x, seen = x.index_select(0, wanted), seen.index_select(0, wanted)
        x = x + drop(layer.out(seen), layer.dropout)
        normed = layer.norm2(x)
        x = x + drop(layer.down(layer.act(*(up(normed) for up in layer.up))), layer.dropout)
    return decoder.norm(x)


def qkv(decoder, layer, x, angles):
    """Queries, keys and values, (N, heads, d) each."""
    sizes = [n * decoder.head_dim for n in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
    made = [matrix(x) for matrix in layer.qkv]
    made = made[0].split(sizes, -1) if len(made) == 1 else made
    q, k, v = (part.view(len(x), -1, decoder.head_dim) for part in made)
    if layer.qk_norms:
        q, k = layer.qk_norms[0](q), layer.qk_norms[1](k)
    return (apply_rotary(q, *angles), apply_rotary(k, *angles), v) if angles else (q, k, v)


def apply_rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def drop(x, p):
    return F.dropout(x, p) if p else x


# --------------------------------------------------------------------------------------------------
# Generation


class CachedDecoder:
    """Reads prompts, then one more token a row at a time, with the weights of this moment."""

    def __init__(self, model, decoder, room):
        self.decoder = replace(decoder, layers=[fused_layer(x) for x in decoder.layers])
        self.head, self.room = fused([model.lm_head]), max(room, 2)

    def read(self, batch):
        """Logits behind each prompt of a packed batch, (B, V)."""
        # (B, heads, d, P + room) and (B, heads, P + room, d) for each layer, filled from the left:
        # what one query multiplies is contiguous.
        self.keys, self.values, decoder = [], [], self.decoder
        self.use(batch.lengths)
        size = len(self.at), decoder.kv_heads, self.longest + self.room, decoder.head_dim

        def attend(i, q, k, v):
            keys, values = k.new_zeros(size).mT.contiguous(), v.new_zeros(size)

            def store(rows, k, v):
                keys[rows, :, :, : k.shape[2]], values[rows, :, : v.shape[2]] = k.mT, v

            self.keys.append(keys)
            self.values.append(values)
            return batch.attention(q, k, v, store=store)

        logits = self.head(run_layers(decoder, batch.ids, batch.positions, attend, batch.wanted))
        if batch.twins is not None:
            self.keep(batch.twins)
        return logits if batch.copies is None else logits.index_select(0, batch.copies)

    def replay(self, ids, mask):
        """What the function `replay` finds with the model's own forward."""
        last = F.one_hot(mask.sum(1) - 1, ids.shape[1]).bool()
        logits = [self.read(layout(ids, mask, last))] + [self.next(ids[:, 0]) for _ in range(2)]
        return torch.stack(logits, 1)

    def keep(self, rows):
        """Goes on with these rows only; a row may be named several times."""
        self.keys, self.values = ([part[rows] for part in x] for x in (self.keys, self.values))
        self.use(self.at[rows])

    def use(self, at):
        """`at`, (B,): where each row goes on."""
        self.at, self.rows = at, torch.arange(len(at), device=at.device)
        shortest, self.longest = torch.stack(at.aminmax()).tolist()
        self.equal = shortest == self.longest

    def next(self, token):
        """Logits behind one more token in each row, (B, V)."""
        rows, at = (slice(None), self.longest) if self.equal else (self.rows, self.at)
        self.longest += 1
        decoder, T, B = self.decoder, self.longest, len(token)
        ahead = torch.arange(T, device=token.device) > self.at[:, None]  # (B, T)
        mask = torch.zeros(ahead.shape, device=token.device).masked_fill(ahead, -torch.inf)
        mask = mask.repeat_interleave(decoder.kv_heads, dim=0)[:, None]  # (B * heads, 1, T)

        def attend(i, q, k, v):
            self.keys[i][rows, :, :, at], self.values[i][rows, :, at] = k, v
            k, v = self.keys[i].flatten(0, 1)[:, :, :T], self.values[i].flatten(0, 1)[:, :T]
            q = q.reshape(len(k), -1, decoder.head_dim)  # queries that share a key stand together
            weights = torch.baddbmm(mask.to(q.dtype), q, k, alpha=decoder.head_dim**-0.5)
            return torch.bmm(weights.softmax(-1), v).view(B, -1)

        hidden = run_layers(decoder, token, self.at, attend)
        self.at = self.at + 1
        return self.head(hidden)


def fused_layer(layer):
    up, parts = [fused([matrix]) for matrix in layer.up], dict(out=layer.out, down=layer.down)
    parts = {name: fused([matrix]) for name, matrix in parts.items()}
    return replace(layer, qkv=[fused(layer.qkv)], up=up, **parts, dropout=0.0)


def fused(matrices):
    """Several matrices as one, in the order and precision in which they will be used."""
    parts, biases = [merged_weight(m) for m in matrices], [m.bias for m in matrices]
    if any(part is None for part in parts) or len({b is None for b in biases}) > 1:
        return lambda x: torch.cat([matrix(x) for matrix in matrices], -1)
    weight = torch.cat(parts) if parts[1:] else parts[0]
    bias = torch.cat(biases) if biases[1:] and biases[0] is not None else biases[0]
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    elif worth_packing(weight):  # oneDNN wants blocks: made once here, not at every token
        op = torch.ops.mkldnn
        weight = op._reorder_linear_weight(weight.detach())
        return lambda x: op._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def worth_packing(weight):
    big = weight.numel() >= BIG and weight.dtype == torch.float32
    return big and weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def merged_weight(matrix):
    """(out, in), an adapter's share included; None where that cannot be said (4 bits, say)."""
    if hasattr(matrix, "get_delta_weight"):
        variants = getattr(matrix, "use_dora", {}), getattr(matrix, "lora_bias", {})
        off = matrix.disable_adapters or matrix.merged
        weight = merged_weight(matrix.base_layer)
        if any(any(x.values()) for x in variants) or (matrix.merged and matrix.disable_adapters):
            return None
        if off or weight is None:
            return weight
        deltas = [matrix.get_delta_weight(name) for name in matrix.active_adapters]
        transposed = type(matrix.base_layer) is Conv1D
        return sum((delta.T if transposed else delta for delta in deltas), start=weight)
    if type(matrix) is torch.nn.Linear:
        return matrix.weight
    return matrix.weight.T if type(matrix) is Conv1D else None
