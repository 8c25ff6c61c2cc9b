"""Checks what users rely on: importing util has no side effects, only lab/__main__.py imports util,
public arguments keep their names and defaults, and the stored notebooks are clean.

These tests do not check the style of util.py; ruff does.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import util

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "util.py", *sorted((ROOT / "lab").glob("*.py"))]
NOTEBOOKS = ("0_download", "1_actor", "2_critic", "3_rlhf", "4_test", "more/overoptimisation")

# -------------------------------------------------------------------------------------------- code


def test_lab_knows_nothing_of_util_and_nobody_of_trl():
    for path in CODE:
        modules = {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "trl" not in modules, path.name
        assert "util" not in modules or path.name in ("util.py", "__main__.py"), path.name


SAMPLING = "max_new_tokens temperature top_k top_p eos_token_id pad_token_id generator"
FACE = {  # name -> keyword-only arguments that notebooks and custom losses use
    "generate": SAMPLING,
    "response_logprobs": "temperature entropy",
    "masked_mean": "",
    "masked_whiten": "",
    "pairwise_loss": "",
    "kl_estimate": "estimator",
    "gae": "gamma lam",
    "ppo_policy_loss": "clip_ratio unit",
    "ppo_value_loss": "value_clip unit",
    "group_advantages": "scale",
    "grpo_loss": "clip_ratio kl_coef estimator unit",
    "dpo_loss": "beta loss_type label_smoothing",
}
OPTIONAL = {"entropy": True, "unit": "token", "temperature": 1.0, "scale": True}


@pytest.mark.parametrize("name", FACE)
def test_what_was_called_still_means_what_it_meant(name):
    """New arguments need defaults. No argument may disappear, and no default may change."""
    arguments = inspect.signature(getattr(util, name)).parameters
    assert set(FACE[name].split()) <= arguments.keys()
    for argument in arguments.values():
        if argument.kind is argument.KEYWORD_ONLY and argument.name not in FACE[name].split():
            assert argument.default is not argument.empty, argument.name
        if argument.name in OPTIONAL:
            assert argument.default == OPTIONAL[argument.name], argument.name


def test_loaders_are_callable_and_loops_are_generators():
    assert all(callable(getattr(util, f"load_{name}")) for name in ("tokenizer", "actor", "scorer"))
    loops = (util.train_actor, util.train_critic, util.train_rlhf)
    assert all(map(inspect.isgeneratorfunction, loops))


# ------------------------------------------------------------------------------------------ config

STAGES = {"all", "base", "actor", "critic", "rlhf", "test"}


def fields():
    return util.Config.__dataclass_fields__


def test_every_field_has_a_meaning_a_type_and_stages():
    for name, field in fields().items():
        assert field.metadata["meaning"].strip() and field.metadata["stages"], name
        assert set(field.metadata["stages"]) <= STAGES, name
        assert field.type in (bool, int, float, str) and type(field.default) is field.type, name


# ------------------------------------------------------------------------------------------ import

PROBE = """
import sys, random, warnings
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
    AutoTokenizer, DynamicCache, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast)
import torch, tokenizers, numpy
root, events = sys.argv[1], []

def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        name, mode = str(args[0]), str(args[1])
        ours = name.startswith(root) and not name.endswith((".py", ".pyc"))
        if any(letter in mode for letter in "wax+") or ours and ".venv" not in name:
            events.append((event, name, mode))
    elif event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename")):
        events.append((event,))

def forbidden(*args, **kwargs):
    events.append(("cuda",))
    return False

torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = forbidden
before = (list(warnings.filters), torch.get_rng_state().tolist(), random.getstate(),
    torch.get_default_dtype(), torch.get_num_threads())
sys.addaudithook(hook)
sys.path.insert(0, root)
import util
after = (list(warnings.filters), torch.get_rng_state().tolist(), random.getstate(),
    torch.get_default_dtype(), torch.get_num_threads())
names = "warnings rng random dtype threads".split()
events += [("changed", name) for name, a, b in zip(names, before, after) if a != b]
events += [("imported", m) for m in ("peft", "wandb", "trl", "datasets") if m in sys.modules]
print(events)
"""


def test_importing_util_touches_nothing(tmp_path):
    command = [sys.executable, "-B", "-c", PROBE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- notebooks
@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    path = ROOT / f"{request.param}.ipynb"
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    """Yields all text in the stored outputs, without pictures."""
    for output in cell["outputs"]:
        parts = [output.get("text", ""), *output.get("traceback", [])]
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "application/json":
                parts.append(value if isinstance(value, (str, list)) else json.dumps(value))
        text = "\n".join(text_of(part) for part in parts)
        yield re.sub(r"data:image/[\w+.-]+;base64,[A-Za-z0-9+/=\s]+", "", text)


def test_the_kernel_is_python3_and_no_widget_is_stored(notebook):
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    assert "widget-view" not in json.dumps([c.get("outputs") for c in notebook["cells"]])


def test_the_parameters_are_one_cell_of_plain_literals_that_config_knows(notebook):
    cells = code_cells(notebook)
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert "cfg" not in text_of(cells[0]["source"]) + text_of(cells[1]["source"])
    assert tagged == [cells[2]], "papermill puts its own behind them, before anything reads them"
    for node in ast.parse(text_of(tagged[0]["source"])).body:
        assert isinstance(node, ast.Assign) and node.targets[0].id in {*fields(), "quick"}
        ast.literal_eval(node.value)


def test_outputs_are_stored_without_errors(notebook):
    assert all(cell["execution_count"] for cell in code_cells(notebook))
    kinds = [output["output_type"] for cell in code_cells(notebook) for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == sorted(counts)  # the notebook ran once from top to bottom


def test_outputs_show_no_absolute_path_and_no_warning(notebook):
    absolute = re.compile(
        r"(?:^|[\s'\"(=\[])(/[A-Za-z][\w.+-]*/[\w.+-]+|[A-Z]:\\\\?\w+)", re.MULTILINE
    )
    for cell in code_cells(notebook):
        for text in printed(cell):
            assert not absolute.findall(text), text[:300]
            assert not re.search(r"[A-Z]?\w*Warning\b|\bwarning:", text), text[:300]
        assert not [out for out in cell["outputs"] if out.get("name") == "stderr"]


def test_metadata_hold_no_absolute_path(notebook):
    bare = {k: v for k, v in notebook.items() if k != "cells"}
    text = json.dumps([bare, [cell["metadata"] for cell in notebook["cells"]]])
    assert not re.search(r'"/[A-Za-z]', text) and "papermill" not in notebook["metadata"]


def test_cells_hold_no_absolute_path(notebook):
    for cell in notebook["cells"]:
        assert not re.search(r"['\"(\s]/(?:home|Users|mnt)/", text_of(cell["source"]))


def test_no_cell_is_longer_than_a_screen(notebook):
    assert max(len(text_of(cell["source"]).splitlines()) for cell in code_cells(notebook)) <= 25
