"""House rules: what can be asserted over the source of the code and the JSON of the notebooks."""

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
NOTEBOOKS = ("0_download", "1_actor", "2_critic", "3_rlhf", "4_test")
SOURCE = (ROOT / "util.py").read_text(encoding="utf-8")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(node):
    return [f for f in ast.walk(node) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]


every_file = pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)

# -------------------------------------------------------------------------------------------- code


def test_util_fits_on_the_blackboard():
    assert SOURCE.count("\n") <= 1_200


@every_file
def test_no_function_is_longer_than_45_lines(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(tree(path))}
    assert not {name: lines for name, lines in long.items() if lines > 45}


@every_file
def test_no_function_takes_more_than_7_arguments_by_position(path):
    counts = {f.name: len(f.args.posonlyargs + f.args.args) for f in functions(tree(path))}
    assert not {name: count for name, count in counts.items() if count > 7}


@every_file
def test_no_global(path):
    assert not [n for n in ast.walk(tree(path)) if isinstance(n, (ast.Global, ast.Nonlocal))]


QUIET = {"dict", "set", "tuple", "list", "frozenset", "sorted", "range", "World", "Path", "field"}
QUIET_METHODS = {"split", "items", "keys", "values", "join", "format", "compile", "resolve"}


def noisy(call):
    if isinstance(call.func, ast.Attribute):
        return call.func.attr not in QUIET_METHODS
    return call.func.id not in QUIET


