"""A fast path for six families: OPT, GPT-2, Llama, Mistral, Qwen2 and Qwen3.

Three things make it fast. It packs the rows one after the other without padding, and pads them only
for attention. It computes the tokens that rows share at their start only once. After the attention
of the last layer, it continues with the positions that are needed. lab/decoding.py generates with
the same layers.

This file repeats code of transformers, which may change. `agree` therefore compares it with the
model's own forward, once per model and use. All other models use their own forward, the plain path.
To turn the fast path off, empty FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
import transformers

from lab import plain_path
from lab.agreement import agree, autocast_dtype, is_off, turn_off
from lab.plain_path import forward, has_hooks
from lab.sharding import unwrapped

GROUPS = 8  # groups of rows of similar length for attention on a CPU; a GPU uses one group


def hidden_states(model, ids, mask, wanted):
    """Returns the last hidden states where `wanted`, (B, T), is set, and the head that turns them
    into logits.

    On the plain path the first result already is the logits, (N, V); the head is the identity.
    """
    model = unwrapped(model)
    hidden = packed_forward(model, ids, mask, wanted)
    if hidden is not None:
        return hidden, model.lm_head
    return plain_path.logits_at(model, ids, mask, wanted), torch.nn.Identity()


def scores(scorer, ids, mask, wanted):
    """Returns the scorer's outputs where `wanted`, (B, T), is set, (N,)."""
    scorer = unwrapped(scorer)
    hidden = packed_forward(scorer, ids, mask, wanted)
    if hidden is None:
        hidden = forward(scorer.base_model, ids, mask, use_cache=False).last_hidden_state[wanted]
    return scorer.score(hidden)[:, 0].float()


# --------------------------------------------------------------------------------------------------
# Families


@dataclass
class Layer:
    """The parts of a decoder layer, under the same names for every family."""

    norm1: Callable
    qkv: list  # one fused matrix, or three
    qk_norms: tuple  # the norms of queries and keys, empty if a family has none
    out: Callable
    norm2: Callable
    up: list
    act: Callable
    down: Callable
    dropout: float = 0.0  # on what is added to the residual stream
    attention_dropout: float = 0.0


@dataclass
class Decoder:
    """The parts of a decoder, under the same names for every family."""

    embed: Callable  # (ids, positions) -> (N, D)
    rotary: Callable | None  # positions -> cosines and sines, (N, 1, d)
    layers: list
    norm: Callable
    heads: int
    kv_heads: int
    head_dim: int


def opt(body):
    """OPT: learned positions, biases in all matrices."""
    decoder, config = body.decoder, body.config
    skips = body.training and decoder.layerdrop  # skips whole layers at random
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
    """GPT-2: learned positions, one fused matrix for queries, keys and values."""
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
    """Llama, Mistral and Qwen: rotary positions, gated MLPs, grouped queries."""
    config = body.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "sliding_window", None) and "sliding_attention" in kinds
    if slides or body.rotary_emb.rope_type in ("dynamic", "longrope"):
        return None
    layers = []
    for layer in body.layers:
        attn, mlp = layer.self_attn, layer.mlp
        norms = [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []
        layers.append(
            Layer(
                fused_norm(layer.input_layernorm), [attn.q_proj, attn.k_proj, attn.v_proj],
                tuple(map(fused_norm, norms)), attn.o_proj,
                fused_norm(layer.post_attention_layernorm), [mlp.gate_proj, mlp.up_proj],
                lambda gate, up, act=mlp.act_fn: act(gate) * up, mlp.down_proj,
                attention_dropout=attn.attention_dropout,
            )
        )  # fmt: skip

    def rotary(positions):
        cos, sin = (x[0][:, None] for x in body.rotary_emb(body.norm.weight, positions[None]))
        a, b = sin.chunk(2, -1)
        return cos, torch.cat([-a, b], -1)

    return Decoder(
        lambda ids, positions: body.embed_tokens(ids), rotary, layers, fused_norm(body.norm),
        config.num_attention_heads, config.num_key_value_heads, body.layers[0].self_attn.head_dim,
    )  # fmt: skip


def fused_norm(norm):
    """The norm of Llama as PyTorch's own function: one kernel of a GPU instead of seven."""
    if not type(norm).__name__.endswith("RMSNorm"):  # e.g. inside a wrapper of PEFT
        return norm
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda x: F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps)


