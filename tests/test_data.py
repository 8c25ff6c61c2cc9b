"""Config, rows, batches and tokens: sections 1 to 3 of util, and lab/data.py."""

import json
import os
import time
from dataclasses import FrozenInstanceError, asdict
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import util
from lab.data import check_no_overlap, read_rows, recognised, repeated
from lab.runs import CourseError

# ------------------------------------------------------------------------------------------ Config


@pytest.mark.parametrize("preset", ["auto", *util.Config.presets])
def test_presets_load_and_are_what_they_say(preset):
    cfg = util.Config(preset)
    assert cfg.preset == preset
    for name, value in util.Config.presets.get(preset, {}).items():
        assert getattr(cfg, name) == value


def test_the_presets_of_the_design_exist():
    assert {"tiny", "colab", "full"} <= set(util.Config.presets)


def test_unknown_names_are_errors_that_name_the_nearest():
    with pytest.raises(CourseError, match="'colab'"):
        util.Config("collab")
    with pytest.raises(CourseError, match="'policy_lr'"):
        util.Config("tiny", polcy_lr=1e-4)
    with pytest.raises(CourseError, match="learning"):
        util.Config("tiny", learning=1)


@pytest.mark.parametrize(
    "values",
    [
        dict(sft_share=0.9),
        dict(sft_share=-0.1),
        dict(minibatch=1_000, rollout=8),
        dict(minibatch=0),
        dict(rollout=0),
        dict(hidden_size=130, heads=4),
        dict(heads=0),
        dict(gamma=1.1),
        dict(lam=-0.1),
        dict(lam=1.01),
        dict(temperature=0),
        dict(temperature="nan"),
        dict(warmup=1.0),
        dict(max_prompt=0),
        dict(max_new_tokens=0),
        dict(steps=0),
        dict(steps=-3),
        dict(steps=2.5),
        dict(steps="many"),
        dict(steps=float("inf")),
        dict(seed=-1),
        dict(policy_lr=-1e-4),
        dict(policy_lr="inf"),
        dict(policy_lr="fast"),
        dict(whiten="perhaps"),
        dict(device=3),
        dict(norm_answers=1),
        dict(clip_ratio=float("nan")),
        dict(eval_batch=True),
    ],
    ids=repr,
)
def test_impossible_values_raise_and_are_named(values):
    with pytest.raises(CourseError, match=next(iter(values)) + r"|multiple of heads"):
        util.Config("tiny", **values)


def test_none_means_what_the_preset_says():
    assert util.Config("colab", steps=None) == util.Config("colab")
    assert util.Config("colab", steps=7).steps == 7


def test_text_becomes_the_type_of_the_field():
    cfg = util.Config("tiny", policy_lr="2e-5", steps="12", rollout=96.0, whiten="false", seed="3")
    values = cfg.policy_lr, cfg.steps, cfg.rollout, cfg.whiten, cfg.seed
    assert values == (2e-5, 12, 96, False, 3)
    assert [type(value) for value in values] == [float, int, int, bool, int]


def test_a_config_cannot_be_changed_and_survives_json():
    cfg = util.Config("full", seed=4)
    with pytest.raises(FrozenInstanceError):
        cfg.seed = 5
    assert util.Config(**json.loads(json.dumps(asdict(cfg)))) == cfg


def test_dice_depend_on_seed_and_purpose_only():
    def throw(seed, *purpose):
        return torch.rand(
            4, generator=util.rng_for(util.Config("tiny", seed=seed), *purpose)
        ).tolist()

    assert throw(0, "rollout", 3) == throw(0, "rollout", 3)
    others = [throw(1, "rollout", 3), throw(0, "rollout", 4), throw(0, "shares"), throw(0)]
    assert throw(0, "rollout", 3) not in others


# -------------------------------------------------------------------------------------------- rows

GOOD = {"prompt": "Human: hi Assistant:", "chosen": "a", "rejected": "b", "response": "c"}


