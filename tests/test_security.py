"""Code in checkpoints, models, data and answers of strangers is never run."""

import contextlib
import html.parser
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import util
from lab import report
from lab.data import turns
from lab.runs import CourseError, Stage


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The path of a file that exists only if the code of a stranger ran."""
    return tmp_path / "executed"


# ------------------------------------------------------------------------------------------------
# Pickles in checkpoints and models


def plain(evil, path):
    path.write_bytes(pickle.dumps(evil, 2))


def zipped(evil, path):
    torch.save({"state": evil}, path)


def legacy(evil, path):
    torch.save({"state": evil}, path, _use_new_zipfile_serialization=False)


def tar(evil, path):
    """Writes the tar format of torch before version 0.1."""
    parts = {"storages": (0, []), "tensors": (0,), "pickle": (evil,)}
    with tarfile.open(path, "w") as archive:
        for name, objects in parts.items():
            data = b"".join(pickle.dumps(thing, 2) for thing in objects)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


disguises = pytest.mark.parametrize("disguise", [plain, zipped, legacy, tar])


@disguises
def test_these_pickles_do_harm_where_they_are_trusted(disguise, marker, tmp_path):
    disguise(Evil(marker), tmp_path / "file")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()


def pretrain(folder, **changes):
    sizes = dict(pretrain_documents=200, pretrain_steps=6, checkpoint_minutes=0)
    cfg = util.Config("smoke", root=str(folder), base_model="tiny", **sizes | changes)
    return util.train_base(cfg)


@pytest.fixture
def checkpoint(tmp_path, root):
    """The last checkpoint of a stopped run."""
    (tmp_path / "dataset").symlink_to(root / "dataset")
    run = pretrain(tmp_path)
    while next(run)["step"] < 2:
        pass
    run.close()
    (folder,) = (tmp_path / "model" / ".base.checkpoints").glob("step-*")
    return folder


def swap(folder, name, disguise, evil, instead_of=None):
    """Puts a pickle into a checkpoint and updates its list of files to match."""
    if instead_of:
        (folder / instead_of).unlink()
    disguise(evil, folder / name)
    note = json.loads((folder / "note.json").read_text())
    note["parts"] = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "note.json"}
    (folder / "note.json").write_text(json.dumps(note))


@disguises
@pytest.mark.parametrize(
    "name, instead_of",
    [
        ("adamw.safetensors", None),
        ("model-0.safetensors", None),
        ("pytorch_model.bin", "model-0.safetensors"),
    ],
)
def test_a_pickle_in_a_checkpoint_is_refused(
    name, instead_of, disguise, checkpoint, marker, tmp_path
):
    swap(checkpoint, name, disguise, Evil(marker), instead_of)
    with pytest.raises(CourseError, match="resume = False") as refused:
        list(pretrain(tmp_path))
    assert not marker.exists()
    said = str(refused.value)
    assert checkpoint.name in said and "\n" not in said and said.isprintable()
    assert "weights_only" not in said, "torch's advice is to trust the file"


def test_a_refused_checkpoint_is_out_of_the_way_with_resume_false(checkpoint, marker, tmp_path):
    swap(checkpoint, "adamw.safetensors", zipped, Evil(marker))
    assert len(list(pretrain(tmp_path, resume=False))) == 6
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model.bin", "random_states_0.pkl"])
def test_a_pickle_that_no_checkpoint_has_is_not_read(name, checkpoint, marker, tmp_path):
    swap(checkpoint, name, zipped, Evil(marker))
    assert len(list(pretrain(tmp_path))) == 6
    assert not marker.exists()


@pytest.fixture
def model(tmp_path):
    """The folder of a user's model: a small GPT-2 and its tokenizer."""
    folder = tmp_path / "theirs" / "model"
    tokenizer = util.train_tokenizer(["one two three four"] * 4, 300)
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def take(model, **changes):
    return util.choose_base(util.Config("smoke", base_model=str(model), **changes))[:2]


def refused(model):
    """Checks that the course refuses the model and falls back to tiny; returns the error."""
    with pytest.raises(CourseError, match="does not load") as error:
        take(model, fallback=False)
    source, why = take(model)
    assert source == "tiny" and str(model) in why
    assert "\n" not in why and why.isprintable()
    return str(error.value)


@disguises
def test_weights_in_a_pickle_are_never_loaded(disguise, model, marker):
    (model / "model.safetensors").unlink()
    disguise(Evil(marker), model / "pytorch_model.bin")
    assert "safetensors" in refused(model)
    assert not marker.exists()


@disguises
def test_an_index_cannot_smuggle_a_pickle_in(disguise, model, marker):
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    disguise(Evil(marker), model / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weights.bin" in refused(model)
    assert not marker.exists()


def test_an_index_cannot_leave_its_folder(model):
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../x.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../x.safetensors" in refused(model)


def test_other_pickles_beside_a_model_are_not_read(model, marker):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "pytorch_model.bin"):
        zipped(Evil(marker), model / name)
    assert take(model)[0] == str(model)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------