FAMILIES = {
    transformers.OPTModel: opt,
    transformers.GPT2Model: gpt2,
    transformers.LlamaModel: llama,
    transformers.MistralModel: llama,
    transformers.Qwen2Model: llama,
    transformers.Qwen3Model: llama,
}


def decoder_of(model):
    """Returns the parts of a model whose forward is unchanged transformers code; else None."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if type(body) not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return None
    modules = list(model.modules())
    recomputes = any(m.training and getattr(m, "gradient_checkpointing", False) for m in modules)
    if recomputes or any(map(has_hooks, modules)) or is_off(model, "fast path"):
        return None
    try:
        decoder = FAMILIES[type(body)](body)
    except AttributeError as error:
        turn_off(model, "fast path", error)
        return None
    if decoder and not body.training:
        still = dict(dropout=0.0, attention_dropout=0.0)
        decoder.layers = [replace(layer, **still) for layer in decoder.layers]
    return decoder


# --------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class PackedBatch:
    """The real tokens of a batch, one after the other; a shared start of rows occurs only once."""

    lengths: torch.Tensor  # (D,), the lengths of the distinct rows
    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,), counted from the row's first real token
    wanted: torch.Tensor  # the distinct tokens that are wanted
    copies: torch.Tensor  # for each wanted position, its index in `wanted`
    row_of: torch.Tensor  # (B,), for each row of the batch, the distinct row that equals it
    slots: torch.Tensor | None  # the token in each slot of the padded groups; None: same order
    slot_of: torch.Tensor | None  # (N,), the slot that computes the attention of each token
    groups: list  # (rows, length): distinct rows of similar length, padded for attention

    def attention(self, q, k, v, dropout=0.0, store=None):
        """Returns the causal attention of each token within its row, (N, heads * d).

        `store(rows, k, v)`, if given, receives the keys and values of each group.
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
            if q.shape[1] > k.shape[1]:  # grouped queries share a key
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            seen.append(out.transpose(1, 2).reshape(len(rows) * length, -1))
        seen = torch.cat(seen)
        return seen if self.slot_of is None else seen.index_select(0, self.slot_of)


