"""What a model makes of a text: of any causal language model, and of six families without waste.

Four things make OPT, GPT-2, Llama, Mistral, Qwen2 and Qwen3 fast. Rows lie one behind the other
without padding, and only attention, which has to tell rows apart, lays them side by side: moved to
the left, so that "causal" is mask enough. What rows have in common at their start is read once. The
last layer goes on only at the places that somebody asks for. And while answers are written, weights
that are used together lie together, and keys and values have one fixed place.

Any other model, and any that does something of its own, takes the plain path to the same numbers.
Whoever wants all of them to take it empties FAMILIES.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    GPT2Model,
    LlamaModel,
    MistralModel,
    OPTModel,
    Qwen2Model,
    Qwen3Model,
)
from transformers.pytorch_utils import Conv1D

# Matrices with fewer elements are not worth packing: the product costs less than its preparation.
WORTH_PACKING = 2**19
WIDE = 512  # models that are wide enough for oneDNN's products; below, calling them costs more
GROUPS = 8  # of rows of like length that attend side by side; a GPU would rather have one


# --------------------------------------------------------------------------------------------------
# Any model


def inner(model):
    """The model itself, where adapters are wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def positions(mask):
    """Position ids that count real tokens only: padding on the left must not shift the text."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def call(model, ids, mask, **extra):
    """One forward pass over left-padded rows, with what this model's forward understands."""
    understood = inspect.signature(model.forward).parameters
    extra["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    extra = {name: value for name, value in extra.items() if name in understood}
    return model(input_ids=ids, attention_mask=mask.long(), **extra)


def states(model, ids, mask, wanted):
    """What the model has understood at the places that `wanted` marks in (B, T), one row each, and
    the head that makes logits of it; on the plain path these are the logits already, (N, V)."""
    model = inner(model)
    found = unpadded(model, ids, mask, wanted)
    if found is not None:
        return found, model.lm_head
    columns = ids.shape[1] - int(wanted.any(0).int().argmax())  # from the first that is wanted
    logits = call(model, ids, mask, use_cache=False, logits_to_keep=columns).logits
    return logits[:, -columns:][wanted[:, -columns:]], torch.nn.Identity()


def scores(scorer, ids, mask, wanted):
    """The scorer's numbers at the places that `wanted` marks in (B, T), one after the other."""
    scorer = inner(scorer)
    found = unpadded(scorer, ids, mask, wanted)
    if found is None:
        body = getattr(scorer, scorer.base_model_prefix)
        found = call(body, ids, mask, use_cache=False).last_hidden_state[wanted]
    return scorer.score(found)[:, 0].float()


def reader(model, prompt_ids, prompt_mask, room):
    """What has read these prompts and goes on for up to `room` tokens, and the logits behind them.

    A prompt that stands there several times in a row is read only once.
    """
    model = inner(model)
    both = torch.stack([prompt_ids, prompt_mask.long()], dim=1)
    both, copies = torch.unique_consecutive(both, dim=0, return_inverse=True)
    ids, mask = both[:, 0], both[:, 1].bool()
    decoder = decoder_of(model)
    batch = layout(ids, mask, last_column(mask)) if decoder else None
    if batch:
        found = SwiftReader(model, decoder, room)
        logits = found.read(batch)
    else:
        found = Reader(model)
        logits = found.read(ids, mask)
    if len(ids) < len(copies):
        logits = logits[copies]
        found.keep(copies)
    return found, logits


class Reader:
    """Any model, reading on where it stopped: what it has read stays in its cache."""

    def __init__(self, model):
        self.model, self.cache = model, DynamicCache(config=model.config)

    def read(self, ids, mask):
        """Logits behind the last column of ids, (B, V); the mask covers all that was read."""
        self.mask, more = mask, dict(past_key_values=self.cache, logits_to_keep=1)
        return call(self.model, ids, mask, use_cache=True, **more).logits[:, -1]

    def next(self, token):
        """Logits behind one more token in each row."""
        seen = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self.read(token[:, None], seen)

    def keep(self, rows):
        """Goes on with these rows only; a row may be named several times."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


@contextmanager
def products(model):
    """Within, a wide model on the CPU multiplies in the fastest way that is exact."""
    before = torch.get_float32_matmul_precision()
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    if model.device.type == "cpu" and width >= WIDE and quicker():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def quicker(size=1024):
    """Whether "medium" precision, oneDNN's way, is faster here and yet float32; measured once.

    On some processors it rounds to half precision instead: then nothing changes.
    """
    dice = torch.Generator().manual_seed(0)  # nobody else's luck
    x, before = torch.randn(2, size, size, generator=dice), torch.get_float32_matmul_precision()
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
# Families


@dataclass
class Layer:
    """One decoder layer in parts that go by the same names in every family."""

    before: Callable  # the norm ahead of attention
    project: list  # what makes queries, keys and values: one matrix or three
    polish: tuple  # norms of queries and keys, where a family has them
    out: Callable
    between: Callable  # the norm ahead of the MLP
    widen: list
    act: Callable
    narrow: Callable
    drop: float = 0.0  # dropout of what is added to the residual stream, and of attention
    attention_drop: float = 0.0


@dataclass
class Decoder:
    embed: Callable  # (ids, positions) -> (N, D)
    rotate: Callable | None  # positions -> cosines and sines, (N, d)
    layers: list
    norm: Callable
    heads: int
    key_heads: int
    width: int  # of a head


def opt(body):
    decoder, shape = body.decoder, body.config
    skipping = body.training and decoder.layerdrop  # whole layers, now and then
    if not shape.do_layer_norm_before or decoder.project_in or skipping:
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

    heads = shape.num_attention_heads
    norm = decoder.final_layer_norm or torch.nn.Identity()
    return Decoder(embed, None, layers, norm, heads, heads, shape.hidden_size // heads)


def gpt2(body):
    shape = body.config
    odd = shape.scale_attn_by_inverse_layer_idx or shape.reorder_and_upcast_attn
    if odd or not shape.scale_attn_weights or shape.add_cross_attention:
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

    heads = shape.num_attention_heads
    return Decoder(embed, None, layers, body.ln_f, heads, heads, shape.hidden_size // heads)


def llama(body):
    """Llama, Mistral and Qwen: rotary positions, gated MLPs, fewer keys than queries."""
    shape = body.config
    window = getattr(shape, "sliding_window", None)
    kinds = getattr(shape, "layer_types", None) or ["sliding_attention"]
    stretched = body.rotary_emb.rope_type in ("dynamic", "longrope")
    if (window and "sliding_attention" in kinds) or stretched:
        return None
    layers = []
    for layer in body.layers:
        heart, mlp = layer.self_attn, layer.mlp
        polish = (heart.q_norm, heart.k_norm) if hasattr(heart, "q_norm") else ()
        layers.append(
            Layer(
                layer.input_layernorm, [heart.q_proj, heart.k_proj, heart.v_proj], polish,
                heart.o_proj, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj],
                lambda gate, up, act=mlp.act_fn: act(gate) * up, mlp.down_proj,
                attention_drop=heart.attention_dropout,
            )
        )  # fmt: skip

    def rotate(positions):
        return [x[0][:, None] for x in body.rotary_emb(body.norm.weight, positions[None])]

    return Decoder(
        lambda ids, positions: body.embed_tokens(ids), rotate, layers, body.norm,
        shape.num_attention_heads, shape.num_key_value_heads, body.layers[0].self_attn.head_dim,
    )  # fmt: skip


FAMILIES = {
    OPTModel: opt,
    GPT2Model: gpt2,
    LlamaModel: llama,
    MistralModel: llama,
    Qwen2Model: llama,
    Qwen3Model: llama,
}


def particular(module):
    """Whether a module does more than its class: hooks want to be called, activations be few."""
    own = "forward" in vars(module) or hasattr(module, "_hf_hook")
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    if isinstance(module, torch.nn.Embedding):  # it is called here as well, with its hooks
        hooks = ()
    return own or any(hooks) or (module.training and getattr(module, "gradient_checkpointing", 0))


def decoder_of(model):
    """The parts of a model whose forward is just what transformers ships; None for any other."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if type(body) not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return None
    if any(map(particular, model.modules())):
        return None
    decoder = FAMILIES[type(body)](body)
    if decoder and not body.training:
        decoder.layers = [replace(layer, drop=0.0, attention_drop=0.0) for layer in decoder.layers]
    return decoder


# --------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Layout:
    """The real tokens of a batch, one behind the other. Rows that start alike share their start:
    a pair its prompt, a group of answers too. Whoever has read the same thinks the same of it."""

    lengths: torch.Tensor  # (B,), of the rows
    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,), counted from the row's first real token
    wanted: torch.Tensor  # numbers of the tokens that were asked for, in the order of the batch
    groups: list  # (rows, length): rows of about the same length, which attend side by side
    slots: torch.Tensor | None  # the token in each slot of each group's rows; None: one in each
    home: torch.Tensor | None  # (N,), the slot in which each token is at home

    def attention(self, q, k, v, drop=0.0, keep=None):
        """What each token sees of its own row up to itself, (N, heads * d).

        `keep(rows, k, v)` may take the keys and values of each group along.
        """
        if self.slots is not None:
            q, k, v = (x.index_select(0, self.slots) for x in (q, k, v))
        sizes, seen = [len(rows) * length for rows, length in self.groups], []
        width = q.shape[-1]
        for (rows, length), *parts in zip(self.groups, *(x.split(sizes) for x in (q, k, v))):
            # (rows * length, heads, d) -> (rows, heads, length, d), filled from the left
            shape = len(rows), length, -1, width
            q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
            if keep:
                keep(rows, k, v)
            if q.shape[1] > k.shape[1]:  # several queries share a key
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
            seen.append(out.transpose(1, 2).reshape(len(rows) * length, -1))
        seen = torch.cat(seen)
        return seen if self.home is None else seen.index_select(0, self.home)


