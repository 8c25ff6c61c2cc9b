"""What a stopped training needs again: tensors as safetensors, numbers as JSON.

Everything is read into the models and the optimiser where they are: no tensor changes its device.
"""

import random

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def write(folder, optimiser):
    """The weights that learn and their moments, one file a model and one for AdamW."""
    moments = optimiser.adamw.state_dict()["state"]
    parts = {f"model-{i}": changing(model) for i, model in enumerate(optimiser.models)}
    parts["adamw"] = {f"{i}.{name}": x for i, own in moments.items() for name, x in own.items()}
    folder.mkdir(parents=True)
    for name, tensors in parts.items():
        tensors = {key: x.detach().contiguous() for key, x in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")


@torch.no_grad()
def read(folder, optimiser):
    """The reverse: in place, so that each tensor stays on the device where it is."""
    for i, model in enumerate(optimiser.models):
        own, saved = changing(model), load_file(folder / f"model-{i}.safetensors")
        if shapes(own) != shapes(saved):
            raise ValueError("it holds the weights of another model")
        for name, x in own.items():
            x.copy_(saved[name])
    state, groups = {}, optimiser.adamw.state_dict()["param_groups"]
    for key, x in load_file(folder / "adamw.safetensors").items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = x.clone()  # it outlives the file
    optimiser.adamw.load_state_dict({"state": state, "param_groups": groups})


def changing(model):
    """The tensors that training changes, tied ones once; frozen ones come from where they came."""
    kept = model.state_dict().keys()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return learning | {name: b for name, b in model.named_buffers() if name in kept}


def shapes(tensors):
    return {name: x.shape for name, x in tensors.items()}


def random_states(device):
    """Every random state that a training on this device may draw from, as plain numbers."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
    }
    if device.type != "cpu":
        states[device.type] = of_device(device, "get_rng_state").tolist()
    return states


def set_random_states(states, device):
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
    if device.type != "cpu" and device.type in states:  # a changed run may have changed its device
        of_device(device, "set_rng_state", torch.tensor(states[device.type], dtype=torch.uint8))


def of_device(device, name, *args):
    """A function of torch.cuda, or of the module of another kind of device, for this one of it."""
    one = [device] if device.type != "mps" else []  # of which there is only one
    return getattr(torch.get_device_module(device), name)(*args, *one)