# Code of models, tokenizers and data sets


@pytest.fixture
def script(marker):
    """Source code that creates the marker file when it is imported."""
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"


@pytest.fixture(autouse=True)
def somebody_who_says_yes(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


OWN = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


def test_the_code_of_an_unknown_model_is_not_run(model, script, marker):
    (model / "modeling_evil.py").write_text(script)
    change(model / "config.json", auto_map=OWN, model_type="evil")
    assert "needs Python code that comes with the model" in refused(model)
    assert not marker.exists()


def test_the_code_of_a_known_model_is_not_run(model, script, marker):
    (model / "modeling_evil.py").write_text(script)
    change(model / "config.json", auto_map=OWN)
    assert take(model)[0] == str(model)
    assert not marker.exists()


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_the_code_of_a_tokenizer_is_not_run(family, model, script, marker):
    if family == "bloom":  # transformers has no tokenizer class for it and would ask the user
        shape = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
        BloomForCausalLM(shape).save_pretrained(model)
    (model / "tokenization_evil.py").write_text(script)
    own = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(model / "tokenizer_config.json", auto_map=own, tokenizer_class="Evil")
    take(model)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["rubbish", "{}", '{"model": {"type": "BPE", "vocab": 7}}'])
def test_a_tokenizer_that_is_rubbish_is_refused(text, model):
    (model / "tokenizer.json").write_text(text)
    assert "tokenizer" in refused(model).replace(str(model), "")


ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].popen('touch MARKER').read() }}",
    "lipsum": "{{ lipsum.__globals__.os.system('touch MARKER') }}",
    "attr": "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].system('touch MARKER') }}",
    "self": "{{ self.__init__.__globals__.__builtins__['open']('MARKER', 'w') }}",
    "format": "{{ '{0.__init__.__globals__}'.format(cycler).os.system('touch MARKER') }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
    "{% if c.__init__.__globals__ and c.__init__.__globals__.__builtins__ %}"
    "{{ c.__init__.__globals__.__builtins__['open']('MARKER', 'w') }}{% endif %}{% endfor %}",
    "messages": "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}"
    "{% set _ = messages.append({'role': 'x', 'content': 'planted'}) %}",
}
HI = "Human: Hi Assistant:"
HARMFUL = ("globals", "joiner", "lipsum", "attr")  # these do harm without the sandbox


@pytest.mark.parametrize("name", HARMFUL)
def test_these_templates_do_harm_where_nothing_guards_them(name, marker):
    template = ESCAPES[name].replace("MARKER", str(marker))
    jinja2.Environment().from_string(template).render(messages=[])
    assert marker.exists()


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_gets_out_of_nothing(name, model, marker, write_rows):
    """The course uses the template of a model, in the sandbox that transformers provides."""
    template = "{{ messages[0].content }}" + ESCAPES[name].replace("MARKER", str(marker))
    (model / "chat_template.jinja").write_text(template)
    root = write_rows([{"prompt": HI}])
    cfg = util.Config("smoke", root=str(root), base_model=str(model), fallback=False)
    said = turns(HI)
    with contextlib.suppress(CourseError):
        list(util.train_base(cfg))
        tokenizer, _ = util.load_pair(cfg, "base")
        assert tokenizer.chat_template == template
        text = tokenizer.apply_chat_template(said, tokenize=False)
        assert text.startswith("Hi"), "it is the template that speaks"
        util.encode_prompts(tokenizer, [HI], cfg, "cpu")
    assert not marker.exists()
    assert said == turns(HI)


def test_a_chat_template_without_tricks_is_used(model):
    (model / "chat_template.jinja").write_text("<<{{ messages[-1].content }}>>")
    tokenizer = util.load_tokenizer(model)
    ids = util.encode_prompt(tokenizer, HI, 50)
    assert tokenizer.decode(ids) == "<<Hi>>"


def test_scripts_beside_the_data_are_not_run(script, marker, write_rows):
    row = {"prompt": "Hi", "response": "a", "chosen": "b", "rejected": "c"}
    root = write_rows([row] * 20)
    write_rows([row | {"prompt": "Hello"}], "eval.json")
    for name in ("train.py", "dataset.py", "__init__.py"):
        (root / "dataset" / name).write_text(script)
    (root / "dataset" / "dataset_infos.json").write_text('{"builder_name": "dataset"}')
    cfg = util.Config("smoke", root=str(root), sft_share=0.5)
    assert len(util.load_rows(cfg, "sft")) == 10 and len(util.load_eval_rows(cfg)) == 1
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------
# Answers in the report and in a notebook

