"""Generation with a cache of keys and values: a fast decoder, and a plain one for any model.

The fast decoder fuses the weights that are used together. It allocates the cache for all tokens at
the start, instead of extending it token by token. On a GPU it records the kernels of a token and
then launches them all at once, because launching them one by one takes longer than running them.
"""

from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from lab.agreement import agree, autocast_dtype
from lab.fast_path import decoder_of, layout, run_layers
from lab.plain_path import forward
from lab.sharding import unwrapped

BIG = 2**19  # elements of a matrix from which packing it for oneDNN pays off
# After how many tokens Python asks which rows have finished: 8, because a GPU works ahead of Python
# and has to wait for each such question; a CPU can tell at every token.
ASK_EVERY = {"cpu": 1}


def start_decoding(model, prompt_ids, prompt_mask, room):
    """Reads the prompts. Returns a decoder for up to `room` more tokens, and the logits of the next
    token, (B, V)."""
    model, last = unwrapped(model), torch.zeros_like(prompt_mask)
    last[:, -1] = True
    decoder = decoder_of(model)
    batch = layout(prompt_ids, prompt_mask, last) if decoder else None
    if batch:
        cached = CachedDecoder(model, decoder, room)
        paths = cached.replay, lambda ids, mask: replay(model, ids, mask)
        if agree(model, "fast path", "generating", prompt_ids, prompt_mask, *paths):
            return cached, cached.read(batch)
    plain = PlainDecoder(model)
    prompts = torch.stack([prompt_ids, prompt_mask.long()], 1)
    prompts, copies = prompts.unique(dim=0, return_inverse=True)  # read equal prompts only once
    logits = plain.read(prompts[:, 0], prompts[:, 1].bool())
    plain.keep(copies)
    return plain, logits[copies]


