"""What the cells of a notebook show, in every form in which they show it."""

import base64
import inspect
import re
import xml.etree.ElementTree as tree
from html import unescape
from types import SimpleNamespace

import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from markdown_it import MarkdownIt

from lab import CourseError, drawing, notebook, report
from lab.config import Config
from lab.runs import Stage
from lab.world import World, judge
from lab.world import rows as world_rows

EVIL = "<b>x</b> | *y* _z_ `q` [l](u) $5$ \\ ~s~ &amp;\nline"


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, as dicts of mime types."""
    outputs = []
    monkeypatch.setattr(notebook, "display", lambda forms, raw: outputs.append(forms))
    return outputs


def markdown_cells(text):
    """The texts of a markdown table, as a reader sees them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    assert tokens[0].type == "table_open", "it is no table"
    cells = [token for token in tokens if token.type == "inline"]
    for cell in cells:
        assert all(child.type in ("text", "text_special") for child in cell.children), cell
    return ["".join(child.content for child in cell.children) for cell in cells]


# ------------------------------------------------------------------------------------------ source


def test_code_is_there_as_html_markdown_and_text(shown):
    notebook.source(notebook.show, report.interval)
    (forms,) = shown
    code = "\n\n".join(inspect.getsource(f).rstrip() for f in (notebook.show, report.interval))
    assert forms["text/plain"] == code
    assert forms["text/markdown"] == f"```python\n{code}\n```"
    text = re.sub("<[^>]*>", "", forms["text/html"])
    for name, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(name, sign)
    assert text.strip() == code.strip()


def test_the_colours_of_code_come_from_the_theme_and_long_lines_scroll(shown):
    notebook.source(report.interval)
    page = shown[0]["text/html"]
    assert "overflow-x:auto" in page and "white-space:pre;" in page
    colours = re.findall(r"[; \"]color:([^;\"]*)", page)
    assert len(colours) > 10
    assert all(c.startswith("var(--jp-mirror-editor-") and "#" in c for c in colours)
    assert "background" not in page
    assert re.search(r'<span class="k"[^>]*>def</span>', page)


def fenced():
    """A docstring with a fence:

    ```python
    x = "````"
    ```
    """


def test_a_fence_within_the_code_does_not_end_the_block(shown):
    notebook.source(fenced)
    tokens = MarkdownIt().parse(shown[0]["text/markdown"])
    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content.rstrip() == shown[0]["text/plain"]


# ------------------------------------------------------------------------------------------ tables


def test_a_table_is_there_as_html_markdown_and_text(shown):
    notebook.show({"answer": [EVIL, "b"], "score": [-0.0, 0.123456]})
    (forms,) = shown
    assert "<b>" not in forms["text/html"] and "&lt;b&gt;" in forms["text/html"]
    assert 'class="scroll' in forms["text/html"] and "overflow-x:auto" in forms["text/html"]
    one_line = " ".join(EVIL.split()).replace("&amp;", "&amp;")
    assert markdown_cells(forms["text/markdown"]) == [
        "answer",
        "score",
        one_line,
        "0",
        "b",
        "0.123",
    ]
    assert forms["text/plain"].splitlines()[0].split() == ["answer", "score"]
    assert "0.123" in forms["text/plain"] and "HTML object" not in forms["text/plain"]


@pytest.mark.parametrize("form", ["text/html", "text/markdown", "text/plain"])
def test_a_named_index_is_a_column_and_row_numbers_are_not(shown, form):
    table = pd.DataFrame({"x": ["a", "b"]}, index=[17, 18])
    notebook.show(table)
    notebook.show(table.rename_axis("model"))
    bare, named = (forms[form] for forms in shown)
    assert "17" not in bare and "17" in named and "model" in named


def test_the_parameters_are_folded_in_every_form(shown):
    notebook.explain(Config("smoke"), "base")
    (forms,) = shown
    assert forms["text/html"].startswith("<details><summary>All ")
    assert forms["text/markdown"].startswith("<details><summary>All ")
    table = forms["text/markdown"].split("\n\n", 1)[1].removesuffix("\n\n</details>")
    assert markdown_cells(table)[:3] == ["parameter", "value", "meaning"]
    for text in forms.values():
        assert "pretrain" in text and "HTML object" not in text