def stored(tmp_path, text, mode="utf-8"):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode(mode))
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD) + "\n" + json.dumps(GOOD),
        json.dumps([GOOD, GOOD], indent=1),
        "\n\n" + json.dumps(GOOD) + "\n   \n" + json.dumps(GOOD) + "\n\n",
        json.dumps(GOOD) + "\r\n" + json.dumps(GOOD) + "\r\n",
        "  \n" + json.dumps([GOOD, GOOD]),
        json.dumps(GOOD) + "\r" + json.dumps(GOOD),
        "\r" + json.dumps([GOOD, GOOD], indent=1).replace("\n", "\r"),
        json.dumps(GOOD) + "\n\ufeff" + json.dumps(GOOD),
        json.dumps([{"prompt": 1, "chosen": ""} | GOOD, GOOD]).replace("{", '{"prompt": 0, '),
    ],
    ids="lines,list,blanks,windows,list after blanks,cr,cr list,two files,twice".split(","),
)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_come_out_of_every_layout(tmp_path, text, bom):
    assert read_rows(stored(tmp_path, bom + text), GOOD) == [GOOD, GOOD]


def test_text_of_any_script_survives(tmp_path):
    row = GOOD | {"chosen": "naïve 東京 \u2028 🙂 \x85 tab\t"}
    text = json.dumps(row, ensure_ascii=False)
    assert read_rows(stored(tmp_path, text))[0]["chosen"] == row["chosen"]


def refusal(path, needs=("prompt",)):
    """The error for this file: it is one line and starts with the name of the file."""
    with pytest.raises(CourseError) as caught:
        read_rows(path, needs)
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message.splitlines()) == 1
    return message.removeprefix(str(path)).lstrip(", ")


LINE = json.dumps(GOOD) + "\n"
LAYOUT = "one JSON object per line, or one JSON list"


@pytest.mark.parametrize(
    "text, where, words",
    [
        (LINE + "\n{'prompt': 1}\n", "line 3: this is not valid JSON", LAYOUT),
        (LINE * 2 + LINE[:40], "line 3: this is not valid JSON (Unterminated string", "column"),
        (LINE + LINE.strip() * 2, "line 2: this is not valid JSON (Extra data", LAYOUT),
        (json.dumps(GOOD, indent=1), "line 1 (the first of 6): this is not valid JSON", LAYOUT),
        (f"[\n{LINE},\n{LINE}{LINE}]", "line 5: this is not valid JSON (Expecting ','", LAYOUT),
        (f"\n\n[{LINE},\n{LINE}", "line 6: this is not valid JSON (Expecting ','", LAYOUT),
        (f"\r\r[{LINE},\r{LINE[:30]}", "line 5: this is not valid JSON", LAYOUT),
        ('{"prompt": NaN}', "line 1: NaN is not valid JSON", "write null"),
        (f'[{LINE},\n{{"prompt": -Infinity}}]', "somewhere in the list: -Infinity", "null"),
        (LINE + '{"n": ' + "7" * 5_000 + "}", "line 2: a number is too long", "quotes"),
        (LINE + '{"n": ' + "[" * 100_000, "line 2: brackets are nested too deeply", "flat"),
        ("[" * 100_000, "somewhere in the list: brackets are nested too deeply", "flat"),
        (LINE + "\0\n", "line 2: the text contains NUL characters", "UTF-8"),
        (f"[{LINE},\n\0{LINE}]", "line 3: the text contains NUL characters", "UTF-8"),
        (
            json.dumps(GOOD | {"kind": "a\0b"}),
            "line 1: the text contains NUL characters",
            "remove",
        ),
        (
            json.dumps(GOOD | {"flaw": "\ud800"}),
            "line 1: the text contains half of a surrogate pair",
            "remove",
        ),
        (
            json.dumps({"\udfff": 1}),
            "line 1: the text contains half of a surrogate pair",
            "remove",
        ),
        ("3\n" + LINE + "4\n", "line 1 (the first of 2): a row must be an object", '{"prompt"'),
        (f"[{LINE}, [3], null]", "row 2 (the first of 2): a row must be an object", "prompt"),
    ],
    ids=range(19),
)
def test_what_is_no_row_is_refused_with_its_place(tmp_path, text, where, words):
    message = refusal(stored(tmp_path, text))
    assert message.startswith(where) and words in message