@every_file
def test_nothing_happens_at_module_level(path):
    """Imports, definitions and constants made of literals; no call with an effect."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for i, node in enumerate(tree(path).body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        where = f"{path.name}:{node.lineno}"
        assert docstring or main or isinstance(node, allowed), where
        if isinstance(node, ast.Assign):
            calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
            assert not [ast.unparse(c) for c in calls if noisy(c)], where


def test_lab_knows_nothing_of_util():
    for path in CODE[1:]:
        modules = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree(path))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "util" not in modules or path.name == "__main__.py", path.name
        assert not [m for m in modules if m and m.split(".")[0] == "trl"]


def contents():
    """Section numbers and names, once from the docstring and once from the banners."""
    listed = re.findall(r"^    (\d+)\. (.+?)(?:  +.*)?$", util.__doc__, re.MULTILINE)
    banners = re.findall(r"^# -{20,}\n# (\d+)\. (.+)$", SOURCE, re.MULTILINE)
    return listed, banners


def test_the_banners_are_the_contents():
    listed, banners = contents()
    assert listed == banners and len(banners) >= 10
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))


def section(name):
    """The functions of a section of util.py."""
    lines = SOURCE.splitlines()
    banners = [i for i, line in enumerate(lines, 1) if re.match(r"# \d+\. ", line)] + [len(lines)]
    start = next(i for i in banners if lines[i - 1].endswith(name))
    stop = banners[banners.index(start) + 1]
    return [f for f in functions(ast.parse(SOURCE)) if start < f.lineno < stop]


@pytest.mark.parametrize("name", ["Masked statistics", "Losses", "Rewards", "Training"])
def test_numbers_of_losses_and_loops_belong_to_config(name):
    """0, 1, 0.5, whole numbers, and tolerances up to a thousandth are no knobs."""
    bodies = [statement for function in section(name) for statement in function.body]
    floats = [
        (n.lineno, n.value)
        for body in bodies
        for n in ast.walk(body)
        if isinstance(n, ast.Constant) and isinstance(n.value, float)
    ]
    assert section(name)
    assert not [pair for pair in floats if pair[1] not in (0.0, 1.0, 0.5) and pair[1] > 1e-3]


def test_every_name_is_defined_once():
    defined = [
        n.name for n in ast.parse(SOURCE).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    ]
    assert len(defined) == len(set(defined))


SAMPLING = "max_new_tokens temperature top_k top_p eos_token_id pad_token_id generator"
FACE = {  # name -> its keyword-only arguments
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
CALLABLE = ("load_tokenizer", "load_actor", "load_scorer")
GENERATORS = ("train_actor", "train_critic", "train_rlhf")


@pytest.mark.parametrize("name", FACE)
def test_the_public_face_stays(name):
    arguments = inspect.signature(getattr(util, name)).parameters.values()
    assert [p.name for p in arguments if p.kind is p.KEYWORD_ONLY] == FACE[name].split()


def test_the_public_face_has_its_old_defaults():
    """What was called without the newer arguments means what it meant."""
    policy, grpo = (inspect.signature(f) for f in (util.ppo_policy_loss, util.grpo_loss))
    assert policy.parameters["unit"].default == grpo.parameters["unit"].default == "token"
    assert grpo.parameters["estimator"].default == "k3"
    assert inspect.signature(util.response_logprobs).parameters["entropy"].default is True


def test_loaders_are_callable_and_loops_are_generators():
    assert all(callable(getattr(util, name)) for name in CALLABLE)
    assert all(inspect.isgeneratorfunction(getattr(util, name)) for name in GENERATORS)


# ------------------------------------------------------------------------------------------ config

STAGES = {"all", "base", "actor", "critic", "rlhf", "test"}


def config_groups():
    """Field -> the comment of the group it stands in."""
    text = (ROOT / "lab" / "config.py").read_text(encoding="utf-8")
    start = text.index("class Config")
    body = text[start : text.index("    presets", start)]
    groups, group = {}, None
    for line in body.splitlines():
        if line.startswith("    # "):
            group = line[6:]
        elif field := re.match(r"    (\w+): \w+ = knob\(", line):
            assert field[1] not in groups, "a field stands twice"
            groups[field[1]] = group
    return groups


def fields():
    return util.Config.__dataclass_fields__


def test_every_field_has_a_meaning_stages_and_one_group():
    groups = config_groups()
    assert set(groups) == set(fields())
    for name, field in fields().items():
        assert field.metadata["meaning"].strip() and set(field.metadata["stages"]) <= STAGES
        assert field.metadata["stages"], name
        assert field.type in (bool, int, float, str) and type(field.default) is field.type, name
        stage = {"0_download": "base", "4_test": "test"}.get(groups[name], groups[name][2:])
        if groups[name] != "all stages":
            assert stage in field.metadata["stages"], f"{name} stands under {groups[name]}"


def notebook_sources():
    for name in NOTEBOOKS:
        path = ROOT / f"{name}.ipynb"
        if path.exists():
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            yield from ("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.mark.parametrize("name", [name for name in fields() if name != "preset"])
def test_every_field_is_read_somewhere(name):
    text = "\n".join([*(path.read_text(encoding="utf-8") for path in CODE), *notebook_sources()])
    assert re.search(rf"\bcfg\.{name}\b", text) or (
        name.endswith("_share") and 'getattr(cfg, f"{share}_share")' in text
    )


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


def python_of(cell):
    """The cell, with `pass` for the lines only IPython understands."""
    lines = text_of(cell["source"]).splitlines()
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip()[:1] in ("%", "!") else line
        for line in lines
    )


def printed(cell):
    """All text a reader of the stored outputs sees, pictures left out."""
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


def test_the_first_code_cell_is_setup_and_the_second_the_parameters(notebook):
    first, second, *others = code_cells(notebook)
    setup = text_of(first["source"])
    assert "autoreload" in setup and "import" in setup
    assert "parameters" in second["metadata"].get("tags", [])
    for cell in (first, *others):
        assert "parameters" not in cell["metadata"].get("tags", [])


def test_parameters_are_plain_literals(notebook):
    for node in ast.parse(python_of(code_cells(notebook)[1])).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        ast.literal_eval(node.value)


def test_parameters_are_fields_of_config(notebook):
    for node in ast.parse(python_of(code_cells(notebook)[1])).body:
        assert node.targets[0].id in fields()


def test_cells_are_short_and_define_next_to_nothing(notebook):
    for cell in code_cells(notebook):
        source = text_of(cell["source"])
        assert len(source.splitlines()) <= 25, source
        body = ast.parse(python_of(cell))
        assert not [n for n in ast.walk(body) if isinstance(n, ast.ClassDef)]
        assert not [f.name for f in functions(body) if f.end_lineno - f.lineno + 1 > 5]


def test_prose_stands_before_every_code_cell(notebook):
    cells = notebook["cells"]
    for before, cell in zip([None, *cells], cells):
        if cell["cell_type"] == "code":
            assert before and before["cell_type"] == "markdown", text_of(cell["source"])
            assert text_of(before["source"]).strip()


def test_outputs_are_stored_without_errors(notebook):
    assert all(cell["execution_count"] for cell in code_cells(notebook))
    kinds = [output["output_type"] for cell in code_cells(notebook) for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == sorted(counts)  # one run from top to bottom


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
