"""Runs the course's own code on tensors without values, and counts their bytes and operations.

Weights live on torch's device `meta`, where a tensor has a shape but no memory. `Watch` sees every
operation, so it knows which blocks a real run would hold at each moment. Token ids and masks keep
their values, because the fast path builds its layout from them.
"""

import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lab import decoding, fast_path, models, plain_path

META = torch.device("meta")
ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLOPS = flop_registry | {ATTEND: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]}
PRODUCTS = (  # what autocast computes in half precision
    (torch.nn.functional, "linear"), (torch, "matmul"), (torch.Tensor, "matmul"),
    (torch.Tensor, "__matmul__"), (torch, "bmm"), (torch, "baddbmm"), (torch, "addmm"),
)  # fmt: skip


def is_meta(x):
    return isinstance(x, torch.Tensor) and x.is_meta


def without_values(x):
    return x.to(META) if isinstance(x, torch.Tensor) and not x.is_meta else x


def storages(things):
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in things if is_meta(x)}


class Watch(TorchDispatchMode):
    """Counts the bytes of all tensors without values that exist: now, and at most in each phase."""

    def __init__(self):
        super().__init__()
        self.now, self.peaks, self.phase, self.flops, self.known = 0, {}, "0 forward", 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if not any(map(is_meta, given)) and kwargs.get("device") != META:
            return func(*args, **kwargs)  # ids and masks
        if (
            func is torch.ops.aten._local_scalar_dense.default
        ):  # x.item(), e.g. "is all of it real?"
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.index.Tensor:  # how many are true is known here only
            args = args[0], [y for x in args[1] for y in places(x)]
        args, kwargs = tree_map(without_values, (args, kwargs))
        out = func(*args, **kwargs)
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        old = storages(given)
        for key, storage in storages(tree_leaves(out)).items():
            if key not in old and key not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key, storage.nbytes())
        self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


def places(index):
    """A mask as the indices of its true elements, one tensor for each dimension."""
    mask = isinstance(index, torch.Tensor) and not index.is_meta and index.dtype == torch.bool
    return index.nonzero().unbind(1) if mask else [index]


class Autocast:
    """What torch.autocast does, which does not know the device `meta`: products of matrices in half
    precision, and a copy of each weight that learns, kept to the end of the forward pass."""

    def __init__(self, dtype):
        self.dtype, self.copies = dtype, {}

    def product(self, function):
        """A function with its inputs in half precision."""

        def multiply(*args, **kwargs):
            if self.dtype is not None:
                args, kwargs = tree_map(self.half, (args, kwargs))
            return function(*args, **kwargs)

        return multiply

    def half(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        if self.copies is None or not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.copies:
            self.copies[id(x)] = x.to(self.dtype)
        return self.copies[id(x)]

    def enter(self):
        """A forward pass begins."""
        self.copies = {}

    def leave(self):
        """The forward pass is over. What the backward pass recomputes is not kept for later."""
        self.copies = None

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        """An attention that keeps no matrix of all pairs, as the kernels of CPUs and GPUs do."""
        if self.dtype is not None:
            q, k, v = map(self.half, (q, k, v))
        if more.pop("enable_gqa", False):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        mask = None if attn_mask is None else without_values(attn_mask)
        return ATTEND.default(q, k, v, 0.0, is_causal, attn_mask=mask, scale=more.get("scale"))[0]


def on_meta(function, answer):
    """A function of a device's name that gives `answer` for `meta`."""
    return lambda *device: answer if device == ("meta",) else function(*device)


@contextmanager
def dry(dtype=None, groups=1):
    """`with dry() as (watch, autocast):` runs the code inside on tensors without values.

    `dtype`: that of autocast, or None. `groups`: see fast_path.GROUPS.
    """
    watch, half = Watch(), Autocast(dtype)
    with ExitStack() as stack:
        for place in (fast_path, plain_path, decoding):  # without values there is no comparison
            stack.enter_context(mock.patch.object(place, "agree", lambda *_: True))
        for place, name, value in (
            (fast_path, "GROUPS", groups),
            (torch.nn.functional, "scaled_dot_product_attention", half.attention),
            (models, "autocast", lambda *_: nullcontext()),
            (torch, "is_autocast_enabled", on_meta(torch.is_autocast_enabled, dtype is not None)),
            (torch, "get_autocast_dtype", on_meta(torch.get_autocast_dtype, dtype)),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        for place, name in PRODUCTS:
            product = half.product(getattr(place, name))
            stack.enter_context(mock.patch.object(place, name, product))
        stack.enter_context(watch)
        yield watch, half


class FourBit(torch.nn.Linear):
    """A frozen matrix as bitsandbytes stores it: 4 bits a weight, and one scale for 64 of them."""

    def __init__(self, matrix, dtype):
        torch.nn.Module.__init__(self)
        self.dtype = dtype  # of the product
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        size = matrix.weight.numel() * 9 // 16
        weight = torch.empty(size, dtype=torch.uint8, device=META)
        self.weight, self.bias = torch.nn.Parameter(weight, requires_grad=False), matrix.bias

    def forward(self, x):
        out = Unpacked.apply(x, self.out_features, self.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Unpacked(torch.autograd.Function):
    """The product with a matrix that is unpacked for each use."""

    @staticmethod
    def forward(ctx, x, width, dtype):
        ctx.depth, ctx.dtype = x.shape[-1], x.dtype
        x = x.to(dtype)
        return x @ x.new_empty(ctx.depth, width)

    @staticmethod
    def backward(ctx, grad):
        return (grad @ grad.new_empty(grad.shape[-1], ctx.depth)).to(ctx.dtype), None, None


def in_4_bits(model, dtype):
    """Packs all matrices except the head, as load_in_4bit does."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name not in ("lm_head", "score"):
                setattr(module, name, FourBit(child, dtype))
    return model
