"""People compare two answers of the actor: in a notebook, in the terminal, or simulated.

Every comparison is a line of dataset/feedback.jsonl with prompt, left, right, choice and by. The
file is the only state: whoever opens it again goes on where the file ends. Comparisons of answers
that 4_test has reported go to dataset/compared.jsonl, because no training may read them.
"""

import html
import json
import os
import sys
import time
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from lab import CourseError
from lab.data import Problem, parsed, problem_of, turns
from lab.errors import explained
from lab.rewards import SHIPPED, ask, named
from lab.splits import rng_for

FILE = "feedback.jsonl"  # to learn from
TEST_FILE = "compared.jsonl"  # to test with
CHOICES = {"l": "left", "r": "right", "t": "tie", "s": "skip"}
PAUSE = 0.3  # seconds in which nobody reads a pair: the second click of a double click is no answer

# --------------------------------------------------------------------------------------------------
# The file


def path_of(root, file=FILE):
    return Path(root) / "dataset" / file


def scan(path):
    """Returns all comparisons, and the offsets in the file where each begins and the last ends.

    A last line that a kill cut short is left out.
    """
    rows, offsets, here = [], [0], 0
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        here += len(line)
        if not line.strip():
            continue
        row = comparison(line)
        if isinstance(row, Problem):
            if here == len(text) and not line.endswith(b"\n"):
                break
            raise CourseError(f"{path}, line {number}: {row.what}{row.remedy}")
        rows.append(row)
        offsets[-1:] = here - len(line), here
    return rows, offsets


def comparison(line):
    """Parses a line of the file; returns a row, or a Problem."""
    row = parsed(json.loads, line.decode("utf-8", "surrogateescape").strip().lstrip("\ufeff"))
    needs = dict.fromkeys(("prompt", "left", "right", "choice", "by"))
    problem = row if isinstance(row, Problem) else problem_of(row, needs)
    if not problem and row["choice"] not in CHOICES.values():
        problem = Problem(f"the choice is {row['choice']!r}", ": write left, right, tie or skip.")
    return problem or row


def append(path, row):
    """Writes a comparison to the disk at once, in place of a line that was cut short."""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    end = scan(path)[1][-1]
    with open(path, "a+b") as file:
        if file.tell() > end:
            file.truncate(end)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def take_back(path, by):
    """Removes the last comparison if it is by this person; returns it, or None."""
    rows, offsets = scan(path)
    if not rows or rows[-1]["by"] != by:
        return None
    with open(path, "r+b") as file:
        file.truncate(offsets[-2])
        os.fsync(file.fileno())
    return rows[-1]


def pairs_of(root):
    """Returns the comparisons that have a winner, as rows with prompt, chosen and rejected."""
    rows, other = scan(path_of(root))[0], {"left": "right", "right": "left"}
    return [
        {"prompt": row["prompt"], "chosen": row[row["choice"]], "rejected": row[loser]}
        for row in rows
        if (loser := other.get(row["choice"]))
    ]


# --------------------------------------------------------------------------------------------------
# What to ask


def ordered(prompts, answers, scores, rng):
    """Returns pairs of answers to the same prompt: the two that differ most, where the reward
    models are least certain.

    Two answers that are nearly the same tell nothing about a wish of which the reward models know
    nothing. So each prompt offers its most different pair first. Among those come first the pairs
    about which the reward models are least certain. A prompt's second pair comes after the first
    pairs of all prompts.

    `scores` has a row for each reward model. One model is least certain where its two scores are
    closest, several where they disagree most about the difference; without any the order is random.
    """
    groups = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    found, scores = [], np.asarray(scores)
    for prompt, places in groups.items():
        said = {place: answers[place].strip() for place in places}
        texts = {text: place for place, text in said.items() if text and "\0" not in text}
        pairs = sorted(combinations(texts, 2), key=lambda pair: in_common(*pair))
        for rank, (left, right) in enumerate(pairs):
            certainty = torch.rand((), generator=rng).item()
            if len(scores):
                gap = scores[:, texts[left]] - scores[:, texts[right]]
                certainty = abs(gap[0]) if len(scores) == 1 else -gap.std()
            found.append((rank, certainty, {"prompt": prompt, "left": left, "right": right}))
    found.sort(key=lambda item: item[:2])
    return [pair for *_, pair in found]


