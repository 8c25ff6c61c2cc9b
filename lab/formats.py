"""Other people's data: known sources by name, and known shapes of records by their fields."""

import re
from itertools import takewhile
from typing import NamedTuple


class Problem(NamedTuple):
    """Why a row cannot be used and what to do about it."""

    what: str
    remedy: str
    line: int | None = None  # the line of the text in which it was found
    absent: bool = False  # a field is not there; the row may serve another stage


class Defect(Exception):
    """A record has a known shape, but something in it cannot be used."""


# ------------------------------------------------------------------------------------------------
# Sources. Add a line for a source of your own: a data set on the hub as "owner/name:split" or
# "owner/name/config:split", or a function rows(split, seed) -> list of dicts as "module:function".

SOURCES = {
    "hh-rlhf": "Anthropic/hh-rlhf",
    "alpaca": "tatsu-lab/alpaca",
    "alpaca-chinese": "shibing624/alpaca-zh",
    "belle": "BelleGroup/train_0.5M_CN",
    "counselling": "Amod/mental_health_counseling_conversations",
    "sql-create-context": "b-mc2/sql-create-context",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "companion": "lab.companion:rows",
}


# ------------------------------------------------------------------------------------------------
# Dialogues

ROLES = {"system": "System", "user": "Human", "human": "Human"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "Assistant")
BORDER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def framed(prompt):
    """Puts a prompt into the dialogue frame "Human: ... Assistant:", unless it has one."""
    prompt = prompt.strip()
    return prompt if prompt.endswith("Assistant:") else f"Human: {prompt} Assistant:"


def in_frame(turns):
    """Returns the prompt of a dialogue: a system prompt comes first and has no name."""
    said = [text if who == "System" else f"{who}: {text}" for who, text in turns]
    return " ".join([*said, "Assistant:"])


def spoken(value, who):
    """Returns a dialogue as a list of (role, text).

    A list of messages has role and content, or from and value. A text has turns that begin with
    "Human:" or "Assistant:" in a paragraph of their own; without them `who` says all of it.
    """
    if isinstance(value, str):
        parts = BORDER.split(value)
        if not parts[1:]:
            return [(who, value.strip())]
        turns = [("System", parts[0]), *zip(parts[1::2], parts[2::2])]
        return [(role, text.strip()) for role, text in turns if text.strip() or role != "System"]
    if not isinstance(value, list) or not value:
        raise Defect("a dialogue must be a text or a list of messages")
    return [message(one) for one in value]


def message(one):
    """Returns one message of a list as (role, text)."""
    if not isinstance(one, dict):
        raise Defect("a message must be an object with role and content")
    role, text = (one.get(a) or one.get(b) for a, b in (("role", "from"), ("content", "value")))
    if role not in ROLES:
        raise Defect(f"a message has the role {str(role)[:20]!r}, which the course does not know")
    if not isinstance(text, str):
        raise Defect("a message has no text")
    return ROLES[role], text.strip()


def last_answer(value):
    """Returns the text of an answer that may be written as a list of messages."""
    if isinstance(value, str | None):
        return value
    texts = [text for who, text in spoken(value, "Assistant") if who == "Assistant"]
    if not texts:
        raise Defect("an answer has no message of the assistant")
    return texts[-1]


# ------------------------------------------------------------------------------------------------
# Records with dialogues


def pair_of_dialogues(record):
    """Two whole dialogues with a common beginning: the prompt ends where their answers differ."""
    both, prompt = [record["chosen"], record["rejected"]], record.get("prompt")
    texts = [one for one in both if not isinstance(one, list)]
    if texts and (prompt or not all(isinstance(t, str) and BORDER.search(t) for t in texts)):
        return None  # two answers
    chosen, rejected = (spoken(one, "Assistant") for one in both)
    if prompt and chosen[0][0] == "Assistant":
        return None
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
    if common == len(chosen) == len(rejected):
        raise Defect("chosen and rejected are equal")
    answers = [
        k
        for k in range(min(common + 1, len(chosen), len(rejected)))
        if chosen[k][0] == rejected[k][0] == "Assistant"
    ]
    if not answers or not answers[-1]:
        raise Defect("chosen and rejected have no common question")
    good, bad = chosen[answers[-1]][1], rejected[answers[-1]][1]
    prompt = in_frame(chosen[: answers[-1]])
    return {"prompt": prompt, "chosen": good, "rejected": bad}


