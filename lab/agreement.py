"""Whether a faster way to a model's numbers gives the numbers of its own forward.

What repeats code of transformers may be wrong in its next release. So each model compares the two
on its first batch, for each use, and says so where they differ.
"""

from contextlib import contextmanager

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from lab.errors import out_of_memory

# Oldest and newest release of transformers that tests/test_fast_path.py runs with. In any other
# release the comparison alone decides.
TESTED = "5.0.0", "5.24.0"
# How far two ways to the same numbers may lie apart, as a share of their norm.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def findings(model, path):
    """{(use, ...): whether the path agrees with the model's own forward}, kept with the model."""
    return vars(model).setdefault("_agreement", {}).setdefault(path, {})


def agree(model, path, use, ids, mask, fast, plain):
    """Whether `fast` and `plain` give the same for the first tokens of a few rows of this batch:
    the same values and, where the model learns, the same gradients.

    Each model compares once for each use, precision and kind of layers; after one difference it
    takes the plain path for good. Without dropout, so no random number is drawn; modes and `.grad`
    stay as they are.
    """
    known = findings(model, path)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    adapter = "_disable_adapters", "merged_adapters"
    kinds = {(type(m), *(bool(vars(m).get(x)) for x in adapter)) for m in model.modules()}
    key = use, learns, autocast_dtype(model), next(model.parameters()).dtype, frozenset(kinds)
    if key in known or refused(model, path):
        return not refused(model, path)
    texts = [ids[i][mask[i]][: 8 - n] for n, i in enumerate(sorted({0, len(ids) // 2}))]
    texts = [text for text in texts if len(text)]
    if not texts:
        return False
    real = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).bool()
    sample = pad_sequence(texts, batch_first=True), real
    most = tolerance(model)
    try:
        with eval_mode(model):
            expected = outcome(model, plain(*sample), learns)
            found = outcome(model, fast(*sample), learns)
        off = {name: distance(found[name], expected[name]) for name in expected}
        reason = [f"its {name} are off by {x:.1g}" for name, x in off.items() if x > most]
    except Exception as error:  # whatever another release has renamed
        if out_of_memory(error):
            raise
        reason = [f"{type(error).__name__}: {error}"]
    known[key] = not reason
    for sentence in reason[:1]:
        step_aside(model, path, sentence)
    return known[key]


@contextmanager
def eval_mode(model):
    """Dropout off within; afterwards each part is in its mode again, whatever happened."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training


def refused(model, path):
    return not all(findings(model, path).values())


def step_aside(model, path, reason):
    findings(model, path)["refused"] = False
    versions = "transformers {}, tested with {} to {}".format(transformers.__version__, *TESTED)
    print(
        f"The {path} steps aside for {type(model).__name__}: {reason} ({versions}). The model's "
        "own forward does the work: as exact, but slower or with more memory."
    )


def autocast_dtype(model):
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def tolerance(model):
    """That of the least exact numbers that the model's products are made of."""
    dtypes = {p.dtype for p in model.parameters()} | {autocast_dtype(model)}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # of 4 bits
    if model.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
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
