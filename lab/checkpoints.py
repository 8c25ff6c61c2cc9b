"""Checkpoints of an interrupted training: tensors as safetensors, random states as numbers.

Reading copies into the existing models and optimiser, so no tensor changes its device.
"""

import random

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lab.sharding import for_first, share_of


def parts_of(optimiser):
    """{file: tensors}: the trained weights, one file per model, and AdamW's moments. All processes
    call it, because they gather what is sharded; the first one gets it."""
    moments = optimiser.adamw.state_dict()["state"]
    parts = {f"model-{i}": trained_tensors(model) for i, model in enumerate(optimiser.models)}
    parts["adamw"] = {f"{i}.{name}": x for i, own in moments.items() for name, x in own.items()}
    return {
        name: {key: for_first(x.detach()).contiguous() for key, x in tensors.items()}
        for name, tensors in parts.items()
    }


def write(folder, parts):
    folder.mkdir(parents=True)
    for name, tensors in parts.items():
        save_file(tensors, folder / f"{name}.safetensors")


@torch.no_grad()
def read(folder, optimiser):
    """Reads a checkpoint into the models and the optimiser, in place."""
    for i, model in enumerate(optimiser.models):
        own, saved = trained_tensors(model), load_file(folder / f"model-{i}.safetensors")
        if shapes(own) != shapes(saved):
            raise ValueError("it contains the weights of another model")
        for name, x in own.items():
            x.copy_(share_of(saved[name], x))
    state, groups = {}, optimiser.adamw.state_dict()["param_groups"]
    learning = [p for group in optimiser.adamw.param_groups for p in group["params"]]
    for key, x in load_file(folder / "adamw.safetensors").items():
        i, name = key.split(".")
        x = share_of(x, learning[int(i)]) if x.dim() else x  # a number of steps is nowhere sharded
        state.setdefault(int(i), {})[name] = x.clone()  # independent of the memory-mapped file
    optimiser.adamw.load_state_dict({"state": state, "param_groups": groups})


def trained_tensors(model):
    """Returns the trainable parameters and the buffers. Frozen weights are not part of it: they are
    loaded from the model's own files. Tied weights occur once."""
    kept = model.state_dict().keys()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return learning | {name: b for name, b in model.named_buffers() if name in kept}


def shapes(tensors):
    return {name: x.shape for name, x in tensors.items()}


def random_states(device):
    """Returns the states of all random number generators on the CPU and this device, for JSON."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
    }
    if device.type != "cpu":
        states[device.type] = call_device(device, "get_rng_state").tolist()
    return states


def set_random_states(states, device):
    """Restores the states that `random_states` returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
    if device.type != "cpu" and device.type in states:  # a changed run may use another device
        call_device(device, "set_rng_state", torch.tensor(states[device.type], dtype=torch.uint8))


def call_device(device, name, *args):
    """Calls a function of torch.cuda, or of the module of another backend, for this device."""
    one = [device] if device.type != "mps" else []  # torch.mps has one device, without an argument
    return getattr(torch.get_device_module(device), name)(*args, *one)