def in_common(one, other):
    """The share of the pairs of neighbouring letters that two texts have in common: 1 for equal
    texts, in any script."""
    letters, others = (set(zip(text, text[1:])) | {text[:1]} for text in (one, other))
    return len(letters & others) / len(letters | others)


def pairs_of_report(cfg, count):
    """Returns pairs of the sampled answers of actor and rlhf to the questions of 4_test."""
    path, found = Path(cfg.root) / "model" / "report" / "answers.jsonl", {}
    if not path.exists():
        raise CourseError(f"{path} does not exist: run 4_test.ipynb first.")
    for line in path.read_text(encoding="utf-8").split("\n"):
        row = json.loads(line or "{}")
        if row.get("temperature") and row["model"] in ("actor", "rlhf") and "category" not in row:
            found.setdefault(row["prompt"], {})[row["model"]] = row["response"]
    pairs = [
        {"prompt": prompt, "left": both["actor"], "right": both["rlhf"]}
        for prompt, both in found.items()
        if len({text.strip() for text in both.values()}) == 2
    ]
    return pairs[:count]


def key(pair):
    """What makes a pair the same pair, whichever answer is on the left."""
    return pair["prompt"], frozenset((pair["left"], pair["right"]))


def in_random_sides(cfg, pair):
    """The pair with its answers in a random order, always the same one for this pair."""
    left, right = sorted((pair["left"], pair["right"]))
    if torch.rand((), generator=rng_for(cfg, "sides", pair["prompt"], left, right)) < 0.5:
        left, right = right, left
    return pair | {"left": left, "right": right}


class Session:
    """The comparisons of one person: `current` is the pair to ask, None when nothing is left.

    `pairs(cfg, count)` returns pairs to ask, the first ones first; `util.pairs_to_ask` does.
    """

    def __init__(self, cfg, pairs, count, by="person", file=FILE):
        self.cfg, self.find, self.count, self.by = cfg, pairs, count, by
        self.path = path_of(cfg.root, file)

    @cached_property
    def pairs(self):
        return [in_random_sides(self.cfg, pair) for pair in self.find(self.cfg, self.count)]

    @property
    def rows(self):
        return scan(self.path)[0]

    @property
    def done(self):
        """How many pairs this person has answered."""
        return sum(row["by"] == self.by for row in self.rows)

    @property
    def current(self):
        if self.done >= self.count:
            return None
        known = set(map(key, self.rows))
        return next((pair for pair in self.pairs if key(pair) not in known), None)

    def answer(self, pair, choice):
        """Saves the choice, unless this pair was answered elsewhere in the meantime."""
        if key(pair) not in map(key, self.rows):
            row = {name: pair[name] for name in ("prompt", "left", "right")}
            append(self.path, row | {"choice": choice, "by": self.by})

    def undo(self):
        return take_back(self.path, self.by)

    def status(self):
        """One sentence: how far the person is, and at the end what comes next."""
        done = self.done
        if self.current:
            return f"{done} of {self.count}"
        end = "" if done >= self.count else " There are no more pairs."
        reader = "run 4_test" if self.path.name == TEST_FILE else "train the reward model"
        return f"{done} of {self.count}.{end} Now {reader} again: it reads {self.path.name}."


def question_of(prompt):
    """A prompt as a person should read it, without the frame around a single question."""
    said = turns(prompt)
    if len(said) == 1:
        return said[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in said)


# --------------------------------------------------------------------------------------------------
# A simulated person


def simulate(cfg, pairs, person, count=40, noise=0.0, file=FILE):
    """Lets a function compare pairs in place of a person; returns how many it has compared.

    `person` names a function (prompts, responses) -> numbers: a built-in reward or module.function.
    The higher number wins, equal numbers are a tie, and a share `noise` of the choices is reversed.
    """
    score = named("person", person, SHIPPED)
    session = Session(cfg, pairs, count, by=person, file=file)
    while pair := session.current:
        texts = [pair["left"], pair["right"]]
        left, right = ask(score, [pair["prompt"]] * 2, texts, "person")[0].tolist()
        luck = torch.rand(
            (), generator=rng_for(cfg, "noise", pair["prompt"], *sorted(texts))
        ).item()
        if left == right:
            choice = "tie"
        else:
            choice = "left" if (left > right) == (luck >= noise) else "right"
        session.answer(pair, choice)
    return session.done


# --------------------------------------------------------------------------------------------------
# In the terminal


