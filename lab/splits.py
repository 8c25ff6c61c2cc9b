"""Splits the rows between the stages and orders them; the same seed gives the same result."""

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from lab import CourseError, world
from lab.data import check_no_overlap, parts_of, read_table, reading, repeated, sort_out
from lab.rewards import named
from lab.runs import digest, digest_of, stamp
from lab.tokens import encoder

# A word, a sign, or one character of a script that does not separate words
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|\S")
SPEAKERS = {"Human", "Assistant"}


def rng_for(cfg, *purpose):
    """Returns a torch.Generator for one purpose, e.g. ("rollout", 7).

    Its seed depends on cfg.seed and the purpose only, so no step depends on the steps before it.
    """
    name = hashlib.md5(repr((cfg.seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(name[:15], 16))


# ------------------------------------------------------------------------------------------------
# Rows of the stages


def load_rows(cfg, share, needs=("prompt",), say=None):
    """Returns the rows of one stage: "sft", "preference" or "prompt".

    They are its share of cfg.data, or all rows of the source that cfg names for this stage. `say`
    is told which rows are left out and which answers are made.
    """
    table = training_table(cfg, source_of(cfg, share))
    sort_out(table.name, table.count, table.dropped, say)
    rows = table.rows
    if "response" in needs:
        rows = with_responses(rows, say)
    if share == "preference":
        rows = with_negatives(cfg, rows, say)
    try:
        fits = table.fitting(rows, dict.fromkeys(("prompt", *needs)), say)
    except CourseError as error:
        good = not cfg.negatives and any(good_answer(row) for row in rows)
        if "rejected" not in needs or not good or "rename" in str(error):
            raise
        raise CourseError(
            f"{error} The rows have good answers: negatives = 'other', 'cut' or 'base' makes bad "
            "ones."
        ) from None
    order = torch.randperm(len(table.rows), generator=rng_for(cfg, "shares")).tolist()
    if not getattr(cfg, f"{share}_data"):
        first = {"sft": 0, "preference": cfg.sft_share}
        start = first.get(share, cfg.sft_share + cfg.preference_share)
        stop = start + getattr(cfg, f"{share}_share")
        order = order[round(start * len(order)) : round(stop * len(order))]
        if not order:
            raise CourseError(
                f"{share}_share = {stop - start:g} of {len(table.rows)} rows gives no row: raise "
                "it."
            )
    chosen = [rows[i] for i in order if fits[i]]
    if not chosen:
        raise CourseError(f"No row in the {share} share of {table.name} has {' and '.join(needs)}.")
    return chosen


def source_of(cfg, share):
    return getattr(cfg, f"{share}_data") or cfg.data


def training_sources(cfg):
    """Returns the different sources of the three stages that train on rows."""
    return list(dict.fromkeys(source_of(cfg, share) for share in ("sft", "preference", "prompt")))


def load_eval_rows(cfg, say=print):
    """Returns the rows of 4_test, at most cfg.test_rows. No prompt of theirs is in the training."""
    return all_eval_rows(cfg, say)[: cfg.test_rows]


def all_eval_rows(cfg, say=None):
    """Returns all rows for evaluation.

    They come from cfg.eval_data, or from each training source: its own rows for evaluation, or
    else those that are kept back from training.
    """
    texts = [cfg.eval_data] if cfg.eval_data else training_sources(cfg)
    tables = [table for text in texts if (table := eval_table(cfg, text))]
    for table in tables:
        sort_out(table.name, table.count, table.dropped, say)
    rows = [row for table in tables for row in table.rows]
    trained = [training_table(cfg, text) for text in training_sources(cfg) if readable(cfg, text)]
    if texts == [""] and "eval" in parts_for(cfg, ""):
        for table in trained:
            check_no_overlap(table.rows, rows, "eval.json")
    else:
        known = {row["prompt"] for table in trained for row in table.rows}
        fresh = [row for row in rows if row["prompt"] not in known]
        if not fresh:
            raise CourseError(
                "There are no rows for evaluation whose prompts are not in the training rows: "
                "raise eval_share, or name other rows with eval_data."
            )
        if say and len(fresh) < len(rows):
            say(f"{len(rows) - len(fresh)} evaluation rows have prompts of the training: left out.")
        order = torch.randperm(len(fresh), generator=rng_for(cfg, "eval")).tolist()
        rows = [fresh[i] for i in order]
    return with_negatives(cfg, rows, say)


def rows_of(cfg, text):
    """Returns the rows of any source, those for evaluation if it has such; at most cfg.test_rows.
    Their order stays, and it does not matter what the training has read."""
    return eval_table(cfg.changed(eval_data=text), text).rows[: cfg.test_rows]


def load_data(cfg):
    """Returns all rows for training and all rows for evaluation."""
    train = [row for text in training_sources(cfg) for row in training_table(cfg, text).rows]
    return train, all_eval_rows(cfg)


def load_documents(cfg, say=None):
    """Returns (question, answer) pairs for pretraining, at most cfg.pretrain_documents.

    They come from cfg.pretrain_data; else from the embedded world if the training rows do, so that
    pretraining reads more than they hold; else they are the training rows. Few rows are repeated,
    each time in a new order.
    """
    texts = [cfg.pretrain_data] if cfg.pretrain_data else training_sources(cfg)
    if texts == [""] and embedded(cfg, ""):
        return list(world.documents(world.World(seed=cfg.seed), cfg.pretrain_documents))
    tables = [training_table(cfg, text) for text in texts]
    known = dict.fromkeys(document(row) for table in tables for row in table.rows)
    known, documents, letters = list(known), [], 0
    enough = 8 * cfg.pretrain_steps * cfg.pretrain_batch * cfg.pretrain_length  # letters
    while len(documents) < cfg.pretrain_documents and letters < enough:
        order = torch.randperm(len(known), generator=rng_for(cfg, "documents", len(documents)))
        documents += [known[i] for i in order]
        letters += sum(map(len, (text for pair in known for text in pair)))
    documents = documents[: cfg.pretrain_documents]
    if say:
        names = ", ".join(table.name for table in tables)
        laps = len(documents) / len(known)
        say(f"the pretraining text is {names}: {len(known)} documents, {laps:.3g} times each.")
    return documents


def document(row):
    """Returns a row as (question, answer) without the dialogue frame. Plain text has no answer:
    its second half takes the place of one."""
    question = row["prompt"]
    answer = text_in(row, "response") or text_in(row, "chosen")
    if question.count("Human:") == 1:
        question = question.removeprefix("Human: ").removesuffix(" Assistant:")
    if answer:
        return question, answer
    middle = question.find(" ", len(question) // 2) + 1 or len(question) // 2
    return question[:middle].rstrip(), question[middle:]


# ------------------------------------------------------------------------------------------------
# Sources


def parts_for(cfg, text):
    """Returns the parts of a source; "" stands for train.json and eval.json in dataset/."""
    if text:
        return parts_of(text, cfg.root, cfg.seed)
    folder = Path(cfg.root) / "dataset"
    parts = {"train": [folder / "train.json"], "eval": [folder / "eval.json"]}
    if not parts["eval"][0].exists() and readable(cfg, "") and not embedded(cfg, ""):
        parts.pop("eval")  # rows of your own: some of them are kept back
    return parts


def readable(cfg, text):
    return bool(text) or (Path(cfg.root) / "dataset" / "train.json").exists()


def embedded(cfg, text):
    """Returns whether the training rows of a source are those of the embedded world."""
    if text:
        return False
    files = [Path(cfg.root) / "dataset" / "train.json"]
    return world.knows(table_of(cfg, "", files).rows[0])


def table_of(cfg, text, part):
    """Returns the Table of a part of a source."""
    most, seed = cfg.max_rows, cfg.seed
    if cfg.reader and not callable(part):
        return read_table(part, text, named("reader", cfg.reader, {}), most, seed)
    part = part if callable(part) else tuple(part)
    stamps = () if callable(part) else tuple(map(stamp, part))
    return known_table(part, stamps, text, most, seed)


@lru_cache(maxsize=6)
def known_table(part, stamps, text, most, seed):
    """Returns the Table of a part; cached while the stamps of its files are equal."""
    return read_table(part, text, None, most, seed)


def training_table(cfg, text):
    """Returns the Table of a source's rows for training, without those kept back."""
    parts = parts_for(cfg, text)
    table = table_of(cfg, text, parts["train"])
    if cfg.eval_data or "eval" in parts:
        return table
    table = table.without(kept_back(cfg, table))
    if not table.rows:
        raise CourseError(f"eval_share = {cfg.eval_share:g} leaves no row to train on: lower it.")
    return table


def eval_table(cfg, text):
    """Returns the Table of a source's rows for evaluation; None if it has none."""
    parts = parts_for(cfg, text)
    if "eval" in parts or cfg.eval_data:
        return table_of(cfg, text, parts.get("eval", parts["train"]))
    table = table_of(cfg, text, parts["train"])
    back = kept_back(cfg, table)
    return table.without({row["prompt"] for row in table.rows} - back) if back else None


def kept_back(cfg, table):
    """Returns the prompts that are kept back for evaluation: a share of all prompts.

    The choice depends on the seed and the prompt, so a prompt in two sources falls on one side.
    """
    prompts = {row["prompt"] for row in table.rows}
    if not cfg.eval_share or len(prompts) < 2:
        return set()
    places = {prompt: place(f"{cfg.seed} {prompt}") for prompt in prompts}
    back = {prompt for prompt in prompts if places[prompt] < cfg.eval_share}
    return back or {min(prompts, key=places.get)}


def place(text):
    """Returns a number in [0, 1) that depends on the text only."""
    return int(hashlib.md5(text.encode()).hexdigest()[:12], 16) / 16**12


def data_digests(cfg, stage):
    """Returns {name: hash} of the data that a stage reads, so that a changed file is noticed."""
    texts = {
        "base": [cfg.pretrain_data] if cfg.pretrain_data else training_sources(cfg),
        "actor": [source_of(cfg, "sft")],
        "report": [cfg.eval_data] if cfg.eval_data else training_sources(cfg),
    }
    both = [source_of(cfg, share) for share in ("preference", "prompt")]
    wanted, found = "eval" if stage == "report" else "train", {}
    for text in dict.fromkeys(texts.get(stage, both)):
        parts = parts_for(cfg, text)
        part = parts.get(wanted, parts["train"])
        if callable(part):
            found[text] = digest_of(table_of(cfg, text, part).rows)
        else:
            with reading(part[0]):
                found[text or part[0].name] = digest(*part)
    return found


# ------------------------------------------------------------------------------------------------
# What a source holds


def overview(cfg, tokenizer=None):
    """Returns a table of the training sources: a dict for each, {what: value}.

    Lengths are in tokens if there is a tokenizer, else in characters.
    """
    return [facts(cfg, text, tokenizer) for text in training_sources(cfg)]


def facts(cfg, text, tokenizer):
    table = training_table(cfg, text)
    evals = None if cfg.eval_data else eval_table(cfg, text)
    counts = Counter(problem.what for _, problem in table.dropped)
    shapes = [f"{shape}: {count}" for shape, count in table.shapes.items()]
    found = {
        "source": text or "dataset/",
        "recognised as": ", ".join(shapes),
        "rows for training": len(table.rows),
        "rows for evaluation": len(evals.rows) if evals else 0,
        "dropped": sum(counts.values()),
        "why": "; ".join(f"{what}: {count}" for what, count in counts.items()) or "-",
        "copies": repeated(table.rows),
    }
    for name in ("response", "chosen", "rejected"):
        found[f"rows with {name}"] = len(texts_of(table.rows, name))
    unit = "tokens" if tokenizer else "characters"
    for name, limit in (("prompt", cfg.max_prompt), ("answer", cfg.max_new_tokens)):
        lengths = sorted(lengths_of(table.rows, name, tokenizer))
        if not lengths:
            continue
        middle, high = (lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.95))
        key = f"{unit} of {'a prompt' if name == 'prompt' else 'an answer'}"
        found[f"{key}: median, 95 %, max"] = f"{middle}, {high}, {lengths[-1]}"
        if tokenizer:
            over = sum(length > limit for length in lengths)
            found[f"{name}s over {limit} tokens, which are cut"] = over
    return found


def lengths_of(rows, name, tokenizer, most=5_000):
    """Returns the lengths of the prompts, or of all answers, of the first `most` rows."""
    fields = ("prompt",) if name == "prompt" else ("response", "chosen", "rejected")
    texts = [text for field in fields for text in texts_of(rows[:most], field)]
    if tokenizer is None:
        return map(len, texts)
    encode = encoder(tokenizer)
    ids = encode.prompts if name == "prompt" else encode.answers
    return map(len, ids(texts, math.inf))


def as_read(cfg, tokenizer=None, count=5):
    """Returns the first training rows as a model reads them: what is cut stands in brackets."""
    shown = []
    for row in training_table(cfg, training_sources(cfg)[0]).rows[:count]:
        line = {}
        for name in ("prompt", "response", "chosen", "rejected"):
            if text := text_in(row, name):
                line[name] = with_cut(cfg, text, name, tokenizer)
        shown.append(line)
    return shown


def with_cut(cfg, text, name, tokenizer):
    """Returns a text and its number of tokens, with the part in brackets that a model loses."""
    if tokenizer is None:
        return f"{text} ({len(text)} characters)"
    encode, limit = encoder(tokenizer), cfg.max_prompt if name == "prompt" else cfg.max_new_tokens
    ids = (encode.prompts if name == "prompt" else encode.answers)([text], math.inf)[0]
    if len(ids) > limit and name == "prompt":
        cut = len(ids) - limit
        text = f"[{tokenizer.decode(ids[:cut])}]{tokenizer.decode(ids[cut:])}"
    elif len(ids) > limit:
        text = f"{tokenizer.decode(ids[: limit - 1])}[{tokenizer.decode(ids[limit - 1 : -1])}]"
    return f"{text} ({len(ids)} tokens)"


# ------------------------------------------------------------------------------------------------
# Answers that are made


def with_responses(rows, say=None):
    """Returns the rows; where a response is not there, the chosen answer takes its place."""
    lack = [row.get("response") is None and isinstance(row.get("chosen"), str) for row in rows]
    if say and any(lack):
        say(f"{sum(lack)} of {len(rows)} rows have no response: 1_actor learns the chosen answer.")
    return [row | {"response": row["chosen"]} if bare else row for row, bare in zip(rows, lack)]


def with_negatives(cfg, rows, say=None):
    """Returns the rows; those that have a good answer but no pair get one as cfg.negatives says.

    With "base" the base model writes the bad answers later: see `preference_rows`.
    """
    if cfg.negatives in ("", "base"):
        return rows
    good = {i: good_answer(row) for i, row in enumerate(rows) if not text_in(row, "rejected")}
    good = {i: text for i, text in good.items() if text}
    rng = random.Random(f"{cfg.seed} negatives")
    bad = NEGATIVES[cfg.negatives](good, rows, rng)
    if say and bad:
        say(f"{len(bad)} of {len(rows)} rows have no pair: {SPOILT[cfg.negatives]} is rejected.")
    pairs = {i: {"chosen": good[i], "rejected": text} for i, text in bad.items()}
    return [row | pairs.get(i, {}) for i, row in enumerate(rows)]


def good_answer(row):
    """Returns the answer of a row without a pair, or None."""
    return text_in(row, "chosen") or text_in(row, "response")


def text_in(row, name):
    """Returns the text of a field; None if there is no text in it."""
    text = row.get(name)
    return text if isinstance(text, str) and text.strip() else None


def texts_of(rows, name):
    """Returns the texts of a field of those rows that have one."""
    return list(filter(None, (text_in(row, name) for row in rows)))


def other_answers(good, rows, rng):
    """Returns {i: the answer to another prompt}."""
    order, bad = list(good), {}
    rng.shuffle(order)
    for place, i in enumerate(order):
        for step in range(1, min(len(order), 20)):  # 20 equal answers in a row: there is no other
            other = order[(place + step) % len(order)]
            if good[other] != good[i] and rows[other]["prompt"] != rows[i]["prompt"]:
                bad[i] = good[other]
                break
    return bad


def spoilt_answers(good, rows, rng):
    """Returns {i: the answer cut off in the middle, or with a piece said twice}."""
    bad = {}
    for i, text in good.items():
        words = re.findall(r"\s*\S+", text)
        words = words if len(words) > 3 else list(text)  # some scripts do not separate words
        start = rng.randrange(len(words))
        piece = words[start : start + max(1, len(words) // 2)]
        half = words[: len(words) // 2]
        twice = [*words[: start + len(piece)], *piece, *words[start + len(piece) :]]
        bad[i] = "".join(half if half and rng.random() < 0.5 else twice).strip()
    return bad


def mirrored_pairs(rows, rng):
    """Returns two more pairs for each chosen answer that repeats words of its question.

    Some of these words, one to all of them, are exchanged for others of the same sort: words that
    stand between the same neighbours in other answers. The exchange makes a second question and a
    second answer, and each question prefers its own answer. No question and no answer alone shows
    which one is chosen, so a model has to compare them.
    """
    texts = [WORD.findall(row["chosen"]) for row in rows]
    after, before, pairs = defaultdict(set), defaultdict(set), []
    for words in texts:
        for left, right in pairwise(["", *words, ""]):
            after[left].add(right)
            before[right].add(left)
    for row, words in zip(rows, texts):
        known, options = {*WORD.findall(row["prompt"])} - SPEAKERS, {}
        for left, word, right in zip(["", *words], words, [*words[1:], ""]):
            alike = (after[left] & before[right]) - SPEAKERS - {word}
            if word in known and word.isalnum() and any(map(str.isalnum, alike)):
                options[word] = sorted(filter(str.isalnum, alike))
        share, exchange = rng.random(), {}
        some = [word for word in options if rng.random() < share]
        for word in some or [rng.choice(list(options))] if options else []:
            other = rng.choice(options[word])
            if not {word, other} & exchange.keys():
                exchange |= {word: other, other: word}
        if exchange:
            prompt, answer = (exchanged(row[name], exchange) for name in ("prompt", "chosen"))
            pairs.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": answer})
            pairs.append({"prompt": prompt, "chosen": answer, "rejected": row["chosen"]})
    return pairs


def exchanged(text, exchange):
    """Returns the text with some words exchanged, {word: other}."""
    return WORD.sub(lambda found: exchange.get(found[0], found[0]), text)


NEGATIVES = {"other": other_answers, "cut": spoilt_answers}
SPOILT = {"other": "the answer to another prompt", "cut": "the answer cut off or said twice"}


# ------------------------------------------------------------------------------------------------
# Batches


def load_plain_text(cfg):
    """Returns the text of cfg.plain_text, a file in root or in the folder of the notebooks."""
    places = [Path(folder) / cfg.plain_text for folder in (cfg.root, Path(__file__).parents[1])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        lost = " and no file ".join(dict.fromkeys(map(str, places)))
        raise CourseError(f"plain_text cannot be read: there is no file {lost}. Check its name.")
    with reading(path):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise CourseError(f"{path} is not UTF-8 text: save the file as UTF-8.") from None


def batches(count, size, generator):
    """Returns the row indices of one epoch as a list per batch, in random order."""
    return [part.tolist() for part in torch.randperm(count, generator=generator).split(size)]


def epochs(cfg, purpose, count, size, laps):
    """Returns one list of row indices per step, for `laps` passes over the rows."""
    return [
        index for lap in range(laps) for index in batches(count, size, rng_for(cfg, purpose, lap))
    ]


WATCHDOG_NEEDS = 50  # pairs


def apart(cfg, rows, say=None):
    """Splits pairs into those to learn from, and those that only the watchdog may see.

    The seed and the prompt decide, so all pairs of a prompt fall on one side. What a person has
    compared is never for the watchdog.
    """
    share = cfg.watchdog
    theirs = [
        row.get("by") != "person" and place(f"{cfg.seed} watchdog {row['prompt']}") < share
        for row in rows
    ]
    if share and not WATCHDOG_NEEDS <= sum(theirs) <= len(rows) / 2:
        if say:
            say(
                f"watchdog = {share:g} gives the watchdog {sum(theirs)} of {len(rows)} pairs. It "
                f"needs at least {WATCHDOG_NEEDS} and at most half of them, so there will be no "
                "watchdog, and the reward model learns from all pairs."
            )
        return rows, []
    kept = [row for row, its in zip(rows, theirs) if its]
    return [row for row, its in zip(rows, theirs) if not its], kept


def watchdog_plan(cfg, count, steps):
    """Returns {step: row indices}: the batches of the watchdog, spread evenly over the steps."""
    plan = epochs(cfg, "watchdog", count, cfg.critic_batch, cfg.critic_epochs) if count else []
    return {i * steps // len(plan): rows for i, rows in enumerate(plan)}


def prompt_batch(cfg, prompts, step):
    """Returns the prompts of one step, each repeated `answers` times.

    Every pass over the prompts has a new random order.
    """
    batch, count = [], cfg.rollout // cfg.answers
    for i in range(step * count, (step + 1) * count):
        lap, place = divmod(i, len(prompts))
        if place == 0 or not batch:
            order = torch.randperm(len(prompts), generator=rng_for(cfg, "prompts", lap)).tolist()
        batch += [prompts[order[place]]] * cfg.answers
    return batch


def stack(pieces):
    """Concatenates pieces of a batch, (b,) or (b, R). Shorter rows get zeros on the right."""
    if pieces[0].dim() == 1:
        return torch.cat(pieces)
    R = max(piece.shape[1] for piece in pieces)
    return torch.cat([F.pad(piece, (0, R - piece.shape[1])) for piece in pieces])