class PlainDecoder:
    """Generates with the model's own forward and cache."""

    def __init__(self, model):
        self.model, self.cache = model, DynamicCache(config=model.config)

    def read(self, ids, mask):
        """Returns the logits after the last column of ids, (B, V). The mask covers all tokens so
        far, including those in the cache."""
        self.mask, more = mask, dict(cache=self.cache, use_cache=True, logits_to_keep=1)
        return forward(self.model, ids, mask, **more).logits[:, -1]

    def next(self, token):
        """Appends one token to each row and returns the logits after it, (B, V)."""
        return self.read(token[:, None], F.pad(self.mask, (0, 1), value=True))

    def keep(self, rows):
        """Keeps only these rows; an index may occur several times."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


def replay(model, ids, mask):
    """Returns the logits (B, 3, V) after each row, and after appending its first token once and
    twice: what a decoder computes in two steps, from one plain forward pass."""
    ends = mask.sum(1, keepdim=True)  # (B, 1)
    more = ends + torch.arange(2, device=ids.device)
    ids = F.pad(ids, (0, 2)).scatter(1, more, ids[:, :1].expand_as(more))
    mask = F.pad(mask, (0, 2)).scatter(1, more, True)
    logits = forward(model, ids, mask, use_cache=False).logits
    places = ends - 1 + torch.arange(3, device=ids.device)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], places]


class CachedDecoder:
    """The fast decoder: reads prompts, then one token per row at a time.

    It may copy weights when it is created, so it is valid only until the next update.
    """

    def __init__(self, model, decoder, room):
        self.decoder = replace(decoder, layers=[fused_layer(x) for x in decoder.layers])
        self.head, self.room = fused([model.lm_head]), max(room, 2)
        # Weights in 4 bits have kernels of their own, which a graph may not be able to hold.
        plain = all(p.is_floating_point() for p in model.parameters())
        self.record = RECORDERS.get(model.device.type) if plain else None

    def read(self, batch):
        """Returns the logits after each prompt of a packed batch, (B, V)."""
        # Keys (B, heads, d, P + room) and values (B, heads, P + room, d) of each layer, filled from
        # the left. In this layout the numbers that one query multiplies are contiguous.
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
        if len(batch.lengths) < len(batch.row_of):
            self.keep(batch.row_of)
        return logits.index_select(0, batch.copies)

    def replay(self, ids, mask):
        """Returns what the function `replay` returns, computed by this decoder."""
        last = F.one_hot(mask.sum(1) - 1, ids.shape[1]).bool()
        logits = [self.read(layout(ids, mask, last))] + [self.next(ids[:, 0]) for _ in range(2)]
        return torch.stack(logits, 1)

    def keep(self, rows):
        """Keeps only these rows; an index may occur several times."""
        self.keys, self.values = ([part[rows] for part in x] for x in (self.keys, self.values))
        self.use(self.at[rows])

    def use(self, at):
        """Sets the position of the next token of each row, `at`, (B,)."""
        self.at, self.rows = at, torch.arange(len(at), device=at.device)
        places = at.tolist()
        self.longest, self.equal = max(places), len(set(places)) == 1
        self.launch = None  # a recording is valid for these rows only

    def next(self, token):
        """Appends one token to each row and returns the logits after it, (B, V)."""
        if self.launch:
            return self.launch(token)
        rows, at = (slice(None), self.longest) if self.equal else (self.rows, self.at)
        self.longest += 1
        logits = self.step(token, rows, at, self.longest)
        if self.record:  # the whole cache and no numbers of Python: the same kernels for each token
            whole = self.keys[0].shape[-1]
            self.launch = self.record(lambda x: self.step(x, self.rows, self.at, whole), token)
        return logits

    def step(self, token, rows, at, T):
        """Stores the token in the cache, [rows, at], and reads its first T columns."""
        decoder, B = self.decoder, len(token)
        ahead = torch.arange(T, device=token.device) > self.at[:, None]  # (B, T)
        mask = self.keys[0].new_zeros(ahead.shape).masked_fill(ahead, -torch.inf)
        mask = mask.repeat_interleave(decoder.kv_heads, dim=0)[:, None]  # (B * heads, 1, T)

        def attend(i, q, k, v):
            self.keys[i][rows, :, :, at], self.values[i][rows, :, at] = k, v
            k, v = self.keys[i].flatten(0, 1)[:, :, :T], self.values[i].flatten(0, 1)[:, :T]
            q = q.reshape(len(k), -1, decoder.head_dim)  # group the queries that share a key
            weights = torch.baddbmm(mask, q, k, alpha=decoder.head_dim**-0.5)
            return torch.bmm(weights.softmax(-1), v).view(B, -1)

        hidden = run_layers(decoder, token, self.at, attend)
        self.at += 1
        return self.head(hidden)


def record(step, token):
    """Records the kernels of step(token) as a CUDA graph, without running them.

    Returns a function of a token that runs them all: same memory, other values.
    """
    graph, stream, token = torch.cuda.CUDAGraph(), side_stream(token.device), token.clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            logits = step(token)
        except BaseException:
            with suppress(RuntimeError):  # what went wrong in the step counts, e.g. no memory left
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def launch(new):
        token.copy_(new)
        graph.replay()
        return logits.clone()  # the next launch overwrites them

    return launch


@cache
def side_stream(device):
    """The stream on which graphs of this GPU are recorded; the default stream refuses."""
    return torch.cuda.Stream(device)


RECORDERS = {"cuda": record}


def fused_layer(layer):
    """Returns a layer with fused matrices and without dropout."""
    up, parts = [fused([matrix]) for matrix in layer.up], dict(out=layer.out, down=layer.down)
    parts = {name: fused([matrix]) for name, matrix in parts.items()}
    return replace(layer, qkv=[fused(layer.qkv)], up=up, **parts, dropout=0.0)


def fused(matrices):
    """Returns a function that applies several linear layers to the same input as one product."""
    parts, biases = [merged_weight(m) for m in matrices], [m.bias for m in matrices]
    if any(part is None for part in parts) or len({b is None for b in biases}) > 1:
        return lambda x: torch.cat([matrix(x) for matrix in matrices], -1)
    weight = torch.cat(parts) if parts[1:] else parts[0]
    bias = torch.cat(biases) if biases[1:] and biases[0] is not None else biases[0]
    if dtype := autocast_dtype(weight.device):  # it would convert both again at every token
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    elif worth_packing(weight):  # oneDNN needs a blocked layout: convert once, not at every token
        op = torch.ops.mkldnn
        weight = op._reorder_linear_weight(weight.detach())
        return lambda x: op._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def worth_packing(weight):
    big = weight.numel() >= BIG and weight.dtype == torch.float32
    return big and weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def merged_weight(matrix):
    """Returns the weight, (out, in), with its adapters merged; None if that is impossible, as for
    weights in 4 bits."""
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
