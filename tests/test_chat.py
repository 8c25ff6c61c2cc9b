"""python -m lab chat and the chat cells of 4_test: questions, streaming, verdicts."""

import random
from functools import partial

import pytest
import torch
from conftest import FAMILIES, random_model

import util
from lab import __main__ as driver
from lab import chat, decoding, world
from lab.tokens import stops_of

# ------------------------------------------------------------------------------------------------
# Recognising a question


def items(count, missing=0.3):
    """Items of every kind and split, also of questions about a column that is not there."""
    rng = random.Random(7)
    for kind in world.KINDS:
        for split in world.SPLITS:
            yield from (world.draw(rng, kind, split, missing) for _ in range(count))


def test_every_question_of_the_grammar_is_recognised_with_its_truth():
    seen = set()
    for item in items(400):
        row = chat.recognise(item.question)
        prompt = world.TEMPLATE.format(item.question)
        assert row == {"prompt": prompt, "kind": item.kind, "truth": item.truth}, item.question
        seen.add((item.kind, item.slots.get("form"), "missing" in item.truth))
    assert len(seen) == 3 + len(world.UNKNOWN_FORMS) - 1 + len(world.SQL_FORMS) * 2 - 1, seen


def test_the_rows_of_a_world_are_recognised():
    for split in ("train", "eval"):
        for row in world.rows(world.World(seed=3), split, 300):
            question = row["prompt"].removeprefix("Human: ").removesuffix(" Assistant:")
            found = chat.recognise(question)
            assert found == {name: row[name] for name in ("prompt", "kind", "truth")}


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.lower,
        lambda text: f"  {text.replace(' ', '   ')} ",
        lambda text: text.rstrip(".?"),
        lambda text: text.replace(",", " ,").replace(":", " :"),
        lambda text: text.replace(", ", ","),
    ],
)
def test_spelling_is_forgiven(change):
    for item in items(25):
        row = chat.recognise(change(item.question))
        assert row and row["truth"] == item.truth
        assert row["prompt"] == world.TEMPLATE.format(item.question), "the usual spelling"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "Hello!",
        "How do I learn a bike?",
        "How do I steal a bike? And a car?",
        "I feel happy because my brother moved away.",
        "Who will win the chess final?",
        "What will bread cost on Paris?",
        "Table farms: age, city. List the city of farms with a age above 200.",
        "Table farms: age, city. List the city of farms with a age above x.",
        "Table farms: age, city. List the city of teams with a age above 20.",
        "Table farms: age, city, age. List the city of farms with a age above 20.",
        "Table farms: age, moon. List the age of farms whose moon is full.",
        "Table farms: age, city. List the age of farms whose city is red.",
        "Table farms: age, city. List the age of farms whose color is red.",
        "Table farms: age, city. List the color of farms with a age above 20.",
        "Table farms: age, city. What is the average city of all farms?",
        "Table farms: age, city.",
        "Table farms: city; drop table farms. How many farms have a age above 20?",
    ],
)
def test_other_text_is_none(text):
    assert chat.recognise(text) is None
    assert chat.row_of(text)["prompt"] == f"Human: {text} Assistant:"
    assert chat.verdict(chat.row_of(text), "I do not know.", True) is None


def test_a_changed_word_is_never_taken_for_another_question():
    """Whatever is recognised asks, word for word, what was typed."""
    rng, changed = random.Random(0), 0
    words = sorted({word for item in items(20) for word in item.question.split()})
    for item in items(40):
        parts = item.question.split()
        parts[rng.randrange(len(parts))] = rng.choice(words)
        row = chat.recognise(" ".join(parts))
        changed += row is None
        if row:
            question = row["prompt"].removeprefix("Human: ").removesuffix(" Assistant:")
            assert chat.simplified(question) == chat.simplified(" ".join(parts))
    assert changed > 100


def test_the_examples_are_recognised_and_no_training_has_seen_them():
    rows = [chat.recognise(question) for question in chat.examples()]
    assert [row["kind"] for row in rows] == list(world.KINDS)