@pytest.mark.parametrize("draw", [drawing.four_models, drawing.course])
def test_a_drawing_has_its_description_as_text(shown, draw):
    notebook.draw(draw())
    (forms,) = shown
    assert set(forms) == {"text/html", "image/svg+xml", "text/plain"}
    assert forms["image/svg+xml"] == draw()
    title, description = forms["text/plain"].splitlines()
    assert title and len(description) > 200
    image = re.fullmatch(r'<img src="([^"]*)" alt="([^"]*)" width="[0-9]+">', forms["text/html"])
    assert unescape(image[2]) == forms["text/plain"]
    assert base64.b64decode(image[1].split(",")[1]).decode() == draw()


# -------------------------------------------------------------------------------------------- data


def test_examples_show_a_right_and_a_wrong_answer_of_each_kind():
    rows = list(world_rows(World(), "train", 400))
    table = notebook.examples(rows)
    assert table["kind"].tolist() == [k for k in sorted({r["kind"] for r in rows}) for _ in "ab"]
    assert table["judge's score"].tolist() == [1, 0] * (len(table) // 2)
    for shown in table.to_dict("records"):
        row = next(r for r in rows if r["prompt"] == shown["prompt"])
        assert judge(row, shown["chosen"]) >= judge(row, shown["rejected"])


def test_examples_of_rows_without_a_judge_are_the_first_of_each_kind():
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "kind": "ab"[i % 2]} for i in range(6)]
    table = notebook.examples(rows)
    assert table.to_dict("list") == {
        "kind": ["a", "b"], "prompt": ["p0", "p1"], "response": ["r0", "r1"],
    }  # fmt: skip
    bare = notebook.examples([{"prompt": "p"}, {"prompt": "q"}])
    assert bare.to_dict("list") == {"kind": ["all"], "prompt": ["p"]}


def test_a_kind_that_is_only_half_right_is_shown_by_its_first_row():
    rows = [r for r in world_rows(World(), "train", 60) if r["kind"] == "feelings"]
    half = [row | {"response": "I am here to listen."} for row in rows]
    table = notebook.examples(half)
    assert table["prompt"].tolist() == [half[0]["prompt"]]
    assert table["judge's score"].tolist() == pytest.approx([1 / 3])


# ----------------------------------------------------------------------------------------- samples


def write_samples(root, rows):
    with Stage(root, "rlhf", {}) as stage:
        stage.samples(rows)


def sample(step, prompt, response, temperature=0.0, **more):
    return {"step": step, "temperature": temperature, "prompt": prompt, "response": response} | more


def test_samples_put_the_same_prompts_before_and_after(tmp_path):
    rows = [
        sample(step, prompt, f"{prompt} {step} {temperature}", temperature, reward=step, kl=kl)
        for step, kl in ((0, -3.8e-6), (25, 0.2), (50, 0.5824))
        for temperature in (0.0, 0.7)
        for prompt in ("p", "q")
    ]
    write_samples(tmp_path, rows)
    for temperature in (0, 0.7):
        table = notebook.samples(tmp_path, temperature)
        told = float(temperature)
        assert table.to_dict("list") == {
            "prompt": ["p", "q"],
            "before": [f"p 0 {told}", f"q 0 {told}"],
            "after": [f"p 50 {told}", f"q 50 {told}"],
            "reward before": [0, 0],
            "reward after": [50, 50],
            "KL after": [0.582, 0.582],
        }


def test_samples_without_reward_have_no_such_column_and_a_resumed_run_counts_once(tmp_path):
    rows = [sample(0, "p", "a", reward=None, kl=0.0), sample(9, "p", "b", reward=None, kl=-1e-9)]
    write_samples(tmp_path, [*rows, sample(9, "p", "c", reward=None, kl=-1e-9)])
    table = notebook.samples(tmp_path, 0)
    assert list(table) == ["prompt", "before", "after", "KL after"]
    assert table["after"].tolist() == ["c"]
    assert report.cell(table["KL after"][0]) == "0"


