"""The plain path: what any causal language model says, by its own forward."""

import inspect

import torch

from lab import CourseError
from lab.agreement import agree


def unwrapped(model):
    """The model inside its adapters, which are part of its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def arguments(model):
    """The names that the model's forward knows. A subclass may only pass on what it gets: the first
    forward that spells out its arguments counts."""
    kinds = (vars(kind) for kind in type(model).__mro__)
    for function in (model.forward, *(kind["forward"] for kind in kinds if "forward" in kind)):
        known = inspect.signature(function).parameters
        if "input_ids" in known:
            return known
    return {}


def cache_argument(model):
    """The name of the cache, which transformers 5.24 has renamed; None if there is none."""
    return next((name for name in ("cache", "past_key_values") if name in arguments(model)), None)


def forward(model, ids, mask, cache=None, **extra):
    """The model's own forward over padded rows, with those arguments that it knows.

    Positions count real tokens only: padding on the left must not shift the text.
    """
    extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = arguments(model)
    extra = {name: value for name, value in extra.items() if name in known}
    if cache is not None:
        name = cache_argument(model)
        if name is None:
            raise CourseError(f"{type(model).__name__} cannot generate: its forward has no cache.")
        extra[name] = cache
    return model(input_ids=ids, attention_mask=mask.long(), **extra)


def logits_at(model, ids, mask, wanted):
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


def has_hooks(module):
    """Whether a module's forward has been replaced or watched; every path calls embeddings."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    watched = any(hooks) and not isinstance(module, torch.nn.Embedding)
    return watched or "forward" in vars(module) or hasattr(module, "_hf_hook")