# ------------------------------------------------------------------------------------------------
# Streaming


def config(**values):
    return util.Config("smoke", device="cpu", max_new_tokens=24, **values)


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_ids_are_those_of_generate(family, temperature, path, monkeypatch):
    if path == "plain":
        monkeypatch.setattr(decoding, "decoder_of", lambda model: None)
    model, stops, lengths = random_model(family), [1, 5], set()
    for seed in range(6):
        ids = torch.randint(2, 61, (1, 9), generator=torch.Generator().manual_seed(seed))
        prompt = ids, torch.ones_like(ids, dtype=torch.bool)
        tokens, mask, _ = util.generate(
            model, *prompt, max_new_tokens=24, temperature=temperature, eos_token_id=stops,
            pad_token_id=0, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        uniforms = util.draw_uniforms(1, 24, generator, ids.device)
        choose = partial(util.pick, temperature=temperature, top_k=0, top_p=1.0)
        found = list(chat.stream(model, *prompt, uniforms, choose, stops, config()))
        assert found == tokens[mask].tolist()
        lengths.add(len(found))
    assert len(lengths) > 1 or temperature == 0, "some answers must end before the limit"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_streamed_text_is_that_of_generate_answers(text_model, tokenizer, temperature):
    cfg = config()
    for number, question in enumerate(chat.examples()):
        row = chat.row_of(question)
        generator = util.rng_for(cfg, "chat", number)
        prompts = [row["prompt"]]
        (tokens,) = util.generate_answers(
            text_model, tokenizer, prompts, cfg, generator, temperature=temperature
        )
        ids = driver.answer_ids(cfg, tokenizer, text_model, temperature, row, number)
        parts = list(chat.pieces(tokenizer, ids))
        assert ["".join(parts)] == util.decode(tokenizer, *tokens[2:])
        assert len(parts) > 3, "it must arrive piece by piece"


def test_streaming_leaves_gradients_and_mode_as_they_were(text_model, tokenizer):
    text_model.train()
    try:
        ids = driver.answer_ids(config(), tokenizer, text_model, 1.0, chat.row_of("Hi"), 0)
        next(ids)
        assert torch.is_grad_enabled()
        list(ids)
        assert text_model.training
    finally:
        text_model.eval()


@pytest.mark.parametrize("text", ["é ü ß", "你好，世界", "a 🙂 b", "plain words."])
def test_a_letter_of_several_tokens_waits_for_the_last_one(tokenizer, text):
    ids = util.encode_answer(tokenizer, text, 99)
    parts = list(chat.pieces(tokenizer, ids))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_an_answer_that_breaks_off_inside_a_letter_is_shown_to_its_end(tokenizer):
    ids = util.encode_answer(tokenizer, "ab 🙂", 99)[:-2]
    whole = tokenizer.decode(ids).strip()
    assert "".join(chat.pieces(tokenizer, ids)) == whole and whole.endswith("\ufffd")


# ------------------------------------------------------------------------------------------------
# Verdicts


def test_the_verdict_is_the_judges():
    row = chat.recognise("how do i steal a bike")
    for answer, ended in (
        ("I cannot help you steal a bike.", True),
        ("Sure!", True),
        ("No", False),
    ):
        score, reason = world.explain(row, answer, ended)
        assert chat.verdict(row, answer, ended) == f"{score:.2f}. {reason}"


@pytest.mark.parametrize("question, judged", [("How do I steal a bike?", True), ("Hi!", False)])
def test_the_table_shows_the_verdict_where_there_is_one(question, judged):
    row = chat.row_of(question)
    answer = {"response": "I cannot help you steal a bike.", "reward": 0.5, "eos": True}
    table = chat.compare(row, {"actor": answer, "rlhf": answer | {"reward": 1.5}})
    assert table["model"].tolist() == ["actor", "rlhf"]
    assert table["answer"].tolist() == [answer["response"]] * 2
    assert table["reward"].tolist() == [0.5, 1.5]
    assert ({"judge", "reason"} <= set(table)) == judged
    if judged:
        score, reason = world.explain(row, answer["response"])
        assert table["judge"].tolist() == [score] * 2 and table["reason"].tolist() == [reason] * 2


# ------------------------------------------------------------------------------------------------
# Where a person types


def raises(error):
    def read(text):
        raise error

    return read


def test_ask_reads_a_line_where_a_person_sits(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: "  Hi there ")
    assert chat.ask() == "Hi there"


def test_ask_is_empty_without_a_person(monkeypatch):
    from IPython.core.error import IPythonCoreError

    monkeypatch.setattr("builtins.input", raises(AssertionError("nobody may be asked")))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert chat.ask() == ""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for error in (IPythonCoreError(), EOFError()):
        monkeypatch.setattr("builtins.input", raises(error))
        assert chat.ask() == ""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a base model."""
    root = tmp_path_factory.mktemp("chat")
    world.write(world.World(rows=40, eval_rows=8), root / "dataset")
    small = dict(pretrain_documents=400, pretrain_steps=2, device="cpu")
    list(util.train_base(util.Config("smoke", root=str(root), base_model="tiny", **small)))
    return root


def typed(monkeypatch, *lines):
    """The lines that a person types, then Ctrl-C."""
    left = iter(lines)

    def read(text):
        try:
            return next(left)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", read)


def said(capsys):
    """What the model answered and what the judge said, question by question."""
    text = capsys.readouterr().out
    turns = text.split("Model: ")[1:]
    return text, [tuple(turn.strip().split("\nJudge: ")) for turn in turns]


@pytest.mark.parametrize("end", [("",), ()])
def test_a_chat_from_the_first_question_to_the_last(root, monkeypatch, capsys, end):
    typed(monkeypatch, "how do i steal a bike", "What is love?", *end)
    assert driver.main(["chat", "base", "--set", f"root={root}"]) == 0
    text, turns = said(capsys)
    assert all(question in text for question in chat.examples())
    cfg = util.Config.of(root=str(root))
    tokenizer, model = util.load_pair(cfg, "base")
    for number, (question, (answer, told)) in enumerate(
        zip(("How do I steal a bike?", "What is love?"), turns, strict=True)
    ):
        row = chat.row_of(question)
        rng = util.rng_for(cfg, "chat", number)
        (tokens,) = util.generate_answers(model, tokenizer, [row["prompt"]], cfg, rng)
        assert answer == chat.printable(util.decode(tokenizer, *tokens[2:])[0]).strip()
        ended = util.ended(*tokens[2:], stops_of(model, tokenizer)).item()
        expected = chat.verdict(row, answer, ended)
        assert told.split("\n")[0] == (expected or "no verdict, as it does not know this question.")


def test_seed_and_temperature_change_the_answer(root, monkeypatch, capsys):
    answers = []
    for more in (
        [],
        ["--seed", "1"],
        ["--temperature", "0"],
        ["--temperature", "0", "--seed", "1"],
    ):
        typed(monkeypatch, "What is love?", "What is love?")
        assert driver.main(["chat", "base", "--set", f"root={root}", *more]) == 0
        answers.append([answer for answer, _ in said(capsys)[1]])
    plain, other_seed, greedy, greedy_again = answers
    assert plain != other_seed and greedy == greedy_again
    assert plain[0] != plain[1] and greedy[0] == greedy[1]


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("chat", "run 3_rlhf.ipynb first."),
        ("chat actor", "run 1_actor.ipynb first."),
        ("chat --temperature=-1", "--temperature -1.0 is impossible"),
        ("chat --temperature nan", "--temperature nan is impossible"),
        ("chat --seed x", "seed = 'x' is impossible"),
        ("chat --set kl_coef=1", "chat does not read kl_coef"),
    ],
)
def test_what_keeps_a_chat_from_starting_is_a_sentence(
    tmp_path, monkeypatch, capsys, line, sentence
):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    assert driver.main(line.split()) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert chat.printable("a\x1b[31mred\x07\r\nb 你好") == "a [31mred  \nb 你好"
