"""The companion task: troubles, the answers of volunteers, and the rule that judges answers."""

from collections import Counter

import pytest

from lab import CourseError, companion
from lab.companion import explain, parts, rows, supportive, whole

PARTS = "supportive names offers human brief complete".split()
TRAIN, EVAL = rows("train"), rows("eval")
PLAIN = (companion.FOLDER / "plain.txt").read_text()
ANSWERED = [row for row in TRAIN if "response" in row]


def lacking(prompt, answer, **known):
    """Returns the parts that an answer lacks, as one text."""
    return " ".join(part for part, fine in explain(prompt, answer, **known).items() if not fine)


# -------------------------------------------------------------------------------------------- rows


def test_there_are_enough_rows_and_no_prompt_occurs_twice():
    assert len(TRAIN) >= 550 and len(EVAL) >= 150
    prompts = [row["prompt"].lower().replace("'", "") for row in TRAIN + EVAL]
    assert len(set(prompts)) == len(prompts)
    assert len({row["trouble"] for row in EVAL}) == len({row["trouble"] for row in TRAIN}) >= 12


def test_no_situation_of_eval_has_the_core_of_one_of_train():
    assert not {row["situation"] for row in TRAIN} & {row["situation"] for row in EVAL}
    cores = {
        split: [companion.topic_words(text) for s, _, _, text, _, _ in table if s == split]
        for split in ("train", "eval")
        for table in [companion.table("situations.txt")]
    }
    assert len(cores["train"]) + len(cores["eval"]) >= 150
    for new in cores["eval"]:
        for known in cores["train"]:
            assert len(new & known) <= 0.5 * min(len(new), len(known)), (new, known)


def test_every_situation_is_complete_and_short():
    for line in companion.table("situations.txt"):
        split, _, feeling, text, thing, question = line
        assert split in companion.FRAMES and feeling in companion.FEELINGS
        assert 8 <= len(text.split()) <= 30 and question.endswith("?"), text
        assert thing[0].islower() and thing[-1].isalnum(), thing


def test_texts_are_short_ascii_and_framed():
    for row in TRAIN + EVAL:
        assert row["prompt"].startswith("Human: ") and row["prompt"].endswith(" Assistant:")
        assert row["prompt"].isascii() and len(row["prompt"].split()) <= 60
        assert row.get("response", "").isascii() and "{" not in row.get("response", "")
    assert PLAIN.isascii()
    assert 1500 <= len(PLAIN.split()) <= 2500


def test_a_seed_gives_the_same_rows_and_another_seed_others():
    assert rows("train") == TRAIN and rows("eval", seed=3) == rows("eval", seed=3)
    assert rows("eval", seed=3) != EVAL
    situations = {row["situation"] for row in rows("eval", seed=3)}
    assert situations == {row["situation"] for row in EVAL}


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(CourseError, match="choose from train, eval"):
        rows("test")


# ------------------------------------------------------------------------------------------ answers


def test_every_train_row_has_an_answer_and_no_eval_row_has_one():
    assert len(ANSWERED) == len(TRAIN)
    assert not any("response" in row for row in EVAL)
    assert len({row["response"] for row in ANSWERED}) == len(ANSWERED)


def test_the_share_of_good_answers_is_the_parameter(monkeypatch):
    flaws = Counter(row["flaw"] for row in ANSWERED)
    assert set(flaws) == {"none", *companion.FLAWS} and min(flaws.values()) >= 15
    assert flaws["none"] / len(ANSWERED) == pytest.approx(companion.GOOD, abs=0.08)
    monkeypatch.setattr(companion, "GOOD", 1.0)
    assert {row["flaw"] for row in rows("train") if "response" in row} == {"none"}


def test_the_rule_agrees_with_every_flaw():
    for row in ANSWERED:
        verdict = explain(row["prompt"], row["response"])
        if row["flaw"] == "none":
            assert all(verdict.values()), row
            assert 12 <= len(row["response"].split()) <= 40
        else:
            assert not verdict[companion.FLAWS[row["flaw"]]], row


def test_an_answer_to_one_trouble_seldom_fits_another():
    good = [row for row in ANSWERED if row["flaw"] == "none"]
    pairs = [(a, b) for a, b in zip(good, good[1:]) if a["situation"] != b["situation"]]
    assert sum(whole([b["prompt"] for _, b in pairs], [a["response"] for a, _ in pairs])) < (
        0.35 * len(pairs)
    )


