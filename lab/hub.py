"""Models from elsewhere: how long a hub is waited for, and its errors in a line."""

import json
import pickle
import threading
from pathlib import Path

PATIENCE = 30  # seconds that a hub has for its first answer; weights take what they need


def reach(path):
    """Raises what keeps a model from being loaded, before the long part begins.

    A hub is asked for a small file under a clock, as some requests to it never time out.
    """
    from transformers import PreTrainedConfig

    if Path(path).is_dir():
        check_index(Path(path))
    else:
        within(PATIENCE, lambda: PreTrainedConfig.get_config_dict(path))


def within(seconds, task):
    """Waits for `task` and raises what it raises; TimeoutError if it takes longer."""
    ends = []

    def work():
        try:
            task()
            ends.append(None)
        except Exception as error:  # handed over to the thread that waits
            ends.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ends:
        raise TimeoutError(
            f"the hub did not answer within {seconds} seconds: try again later, or set "
            "HF_HUB_OFFLINE=1 if the model is on this disk"
        )
    if ends[0]:
        raise ends[0]


def check_index(folder):
    """The list of a model's weights may name safetensors of its own folder, and nothing else."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index.name} names {name}: no safetensors file beside it")


def reason_of(error):
    """The first line of an error of another library, without torch's advice to trust a file."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return f"the hub answers {status}: try again later"
        if isinstance(link, pickle.UnpicklingError) or "weights_only" in str(link):
            return "it holds more than tensors"
    if str(error).startswith("Can't load the") and chain[1:]:  # transformers says so of anything
        error = chain[1]
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    several = "gated repo" in lines[0]  # the next line says where to ask for it
    text = " ".join(lines[: 1 + several])[:200].rstrip(". ")
    text = "".join(c for c in text if c.isprintable())
    known = text and isinstance(error, (OSError, ValueError, RuntimeError))
    return text if known else f"{type(error).__name__}: {text}".rstrip(": ")