def layout(ids, mask, wanted):
    """Packs padded rows, (B, T). Returns None if a row has gaps or no tokens, or if a wanted
    position is padding.

    The CPU computes the layout, so a GPU synchronises only once: one copy there, one copy back.
    """
    device = ids.device
    ids, mask, wanted = torch.stack([ids, mask.long(), wanted.long()]).cpu()
    starts = F.pad(mask, (1, 0)).diff(dim=1) > 0
    if (starts.sum(1) != 1).any() or (wanted > mask).any():
        return None
    lengths = mask.sum(1)
    texts = [text.tolist() for text in ids[mask.bool()].split(lengths.tolist())]
    # Build a prefix tree: equal tokens with equal tokens before them are one node. `numbers` maps
    # (parent, token id) to the node, and `paths` has the nodes of each row.
    numbers, paths, first_row, new_nodes = {}, {}, {}, {}
    for row in lengths.argsort(stable=True).tolist():  # short rows first
        known, last = len(numbers), None
        paths[row] = [last := numbers.setdefault((last, x), len(numbers)) for x in texts[row]]
        new_nodes[row] = len(numbers) - known  # the row's new nodes, at its end
        first_row.setdefault(last, row)
    rows, groups, positions, slots, slot_of = list(first_row.values()), [], [], [], []
    rank = {row: i for i, row in enumerate(sorted(rows))}
    size = -(-len(rows) // (GROUPS if device.type == "cpu" else 1))
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        width = len(paths[part[-1]])
        for row in part:
            path = paths[row]
            places = range(len(path) - new_nodes[row], len(path))
            positions += places
            slot_of += [len(slots) + place for place in places]
            slots += path + [0] * (width - len(path))
        groups.append((torch.tensor([rank[row] for row in part]), width))
    order = range(len(texts))
    place = torch.tensor([*chain(*(paths[row] for row in order))])
    place = torch.zeros_like(ids).masked_scatter(mask.bool(), place)  # (B, T)
    fields = [x for _, x in numbers], positions, [rank[first_row[paths[row][-1]]] for row in order]
    fields = *map(torch.tensor, (*fields, slots, slot_of)), lengths[sorted(rows)]
    fields += place[wanted.bool()].unique(return_inverse=True)
    ids, positions, row_of, slots, slot_of, lengths, found, copies, *rows = move(
        [*fields, *(rows for rows, _ in groups)], device
    )
    if len(slots) == len(slot_of):  # no padding and no shared tokens: nothing to reorder
        slots = slot_of = None
    groups = [(part, width) for part, (_, width) in zip(rows, groups)]
    return PackedBatch(lengths, ids, positions, found, copies, row_of, slots, slot_of, groups)


def move(vectors, device):
    """Moves vectors of integers to the device in a single copy."""
    if device.type == "cpu":
        return vectors
    whole = torch.cat(vectors)
    whole = whole.pin_memory() if device.type == "cuda" else whole
    return whole.to(device, non_blocking=True).split([len(vector) for vector in vectors])


def packed_forward(model, ids, mask, wanted):
    """Returns the last hidden states where `wanted` is set, (N, D); None if the plain path must be
    used."""
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
    """Returns the last hidden states at the wanted positions of a packed batch, (N, D)."""

    def attend(i, q, k, v):
        return batch.attention(q, k, v, decoder.layers[i].attention_dropout)

    hidden = run_layers(decoder, batch.ids, batch.positions, attend, batch.wanted)
    return hidden.index_select(0, batch.copies)


def run_layers(decoder, ids, positions, attend, wanted=None):
    """Runs all layers on N tokens. After the attention of the last layer it continues with the
    `wanted` tokens only."""
    x = decoder.embed(ids, positions)
    angles = decoder.rotary(positions) if decoder.rotary else None
    dtype = autocast_dtype(x.device) or x.dtype
    for i, layer in enumerate(decoder.layers):
        # Under autocast each matrix would convert its input; so convert it once for all of them.
        seen = attend(i, *qkv(decoder, layer, layer.norm1(x).to(dtype), angles))
        if wanted is not None and i == len(decoder.layers) - 1:
            x, seen = x.index_select(0, wanted), seen.index_select(0, wanted)
        x = x + drop(layer.out(seen), layer.dropout)
        normed = layer.norm2(x).to(dtype)
        x = x + drop(layer.down(layer.act(*(up(normed) for up in layer.up))), layer.dropout)
    return decoder.norm(x)


def qkv(decoder, layer, x, angles):
    """Returns queries, keys and values, (N, heads, d) each."""
    sizes = [n * decoder.head_dim for n in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
    made = [matrix(x) for matrix in layer.qkv]
    made = made[0].split(sizes, -1) if len(made) == 1 else made
    q, k, v = (part.view(len(x), -1, decoder.head_dim) for part in made)
    if layer.qk_norms:
        q, k = layer.qk_norms[0](q), layer.qk_norms[1](k)
    if angles:
        both = apply_rotary(torch.cat([q, k], 1), *angles)
        q, k = both.split([decoder.heads, decoder.kv_heads], 1)
    # Under autocast angles and norms are in float32; the cache has the dtype of the products.
    return q.to(v.dtype), k.to(v.dtype), v


def apply_rotary(x, cos, sin):
    """Rotates heads by the angles of their positions: each pair (a, b), half a head apart, becomes
    (a cos - b sin, b cos + a sin). The first half of `sin` has the minus sign."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def drop(x, p):
    return F.dropout(x, p) if p else x