def layout(ids, mask, wanted):
    """How padded rows (B, T) become tokens one behind the other. None where a row has gaps or no
    tokens, or something is asked for where there is no token."""
    lengths, first = mask.sum(1), mask.int().argmax(1)
    slot = torch.arange(max(int(lengths.max()), 1), device=ids.device)
    columns = (first[:, None] + slot).clamp(max=mask.shape[1] - 1)  # (B, L): rows moved to the left
    real = slot < lengths[:, None]
    asked = wanted.gather(1, columns) & real
    gaps = not mask.gather(1, columns)[real].all() or not lengths.all()
    if gaps or int(asked.sum()) != int(wanted.sum()):
        return None
    ids = ids.gather(1, columns).masked_fill(~real, -1)
    reader = first_readers(ids)  # (B, L)
    own = real & (reader == torch.arange(len(ids), device=ids.device)[:, None])
    order = lengths.argsort(stable=True)  # short rows first
    number = torch.empty_like(columns)  # of each slot's token among all
    number[order] = own[order].flatten().cumsum(0).view(columns.shape) - 1
    number = number.gather(0, reader).masked_fill(~real, 0)  # an empty slot is never looked at
    several = order.split(-(-len(order) // (GROUPS if ids.device.type == "cpu" else 1)))
    groups = [(rows, int(lengths[rows].max())) for rows in several]
    slots, home = (
        torch.cat([part[rows, :length].flatten() for rows, length in groups])
        for part in (number, own)
    )
    home = home.nonzero()[:, 0]
    ids, positions = ids[order][own[order]], slot.expand_as(columns)[own[order]]
    places = (slots, home) if len(slots) > len(home) else (None, None)
    return Layout(lengths, ids, positions, number[asked], groups, *places)


def first_readers(ids):
    """Which row reads a token for all that have started alike so far, (B, L): the alphabet's first,
    because in alphabetical order they are neighbours."""
    order = ids.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    rows, ordered = torch.arange(len(ids), device=ids.device)[:, None], ids[order]
    alike = (ordered[1:] == ordered[:-1]).int().cummin(1).values.bool()  # as the row above, so far
    new = F.pad(~alike, (0, 0, 1, 0), value=True)
    first = torch.where(new, rows, 0).cummax(0).values
    return torch.empty_like(first).index_copy(0, order, order[first])


def unpadded(model, ids, mask, wanted):
    """Last hidden states at the places of (B, T) that `wanted` marks, one row each, (N, D).

    None where the plain path has to do it.
    """
    decoder = decoder_of(model)
    batch = layout(ids, mask, wanted) if decoder else None
    if batch is None:
        return None

    def attend(i, q, k, v):
        return batch.attention(q, k, v, decoder.layers[i].attention_drop)

    return through(decoder, batch.ids, batch.positions, attend, batch.wanted)


def through(decoder, ids, positions, attend, wanted=None):
    """All layers, for N tokens; behind the last attention only those that are wanted, (N, D)."""
    x = decoder.embed(ids, positions)
    angles = decoder.rotate(positions) if decoder.rotate else None
    for i, layer in enumerate(decoder.layers):
        seen = attend(i, *queries(decoder, layer, layer.before(x), angles))
        if wanted is not None and i == len(decoder.layers) - 1:
            x, seen = x.index_select(0, wanted), seen.index_select(0, wanted)
        x = x + dropped(layer.out(seen), layer.drop)
        wide = [matrix(layer.between(x)) for matrix in layer.widen]
        x = x + dropped(layer.narrow(layer.act(*wide)), layer.drop)
    return decoder.norm(x)


def queries(decoder, layer, x, angles):
    """Queries, keys and values, (N, heads, d) each."""
    sizes = [n * decoder.width for n in (decoder.heads, decoder.key_heads, decoder.key_heads)]
    made = [matrix(x) for matrix in layer.project]
    made = made[0].split(sizes, -1) if len(made) == 1 else made
    q, k, v = (part.view(len(x), -1, decoder.width) for part in made)
    if layer.polish:
        q, k = layer.polish[0](q), layer.polish[1](k)
    return (turned(q, *angles), turned(k, *angles), v) if angles else (q, k, v)


def turned(x, cos, sin):
    """Rotary positions: pairs of numbers turned by an angle that grows with the position."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def dropped(x, share):
    return F.dropout(x, share) if share else x


# --------------------------------------------------------------------------------------------------
# Writing


class SwiftReader:
    """Reads prompts, then one more token a row at a time. Its weights are those of this moment."""

    def __init__(self, model, decoder, room):
        self.decoder = replace(decoder, layers=[packed_layer(x) for x in decoder.layers])
        self.head, self.room = packed([model.lm_head]), room
        # (B, heads, d, P + room) and (B, heads, P + room, d) for each layer, filled from the left:
        # what one query multiplies lies in a row.
        self.keys, self.values = [], []

    def read(self, batch):
        """Logits behind each prompt of a layout, (B, V)."""
        self.at = batch.lengths  # (B,), where each row goes on
        self.measure()
        size = len(self.at), self.decoder.key_heads, self.longest + self.room, self.decoder.width

        def attend(i, q, k, v):
            keys, values = k.new_zeros(size).mT.contiguous(), v.new_zeros(size)

            def keep(rows, k, v):
                keys[rows, :, :, : k.shape[2]], values[rows, :, : v.shape[2]] = k.mT, v

            self.keys.append(keys)
            self.values.append(values)
            return batch.attention(q, k, v, keep=keep)

        return self.head(through(self.decoder, batch.ids, batch.positions, attend, batch.wanted))

    def keep(self, rows):
        """Goes on with these rows only; a row may be named several times."""
        self.at = self.at[rows]
        self.keys, self.values = ([part[rows] for part in x] for x in (self.keys, self.values))
        self.measure()

    def measure(self):
        self.rows = torch.arange(len(self.at), device=self.at.device)
        self.longest = int(self.at.max())
        self.equal = bool((self.at == self.longest).all())

    def next(self, token):
        """Logits behind one more token in each row, (B, V)."""
        rows, at = (slice(None), self.longest) if self.equal else (self.rows, self.at)
        self.longest += 1
        decoder, T, B = self.decoder, self.longest, len(token)
        ahead = torch.arange(T, device=token.device) > self.at[:, None]  # (B, T)
        mask = torch.zeros(ahead.shape, device=token.device).masked_fill(ahead, -torch.inf)
        mask = mask.repeat_interleave(decoder.key_heads, dim=0)[:, None]  # (B * heads, 1, T)

        def attend(i, q, k, v):
            self.keys[i][rows, :, :, at], self.values[i][rows, :, at] = k, v
            k, v = self.keys[i].flatten(0, 1)[:, :, :T], self.values[i].flatten(0, 1)[:, :T]
            q = q.reshape(len(k), -1, decoder.width)  # queries that share a key stand together
            weights = torch.baddbmm(mask.to(q.dtype), q, k, alpha=decoder.width**-0.5)
            return torch.bmm(weights.softmax(-1), v).view(B, -1)

        found = through(decoder, token, self.at, attend)
        self.at = self.at + 1
        return self.head(found)


def last_column(mask):
    wanted = torch.zeros_like(mask)
    wanted[:, -1] = True
    return wanted


def packed_layer(layer):
    return replace(
        layer,
        project=[packed(layer.project)],
        out=packed([layer.out]),
        widen=[packed([matrix]) for matrix in layer.widen],
        narrow=packed([layer.narrow]),
    )


def packed(matrices):
    """Several matrices as one, in the order and precision in which they are going to be used."""
    parts, biases = [weight_of(m) for m in matrices], [m.bias for m in matrices]
    if any(part is None for part in parts) or len({b is None for b in biases}) > 1:
        return lambda x: torch.cat([matrix(x) for matrix in matrices], -1)
    weight = torch.cat(parts) if parts[1:] else parts[0]
    bias = torch.cat(biases) if biases[1:] and biases[0] is not None else biases[0]
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    elif worth_reordering(weight):
        # oneDNN wants the weights in blocks; done once here, not at every token.
        op = torch.ops.mkldnn
        weight = op._reorder_linear_weight(weight.detach())
        return lambda x: op._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def worth_reordering(weight):
    big = weight.numel() >= WORTH_PACKING and weight.dtype == torch.float32
    return big and weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def weight_of(matrix):
    """(out, in), an adapter's share included; None where that cannot be said (4 bits, say)."""
    if hasattr(matrix, "get_delta_weight"):
        odd = [
            *getattr(matrix, "use_dora", {}).values(),
            *getattr(matrix, "lora_bias", {}).values(),
        ]
        if any(odd) or (matrix.merged and matrix.disable_adapters):
            return None
        weight, off = weight_of(matrix.base_layer), matrix.disable_adapters or matrix.merged
        names = [] if off or weight is None else matrix.active_adapters
        shares = [matrix.get_delta_weight(name) for name in names]  # lie as the layer's weight does
        lying = type(matrix.base_layer) is Conv1D
        return sum((share.T if lying else share for share in shares), start=weight)
    if type(matrix) is torch.nn.Linear:
        return matrix.weight
    if type(matrix) is Conv1D:
        return matrix.weight.T
    return None