def test_dates_and_numbers_in_samples_stay_texts(tmp_path):
    write_samples(tmp_path, [sample(0, "2020-01-01", "007"), sample(1, "2020-01-01", "a\u2028b")])
    table = notebook.samples(tmp_path, 0)
    assert table.to_dict("list") == {
        "prompt": ["2020-01-01"],
        "before": ["007"],
        "after": ["a\u2028b"],
    }


@pytest.mark.parametrize(
    "rows, temperature, word",
    [
        ([sample(0, "p", "a")], 0, "run 3_rlhf.ipynb to its end"),
        ([sample(0, "p", "a"), sample(1, "p", "b")], 0.5, r"temperatures \[0.0\]"),
        ([{"step": 1, "prompt": "p", "response": "a", "fixed": True}], 0, "older version"),
    ],
)
def test_samples_that_cannot_be_compared_say_why(tmp_path, rows, temperature, word):
    write_samples(tmp_path, rows)
    with pytest.raises(CourseError, match=word):
        notebook.samples(tmp_path, temperature)


# ------------------------------------------------------------------------------------------- watch


def test_the_last_state_of_a_training_is_shown(monkeypatch):
    updates = []

    class Handle:
        def update(self, content, **_):
            updates.append(content)

    monkeypatch.setattr(notebook, "display", lambda *_, **__: Handle())
    steps = ({"step": i + 1, "steps": 5, "loss": 1.0 / (i + 1)} for i in range(5))
    history = notebook.watch(steps, {"loss": ("Loss", "nats", "log")}, "training")
    assert history["loss"].tolist() == [1 / (i + 1) for i in range(5)]
    line, figure = updates[-2:]
    assert "5/5" in line["text/plain"]
    assert len(figure.axes[0].lines[0].get_ydata()) == 5


def test_a_figure_is_described_in_words_where_pictures_are_not_shown(monkeypatch, capsys):
    shell = SimpleNamespace(run_line_magic=lambda *_: None, display_formatter=DisplayFormatter())
    monkeypatch.setattr(notebook, "get_ipython", lambda: shell)
    for name in ("disable_progress_bar", "set_verbosity_error"):
        monkeypatch.setattr(f"transformers.utils.logging.{name}", lambda: None)
    notebook.hello(Config("tiny", device="cpu"))
    assert capsys.readouterr().out.startswith("Running on cpu, python 3")
    notebook.hello(Config("tiny", device="cpu", precision="fp16"))
    assert "cpu, products in fp16, with loss scaling, python" in capsys.readouterr().out
    figure = report.next_token_bars(["a", "b"], [0.25, 0.75], [0.5, 0.5])
    words = shell.display_formatter.formatters["text/plain"](figure)
    assert words == "Next token, actor and rlhf: b 0.75 and 0.50, a 0.25 and 0.50."


# ---------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize("draw", [drawing.four_models, drawing.course])
def test_a_drawing_is_whole_and_stays_within_its_frame(draw):
    page = tree.fromstring(draw())
    width, height = float(page.get("width")), float(page.get("height"))
    assert page.get("viewBox") == f"0 0 {width:g} {height:g}"
    space = "{http://www.w3.org/2000/svg}"
    boxes = page.findall(f".//{space}rect")
    for shape in boxes:
        x, y, w, h = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
    for words in page.findall(f".//{space}text"):
        x, y, size = (float(words.get(name)) for name in ("x", "y", "font-size"))
        length = 0.6 * size * len(words.text)  # a wide font; a line that is too long shows here
        left = x if words.get("text-anchor") == "start" else x - length / 2
        assert left >= 0 and left + length <= width and size <= y <= height
    backgrounds = [shape for shape in boxes if float(shape.get("width")) == width]
    assert not backgrounds, "the page shows through"


def test_the_drawing_of_ppo_names_its_four_models():
    text = re.sub("<[^>]*>", "\n", drawing.four_models().split("</desc>")[1])
    assert {"policy", "reference", "reward model", "value model"} <= set(text.split("\n"))


def test_the_drawing_of_the_course_names_its_notebooks(root):
    text = drawing.course()
    assert all(path.stem in text for path in root.glob("[0-4]_*.ipynb"))