EVIL_TEXTS = [
    "<script>document.title='taken over'</script>",
    "<img src=x onerror=\"document.title='taken over'\">",
    "</td></table></style></pre></title><b id=planted>planted</b>",
    "<svg onload=\"document.title='taken over'\"><iframe srcdoc='<b id=planted>'></iframe>",
    "&lt;b id=planted&gt; &amp; \" ' ` {0} {body} $\\frac$ %s",
]
FIELDS = ("prompt", "response", "kind", "flaw")
EVIL_ROWS = [
    {name: f"{name} {i} {text}" for name in FIELDS} | {"step": 0, "temperature": 0.0, "reward": 0.5}
    for i, text in enumerate(EVIL_TEXTS)
]
BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable microsoft-edge".split()


class Page(html.parser.HTMLParser):
    """Parses a page into its elements and its visible text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.inside, self.title, self.text, self.scripts = [], "", "", "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        name = {"title": "title", "script": "scripts", "style": "scripts"}.get(self.inside, "text")
        setattr(self, name, getattr(self, name) + data)


def check(page, title):
    """Checks that the page shows hostile rows as text only."""
    found = Page(page)
    assert found.title == title
    assert "taken over" not in found.scripts
    for tag, attributes in found.elements:
        assert attributes.get("id") != "planted" and tag not in ("iframe", "svg"), tag
        assert not {"onerror", "onload", "srcdoc"} & set(attributes), tag
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    for row in EVIL_ROWS:
        for name in FIELDS:
            assert row[name] in found.text, name


def rendered(path):
    """The page after a browser ran its scripts without a network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None and os.environ.get("NEED_BROWSER") != "1":
        pytest.skip("no Chromium, Chrome or Edge on this machine (NEED_BROWSER=1 makes this fail)")
    assert browser, "NEED_BROWSER=1, and no Chromium, Chrome or Edge is installed"
    how = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    how += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'browser'}"]
    call = [browser, *how, "--dump-dom", path.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("</html>"), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """The report for hostile rows."""
    folder = tmp_path_factory.mktemp("report")
    truth = {"judge": 0.5, "kl": 0.1, "length": 3, "eos": True}
    answers = {name: [row | truth for row in EVIL_ROWS] for name in ("base", "actor", "rlhf")}
    models = {name: report.summarise(rows, rows) for name, rows in answers.items()}
    pairs = pd.DataFrame(EVIL_ROWS).assign(chosen=range(5), rejected=2.5)
    beside = report.side_by_side(EVIL_ROWS, answers)
    parts = report.parts(models, answers, beside, pairs)
    parts += [(row["prompt"], row["response"]) for row in EVIL_ROWS]
    parts.append(("Flaws", report.by_flaw(pairs)))
    report.write_report(folder, {"models": models}, parts)
    return folder / "report.html"


CELLS = (
    "import json\n"
    "from lab import notebook, report\n"
    "from lab.config import Config\n"
    "import pandas as pd\n"
    "rows = json.load(open('rows.json'))",
    "notebook.show(rows)",
    "notebook.show(notebook.examples(rows))",
    "notebook.show(notebook.composition(rows, rows))",
    "notebook.show(notebook.samples('.', 0))",
    "notebook.explain(Config('smoke', base_model=rows[0]['response']), 'base')",
    "pairs = pd.DataFrame(rows).assign(chosen=range(5), rejected=2.5)\n"
    "notebook.show(report.by_flaw(pairs))\n"
    "report.score_histogram(pairs)",
    "tokens = [row['response'] for row in rows]\n"
    "report.token_strip({rows[0]['prompt']: (tokens, {'reward': range(5)})})",
    "for row in rows:\n    print(row['prompt'], row['response'])",
    "display(pd.DataFrame(rows))",
    "from lab.runs import CourseError\nraise CourseError(rows[0]['response'])",
)


@pytest.fixture(scope="module")
def notebook_page(tmp_path_factory, root):
    """A notebook as a page; it shows hostile rows in every way that the course has."""
    folder = tmp_path_factory.mktemp("notebook")
    with Stage(folder, "rlhf", {}) as stage:
        stage.samples(EVIL_ROWS)
        stage.samples(row | {"step": 9} for row in EVIL_ROWS)
    (folder / "rows.json").write_text(json.dumps(EVIL_ROWS))
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    cells[-1].metadata["tags"] = ["raises-exception"]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))
        NotebookClient(
            book, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    page, _ = HTMLExporter().from_notebook_node(book)
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


def test_a_report_shows_what_strangers_wrote_as_text(report_page):
    check(report_page.read_text(encoding="utf-8"), "RLHF report")


def test_a_notebook_shows_what_strangers_wrote_as_text(notebook_page):
    check(notebook_page.read_text(encoding="utf-8"), "Notebook")


def test_a_browser_finds_nothing_to_run_in_a_report(report_page):
    check(rendered(report_page), "RLHF report")


def test_a_browser_finds_nothing_to_run_in_a_notebook(notebook_page):
    check(rendered(notebook_page), "Notebook")


def test_a_browser_runs_what_is_not_escaped(tmp_path):
    """Checks that the browser runs scripts at all, on which the tests above rely."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><title>mine</title>{EVIL_TEXTS[1]}</html>")
    assert Page(rendered(page)).title == "taken over"
