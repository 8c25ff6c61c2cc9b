"""Access to the model hub: a time limit for its first answer, and its errors in one line."""

import json
import pickle
import threading
from pathlib import Path

PATIENCE = 30  # seconds to wait for the hub's first answer; the download itself has no limit


def reach(path):
    """Raises an error if a model cannot be reached, before the long download begins.

    It requests a small file with a time limit, because some requests to the hub never time out.
    """
    from transformers import PreTrainedConfig

    if Path(path).is_dir():
        check_index(Path(path))
    elif Path(path).suffix != ".gguf":  # such a file is always local
        within(PATIENCE, lambda: PreTrainedConfig.get_config_dict(path))


def within(seconds, task):
    """Runs `task` in a thread and raises its errors, or TimeoutError after `seconds`."""
    ends = []

    def work():
        try:
            task()
            ends.append(None)
        except Exception as error:  # raised again in the waiting thread
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
    """Raises if the index of a model's weights names anything but safetensors in its folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index.name} names {name}, not a safetensors file beside it")


def reason_of(error):
    """Returns the first line of a library's error, without torch's advice to trust a file."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return f"the hub answered with status {status}: try again later"
        if isinstance(link, pickle.UnpicklingError) or "weights_only" in str(link):
            return "the file contains more than tensors"
    if str(error).startswith("Can't load the") and chain[1:]:  # too general; use its cause
        error = chain[1]
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    several = "gated repo" in lines[0]  # the next line says where to request access
    text = " ".join(lines[: 1 + several])[:200].rstrip(". ")
    text = "".join(c for c in text if c.isprintable())
    known = text and isinstance(error, (OSError, ValueError, RuntimeError))
    return text if known else f"{type(error).__name__}: {text}".rstrip(": ")
