"""Texts as token ids: what people write stays text, only a chat template makes turns and ends.

A tokenizer takes "</s>" in a text for its eos, whoever wrote it. So the control tokens have secret
names here, which the words of the template get and the words of people do not.
"""

import json
import re
import secrets
from bisect import bisect_left
from functools import cache, lru_cache
from weakref import WeakKeyDictionary, proxy

from tokenizers import Tokenizer

from lab import CourseError
from lab.data import turns
from lab.hub import reason_of

# What a tokenizer without a chat template gets: the course's own frame.
FRAME = (
    "{% for m in messages %}{{ '' if loop.first else ' ' }}"
    "{{ 'Human: ' if m['role'] == 'user' else 'Assistant: ' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)


@cache
def encoders():
    """{tokenizer: its encoder}, for as long as the tokenizer lives."""
    return WeakKeyDictionary()


@cache
def secret():
    """A word that nobody can know before this program runs."""
    return secrets.token_hex(8)


def encoder(tokenizer):
    """The `Encoder` of a tokenizer, made once."""
    state = str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer)
    known = encoders().get(tokenizer)
    if known is None or known.state != state:
        known = encoders()[tokenizer] = Encoder(tokenizer, state)
    return known


def stops_of(model, tokenizer):
    """The ids that end an answer: those the model was made with, and those of its tokenizer."""
    ids = []
    for part in (getattr(model, "generation_config", None), model.config):
        known = getattr(part, "eos_token_id", None)
        ids += known if isinstance(known, list | tuple) else [known]
    ids += [tokenizer.eos_token_id, encoder(tokenizer).end]
    return [one for one in dict.fromkeys(ids) if one is not None]


def own_frame(tokenizer):
    """Whether dialogues look like "Human: ... Assistant: ...", as the data has them."""
    return tokenizer.chat_template in (None, FRAME)


def in_template(tokenizer, messages, answer_follows=True):
    """The dialogue as its tokenizer's chat template frames it, up to where the answer begins.

    A template is a program of strangers: it runs in a sandbox, which fails where it wants more.
    """
    how = {"tokenize": False, "add_generation_prompt": answer_follows}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template may raise whatever it likes
        what = f"The chat template in {tokenizer.name_or_path} fails ({reason_of(error)})"
        raise CourseError(f"{what}: mend it, or delete it to get the course's frame.") from None


