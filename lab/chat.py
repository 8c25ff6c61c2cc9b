"""Chatting with a trained model: `python -m lab chat`, and the chat cells of 4_test.

The embedded world's judge can grade an answer only if it knows what is right. `recognise` therefore
looks a typed question up in the grammar of `lab/world.py`.
"""

import re
import sys
from functools import cache
from itertools import product

import pandas as pd
import torch

from lab import decoding, models, safety, world
from lab.formats import framed
from lab.tokens import encoder

# --------------------------------------------------------------------------------------------------
# Recognising a question


def recognise(question):
    """The row (prompt, kind, truth) of a question of the embedded world, or None.

    Upper and lower case, spaces and a missing mark at the end make no difference.
    """
    text = simplified(question)
    item = plain_questions().get(text) or sql_item(text)
    if item is None:
        return None
    prompt = world.TEMPLATE.format(item.question)
    return {"prompt": prompt, "kind": item.kind, "truth": item.truth}


def simplified(question):
    """The question in lower case, with single spaces and without its last mark."""
    spaced = re.sub(r"\s*([,.:?!])\s*", r"\1 ", question.lower())
    return " ".join(spaced.split()).strip(" .?!")


class Script:
    """Stands in for the random generator of the grammar: it draws what it is told to draw.

    Draws that the script does not cover give the first choice. `sizes` holds the number of choices
    of every draw.
    """

    def __init__(self, draws=()):
        self.draws, self.sizes = draws, []

    def randrange(self, size):
        place = len(self.sizes)
        self.sizes.append(size)
        return self.draws[place] if place < len(self.draws) else 0

    def randint(self, low, high):
        return low


def wordings(kind, slots):
    """The items with these slots, one for each wording that the grammar can choose."""
    first = Script()
    yield world.BUILD[kind](first, slots)
    for draws in list(product(*map(range, first.sizes)))[1:]:
        yield world.BUILD[kind](Script(draws), slots)


@cache
def plain_questions():
    """{simplified question: its item} for all kinds but SQL, which has too many questions."""
    found = {}
    for kind in (kind for kind in world.KINDS if kind != "sql"):
        forms = [{"form": form} for form in world.UNKNOWN_FORMS] if kind == "unknown" else [{}]
        for form in forms:
            domains = world.domains(kind, form)
            for words in product(*domains.values()):
                for item in wordings(kind, form | dict(zip(domains, words))):
                    found.setdefault(simplified(item.question), item)
    return found


@cache
def sql_patterns():
    """(pattern, form, slots that the wording fixes) for every wording of an SQL question.

    The grammar writes each question with placeholders in its open slots. In the pattern they become
    named groups.
    """
    found = {}
    holes = {slot: f"hole{slot}" for slot in ("table", "x", "n", "c", "v", "w")}
    for form, names in world.SQL_FORMS.items():
        choices = {"op": "<>", "f": list(world.AGGREGATES), "d": ("highest", "lowest")}
        choices = {name: choices[name] for name in names if name in choices}
        for words in product(*choices.values()):
            fixed = dict(zip(choices, words))
            open_slots = {slot: hole for slot, hole in holes.items() if slot not in fixed}
            slots = {"form": form, "columns": ["holes"], "absent": False} | open_slots | fixed
            for item in wordings("sql", slots):
                pattern = re.escape(simplified(item.question)).replace("holes", r"(?P<columns>.+?)")
                for slot, hole in open_slots.items():
                    pattern = pattern.replace(hole, rf"(?P<{slot}>\w+)", 1)
                    pattern = pattern.replace(hole, rf"(?P={slot})")
                found[pattern] = form, fixed
    return [(re.compile(pattern), *rest) for pattern, rest in found.items()]


def sql_item(text):
    """The item of a simplified SQL question, or None."""
    for pattern, form, fixed in sql_patterns():
        if not (match := pattern.fullmatch(text)):
            continue
        slots = match.groupdict() | fixed | {"form": form}
        columns = slots["columns"] = slots["columns"].split(", ")
        if slots["table"] not in world.TABLES or len(set(columns)) < len(columns):
            continue
        if not set(columns) <= {*world.NUMBERS, *world.VALUES}:
            continue
        if "v" in slots:
            if not re.fullmatch(r"\d\d", slots["v"]):
                continue
            slots["v"] = int(slots["v"])
        if "x" not in slots:  # the question does not need it, but the grammar asks for one
            slots["x"] = next(name for name in world.VALUES if name != slots.get("c"))
        elif slots["x"] not in world.VALUES or slots["x"] not in columns:
            continue
        wanted = [slots[slot] for slot in ("c", "n") if slot in slots]
        slots["absent"] = bool(wanted) and not set(wanted) & set(columns)
        domains = world.domains("sql", slots)
        if all(slots[slot] in words for slot, words in domains.items()):
            return next(x for x in wordings("sql", slots) if simplified(x.question) == text)
    return None


