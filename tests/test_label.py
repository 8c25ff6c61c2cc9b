"""lab/label.py: the file of comparisons, what is asked, the terminal, the widget, and training."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import combinations

import nbformat
import pytest
import torch
import websocket

import util
from lab import CourseError, label
from lab import __main__ as driver
from lab.splits import rng_for

PAIRS = [
    {"prompt": f"Human: Question {i}? Assistant:", "left": f"yes {i}", "right": f"no {i}"}
    for i in range(6)
]


def config(root, **values):
    return util.Config("smoke", root=str(root), device="cpu", **values)


def fake(cfg, count):
    return PAIRS


def lines(root):
    text = (root / "dataset" / "feedback.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def session(tmp_path):
    return label.Session(config(tmp_path), fake, 4)


# ------------------------------------------------------------------------------------------------
# The file


def test_every_answer_is_on_the_disk_at_once(session, tmp_path):
    for count, choice in enumerate(("left", "tie", "skip"), 1):
        pair = session.current
        session.answer(pair, choice)
        assert len(lines(tmp_path)) == count == session.done
        assert lines(tmp_path)[-1] == pair | {"choice": choice, "by": "person"}


def test_whoever_opens_it_again_goes_on_where_it_ends(session, tmp_path):
    asked = []
    while pair := label.Session(config(tmp_path), fake, 4).current:
        asked.append(pair)
        label.Session(config(tmp_path), fake, 4).answer(pair, "left")
    assert len(set(map(label.key, asked))) == 4 == label.Session(config(tmp_path), fake, 4).done
    more = label.Session(config(tmp_path), fake, 6)
    assert label.key(more.current) not in set(map(label.key, asked))


def test_a_pair_that_was_answered_with_other_sides_is_not_asked_again(session, tmp_path):
    first = session.current
    turned = first | {"left": first["right"], "right": first["left"]}
    session.answer(turned, "right")
    session.answer(first, "left")
    assert len(lines(tmp_path)) == 1 and label.key(session.current) != label.key(first)


def test_undo_takes_back_the_last_one_and_asks_it_again(session, tmp_path):
    assert session.undo() is None
    first = session.current
    session.answer(first, "left")
    second = session.current
    session.answer(second, "right")
    assert session.undo()["left"] == second["left"]
    assert session.current == second and len(lines(tmp_path)) == 1
    session.undo()
    assert session.current == first and session.undo() is None


def test_undo_takes_back_nothing_of_another_person(session, tmp_path):
    session.answer(session.current, "left")
    assert label.Session(config(tmp_path), fake, 4, by="another").undo() is None
    assert len(lines(tmp_path)) == 1


def test_undo_also_works_when_all_are_answered(session):
    while pair := session.current:
        session.answer(pair, "left")
    fresh = label.Session(session.cfg, fake, 4)
    assert fresh.undo() and fresh.done == 3 and fresh.current


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_line_that_a_kill_cut_short_is_ignored_and_repaired(session, tmp_path, keep):
    session.answer(session.current, "left")
    path = tmp_path / "dataset" / "feedback.jsonl"
    whole = path.read_bytes()
    row = PAIRS[5] | {"left": "中文" * 9, "choice": "tie", "by": "person"}
    torn = json.dumps(row, ensure_ascii=False).encode()[:keep]
    path.write_bytes(whole + torn)
    assert session.done == 1
    session.answer(session.current, "right")
    assert [row["choice"] for row in lines(tmp_path)] == ["left", "right"]
    path.write_bytes(whole + torn)
    session.undo()
    assert label.scan(path)[0] == []


def test_a_last_line_without_its_end_counts_if_it_is_complete(session, tmp_path):
    session.answer(session.current, "left")
    path = tmp_path / "dataset" / "feedback.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    assert session.done == 1
    session.answer(session.current, "tie")
    assert [row["choice"] for row in label.scan(path)[0]] == ["left", "tie"]


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("no JSON", "line 2: this is not valid JSON"),
        ("[]", "line 2: a row must be an object"),
        (json.dumps(PAIRS[1]), "line 2: the field 'choice' is missing"),
        (json.dumps(PAIRS[1] | {"choice": "up", "by": "me"}), "line 2: the choice is 'up'"),
        (json.dumps(PAIRS[1] | {"choice": 1, "by": "me"}), "line 2: the field 'choice' must"),
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error(session, tmp_path, line, sentence):
    session.answer(session.current, "left")
    path = tmp_path / "dataset" / "feedback.jsonl"
    path.write_bytes(path.read_bytes() + line.encode() + b"\n" + path.read_bytes())
    with pytest.raises(CourseError, match="feedback.jsonl, " + sentence.replace("[", r"\[")):
        label.pairs_of(tmp_path)


def test_any_text_survives_the_file(tmp_path):
    left, right = 'a\nb\r\n"\\</script>', "中文\u2028x\x85y"
    pair = {"prompt": "Human: 你好 Assistant:", "left": left, "right": right}
    session = label.Session(config(tmp_path), lambda cfg, count: [pair], 4)
    session.answer(pair, "left")
    assert label.scan(session.path)[0] == [pair | {"choice": "left", "by": "person"}]
    assert label.pairs_of(tmp_path) == [
        {"prompt": pair["prompt"], "chosen": left, "rejected": right}
    ]


# ------------------------------------------------------------------------------------------------
# What to ask


def test_the_sides_are_random_and_the_same_on_every_machine(tmp_path):
    cfg = config(tmp_path)
    pairs = [{"prompt": f"{i}", "left": "a", "right": "b"} for i in range(200)]
    sides = [label.in_random_sides(cfg, pair)["left"] for pair in pairs]
    assert 60 < sides.count("a") < 140
    turned = [pair | {"left": "b", "right": "a"} for pair in pairs]
    assert sides == [label.in_random_sides(cfg, pair)["left"] for pair in turned]
    other = [label.in_random_sides(cfg.changed(seed=1), pair)["left"] for pair in pairs]
    assert sides != other


def asked(scores, answers="abcd", prompts="pppp"):
    return label.ordered(prompts, answers, scores, rng_for(util.Config("smoke"), "x"))


def test_one_reward_model_puts_the_closest_scores_first():
    pairs = asked([[0.0, 1.0, 1.1, 5.0, 7.0, 7.01]], "abcdef", "ppqqrr")
    assert [pair["prompt"] for pair in pairs] == ["r", "p", "q"]


def test_several_reward_models_put_their_largest_disagreement_first():
    scores = [[0.0, 9.0, 0.0, 0.0, 0.0, 2.0], [0.0, 9.0, 0.0, 7.0, 0.0, 0.0]]
    pairs = asked(scores, "abcdef", "ppqqrr")
    said = "a large difference on which all agree comes last"
    assert [pair["prompt"] for pair in pairs] == ["q", "r", "p"], said


def test_without_a_reward_model_the_order_is_random_and_covers_all_pairs():
    pairs = asked([])
    assert set(map(label.key, pairs)) == {("p", frozenset(c)) for c in combinations("abcd", 2)}
    assert pairs == asked([])


def test_equal_empty_and_unreadable_answers_are_never_asked():
    pairs = asked([[0.0] * 7], ["a", "a", " a ", "", " ", "b", "c\0"], "p" * 7)
    assert len(pairs) == 1 and {pairs[0][side].strip() for side in ("left", "right")} == {"a", "b"}


def test_the_two_answers_that_differ_most_come_first():
    texts = ["I am here.", "I am here!", "Shall we talk?"]
    first, *rest = asked([[0.0, 1.0, 5.0]], texts, "ppp")
    assert "Shall we talk?" in first.values()
    assert set(rest[-1].values()) >= {"I am here.", "I am here!"}
    texts = ["我在这里。", "我在这里！", "要谈谈吗？"]
    assert "要谈谈吗？" in asked([[0.0, 1.0, 5.0]], texts, "ppp")[0].values()


def test_every_prompt_comes_once_before_any_comes_twice():
    pairs = asked([[0, 0.1, 0.2, 0, 5, 10]], "abcdef", "pppqqq")
    assert [pair["prompt"] for pair in pairs[:2]] == ["p", "q"]


# ------------------------------------------------------------------------------------------------
# With the models of the course


@pytest.fixture(scope="module")
def course(tmp_path_factory, root):
    """A folder with base and actor of a small course."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "dataset").mkdir()
    for name in ("train.json", "eval.json"):
        lines = (root / "dataset" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "dataset" / name).write_text("".join(lines[:400]), encoding="utf-8")
    for train in (util.train_base, util.train_actor):
        list(train(small(folder)))
    return folder


