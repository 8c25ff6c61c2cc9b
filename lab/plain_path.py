"""The plain path: what any causal language model says, by its own forward."""

import inspect

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from lab.agreement import agree


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


class PlainDecoder:
    """Generation with the model's own forward and cache."""

    def __init__(self, model):
        self.model, self.cache = model, DynamicCache(config=model.config)

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


def replay(model, ids, mask):
    """Logits (B, 3, V) behind each row, and behind its first token once more, and again."""
    ends = mask.sum(1, keepdim=True)  # (B, 1)
    more = ends + torch.arange(2, device=ids.device)
    ids = F.pad(ids, (0, 2)).scatter(1, more, ids[:, :1].expand_as(more))
    mask = F.pad(mask, (0, 2)).scatter(1, more, True)
    logits = forward(model, ids, mask, use_cache=False).logits
    places = ends - 1 + torch.arange(3, device=ids.device)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], places]
