"""Turns texts into token ids so that only the chat template can write control tokens.

A plain tokenizer turns the characters "</s>" into its eos, even in a text that a user wrote. Here
the control tokens therefore have secret names. The template's text uses these names; prompts and
answers cannot.
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

# The course's own dialogue frame, for tokenizers without a chat template.
FRAME = (
    "{% for m in messages %}{{ '' if loop.first else ' ' }}"
    "{{ 'Human: ' if m['role'] == 'user' else 'Assistant: ' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)


@cache
def encoders():
    """Returns the cache {tokenizer: Encoder}; an entry lives as long as its tokenizer."""
    return WeakKeyDictionary()


@cache
def secret():
    """Returns a random word, drawn once per process, that no text can contain on purpose."""
    return secrets.token_hex(8)


def encoder(tokenizer):
    """Returns the `Encoder` of a tokenizer, from the cache if nothing has changed."""
    state = str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer)
    known = encoders().get(tokenizer)
    if known is None or known.state != state:
        known = encoders()[tokenizer] = Encoder(tokenizer, state)
    return known


def stops_of(model, tokenizer):
    """Returns the ids that end an answer, according to the model's config and its tokenizer."""
    ids = []
    for part in (getattr(model, "generation_config", None), model.config):
        known = getattr(part, "eos_token_id", None)
        ids += known if isinstance(known, list | tuple) else [known]
    ids += [tokenizer.eos_token_id, encoder(tokenizer).end]
    return [one for one in dict.fromkeys(ids) if one is not None]


def own_frame(tokenizer):
    """Returns whether a tokenizer uses the course's frame, "Human: ... Assistant: ..."."""
    return tokenizer.chat_template in (None, FRAME)


def in_template(tokenizer, messages, answer_follows=True):
    """Applies the tokenizer's chat template to a dialogue, up to where the answer begins.

    A template is a program that comes with the model. It runs in a sandbox, which blocks unsafe
    access.
    """
    how = {"tokenize": False, "add_generation_prompt": answer_follows}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template may raise any error
        first, *rest = messages
        if first["role"] == "system" and rest:  # some templates, as Gemma's, know no system prompt
            question = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
            return in_template(tokenizer, [question, *rest[1:]], answer_follows)
        what = f"The chat template in {tokenizer.name_or_path} fails ({reason_of(error)})"
        raise CourseError(f"{what}: fix it, or delete it to use the course's frame.") from None


class Encoder:
    """Encodes prompts and answers in the format of one tokenizer and its chat template."""

    def __init__(self, tokenizer, state):
        self.tokenizer, self.state = proxy(tokenizer), state
        self.own_frame = own_frame(tokenizer)
        opened, whole = ("Assistant:", "") if self.own_frame else example(tokenizer)
        self.controls = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        for i, token in tokenizer.added_tokens_decoder.items():
            # Some tokenizers do not mark the tokens that open a turn as special.
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
        else:  # a slow tokenizer cannot be renamed: a space breaks up control words in texts
            self.names = {text: text for text in self.controls}
            self.shown = {name: f"{text[0]} {text[1:]}" for name, text in self.shown.items()}
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        # The number of special tokens before and after a text, e.g. 1 and 1 for the mask 1 0 1.
        self.front, self.back = mask.index(0), mask[::-1].index(0)
        self.around_answers(opened, whole)

    def around_answers(self, opened, whole):
        """Finds the text before an answer, the spaces around it, and the token that ends it."""
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
        """Returns the ids of texts in which control tokens have their secret names."""
        if self.inside is None:
            return self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [one.ids for one in self.inside.encode_batch_fast(texts, add_special_tokens=special)]

    def hide(self, text):
        """Replaces words in a user's text that look like control tokens; `show` restores them."""
        return self.find_control.sub(lambda found: self.hidden[found[0]], text)

    def show(self, text):
        """Restores the words that `hide` replaced. They are text, not control tokens."""
        return self.find_hidden.sub(lambda found: self.shown[found[0]], text)

    def named(self, text):
        """Gives the control tokens in a text of the template their secret names."""
        return self.find_control.sub(lambda found: self.names[found[0]], text)

    def framed(self, messages):
        """Applies the template to a dialogue; no message can add a control token."""
        safe = [turn | {"content": self.hide(turn["content"])} for turn in messages]
        return self.show(self.named(in_template(self.tokenizer, safe)))

    def prompts(self, prompts, limit):
        """Returns the ids of prompts in their frame; long prompts lose their oldest part."""
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
        """Returns the ids of a dialogue that fits: first the oldest turns are dropped, then the
        beginning of the oldest text that is left.

        The system prompt and the template's own tokens stay if there is room for them.
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

        while kept < length and fits(length - kept):  # start small: the text may be very long
            kept *= 2
        letters = bisect_left(range(length), True, lo=max(0, length - kept), key=fits)
        row = without(turns, letters)
        return cut(row, int(row[:1] == [self.tokenizer.bos_token_id]), limit)

    def answers(self, answers, limit):
        """Returns the ids of answers, including the token that ends them; long answers lose their
        last words.

        Some tokenizers encode the first word of a text differently. So each answer is encoded
        together with the words before it, whose ids are then removed.
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
        """Decodes rows of ids to texts, without control tokens."""
        kept = [[one for one in row if one not in self.control_ids] for row in rows]
        return [self.tokenizer.decode(row).strip() for row in kept]


def example(tokenizer):
    """Applies the template to a secret question: up to the answer, and with a secret answer."""
    messages = [{"role": who, "content": secret()} for who in ("user", "assistant")]
    opened = in_template(tokenizer, messages[:1])
    try:
        return opened, in_template(tokenizer, messages, answer_follows=False)
    except CourseError:  # the template accepts questions only
        return opened, ""


def any_of(words):
    """Compiles a pattern that finds any of the words and prefers longer ones."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def cut(ids, front, limit):
    """Cuts ids to `limit`: keeps the first `front` ids if they fit, and then the last ones."""
    if len(ids) <= limit:
        return ids
    front = front if front < limit else 0
    return ids[:front] + ids[len(ids) - limit + front :]


@lru_cache(maxsize=4)
def renamed(serialised, names):
    """Builds a fast tokenizer with the same ids whose control tokens have new names."""
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
