"""Checks that a fast path gives the same results as the model's own forward.

The fast path repeats code of transformers, so a new release may make it wrong. Each model therefore
compares both on its first batch, once per use, and prints a message if they differ.
"""

from contextlib import contextmanager

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from lab.errors import out_of_memory

# The oldest and newest release of transformers with which tests/test_fast_path.py passes. With
# other releases only the comparison decides.
TESTED = "5.0.0", "5.24.0"
# The largest allowed difference, relative to the norm of the expected values.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def findings(model, path):
    """Returns {(use, ...): whether the path agrees}, the results stored with the model."""
    return vars(model).setdefault("_agreement", {}).setdefault(path, {})


def agree(model, path, use, ids, mask, fast, plain):
    """Returns whether `fast` and `plain` give the same results for the first tokens of some rows:
    the same values, and the same gradients if the model is being trained.

    Each model compares once per use, precision and kind of layers. After one difference it uses the
    plain path for good. The comparison runs without dropout, so it draws no random numbers; it does
    not change train or eval mode, nor `.grad`.
    """
    known = findings(model, path)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    adapter = "_disable_adapters", "merged_adapters"
    kinds = {(type(m), *(bool(vars(m).get(x)) for x in adapter)) for m in model.modules()}
    dtypes = autocast_dtype(model.device), next(model.parameters()).dtype
    key = use, learns, dtypes, frozenset(kinds)
    if key in known or is_off(model, path):
        return not is_off(model, path)
    texts = [ids[i][mask[i]][: 8 - n] for n, i in enumerate(sorted({0, len(ids) // 2}))]
    texts = [text for text in texts if len(text)]
    if not texts:
        return False
    real = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).bool()
    sample = pad_sequence(texts, batch_first=True), real
    most = tolerance(model)
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with eval_mode(model), unseen:  # nobody who counts saved tensors counts these
            expected = results_of(model, plain(*sample), learns)
            found = results_of(model, fast(*sample), learns)
        off = {name: distance(found[name], expected[name]) for name in expected}
        reason = [f"its {name} are off by {x:.1g}" for name, x in off.items() if x > most]
    except Exception as error:  # e.g. an attribute that another release has renamed
        if out_of_memory(error):
            raise
        reason = [f"{type(error).__name__}: {error}"]
    known[key] = not reason
    for sentence in reason[:1]:
        turn_off(model, path, sentence)
    return known[key]


@contextmanager
def eval_mode(model):
    """Puts a model into eval mode inside the block, and restores the mode of each module after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training


def is_off(model, path):
    """Returns whether any comparison of this path has failed for this model."""
    return not all(findings(model, path).values())


def turn_off(model, path, reason):
    """Turns a path off for a model and prints why."""
    findings(model, path)["supported"] = False
    versions = "transformers {}, tested with {} to {}".format(transformers.__version__, *TESTED)
    print(
        f"The {path} is off for {type(model).__name__}: {reason} ({versions}). The model's own "
        "forward is used instead; it is as exact, but slower or needs more memory."
    )


def autocast_dtype(device):
    """Returns the dtype of autocast on a device; None if autocast is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def tolerance(model):
    """Returns the tolerance for the least precise dtype in the model's matrix products."""
    dtypes = {p.dtype for p in model.parameters()} | {autocast_dtype(model.device)}
    # Layers in 4 bits have a compute_dtype.
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    if model.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has the same number of digits
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in dtypes)


def results_of(model, x, learns):
    """Returns the values, and their gradients with respect to the first and last layer."""
    x = x.float() - x.float().mean(-1, keepdim=True)  # softmax ignores a common shift of logits
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
    """Returns the norm of the difference relative to `expected`; NaN equals NaN."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-20))