def small(folder, **values):
    how = dict(sft_share=0.4, preference_share=0.3, prompt_share=0.2, norm_prompts=2)
    return config(folder, **(how | dict(pretrain_steps=3, pretrain_documents=300) | values))


@pytest.fixture
def place(course, tmp_path):
    shutil.copytree(course, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_actor_gives_different_answers_and_an_ensemble_orders_them(place, capsys):
    cfg = small(place, ensemble=2)
    random = util.pairs_to_ask(cfg, 3)
    assert "random order. model/critic does not exist yet" in capsys.readouterr().out
    assert all(pair["left"].strip() != pair["right"].strip() for pair in random)
    prompts = {row["prompt"] for row in util.load_rows(cfg, "prompt")}
    assert {pair["prompt"] for pair in random} <= prompts
    list(util.train_critic(cfg))
    capsys.readouterr()
    pairs = util.pairs_to_ask(cfg, 3)
    assert not capsys.readouterr().out
    assert sorted(map(repr, map(label.key, pairs))) == sorted(map(repr, map(label.key, random)))
    gaps = []
    for critic in util.load_critics(cfg):
        prompts = [pair["prompt"] for pair in pairs]
        left, right = (
            critic(prompts, [pair[side] for pair in pairs]) for side in ("left", "right")
        )
        gaps.append(torch.tensor(left) - torch.tensor(right))
    doubt = torch.stack(gaps).std(0)
    count = len(dict.fromkeys(prompts))
    assert doubt[:count].tolist() == pytest.approx(
        sorted(doubt[:count].tolist(), reverse=True), abs=1e-5
    )


def click(place, cfg, count=5):
    session = label.Session(cfg, util.pairs_to_ask, count)
    for choice in ("left", "right", "tie", "skip", "left")[:count]:
        session.answer(session.current, choice)


def test_comparisons_with_a_winner_are_mixed_in_by_weight(place):
    cfg, said = small(place, feedback_weight=3), []
    plain = util.preference_rows(cfg, said.append)
    assert plain == util.load_rows(cfg, "preference") and not said
    click(place, cfg)
    rows = util.preference_rows(cfg, said.append)
    assert rows[: len(plain)] == plain and len(rows) == len(plain) + 3 * 3
    first = lines(place)[0]
    pair = {"prompt": first["prompt"], "chosen": first["left"], "rejected": first["right"]}
    assert rows.count(pair | {"by": "person"}) == 3
    assert len(said) == 1 and said[0].startswith("3 comparisons of feedback.jsonl count 3 times")
    assert util.preference_rows(cfg.changed(feedback_weight=0), said.append) == plain
    assert len(said) == 1


def weights(place, stage):
    return (place / "model" / stage / "model.safetensors").read_bytes()


def record(place, stage):
    return json.loads((place / "model" / stage / "stage.json").read_text())


def test_the_critic_and_dpo_learn_from_comparisons(place):
    cfg = small(place, algorithm="dpo", dpo_batch=16)
    stages = {"critic": util.train_critic, "rlhf": util.train_rlhf}
    before = {}
    for stage, train in stages.items():
        list(train(cfg))
        before[stage] = weights(place, stage)
        assert "feedback.jsonl" not in record(place, stage)["data"]
    click(place, cfg)
    for stage, train in stages.items():
        list(train(cfg))
        assert weights(place, stage) != before[stage]
        assert "feedback.jsonl" in record(place, stage)["data"]
        assert sum("3 comparisons" in note for note in record(place, stage)["notes"]) == 1
        list(train(cfg.changed(feedback_weight=0)))
        assert weights(place, stage) == before[stage]


def test_a_resumed_run_notices_new_comparisons(place):
    cfg = small(place, checkpoint_minutes=0, critic_batch=8)
    run = util.train_critic(cfg)
    next(run), next(run), next(run)
    run.close()
    click(place, cfg, 1)
    with pytest.raises(CourseError, match="the file feedback.jsonl has changed since then"):
        next(util.train_critic(cfg))


# ------------------------------------------------------------------------------------------------
# Simulated persons


OWN = """
def short(prompts, responses):
    return [-len(text) for text in responses]
"""


@pytest.fixture
def person(tmp_path, monkeypatch):
    (tmp_path / "my_people.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_people", raising=False)
    return "my_people.short"


def many(cfg, count):
    return [{"prompt": f"p{i}", "left": "a" * (i % 7 + 1), "right": "bbb"} for i in range(280)]


def test_a_simulated_person_follows_its_function(tmp_path, person):
    assert label.simulate(config(tmp_path), many, person, 70) == 70
    for row in lines(tmp_path):
        gap = len(row["left"]) - len(row["right"])
        assert row["choice"] == ("tie" if not gap else "left" if gap < 0 else "right")
        assert row["by"] == person


def test_noise_reverses_that_share_and_leaves_ties(tmp_path, person):
    label.simulate(config(tmp_path), many, person, 280, noise=0.2)
    wrong = [
        (len(row["left"]) < len(row["right"])) != (row["choice"] == "left")
        for row in lines(tmp_path)
        if row["choice"] != "tie"
    ]
    assert len(wrong) == 240 and 0.1 < sum(wrong) / 240 < 0.3


def test_a_simulated_person_goes_on_where_it_stopped(tmp_path, person):
    cfg = config(tmp_path)
    label.simulate(cfg, many, person, 9, noise=0.5)
    label.simulate(cfg, many, person, 20, noise=0.5)
    found = lines(tmp_path)
    (tmp_path / "dataset" / "feedback.jsonl").unlink()
    label.simulate(cfg, many, person, 20, noise=0.5)
    assert lines(tmp_path) == found


def test_a_wrong_name_is_a_sentence(tmp_path):
    with pytest.raises(CourseError, match="person = 'sentense' is not known; did you mean"):
        label.simulate(config(tmp_path), fake, "sentense")


# ------------------------------------------------------------------------------------------------
# The terminal


@pytest.fixture
def terminal(tmp_path, monkeypatch, capsys):
    """Types letters into `python -m lab label`; returns what it prints."""
    monkeypatch.setattr(driver, "HOME", tmp_path)
    monkeypatch.setattr(util, "pairs_to_ask", fake)

    def type_in(letters, *options):
        typed = iter(letters)

        def answer(prompt):
            letter = next(typed, EOFError)
            if isinstance(letter, type):
                raise letter
            return letter

        monkeypatch.setattr("builtins.input", answer)
        assert driver.main(["label", *options]) == 0
        return capsys.readouterr().out

    return type_in


def test_the_terminal_asks_saves_and_takes_back(terminal, tmp_path):
    said = terminal(["L", "what", "", "right", "u", "t"], "--count", "4")
    assert "0 of 4" in said and "2 of 4" in said and "Question" in said and "Human:" not in said
    assert said.count("Type l, r") == 2 and "Taken back." in said
    assert [row["choice"] for row in lines(tmp_path)] == ["left", "tie"]
    said = terminal(["s", "l", "l"], "--count", "4")
    assert "2 of 4" in said and "train the reward model again" in said
    assert [row["choice"] for row in lines(tmp_path)] == ["left", "tie", "skip", "left"]
    assert "4 of 4." in terminal([], "--count", "4")


@pytest.mark.parametrize("end", ["q", EOFError, KeyboardInterrupt])
def test_the_terminal_can_be_left_at_any_time(terminal, tmp_path, end):
    assert terminal(["l", end], "--count", "4").endswith("1 of 4\n")
    assert len(lines(tmp_path)) == 1


def test_the_terminal_says_when_there_are_no_more_pairs(terminal):
    assert "6 of 40. There are no more pairs." in terminal("llllll")


def test_a_text_cannot_command_the_terminal(terminal, monkeypatch):
    evil = PAIRS[0] | {"left": "\x1b[2Jred", "prompt": "Human: \x1b]0;x\x07 Assistant:"}
    monkeypatch.setattr(util, "pairs_to_ask", lambda cfg, count: [evil])
    assert "\x1b" not in terminal([]) and "[2Jred" in terminal([])


def test_a_function_compares_from_the_command_line(terminal, tmp_path, person):
    said = terminal([], "--count", "5", "--labeller", person, "--noise", "0.1")
    assert f"{person} has compared 5 pairs" in said and len(lines(tmp_path)) == 5


@pytest.mark.parametrize("options", [["--count", "0"], ["--noise", "2"], ["--set", "kl_coef=1"]])
def test_impossible_options_are_a_sentence(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    assert driver.main(["label", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# The widget


@pytest.fixture
def panel(session, monkeypatch):
    monkeypatch.setattr(label, "PAUSE", 0)
    return label.Panel(session)


def test_buttons_and_keys_answer_the_pair_that_is_shown(panel, tmp_path):
    first = panel.pair
    assert "0 of 4" in panel.status.value and first["left"] in panel.left.value
    panel.buttons["l"].click()
    second = panel.pair
    panel.keys.value = "R"
    assert panel.keys.value == "" and "2 of 4" in panel.status.value
    expected = [first | {"choice": "left"}, second | {"choice": "right"}]
    assert lines(tmp_path) == [row | {"by": "person"} for row in expected]
    panel.buttons["u"].click()
    assert panel.pair == second and len(lines(tmp_path)) == 1


def test_other_keys_and_letters_typed_ahead_answer_nothing(panel, session):
    for text in ("x", "ll", "lr", " ", "中"):
        panel.keys.value = text
        assert panel.keys.value.strip() == ""
    assert session.done == 0


def test_a_double_click_answers_one_pair(session):
    panel = label.Panel(session)
    panel.shown = 0
    panel.buttons["l"].click()
    panel.buttons["l"].click()
    assert session.done == 1


def test_at_the_end_only_undo_is_left(panel, session):
    for _ in range(4):
        panel.buttons["s"].click()
    assert "4 of 4" in panel.status.value and "yes" not in panel.left.value
    assert [letter for letter, button in panel.buttons.items() if not button.disabled] == ["u"]
    panel.buttons["u"].click()
    assert session.done == 3 and not panel.buttons["l"].disabled


def test_what_a_model_writes_stays_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>&"
    pair = {"prompt": f"Human: {evil} Assistant:", "left": evil, "right": "中文"}
    panel = label.Panel(label.Session(config(tmp_path), lambda cfg, count: [pair], 1))
    for shown in (panel.prompt.value, panel.left.value + panel.right.value):
        assert "<img" not in shown and "&lt;img src=x onerror=alert(1)&gt;&amp;" in shown
    assert "中文" in panel.left.value + panel.right.value


def test_a_full_disk_is_said_where_the_person_looks(panel, session, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label, "append", full)
    before = panel.pair
    panel.buttons["l"].click()
    assert "Not saved. The disk is full" in panel.status.value and panel.pair == before


def test_a_run_without_a_person_shows_no_widget_and_makes_no_pairs(tmp_path, capsys):
    label.widget(config(tmp_path), None)
    assert "0 comparisons" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# JupyterLab in a browser


BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable microsoft-edge".split()
BOOK = """
from lab import label
from lab.config import Config

pairs = [
    {"prompt": f"Human: {i} <b>bold</b> 你好? Assistant:", "left": f"yes {i}", "right": f"不 {i}"}
    for i in range(6)
]
label.widget(Config("smoke"), lambda cfg, count: pairs, count=4)
"""


def until(look, seconds=180):
    """Waits until look() is true and returns it."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"nothing after {seconds} seconds"
        time.sleep(0.05)
    return found


def ended(process):
    """Ends a process and its children, as a crash would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Page:
    """A page in a headless browser, which follows DevTools commands."""

    def __init__(self, folder):
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None and os.environ.get("NEED_BROWSER") != "1":
            pytest.skip("no Chromium, Chrome or Edge here (NEED_BROWSER=1 makes this fail)")
        assert path, "NEED_BROWSER=1, and no Chromium, Chrome or Edge is installed"
        how = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"]
        how += ["--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
        port = folder / "browser" / "DevToolsActivePort"
        self.process = subprocess.Popen(
            [path, f"--user-data-dir={port.parent}", *how],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        until(lambda: port.exists() and port.read_text().strip())
        self.new, self.number = f"http://127.0.0.1:{port.read_text().split()[0]}/json/new?", 0

    def open(self, url):
        """Goes to the address in a new tab, as an old one might ask before it is left."""
        tab = until(lambda: fetched(self.new + url, method="PUT"))
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=180)

    def tell(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return answer.get("result", {})

    def js(self, code):
        """The value of a JavaScript expression; None while there is no such thing on the page."""
        found = self.tell("Runtime.evaluate", expression=code, returnByValue=True)
        return found.get("result", {}).get("value")

    def see(self, text):
        """Waits until the output of the notebook shows a text."""
        wanted = json.dumps(text)
        shown = "[...document.querySelectorAll('.jp-OutputArea')].map(x => x.innerText).join()"
        until(lambda: self.js(f"{shown}.includes({wanted})"))

    def press(self, name):
        time.sleep(label.PAUSE)  # the widget takes an earlier click for a double click
        button = f"[...document.querySelectorAll('button')].find(b => b.innerText == '{name}')"
        self.js(f"{button}.click()")

    def type_in(self, letter):
        """A key in the box of the widget, with all that a keyboard sends."""
        time.sleep(label.PAUSE)
        self.js("document.querySelector('.jp-OutputArea input[type=text]').focus()")
        key = {"key": letter, "text": letter, "code": f"Key{letter.upper()}"}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **key)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **key)


def fetched(address, **how):
    """The JSON at an address; None while nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, **how), timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def lab_server(folder, root, port):
    """Starts JupyterLab in a folder and waits until it answers."""
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    how = [f"--ServerApp.port={port}", "--IdentityProvider.token=", "--allow-root", "--no-browser"]
    how += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    env = os.environ | own | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *how], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until(lambda: fetched(f"http://127.0.0.1:{port}/api/status"))
    return process


def open_and_run(page, port):
    """Opens the notebook, also again, and runs its cell."""
    page.open(f"http://127.0.0.1:{port}/lab/tree/book.ipynb?reset")
    until(lambda: page.js("!!document.querySelector('.jp-Notebook .jp-CodeCell')"))
    idle = "jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'"
    until(lambda: page.js(idle))
    page.js("jupyterapp.commands.execute('notebook:run-all-cells'); 0")


@pytest.mark.slow
def test_a_person_clicks_in_jupyterlab_and_goes_on_after_a_crash(tmp_path, root):
    cells = [nbformat.v4.new_code_cell(BOOK)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, tmp_path / "book.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        page = Page(tmp_path)
        stack.callback(ended, page.process)
        server = lab_server(tmp_path, root, port)
        stack.callback(ended, server)
        open_and_run(page, port)
        page.see("0 of 4")
        page.see("<b>bold</b> 你好?")
        page.press("Left")
        page.see("1 of 4")
        page.type_in("r")
        page.see("2 of 4")
        page.type_in("u")
        page.see("1 of 4")
        assert [row["choice"] for row in lines(tmp_path)] == ["left"]
        before = lines(tmp_path)
        kinds = "[...document.querySelectorAll('.jp-Notebook .jp-Cell')].map(c => c.className)"
        assert "jp-CodeCell" in page.js(kinds)[0], "a key must not reach the shortcuts of the page"

        ended(server)
        server = lab_server(tmp_path, root, port)
        stack.callback(ended, server)
        open_and_run(page, port)
        page.see("1 of 4")
        for count, name in ((2, "Tie"), (3, "Skip"), (4, "Right")):
            page.press(name)
            page.see(f"{count} of 4")
        page.see("train the reward model again")
        found = lines(tmp_path)
        assert [row["choice"] for row in found] == ["left", "tie", "skip", "right"]
        assert found[:1] == before and len(set(map(label.key, found))) == 4