# ---------------------------------------------------------------------------------------- the rule

BOSS = (
    "Human: My boss corrected me in front of the whole team this morning and I wanted to "
    "disappear. Assistant:"
)
FRIEND = "Human: My best friend moved to Canada last month and I miss her every day. Assistant:"
LUMP = "Human: The doctor found a lump and I have to wait two weeks for the result. Assistant:"
LUNCH = "Human: I eat lunch alone every day at my new school. Assistant:"
DOG = "Human: Our old dog has to be put to sleep on Friday. I can't stop crying. Assistant:"
CARD = "Human: My card was declined at the checkout and the whole queue watched me. Assistant:"
RENT = "Human: My rent went up again and there is nothing left at the end of the month. Assistant:"

KIND = [  # what a kind person may answer
    (
        FRIEND,
        "I'm so sorry. A best friend is hard to do without, even for a month. Have you "
        "been able to call her?",
    ),
    (
        LUMP,
        "Two weeks of waiting must feel endless, of course you're scared. I'm here if you "
        "want to talk about it.",
    ),
    (LUMP, "That waiting is awful. Do you have someone who can be with you when the result comes?"),
    (
        LUNCH,
        "That sounds lonely, and being the new one takes courage. Is there anyone in your "
        "class you'd like to get to know?",
    ),
    (
        LUNCH,
        "It's tough to start at a new school, and lunch can feel very long on your own. You "
        "seem like a kind person. Do you want to tell me about your day?",
    ),
    (
        DOG,
        "I'm so sorry about your dog. He was lucky to have you for so long. Would you like to"
        " tell me about him?",
    ),
    (
        DOG,
        "Losing a dog is losing a member of the family, so cry as much as you need. I'm here "
        "for you.",
    ),
    (
        BOSS,
        "Ouch, that sounds humiliating. You didn't deserve that in front of your colleagues. "
        "How are you feeling now?",
    ),
    (
        CARD,
        "That must have been so embarrassing. It happens to many of us, and it says nothing "
        "about your worth. Do you want to talk about it?",
    ),
    (
        RENT,
        "I'm sorry, that's a heavy load to carry every month. It's no wonder if the rent "
        "keeps you awake. Do you have someone to share this with?",
    ),
    (
        BOSS,
        "I hear you, and feeling embarrassed makes sense. Let me know if you want to talk it "
        "through.",
    ),
]


@pytest.mark.parametrize("prompt, answer", KIND)
def test_a_kind_answer_of_a_person_has_all_parts(prompt, answer):
    assert lacking(prompt, answer) == ""


@pytest.mark.parametrize("ending", ["", " I feel so ashamed.", " what should i do"])
def test_kind_answers_fit_the_trouble_and_not_its_frame(ending):
    prompt = "Human: hi. my card was declined at the checkout and the whole queue watched me put "
    prompt += f"things back.{ending} Assistant:"
    assert lacking(prompt, KIND[8][1]) == ""


JUDGED = [  # answers as chat models write them, and what a person would miss in them
    (
        BOSS,
        "I'm sorry to hear that you're feeling this way, but I'm just a language model and I "
        "can't offer emotional support.",
        "supportive names offers human",
    ),
    (
        LUMP,
        "As an AI, I don't have personal feelings, but waiting for a result can be scary. Do "
        "you want to talk about it?",
        "human",
    ),
    (
        LUNCH,
        "Eating lunch alone at a new school can be difficult. Here are some tips: 1. Join a "
        "club. 2. Sit with a new group every day. 3. Smile at the people you meet. 4. Ask a "
        "teacher for help. 5. Bring a book or listen to some music. 6. Be patient and stay "
        "positive, because every friendship takes time.",
        "offers brief",
    ),
    (
        FRIEND,
        "I'm sorry to hear that your friend moved away. It's natural to miss her, and I'm "
        "here to listen if you want to",
        "complete",
    ),
    (
        RENT,
        "A rent is the price of a lease and is due every month. The landlord must give notice"
        " in written form.",
        "supportive offers",
    ),
    (
        DOG,
        "Everything will be wonderful and you're a great person. Let me know how it goes!",
        "names",
    ),
    (
        CARD,
        "It could be worse. A declined card is no big deal, is there anything else you would "
        "like to know?",
        "supportive",
    ),
    (
        LUMP,
        "Dear [Name], I'm sorry about the lump and I'm here for you. Best wishes, [Your Name].",
        "human",
    ),
    (
        FRIEND,
        "I hate it when friends leave. Canada is an ugly, terrible place and she is stupid. "
        "Why do you miss her?",
        "supportive",
    ),
    (
        LUNCH,
        "I understand how lonely lunch at a new school feels. You deserve good company, and "
        "I'm glad that you told me.",
        "offers",
    ),
    (
        BOSS,
        "It sounds like your boss embarrassed you. I'm here for you. Human: Thank you. "
        "Assistant: You're welcome!",
        "human",
    ),
]