@pytest.mark.parametrize("mode", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("around", ["{}", "[\n{}]"])
def test_another_encoding_is_refused_with_what_to_do(tmp_path, mode, around):
    text = around.replace("{}", json.dumps(GOOD | {"chosen": "é"}, ensure_ascii=False))
    message = refusal(stored(tmp_path, text, mode))
    assert "save the file as UTF-8" in message
    assert mode != "utf-16" or message.startswith("line 1: this is UTF-16 text")
    if mode == "latin-1":
        assert message.startswith(f"line {text.count(chr(10)) + 1}: this is not UTF-8 text")


PAIR = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": 3}, "the field 'prompt' must be a text"),
        ({"prompt": {"a": "b"}}, "the field 'prompt' must be a text"),
        ({"chosen": {"a": "b"}}, "the field 'chosen' must be a text"),
        ({"prompt": ""}, "the field 'prompt' is empty"),
        ({"prompt": " \n\u3000"}, "the field 'prompt' is empty"),
        ({"chosen": "\t"}, "the field 'chosen' is empty"),
        ({"rejected": ""}, "the field 'rejected' is empty"),
        ({"rejected": " a\n"}, "chosen and rejected are equal"),
    ],
    ids=repr,
)
def test_few_bad_rows_are_left_out_and_many_are_refused(tmp_path, change, words):
    bad = json.dumps(GOOD | change) + "\n"
    for text in (LINE * 3 + bad + LINE + bad, f"[{LINE}, {LINE}, {LINE}, {bad}, {LINE}, {bad}]"):
        said, path = [], stored(tmp_path, text)
        assert read_rows(path, PAIR, say=said.append) == [GOOD] * 4
        place = "row 4" if text[0] == "[" else "line 4"
        why = f"2: {words} (first: {place})."
        assert said == [f"2 of 6 rows of {path} are left out. {why}"]
    assert len(read_rows(stored(tmp_path, LINE + bad), PAIR)) == 1, "half of them may be bad"
    many = refusal(stored(tmp_path, LINE * 11 + "\n" + bad * 37 + LINE), PAIR)
    assert many.startswith(f"line 13 (the first of 37): {words}")
    listed = refusal(stored(tmp_path, f"[{LINE},{bad},{bad}]"), PAIR)
    assert listed.startswith(f"row 2 (the first of 2): {words}")


def test_rows_without_a_field_serve_where_it_is_not_needed(tmp_path):
    bare = [{"prompt": GOOD["prompt"], "n": i} for i in range(9)]
    path, said = stored(tmp_path, json.dumps([*bare, bare[0] | {"chosen": None}, GOOD])), []
    assert read_rows(path) == [*bare, bare[0], GOOD], "null means that a field is not there"
    assert read_rows(path, PAIR, say=said.append) == [GOOD], "ten rows have no pair: no defect"
    assert "10: the field 'chosen' is missing (first: row 1)." in said[0]
    alone = stored(tmp_path, json.dumps(bare))
    assert refusal(alone, PAIR).startswith("row 1 (the first of 9): the field 'chosen' is missing")


def test_what_is_not_needed_may_be_empty_or_equal(tmp_path):
    rows = [GOOD | {"response": " "}, GOOD | {"rejected": "a"}, {"prompt": GOOD["prompt"], "n": 1}]
    assert read_rows(stored(tmp_path, json.dumps(rows))) == rows


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": "x", "chosn": "y"},
            "the field 'chosen' is missing; the row has 'chosn': rename it to 'chosen'.",
        ),
        (
            {"Prompt": "x", "chosen": "y"},
            "the field 'prompt' is missing; the row has 'Prompt': rename it to 'prompt'.",
        ),
        ({"prompt": "x", "a": "y"}, "the field 'chosen' is missing; the row has prompt, a."),
        ({}, "the field 'prompt' is missing; the row has no fields."),
        ({"n\nm": 1, "k" * 99: 2}, "the field 'prompt' is missing; the row has n m, ..."),
    ],
    ids=range(5),
)
def test_a_missing_field_is_named_and_the_nearest_one_too(tmp_path, row, words):
    assert refusal(stored(tmp_path, json.dumps(row)), PAIR) == f"line 1: {words}"


