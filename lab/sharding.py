"""Sharding: every process keeps a part of each model, for models that do not fit one card.

PyTorch's FSDP2 (`fully_shard`) does the work. A process holds its part of every weight, gradient
and moment. In a pass through the model the processes gather one layer after the other, use it, and
free it again. Only generation gathers the whole model, because it passes through it for each token.

So all processes must pass through the same models in the same order. They work on as many pieces,
with a copy of a row where their own rows run out; see `pieces`. And before a pass they ask whether
all of them are there; see `in_step`. As in lab/processes.py, functions import torch themselves.
"""

import os
import warnings
from contextlib import contextmanager
from functools import cache

from lab import CourseError, processes
from lab.errors import explained


def wanted(cfg):
    """Whether the models are sharded: cfg.shard or accelerate's FSDP, and several processes."""
    asked = cfg.shard or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return asked and processes.joined() > 1


def shard(model, kind):
    """Keeps this process's part of the weights, on devices of this kind. No layer may change any
    more."""
    from torch.distributed.fsdp import fully_shard

    # It warns that layers of OPT return views. Nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for part in (*layers(model), *roots(model)):
        fully_shard(part, mesh=mesh_of(kind), reshard_after_forward=True)
    return model


@cache
def mesh_of(kind):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (processes.joined(),))


def unwrapped(model):
    """The model inside a PEFT wrapper; its layers still contain the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(model):
    """The decoder layers: the largest list of modules."""
    from torch.nn import ModuleList

    lists = [m for m in model.modules() if isinstance(m, ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])


def roots(model):
    """The modules that a pass calls: a language model; or the body of a scorer, and its head.

    They hold what no layer holds: the embeddings, and a head that is tied to them.
    """
    base = unwrapped(model)
    return [base.base_model, base.score] if hasattr(base, "score") else [base]


def parts_of(model):
    """The modules that gather their weights by themselves; none if the model is not sharded."""
    return [m for m in model.modules() if hasattr(type(m), "set_reshard_after_forward")]


def is_sharded(model):
    return hasattr(type(roots(model)[0]), "set_reshard_after_forward")


def rest(model):
    """Frees gathered weights, and what FSDP has noted for a backward that does not come."""
    for part in parts_of(model):
        part.reshard()
    for root in roots(model):
        if hasattr(root, "reset_iter_state"):  # torch 2.6 does not have it
            root.reset_iter_state()


# --------------------------------------------------------------------------------------------------
# The same passes in all processes


@contextmanager
def in_step(model):
    """A pass through a sharded model: all processes make it at the same time.

    Before it, an error of one process is raised in all of them. An error in the middle of a pass
    cannot be told to the others: this process stops, and with it the training.
    """
    if not is_sharded(model) or vars(unwrapped(model)).get("is_whole"):
        yield
        return
    from torch import is_grad_enabled

    processes.agreed(None)
    try:
        yield
    except Exception as error:
        told = explained(error) or f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and "peer" in told:  # a connection is gone
            told = processes.lost(error)
        found = CourseError(told)
        found.common = True
        raise found from error
    if not is_grad_enabled():
        rest(model)


def pieces(rows, size, spare):
    """Yields (some rows, True), at most `size` at once, and as often as every other process.

    A process that has too few rows gets (spare, False) instead: a row that does not count.
    """
    count = max(processes.agreed(-(-len(rows) // size)))
    for i in range(count):
        part = rows[len(rows) * i // count : len(rows) * (i + 1) // count]
        yield (part, True) if len(part) else (spare, False)


@contextmanager
def whole(model):
    """Inside the block every process has the whole model, so that it can generate."""
    if not is_sharded(model):
        yield
        return
    import torch

    from lab.plain_path import forward

    base, cached = unwrapped(model), torch.is_autocast_cache_enabled()
    for part in parts_of(model):
        part.set_reshard_after_forward(False, recurse=False)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=base.device)
        forward(base, token, torch.ones_like(token, dtype=torch.bool))  # gathers each layer
        base.is_whole = True
        torch.set_autocast_cache_enabled(True)  # else each token would convert all weights
        yield
    finally:
        base.is_whole = False
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()
        for part in parts_of(model):
            part.set_reshard_after_forward(True, recurse=False)
        rest(model)


# --------------------------------------------------------------------------------------------------
# Whole tensors, for files


def here(x):
    """The part of a tensor that this process holds."""
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(x):
    """A whole tensor, made of the parts of all processes; another tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def for_first(x):
    """The same on the CPU, in the first process; the others get an empty tensor instead."""
    if not hasattr(x, "full_tensor"):
        return x
    whole = gathered(x)
    return whole.cpu() if processes.first() else whole.new_empty(0)


def share_of(x, like):
    """This process's part of a whole tensor, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    part = [*x.chunk(mesh.size()), *mesh.size() * [x[:0]]][mesh.get_local_rank()]
    how = dict(run_check=False, shape=x.shape, stride=x.stride())
    return DTensor.from_local(part.to(like.device), mesh, like.placements, **how)


def gather(model):
    """Gives the first process the whole model on the CPU, to save it. It cannot train any more."""
    if not is_sharded(model):
        return
    from torch.nn import Parameter

    found = {}
    for parameter in model.parameters():  # a tied weight once
        tensor = for_first(parameter.detach())
        if processes.first():
            found[parameter] = Parameter(tensor, parameter.requires_grad)
    if processes.first():
        for part in parts_of(model):
            part.__class__ = type(part).__mro__[2]  # as it was before `fully_shard`
            for hooks in (part._forward_pre_hooks, part._forward_hooks, part._state_dict_pre_hooks):
                hooks.clear()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = found.get(parameter, parameter)
        model.to("cpu")  # its buffers too