# --------------------------------------------------------------------------------------------------
# Answers


def row_of(question):
    """The question as a row for `util.evaluate`, with what the judge needs if it can be known."""
    return recognise(question) or {"prompt": framed(question)}


@torch.no_grad()
def stream(model, prompt_ids, prompt_mask, uniforms, choose, stops, cfg):
    """Yields the ids of one answer as they are generated, the closing eos included.

    It decodes as `util.generate` does: `uniforms` are the random numbers of the row, (1, R), and
    `choose(logits, uniforms)` is `util.pick` with its settings. The same random numbers give the
    same answer.
    """
    room, decoder, token = uniforms.shape[1], None, None
    with models.eval_mode(model):
        for t in range(room):
            with models.autocast(cfg, model):
                if decoder is None:
                    decoder, logits = decoding.start_decoding(model, prompt_ids, prompt_mask, room)
                else:
                    logits = decoder.next(token)
                token, _ = choose(logits.float(), uniforms[:, t])
            yield token.item()
            if token.item() in stops:
                return


def pieces(tokenizer, ids):
    """Yields the text of an answer piece by piece while its ids arrive.

    A letter of several bytes may come in several tokens: its piece waits for the last of them.
    """
    read, shown, text = [], "", ""
    for token in ids:
        read.append(token)
        text = encoder(tokenizer).texts([read])[0]
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text.startswith(shown):
        yield text[len(shown) :]
    else:  # a tokenizer that rewrites what it has decoded before
        yield f"\n{text}"


def verdict(row, answer, ended):
    """The judge's score and reason in a sentence; None if the judge does not know the question."""
    if not world.knows(row):
        return None
    score, reason = world.explain(row, answer, ended)
    return f"{score:.2f}. {reason}"


def compare(row, answers):
    """A table of the answers of several models to one question: {name: result of evaluate}."""
    lines = []
    for name, answer in answers.items():
        line = {"model": name, "answer": answer["response"], "reward": answer["reward"]}
        if world.knows(row):
            score, reason = world.explain(row, answer["response"], answer["eos"])
            line |= {"judge": score, "reason": reason}
        lines.append(line)
    return pd.DataFrame(lines)


# --------------------------------------------------------------------------------------------------
# Where a person types


def ask(text="Your question (empty: skip): "):
    """What a person types into the notebook; "" where nobody can type, as in a headless run."""
    from IPython import get_ipython
    from IPython.core.error import IPythonCoreError

    if getattr(get_ipython(), "kernel", None) is None and not sys.stdin.isatty():
        return ""
    try:
        return input(text).strip()
    except (IPythonCoreError, EOFError):  # the first where the kernel has no one to ask
        return ""


INTRO = """\
You are talking to model/{stage}. It answers every question alone and remembers none of them.
The judge knows questions like these:
{examples}
An empty line or Ctrl-C ends the chat."""


def examples():
    """A question of each kind that no training has seen."""
    rng = world.World().rng("chat")
    return [world.draw(rng, kind, "eval").question for kind in world.KINDS]


def talk(stage, reply, tokenizer, stops, check=None):
    """Chats in the terminal until an empty line. `reply(row, number)` yields an answer's ids.

    With a safety filter `check` an answer is shown when it is complete, or replaced.
    """
    lines = "\n".join(f"  {question}" for question in examples())
    print(INTRO.format(stage=stage, examples=lines))
    number = 0
    try:
        while question := input("\nYou:   ").strip():
            row, ids = row_of(question), []
            print("Model: ", end="", flush=True)
            parts = pieces(tokenizer, noted(reply(row, number), ids))
            text = ""
            for piece in parts if check is None else checked(check, row["prompt"], parts):
                text += piece
                print(printable(piece), end="", flush=True)
            told = verdict(row, text, bool(ids) and ids[-1] in stops)
            print(f"\nJudge: {told or 'no verdict, as it does not know this question.'}")
            number += 1
    except (EOFError, KeyboardInterrupt):
        print()


def checked(check, prompt, parts):
    """Yields a whole answer, or what a safety filter shows in its place, and why."""
    text = "".join(parts)
    (why,) = safety.look(check, [prompt], [text])
    yield f"{safety.REPLACEMENT} (safety filter: {why})" if why else text


def noted(values, notes):
    """Passes the values on and appends each of them to `notes`."""
    for value in values:
        notes.append(value)
        yield value


def printable(text):
    """Text without control characters, which could command the terminal; lines may end."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