def ask_in_terminal(session):
    """Asks pair after pair. End of input, q or Ctrl-C ends it; every answer is saved at once."""
    from lab.chat import printable

    print("Which answer is better? Type a letter and Enter:")
    print("l: left  r: right  t: tie  s: skip  u: undo  q: quit")
    try:
        while pair := session.current:
            print(f"\n{session.status()}\n{printable(question_of(pair['prompt']))}")
            for letter, side in list(CHOICES.items())[:2]:
                print(f"  {letter}: {printable(pair[side])}")
            letter = input("> ").strip().lower()[:1]
            if letter == "q":
                break
            if letter == "u":
                print("Taken back." if session.undo() else "There is nothing to take back.")
            elif letter in CHOICES:
                session.answer(pair, CHOICES[letter])
            else:
                print("Type l, r, t, s, u or q.")
    except (EOFError, KeyboardInterrupt):
        print()
    print(session.status())


# --------------------------------------------------------------------------------------------------
# In a notebook


def widget(cfg, pairs, count=40):
    """Shows buttons to compare `count` pairs. Where nobody can click, it says so and goes on."""
    from IPython.display import display

    session = Session(cfg, pairs, count)
    if not watched():
        print(f"{len(session.rows)} comparisons in dataset/{FILE}. Nobody can click in this run.")
        return
    display(Panel(session).box)


def watched():
    """Whether a person sits in front of this notebook: a headless run takes no input."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return "google.colab" in sys.modules or bool(getattr(kernel, "_allow_stdin", False))


TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5;margin:0"
CARD = "border:1px solid var(--jp-border-color1, #9e9e9e);border-radius:4px;padding:8px 12px"


def as_html(text, style=""):
    return f'<div style="{TEXT};{style}">{html.escape(text)}</div>'


class Panel:
    """The widgets of a session: a prompt, two answers, five buttons and a box for keys."""

    def __init__(self, session):
        import ipywidgets as w

        self.session, self.shown = session, 0.0
        self.status, self.prompt, self.left, self.right = (w.HTML() for _ in range(4))
        wide, wraps = w.Layout(width="auto"), w.Layout(flex_flow="row wrap")
        names = CHOICES | {"u": "undo"}
        self.buttons = {
            letter: w.Button(description=name.title(), layout=wide)
            for letter, name in names.items()
        }
        for letter, button in self.buttons.items():
            button.on_click(lambda _, letter=letter: self.press(letter))
        # No host gives keys to buttons. Each of them sends the kernel what is typed into a text.
        self.keys = w.Text(placeholder="or type l r t s u here", layout=w.Layout(width="13em"))
        self.keys.observe(self.typed, "value")
        left, right, *rest = self.buttons.values()
        half = {"flex": "1 1 18em", "min_width": "0", "margin": "4px"}
        half = w.Layout(**half, justify_content="space-between")  # both buttons in one line
        sides = [w.VBox(side, layout=half) for side in ((self.left, left), (self.right, right))]
        lower = w.HBox([*rest, self.keys], layout=wraps)
        self.box = w.VBox([self.status, self.prompt, w.HBox(sides, layout=wraps), lower])
        self.show()

    def typed(self, change):
        """Takes a single letter and empties the box. More letters were typed before the next pair
        was there, so they answer nothing."""
        if text := change["new"].strip().lower():
            self.keys.value = ""
            if len(text) == 1:
                self.press(text)

    def press(self, letter):
        """Does what a button or its key stands for, then shows the next pair."""
        if letter not in self.buttons or time.monotonic() - self.shown < PAUSE:
            return
        try:
            if letter == "u":
                self.session.undo()
            elif self.pair:
                self.session.answer(self.pair, CHOICES[letter])
            self.show()
        except (CourseError, OSError) as error:  # the notebook would not show it
            self.status.value = as_html(f"Not saved. {explained(error) or error}")

    def show(self):
        self.pair, self.shown = self.session.current, time.monotonic()
        self.status.value = as_html(self.session.status())
        prompt, left, right = "", "", ""
        if self.pair:
            prompt = as_html(question_of(self.pair["prompt"]), "font-weight:600")
            left, right = as_html(self.pair["left"], CARD), as_html(self.pair["right"], CARD)
        self.prompt.value, self.left.value, self.right.value = prompt, left, right
        for letter in CHOICES:
            self.buttons[letter].disabled = not self.pair
