"""The plain path: logits of any causal language model, by the model's own forward."""

import inspect

import torch

from lab import CourseError, sharding
from lab.agreement import agree


def arguments(model):
    """Returns the parameters of the model's forward.

    A subclass may only pass on *args and **kwargs. So the first forward in the class hierarchy that
    names `input_ids` counts.
    """
    kinds = (vars(kind) for kind in type(model).__mro__)
    for function in (model.forward, *(kind["forward"] for kind in kinds if "forward" in kind)):
        known = inspect.signature(function).parameters
        if "input_ids" in known:
            return known
    return {}


def cache_argument(model):
    """Returns the name of the cache argument, or None. (transformers 5.24 renamed it.)"""
    return next((name for name in ("cache", "past_key_values") if name in arguments(model)), None)


def forward(model, ids, mask, cache=None, **extra):
    """Calls the model's forward on padded rows, with the arguments that it accepts.

    Positions count real tokens only, so padding on the left does not shift them.
    """
    extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = arguments(model)
    extra = {name: value for name, value in extra.items() if name in known}
    if cache is not None:
        name = cache_argument(model)
        if name is None:
            raise CourseError(
                f"{type(model).__name__} cannot generate: its forward has no cache argument. Use "
                "another base model."
            )
        extra[name] = cache
    with sharding.in_step(model):
        return model(input_ids=ids, attention_mask=mask.long(), **extra)


def logits_at(model, ids, mask, wanted):
    """Returns the logits at the positions where `wanted` is set, (N, V), by the model's forward.

    A hook gives the head only these positions, as one row. If a check finds that this changes the
    logits, the head gets every column from the first wanted one on.
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

    hooked = any(map(has_hooks, model.modules()))  # a user's hook must see each batch only once
    if not hooked and agree(model, "short head", "", ids, mask, check(narrow), check(whole)):
        return narrow(ids, mask, wanted)
    return whole(ids, mask, wanted)


def has_hooks(module):
    """Returns whether a module has hooks or a replaced forward.

    Hooks on embeddings do not count, because every path calls the embeddings.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    watched = any(hooks) and not isinstance(module, torch.nn.Embedding)
    return watched or "forward" in vars(module) or hasattr(module, "_hf_hook")
