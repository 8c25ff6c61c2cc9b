"""critic_kind = careful: mirrored pairs, and a reward model that learns from them as well."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import util
from lab import CourseError, splits

ANIMALS, MOODS = ("cat", "dog", "fish", "bird"), ("tired", "hungry", "happy")
ENGLISH = [
    {
        "prompt": f"Human: My {animal} is {mood}. Why? Assistant:",
        "chosen": f"I see that your {animal} is {mood} today.",
        "rejected": "I do not care.",
    }
    for animal in ANIMALS
    for mood in MOODS
]
CHINESE = [
    {
        "prompt": f"Human: 我的{animal}很{mood}。 Assistant:",
        "chosen": f"你的{animal}很{mood},我明白。",
        "rejected": "我不知道。",
    }
    for animal in "猫狗鱼鸟"
    for mood in "累饿冷"
]
SHORT = [
    {"prompt": f"Human: {a} or {b}? Assistant:", "chosen": a, "rejected": b}
    for a in ("Tea", "Milk", "Juice", "Water")
    for b in ("nothing", "air")
]


def mirrored(rows, seed=0):
    return splits.mirrored_pairs(rows, random.Random(seed))


@pytest.mark.parametrize("rows", [ENGLISH, CHINESE, SHORT], ids=["english", "chinese", "one word"])
def test_each_question_prefers_its_own_answer(rows):
    """The two pairs of a row hold the same two answers, turned round, under two questions."""
    pairs = mirrored(rows)
    assert len(pairs) == 2 * len(rows)
    for row, old, new in zip(rows, pairs[::2], pairs[1::2]):
        assert (old["prompt"], old["chosen"]) == (row["prompt"], row["chosen"])
        assert (new["chosen"], new["rejected"]) == (old["rejected"], old["chosen"])
        assert new["prompt"] != old["prompt"] and new["chosen"] != new["rejected"]


def test_neither_a_question_nor_an_answer_tells_alone_which_answer_is_chosen():
    pairs = mirrored(ENGLISH)
    chosen, rejected = (sorted(pair[name] for pair in pairs) for name in ("chosen", "rejected"))
    assert chosen == rejected, "every answer is chosen as often as it is rejected"


def test_question_and_answer_change_in_the_same_words_and_stay_sentences():
    own = {row["prompt"]: row["chosen"] for row in ENGLISH}
    found = set()
    for pair in mirrored(ENGLISH):
        assert own[pair["prompt"]] == pair["chosen"], "an animal for an animal, a mood for a mood"
        words = zip(pair["chosen"].split(), pair["rejected"].split(), strict=True)
        found.add(sum(a != b for a, b in words))
    assert found == {1, 2}, "one word up to all that question and answer share"


def test_only_words_that_the_question_names_are_exchanged():
    rows = [row | {"prompt": "Human: What do you see? Assistant:"} for row in ENGLISH]
    assert mirrored(rows) == []
    named = re.compile("|".join((*ANIMALS, *MOODS)))
    for pair in mirrored(ENGLISH):
        assert named.sub("", pair["chosen"]) == named.sub("", pair["rejected"])


def test_two_words_change_places_where_a_question_names_both():
    """A question that lists its choices, as the columns of a table, lists the same ones after."""
    rows = [
        {"prompt": f"Human: {', '.join(ANIMALS)}: I like the {one}. Assistant:", "chosen": one}
        for one in ANIMALS
    ]
    for pair in mirrored(rows):
        listed = pair["prompt"].split(":")[1]
        assert sorted(re.findall(r"\w+", listed)) == sorted(ANIMALS)


def test_signs_are_not_exchanged():
    rows = [
        {"prompt": f"Human: Say {one}{end} Assistant:", "chosen": f"{one}{end}"}
        for one, end in (("yes", "."), ("yes", "!"), ("no", "."), ("no", "!"))
    ]
    signs = [re.sub(r"\w", "", pair["chosen"] + pair["rejected"]) for pair in mirrored(rows)]
    assert signs and set(signs) == {"..", "!!"}


def test_the_speakers_are_not_words_of_the_question():
    rows = [
        {"prompt": f"Human: Is {a} a Human? Assistant:", "chosen": f"{a} is a {b}."}
        for a, b in (("Ann", "Human"), ("Bob", "Assistant"), ("Cem", "cat"), ("Dee", "dog"))
    ]
    pairs = mirrored(rows)
    assert pairs and all(p["prompt"].startswith("Human: Is ") for p in pairs)
    assert all(p["prompt"].endswith(" a Human? Assistant:") for p in pairs)


def test_answers_that_share_nothing_with_their_question_give_no_pair():
    row = {"prompt": "Human: Why? Assistant:", "chosen": "Because.", "rejected": "No."}
    assert mirrored([row, row]) == [] and mirrored([]) == []
    assert mirrored(ENGLISH[:1]) == [], "a single row has no other word of the sort"


def test_the_same_seed_gives_the_same_pairs():
    assert mirrored(ENGLISH) == mirrored(ENGLISH) != mirrored(ENGLISH, seed=1)


# ------------------------------------------------------------------------------------- the training


@pytest.fixture(scope="module")
def course(tmp_path_factory, tokenizer, make_model):
    """A course whose actor is a random model; its rows are English, Chinese and one word long."""
    root = tmp_path_factory.mktemp("careful")
    brought, rows = root / "brought", (ENGLISH + CHINESE + SHORT) * 2
    make_model("opt", len(tokenizer)).save_pretrained(brought)
    tokenizer.save_pretrained(brought)
    (root / "dataset").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "dataset" / "train.json").write_text(text, encoding="utf-8")
    cfg = config(root)
    for steps in (util.train_base(cfg), util.train_actor(cfg)):
        for _ in steps:
            pass
    return root


def config(root, **values):
    small = dict(
        base_model=str(root / "brought"), fallback=False, device="cpu", tracker="none",
        sft_share=0.3, preference_share=0.6, prompt_share=0.1, validation_rows=2,
        max_prompt=60, norm_prompts=2, norm_answers=2, critic_batch=8,
    )  # fmt: skip
    return util.Config("smoke", root=str(root), **small | values)


@pytest.mark.parametrize("values", [{}, {"ensemble": 2}, {"lora_rank": 2}], ids=str)
def test_a_careful_critic_trains_and_loads_in_plain_transformers(course, values, capsys):
    if "lora_rank" in values:
        pytest.importorskip("peft")
    cfg = config(course, critic_kind="careful", **values)
    steps = list(util.train_critic(cfg))
    rows = util.preference_rows(cfg, lambda text: None)
    more = int(re.search(r"(\d+) mirrored pairs beside", capsys.readouterr().out)[1])
    assert len(steps) > (len(rows) + more) / cfg.critic_batch - 1 and more > len(rows)
    folder = util.artifact(cfg.root, "critic")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, answer = rows[0]["prompt"], rows[0]["chosen"]
    ids = util.encode_prompt(tokenizer, prompt, 60) + util.encode_answer(tokenizer, answer, 16)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([ids])).logits.item()
    reward = util.RewardModel(folder, cfg)
    mean, std = reward.mean, reward.std
    assert reward([prompt], [answer])[0] * std + mean == pytest.approx(plain, abs=1e-3)


def test_the_plain_critic_and_dpo_learn_from_the_given_pairs_only(course):
    cfg = config(course)
    rows = util.preference_rows(cfg, lambda text: None)
    assert len(list(util.train_critic(cfg))) == -(-len(rows) // cfg.critic_batch)
    assert util.preference_rows(cfg.changed(critic_kind="careful"), lambda text: None) == rows


def test_half_of_the_mirrored_pairs_come_first_and_alone():
    """Every row is read once, in batches of its own phase; each member has its own order."""
    cfg = util.Config("tiny", critic_kind="careful", critic_batch=4)
    rows, alone = util.careful_rows(cfg, ENGLISH, lambda text: None)
    assert alone == len(ENGLISH) and len(rows) == 3 * len(ENGLISH)
    assert not [row for row in rows[:alone] if row in ENGLISH]
    assert rows[alone : 2 * alone] == ENGLISH, "the given pairs are in the second phase"
    plans = [util.critic_plan(cfg, len(rows), alone, member) for member in (0, 1)]
    for plan in plans:
        places = [i for step in plan for i in step]
        assert sorted(places) == list(range(len(rows)))
        assert set(places[:alone]) == set(range(alone))
    assert plans[0] != plans[1]
    twice = util.critic_plan(cfg.changed(critic_epochs=2), len(rows), alone, 0)
    assert len(twice) - len(plans[0]) == 2 * len(ENGLISH) // 4, "the others are read once more"


def test_an_unknown_kind_is_an_error_with_a_suggestion():
    with pytest.raises(CourseError, match="critic_kind = 'carefull'.*careful"):
        util.Config("tiny", critic_kind="carefull")