@pytest.mark.parametrize("prompt, answer, missing", JUDGED)
def test_answers_of_chat_models_get_the_verdict_of_a_person(prompt, answer, missing):
    assert lacking(prompt, answer) == missing


def test_every_part_can_be_lacking_and_can_be_there():
    found = [explain(prompt, answer) for prompt, answer, _ in JUDGED]
    for part in PARTS:
        assert {verdict[part] for verdict in found} == {True, False}, part


CHEATS = {
    "the prompt again": (
        BOSS,
        "My boss corrected me in front of the whole team this morning and I wanted to "
        "disappear. I'm here for you.",
    ),
    "the prompt again, turned": (
        BOSS,
        "I'm here for you. So your boss corrected me in front of the whole team.",
    ),
    "one sentence twice": (BOSS, "I'm here for you and your boss. I'm here for you and your boss."),
    "a chain of key words": (BOSS, "Boss team support love friend care kind hope happy."),
    "a chain inside a sentence": (
        BOSS,
        "I'm here for you, boss team support love friend care kind hope.",
    ),
    "only a question": (BOSS, "Would you like to tell me about your kind and lovely boss?"),
    "playing the person": (
        BOSS,
        "I'm feeling so ashamed about my boss. I love you, you're kind. Can you help me?",
    ),
    "playing the person, asked": (
        LUMP,
        "I'm scared of the result. Thank you so much, you are kind. How are you?",
    ),
    "another feeling": (
        LUMP,
        "I'm sorry that the result makes you feel so angry. I'm here for you.",
    ),
    "every feeling at once": (
        LUMP,
        "I'm sorry that you feel hurt, sad, scared, guilty and torn. I'm here for you.",
    ),
    "a single word": (DOG, "Dog. I'm here for you and you are a kind person."),
    "gushing": (
        DOG,
        "Amazing wonderful you, beautiful lovely you, great happy dog, the best love. I'm "
        "here for you.",
    ),
    "warm to anybody": (
        RENT,
        "You are a kind person. I'm here for you. Do you want to tell me more?",
    ),
    "too few words": (RENT, "Rent? I'm here."),
    "no end": (RENT, "I'm sorry about the rent. I'm here for you"),
    "nothing": (RENT, ""),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheap_answers_do_not_get_all_parts(name):
    assert lacking(*CHEATS[name]) != ""


def test_no_sentence_for_everybody_gets_all_parts_on_a_third_of_the_troubles():
    prompts = [row["prompt"] for row in EVAL]
    for feeling in "sad hurt worried overwhelmed ashamed discouraged upset tired".split():
        answer = (
            f"I'm sorry that you feel {feeling}. I'm here for you. Do you want to talk about it?"
        )
        assert sum(whole(prompts, [answer] * len(prompts))) < len(prompts) / 3, feeling


def test_an_answer_that_was_cut_is_not_complete():
    assert lacking(LUMP, KIND[1][1], ended=False) == "complete"


def test_the_frame_of_the_dialogue_does_not_matter():
    plain = companion.unframed(LUNCH)
    chat = f"<|im_start|>user\n{plain}<|im_end|>\n<|im_start|>assistant\n"
    for prompt in (plain, LUNCH, chat):
        assert companion.unframed(prompt) == plain
        assert explain(prompt, KIND[3][1]) == explain(LUNCH, KIND[3][1])


# ----------------------------------------------------------------------------------------- rewards


def test_rewards_agree_with_the_rule_and_stay_in_range():
    prompts = [prompt for prompt, *_ in JUDGED]
    answers = [answer for _, answer, *_ in JUDGED]
    verdicts = [explain(*pair) for pair in zip(prompts, answers)]
    assert parts(prompts, answers) == [sum(v.values()) / 6 for v in verdicts]
    assert whole(prompts, answers) == [float(all(v.values())) for v in verdicts]
    assert supportive(prompts, answers) == [float(v["supportive"]) for v in verdicts]