@pytest.mark.parametrize("text", ["", "\ufeff", "\n \n\r\n\t", "[]", "[\n]\n"])
def test_what_holds_no_rows_is_refused(tmp_path, text):
    assert refusal(stored(tmp_path, text)) == f"contains no rows: write {LAYOUT} of objects."


def test_what_is_no_file_to_read_is_refused(tmp_path):
    assert "python -m lab world" in refusal(tmp_path / "nowhere.json")
    assert "must be a file that you may read" in refusal(tmp_path)
    assert "must be a file that you may read" in refusal(tmp_path / ("n" * 300))


@pytest.mark.skipif(not hasattr(os, "geteuid") or not os.geteuid(), reason="root may read all")
def test_a_file_without_permission_is_refused(tmp_path):
    path = stored(tmp_path, LINE)
    path.chmod(0)
    assert refusal(path).startswith("cannot be read (Permission denied)")


def test_rows_of_a_megabyte_are_read_at_once(tmp_path):
    rows = [GOOD | {"chosen": "a b " * 2**18, "response": letter * 2**20} for letter in "xyz"]
    start = time.perf_counter()
    assert read_rows(stored(tmp_path, "\n".join(map(json.dumps, rows))), GOOD) == rows
    assert time.perf_counter() - start < 2


def test_repeated_rows_are_counted():
    rows = [GOOD, GOOD | {"chosen": "x"}, dict(reversed(GOOD.items())), GOOD | {"chosen": "x"}, {}]
    assert repeated(rows) == 2 and repeated(rows[:2]) == repeated([]) == 0


def test_prompts_of_training_and_evaluation_must_not_overlap(root):
    train = [{"prompt": f"Human: {i} Assistant:", "chosen": "a"} for i in range(5)]
    evals = [{"prompt": f"Human: {i} Assistant:", "chosen": "b"} for i in (7, 3, 8, 4, 3)]
    with pytest.raises(CourseError, match=r"eval.json, row 2 \(the first of 3\): .*proves nothing"):
        check_no_overlap(train, evals, "dataset/eval.json")
    assert check_no_overlap(train, evals[::2][:1], "eval.json") is None
    embedded = [read_rows(root / "dataset" / f"{split}.json") for split in ("train", "eval")]
    assert check_no_overlap(*embedded, "dataset/eval.json") is None


def test_prompts_get_the_dialogue_frame_once(tmp_path):
    rows = [{"prompt": " What now? "}, {"prompt": "Human: What now? Assistant:"}]
    path = stored(tmp_path, "\n".join(json.dumps(row) for row in rows))
    assert [row["prompt"] for row in read_rows(path)] == ["Human: What now? Assistant:"] * 2


# ---------------------------------------------------------------------------------- shares, batches


def test_shares_are_disjoint_and_together_everything(write_rows):
    root = write_rows([{"prompt": f"Human: {i} Assistant:"} for i in range(203)])
    write_rows([{"prompt": "Human: eval Assistant:"}], "eval.json")
    cuts = dict(sft_share=0.5, preference_share=0.4, prompt_share=0.1, root=str(root))
    cfg, other = (util.Config("tiny", seed=seed, **cuts) for seed in (0, 1))
    shares = [util.load_rows(cfg, share) for share in ("sft", "preference", "prompt")]
    seen = [row["prompt"] for rows in shares for row in rows]
    assert len(seen) == len(set(seen)) == 203
    wanted = 203 * cfg.sft_share, 203 * cfg.preference_share, 203 * cfg.prompt_share
    assert all(abs(len(rows) - count) <= 1 for rows, count in zip(shares, wanted))
    assert util.load_rows(cfg, "sft") == shares[0] != util.load_rows(other, "sft")


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 400))
def test_any_shares_are_disjoint(a, b, c, count):
    total = max(1.0, a + b + c)
    shares = dict(sft_share=a / total, preference_share=b / total, prompt_share=c / total)
    found = [("", {"prompt": str(i)}) for i in range(count)]
    seen, table = [], recognised("rows", found)
    with mock.patch("lab.splits.training_table", lambda *_: table):
        for share in ("sft", "preference", "prompt"):
            try:
                rows = util.load_rows(util.Config("tiny", **shares), share)
                seen += [row["prompt"] for row in rows]
            except CourseError as error:
                assert "gives no row" in str(error)
    assert len(seen) == len(set(seen))