def conversation(record):
    """A list of messages: the last answer, and everything before it as the prompt."""
    said = spoken(record.get("messages") or record.get("conversations"), "Human")
    if isinstance(record.get("system"), str) and record["system"].strip():
        said = [("System", record["system"].strip()), *said]
    ends = [i for i, (who, _) in enumerate(said) if who == "Assistant"]
    end = ends[-1] if ends else len(said)
    if "Human" not in [who for who, _ in said[:end]]:
        raise Defect("a conversation has no question")
    row = {"prompt": in_frame(said[:end])}
    return row | {"response": said[end][1]} if ends else row


def prompt_and_answers(record):
    """A prompt and any of chosen, rejected and response, as texts or as lists of messages.

    This is the course's own shape: fields with other names stay.
    """
    row = dict(record)
    if isinstance(row["prompt"], list):
        row["prompt"] = in_frame(spoken(row["prompt"], "Human"))
    other = next((name for name in ("completion", "answer", "output") if record.get(name)), None)
    if other and "response" not in row:
        row["response"] = row.pop(other)
    for name in {"chosen", "rejected", "response"} & row.keys():
        if isinstance(row[name], list):
            row[name] = last_answer(row[name])
    return row


# ------------------------------------------------------------------------------------------------
# Shapes. Add a line for records of your own: the fields that a record must have, and the fields of
# the course's row as templates, or a function from the record to the row. The first match counts.

SHAPES = {
    "pairs of dialogues": ("chosen rejected", pair_of_dialogues),
    "messages": ("messages", conversation),
    "conversations": ("conversations", conversation),
    "prompt and answers": ("prompt", prompt_and_answers),
    "instructions": (
        "instruction output",
        {"prompt": "{instruction}\n{input}", "response": "{output}"},
    ),
    "text to SQL": (
        "question context answer",
        {"prompt": "{context}\n{question}", "response": "{answer}"},
    ),
    "questions and answers": (
        "question answer",
        {"prompt": "{question}", "response": "{answer}"},
    ),
    "questions and responses": (
        "question response",
        {"prompt": "{question}", "response": "{response}"},
    ),
    "counselling": ("Context Response", {"prompt": "{Context}", "response": "{Response}"}),
    "inputs and outputs": ("input output", {"prompt": "{input}", "response": "{output}"}),
    "questions": ("question", {"prompt": "{question}"}),
    "texts": ("text", {"prompt": "{text}"}),
}
BARE = "prompts"  # the name of records that are texts


def as_row(record):
    """Returns the name of a record's shape and its row in the course's shape.

    The name is None if no shape fits. Instead of a row there may be the Problem of the record.
    """
    if isinstance(record, str):
        return BARE, {"prompt": record}
    if not isinstance(record, dict):
        return None, record
    filled_in = {name for name, value in record.items() if value is not None}
    fitting = [shape for shape, (fields, _) in SHAPES.items() if filled_in >= {*fields.split()}]
    fitting += [
        shape for shape, (fields, _) in SHAPES.items() if record.keys() >= {*fields.split()}
    ]
    for shape in fitting:
        recipe = SHAPES[shape][1]
        try:
            row = recipe(record) if callable(recipe) else filled(recipe, record)
        except Defect as defect:
            return shape, Problem(str(defect), ": correct it, or remove such rows.")
        if row is not None:
            return shape, row
    return None, record


def filled(templates, record):
    """Fills templates with the fields of a record; a field that it lacks is empty."""
    row = {}
    for name, template in templates.items():
        fields = re.findall(r"{(\w+)}", template)
        for field in fields:
            if not isinstance(record.get(field), str | None):
                raise Defect(f"the field {field!r} must be a text")
        pieces = {field: (record.get(field) or "").strip() for field in fields}
        row[name] = template.format(**pieces).strip()
    return row