class Encoder:
    """Turns prompts and answers into ids as one tokenizer and its chat template want them."""

    def __init__(self, tokenizer, state):
        self.tokenizer, self.state = proxy(tokenizer), state
        self.own_frame = own_frame(tokenizer)
        opened, whole = ("Assistant:", "") if self.own_frame else example(tokenizer)
        self.controls = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        for i, token in tokenizer.added_tokens_decoder.items():
            # Some tokenizers do not mark as special what their template writes to open a turn.
            written = token.content.strip() and token.content in opened + whole
            if token.special or written:
                self.controls[token.content] = i
        self.control_ids = set(self.controls.values())
        self.find_control = any_of(self.controls)
        self.names = {text: f"<{secret()}c{i}>" for text, i in self.controls.items()}
        self.hidden = {text: f"{secret()}h{i}h" for text, i in self.controls.items()}
        self.shown = {name: text for text, name in self.hidden.items()}
        self.find_hidden = any_of(self.shown)
        self.inside = None
        if tokenizer.is_fast:
            self.inside = renamed(tokenizer.backend_tokenizer.to_str(), tuple(self.names.items()))
        else:  # its names are fixed: a space keeps what people write from being one
            self.names = {text: text for text in self.controls}
            self.shown = {name: f"{text[0]} {text[1:]}" for name, text in self.shown.items()}
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.front, self.back = mask.index(0), mask[::-1].index(0)  # 1 and 1, if it is 1 0 1
        self.around_answers(opened, whole)

    def around_answers(self, opened, whole):
        """Sets what stands before an answer, the spaces around it, and the token that ends it."""
        last = max((found.start() for found in self.find_control.finditer(opened)), default=0)
        self.opening = self.named(opened[last:])
        self.before, self.after, self.end = "", "", self.tokenizer.eos_token_id
        if self.own_frame:
            self.before = " "
        else:
            start, _, rest = whole.rpartition(secret())
            if start.startswith(opened) and start[len(opened) :].isspace():
                self.before = start[len(opened) :]
            space = rest[: len(rest) - len(rest.lstrip())]
            if found := self.find_control.match(rest, len(space)):
                self.after, self.end = space, self.controls[found[0]]

    def ids(self, texts, special=False):
        """Ids of texts whose control tokens have their secret names."""
        if self.inside is None:
            return self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [one.ids for one in self.inside.encode_batch_fast(texts, add_special_tokens=special)]

    def hide(self, text):
        """A text of people without words that look like control tokens: `show` brings them back."""
        return self.find_control.sub(lambda found: self.hidden[found[0]], text)

    def show(self, text):
        """Here they look like control, and are none: a control token has another name."""
        return self.find_hidden.sub(lambda found: self.shown[found[0]], text)

    def named(self, text):
        """A text of the template, its control tokens under their secret names."""
        return self.find_control.sub(lambda found: self.names[found[0]], text)

    def framed(self, messages):
        """The dialogue in its template, which alone writes control tokens."""
        safe = [turn | {"content": self.hide(turn["content"])} for turn in messages]
        return self.show(self.named(in_template(self.tokenizer, safe)))

    def prompts(self, prompts, limit):
        """Ids of prompts in their frame; those that are too long lose what is oldest."""
        if self.own_frame:
            rows = self.ids([self.show(self.hide(prompt)) for prompt in prompts], special=True)
            return [cut(row[: len(row) - self.back], self.front, limit) for row in rows]
        dialogues = [turns(prompt) for prompt in prompts]
        rows = self.ids([self.framed(messages) for messages in dialogues])
        return [
            row if len(row) <= limit else self.shortened(messages, limit)
            for row, messages in zip(rows, dialogues)
        ]

    def shortened(self, messages, limit):
        """Ids of a dialogue without its oldest turns, and then without the front of a text.

        What the system says and what the template writes stay, if there is room for them.
        """

        first = int(messages[0]["role"] == "system" and len(messages) > 1)
        system, rest = messages[:first], messages[first:]

        def without(turns, letters=0):
            said, *later = rest[turns:]
            said = said | {"content": said["content"][letters:].lstrip()}
            return self.ids([self.framed([*system, said, *later])])[0]

        users = [0] + [i for i, turn in enumerate(rest) if i and turn["role"] == "user"]
        turns = users[bisect_left(users[:-1], True, key=lambda turns: len(without(turns)) <= limit)]
        length, kept = len(rest[turns]["content"]), limit

        def fits(letters):
            return len(without(turns, letters)) <= limit

        while kept < length and fits(length - kept):  # a text may be a thousand times too long
            kept *= 2
        letters = bisect_left(range(length), True, lo=max(0, length - kept), key=fits)
        row = without(turns, letters)
        return cut(row, int(row[:1] == [self.tokenizer.bos_token_id]), limit)

    def answers(self, answers, limit):
        """Ids of answers, their end included; those that are too long lose their last words.

        Some tokenizers begin a text as they begin no word inside one: so the answer is read behind
        the words that stand before it.
        """
        texts = [self.show(self.hide(answer.strip())) for answer in answers]
        texts = [self.before + text + self.after for text in texts]
        front, *rows = self.ids([self.opening, *(self.opening + text for text in texts)])
        for i, row in enumerate(rows):
            whole = row[: len(front)] == front
            row = row[len(front) :] if whole else self.ids(texts[i : i + 1])[0]
            rows[i] = (row if len(row) < limit else row[: limit - 1]) + [self.end]
        return rows

    def texts(self, rows):
        """What stands in rows of ids, without control tokens."""
        kept = [[one for one in row if one not in self.control_ids] for row in rows]
        return [self.tokenizer.decode(row).strip() for row in kept]


def example(tokenizer):
    """A question in its template, up to where the answer begins; and with an answer."""
    messages = [{"role": who, "content": secret()} for who in ("user", "assistant")]
    opened = in_template(tokenizer, messages[:1])
    try:
        return opened, in_template(tokenizer, messages, answer_follows=False)
    except CourseError:  # it knows questions only
        return opened, ""


def any_of(words):
    """A pattern that finds any of the words, the longer ones first."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def cut(ids, front, limit):
    """The last ids, behind the first ones if there is room for both."""
    if len(ids) <= limit:
        return ids
    front = front if front < limit else 0
    return ids[:front] + ids[len(ids) - limit + front :]


@lru_cache(maxsize=4)
def renamed(serialised, names):
    """A fast tokenizer that gives the same ids, and knows its control tokens by other names."""
    inside, names = json.loads(serialised), dict(names)
    inside["truncation"] = inside["padding"] = None
    for token in inside["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = inside["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    return Tokenizer.from_str(json.dumps(inside, ensure_ascii=False))