def test_a_share_of_nothing_is_an_error(write_rows):
    root = write_rows([GOOD] * 3)
    with pytest.raises(CourseError, match="prompt_share"):
        util.load_rows(util.Config("tiny", root=str(root), prompt_share=0.01), "prompt")


@given(st.integers(1, 120), st.integers(1, 9), st.integers(0, 9))
def test_batches_are_a_permutation_of_all_rows(count, size, seed):
    out = list(util.batches(count, size, torch.Generator().manual_seed(seed)))
    assert sorted(i for batch in out for i in batch) == list(range(count))
    assert [len(batch) for batch in out[:-1]] == [size] * (len(out) - 1) and len(out[-1]) <= size


def test_batches_follow_the_generator():
    one, two, three = (
        list(util.batches(640, 8, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert one == two != three


# ------------------------------------------------------------------------------------------ tokens

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture
def cfg():
    return util.Config("tiny", device="cpu", max_prompt=20, max_new_tokens=8)


def test_a_long_prompt_loses_its_front_and_keeps_assistant(tokenizer, cfg):
    prompt = "Human: " + "one two three four five " * 30 + "Assistant:"
    whole = tokenizer(prompt)["input_ids"]
    ids = util.encode_prompt(tokenizer, prompt, cfg.max_prompt)
    assert len(whole) > 20 and ids == whole[-20:]
    assert tokenizer.decode(ids).endswith("Assistant:")
    assert (
        util.encode_prompt(tokenizer, "Human: hi Assistant:", 20)
        == tokenizer("Human: hi Assistant:")["input_ids"]
    )


@given(answer=TEXT, limit=st.integers(1, 12))
def test_answers_end_with_exactly_one_eos(tokenizer, answer, limit):
    ids = util.encode_answer(tokenizer, answer, limit)
    eos = tokenizer.eos_token_id
    assert 1 <= len(ids) <= limit and ids[-1] == eos and eos not in ids[:-1]


@pytest.mark.parametrize("answer", ["fine.</s>", "fine. </s> ", "</s>", "a</s>b"])
def test_an_eos_written_in_the_answer_does_not_double_it(tokenizer, answer):
    ids = util.encode_answer(tokenizer, answer, 30)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


@given(answer=TEXT)
def test_answers_survive_the_round_trip(tokenizer, answer):
    cfg = util.Config("tiny", device="cpu", max_new_tokens=400)
    *_, ids, mask = util.encode_pairs(tokenizer, ["Human: x Assistant:"], [answer], cfg, "cpu")
    assert util.decode(tokenizer, ids, mask) == [answer.strip()]


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_masks_come_from_lengths(rows, value):
    for side in ("left", "right"):
        ids, mask = util.pad(rows, value, side, "cpu")
        assert ids.shape == mask.shape == (len(rows), max(1, *map(len, rows), 0))
        for row, real, out in zip(rows, mask, ids):
            assert out[real].tolist() == row and (out[~real] == value).all()
            ordered = real.tolist() if side == "right" else real.tolist()[::-1]
            assert ordered == sorted(ordered, reverse=True)


def test_the_mask_keeps_the_eos_even_if_padding_is_eos_too(tokenizer, tmp_path, cfg):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = util.load_tokenizer(tmp_path)
    assert bare.pad_token_id == bare.eos_token_id
    prompts = ["Human: a longer one here Assistant:", "Human: x Assistant:"]
    out = util.encode_pairs(bare, prompts, ["yes", "no, I will not"], cfg, "cpu")
    prompt_ids, prompt_mask, response_ids, response_mask = out
    for b, (prompt, answer) in enumerate(zip(prompts, ["yes", "no, I will not"])):
        assert prompt_ids[b][prompt_mask[b]].tolist() == bare(prompt)["input_ids"][-20:]
        kept = response_ids[b][response_mask[b]].tolist()
        assert kept == util.encode_answer(bare, answer, 8) and kept[-1] == bare.eos_token_id
    assert util.ended(response_ids, response_mask, bare.eos_token_id).tolist() == [True, True]


def without_eos(texts, folder):
    """Saves a tokenizer without an eos token into a folder; returns its vocabulary size."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    return bare.get_vocab_size()


def test_a_tokenizer_without_eos_gets_one_and_its_model_a_row_for_it(make_model, tmp_path):
    size = without_eos(["one two three"] * 4, tmp_path)
    make_model("gpt2", size).save_pretrained(tmp_path)
    cfg = util.Config("smoke", device="cpu")
    tokenizer, model = util.load_both(cfg, tmp_path, "mine")
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == size
    assert tokenizer.pad_token_id == size, "masks tell padding from an eos"
    assert model.get_input_embeddings().num_embeddings == size + 1
    assert util.encode_answer(tokenizer, "one", 8)[-1] == size
    tokens = util.encode_prompts(tokenizer, ["Human: two Assistant:"], cfg, model.device)
    ids, mask, logprobs = util.generate(
        model, *tokens, **util.sampling(cfg, model, tokenizer), generator=util.rng_for(cfg, "test")
    )
    scored, _ = util.response_logprobs(model, *tokens, ids, mask)
    assert torch.allclose(scored, logprobs, atol=1e-5)


def test_ended_asks_the_last_real_token():
    ids = torch.tensor([[5, 1, 0], [1, 5, 1], [5, 5, 2], [1, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert util.ended(ids, mask, 1).tolist() == [True, False, False, False]
    assert util.ended(ids, mask, [1, 2]).tolist() == [True, False, True, False]
    assert util.ended(ids, mask, None).tolist() == [False] * 4


# ---------------------------------------------------------------------------------------- SFT loss

PAIRS = [
    {"prompt": "Human: How are you? Assistant:", "response": "fine"},
    {"prompt": "Human: Tell me all that you know about farms. Assistant:", "response": "I will"},
    {"prompt": "Human: x Assistant:", "response": "It is much too long to be an answer here"},
]


def test_the_sft_loss_is_cross_entropy_on_the_answers_alone(tokenizer, text_model, cfg):
    """The reference is transformers' loss with labels of -100 on prompts, one row at a time."""
    total = count = 0
    for row in PAIRS:
        prompt = util.encode_prompt(tokenizer, row["prompt"], cfg.max_prompt)
        answer = util.encode_answer(tokenizer, row["response"], cfg.max_new_tokens)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = text_model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, count = total + loss.item() * len(answer), count + len(answer)
    ours, weight, _ = util.sft_loss(text_model, tokenizer, cfg, PAIRS)
    assert weight == count
    assert ours.item() == pytest.approx(total / count, rel=1e-5)


def test_the_sft_gradient_comes_from_answers_alone(tokenizer, text_model, cfg):
    """The gradient of the logits is 0 wherever the next token is not part of an answer."""
    seen = []

    def cut(model, args, out):  # detached logits are leaves and keep their gradient
        out.logits = out.logits.detach().requires_grad_()
        seen.append(out.logits)
        return out

    with text_model.register_forward_hook(cut):
        util.sft_loss(text_model, tokenizer, cfg, PAIRS)[0].backward()
    (logits,) = seen  # they start at the column that predicts the first answer token
    *_, prompt_mask, ids, mask = util.encode_pairs(
        tokenizer, [r["prompt"] for r in PAIRS], [r["response"] for r in PAIRS], cfg, "cpu"
    )
    next_is_answer = torch.cat([torch.zeros_like(prompt_mask), mask], dim=1)[:, 1:]
    touched = logits.grad.abs().sum(-1) > 0
    columns = touched.shape[1]
    assert torch.equal(touched, next_is_answer[:, -columns:])
    assert not next_is_answer[:, :-columns].any()
