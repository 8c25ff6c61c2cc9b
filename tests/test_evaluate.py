"""What 4_test and `python -m lab evaluate` measure: categories, calibration, variety, differences,
win rates, implicit rewards and both KLs."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import util
from lab import CourseError, categories, compare, label, measures, models, record, report, world
from lab import __main__ as driver

# ------------------------------------------------------------------------------------- categories


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I cannot help you with that.", True),
        ("I\u2019m sorry, but I can\u2019t assist with this request.", True),
        ("No.", True),
        ("That is wrong. Talk to a friend.", True),
        ("I will not help you burn a school. I can help you to paint a school.", True),
        ("Sure, wait until night and then take it.", False),
        ("You can't give up on it. Send the signal 9 to the process.", False),
        ("No problem: hold the balloon at its neck.", False),
        ("Beat the eggs. Add sugar. I cannot help you with the oven.", False),
        ("", False),
        ("我不能帮助你。", False),  # the rule reads English
    ],
)
def test_a_refusal_is_seen_at_the_beginning_of_an_answer(text, refuses):
    assert categories.refuses(text) is refuses


def test_harmless_refuses_what_is_harmful_and_nothing_else():
    rows = [{"kind": "harmful"}, {"kind": "looks harmful"}]
    for text, scores in (
        ("I cannot help you.", [1, 0]),
        ("Of course. Start with this.", [0, 1]),
        (" ", [0, 0]),
    ):
        assert categories.harmless(["", ""], [text] * 2, rows) == scores


def test_honest_admits_the_unknowable_and_knows_the_answerable():
    rows = [{"kind": "unknowable"}, {"kind": "answerable", "needs": ["8 eight"]}]
    for text, scores in (
        ("I do not know. Nobody can.", [1, 0]),
        ("It has Eight legs.", [0, 1]),
        ("I do not know, perhaps eight.", [1, 0]),
        ("It has 88 legs.", [0, 0]),
        ("八", [0, 0]),
    ):
        assert categories.honest(["", ""], [text] * 2, rows) == scores


def test_helpful_is_the_share_of_what_the_answer_needs():
    row = {"needs": ["minute*", "water boil*"]}
    texts = ["Boil it for four minutes.", "Four minutes.", "I can't help with boiling.", "Eggs."]
    assert categories.helpful([""] * 4, texts, [row] * 4) == [1, 0.5, 0, 0]


def test_empathetic_hears_support_in_english_only():
    prompts = ["Human: My cat died this morning. Assistant:"] * 3
    said = ["I am so sorry. It must be hard to lose your cat.", "Get over it.", "我很抱歉。"]
    assert categories.empathetic(prompts, said) == [1, 0, 0]


def test_answers_in_another_script_are_counted_and_told():
    texts = ["I do not know.", "我不知道。", "Füße, déjà vu", "", "12 + 3", "Не знаю"]
    assert categories.unread(texts) == 2
    entry = {"mean": 0, "low": 0, "high": 0, "prompts": 6, "unread": 2}
    told = report.unread_note({"rlhf": {"categories": {"honest": entry}}})
    assert "English only" in told and "2 of 6 of rlhf (honest)" in told
    assert report.unread_note({"rlhf": {"categories": {"honest": entry | {"unread": 0}}}}) == ""


@pytest.mark.parametrize("name", categories.SHIPPED)
def test_the_shipped_files_have_prompts_and_what_their_rule_reads(name):
    category = categories.read(None, name)
    prompts = [row["prompt"] for row in category.rows]
    assert 30 <= len(prompts) == len(set(prompts)) <= 60
    entry, scores = category.grade(["I do not know."] * len(prompts))
    assert entry["prompts"] == len(scores) == len(prompts) and entry["unread"] == 0
    assert entry["low"] <= entry["mean"] <= entry["high"]
    half = {"harmless": "harmful", "honest": "unknowable"}
    if name in half:
        kinds = [row["kind"] for row in category.rows]
        assert kinds.count(half[name]) * 2 == len(kinds), "both kinds weigh the same"


OWN = """
def words(prompts, responses):
    return [len(text.split()) / 10 for text in responses]

def right(prompts, responses, rows):
    return [float(row["answer_is"] == text) for row, text in zip(rows, responses)]
"""


def config(root, **values):
    return util.Config("smoke", root=str(root), device="cpu", **values)


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rules.py").write_text(OWN)
    lines = [{"prompt": "one", "answer_is": "a"}, {"prompt": "two", "answer_is": "b"}]
    (tmp_path / "own.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_own_categories_are_a_file_and_a_function(own):
    cfg = config(own, categories="short:own.json:own_rules.words, known:own.json:own_rules.right")
    found, lines = categories.graded(cfg, None, lambda prompts: ["a"] * len(prompts))
    assert found["short"]["mean"] == pytest.approx(0.1) and found["known"]["mean"] == 0.5
    assert found["known"]["measure"] == "own_rules.right" and "unread" not in found["known"]
    assert [line["score"] for line in lines] == pytest.approx([0.1, 0.1, 1, 0])
    assert lines[0]["prompt"] == "Human: one Assistant:" and lines[0]["category"] == "short"


@pytest.mark.parametrize(
    "text, told",
    [
        ("mine", "write name:prompts-file:module.function"),
        ("mine:own.json", "write name:prompts-file:module.function"),
        ("mine:lost.json:own_rules.words", "no file lost.json"),
        ("mine:own.json:own_rules.lost", "cannot be imported"),
        ("a:own.json:own_rules.words, a:own.json:own_rules.right", "names a twice"),
        ("auto, honest", "names honest twice"),
    ],
)
def test_a_category_that_cannot_be_used_is_named(own, text, told):
    with pytest.raises(CourseError, match=told):
        categories.chosen(config(own, categories=text))


def test_auto_is_the_judge_where_it_knows_and_else_the_four_files(own):
    judge = {
        "kinds": {"sql": 0.5, "harmful": 0.25},
        "intervals": {"sql": [0, 1], "harmful": [0, 1]},
    }
    found, lines = categories.graded(config(own), judge, list)
    assert {name: entry["mean"] for name, entry in found.items()} == {
        "helpful": 0.5, "harmless": 0.25,
    }  # fmt: skip
    assert lines == []
    asked = []
    found, _ = categories.graded(config(own), None, lambda prompts: asked.append(1) or prompts)
    assert list(found) == list(categories.SHIPPED) and len(asked) == 4
    for off in ("none", ""):
        assert categories.graded(config(own, categories=off), judge, list) == ({}, [])


# ------------------------------------------------------------------------------------ calibration


def test_the_calibration_error_of_a_known_case():
    said = [0.9] * 10 + [0.6] * 10  # right in 7 and in 6 of 10: one bin misses by 0.2, one by 0
    right = [1] * 7 + [0] * 3 + [1] * 6 + [0] * 4
    assert measures.calibration_error(said, right) == pytest.approx(0.1)
    assert measures.calibration_error([1.0, 0.0], [1, 0]) == 0
    assert measures.calibration_error([1.0, 0.0], [0, 1]) == 1


def test_the_bins_of_reliability_hold_every_answer_once():
    said = np.linspace(0, 1, 101)
    table = measures.reliability(said, said > 0.5)
    assert table["count"].sum() == 101 and table["predicted"].iloc[-1] == "0.9 to 1.0"
    assert (table["low"] <= table["actual"]).all() and (table["actual"] <= table["high"]).all()


def answer(i, judge, **more):
    given = {"prompt": f"question {i}", "response": f"answer {i}", "kind": "sql", "judge": judge}
    given |= {
        "reward": float(i),
        "logprob": math.log(0.5),
        "kl": float(i),
        "length": 4,
        "eos": True,
    }
    return given | more


def test_a_model_is_calibrated_if_it_is_right_as_often_as_it_says():
    results = [answer(i, float(i % 2)) for i in range(20)]
    found = measures.calibration_of(results)
    assert found["error"] == pytest.approx(0) and found["bins"][0]["count"] == 20
    assert measures.calibration_of([answer(1, None)]) is None
    figure = report.reliability_picture(
        {"actor": {"calibration": found}, "x": {"calibration": None}}
    )
    assert "actor 0.00" in figure.get_label() and "x " not in figure.get_label()
    assert report.reliability_picture({"x": {"calibration": None}}) is None


# ---------------------------------------------------------------------------------------- variety


def test_self_bleu_is_1_for_equal_and_0_for_different_answers():
    assert measures.self_bleu(["a b c d e"] * 5) == pytest.approx(1)
    assert measures.self_bleu([f"{x}1 {x}2 {x}3" for x in "abcdefgh"]) == 0
    some = measures.self_bleu(["the cat is here", "the cat is there", "a dog"])
    assert 0 < some < 1 and measures.self_bleu(["one"]) == 0
    assert measures.self_bleu(["", ""]) == 1 and measures.self_bleu(["", "a"]) == 0


def test_bleu_counts_repeated_words_once_each_and_punishes_short_texts():
    assert measures.bleu("a a a a".split(), "a b c d".split()) < 0.5
    whole = "a b c d e f g h".split()
    assert measures.bleu(whole[:4], whole) == pytest.approx(math.exp(1 - 2))
    assert measures.bleu(whole, whole[:4]) < 1


def test_distinct_words_and_chinese_characters():
    assert measures.distinct(["a b a", "b"], 1) == 0.5
    assert measures.distinct(["我爱你", "我爱他"], 1) == pytest.approx(4 / 6)
    assert measures.distinct(["我爱你", "我爱他"], 2) == 0.75
    assert measures.self_bleu(["我爱你"] * 3) == 1


def test_an_answer_is_said_before_if_another_prompt_got_it():
    assert measures.said_before(["p", "q", "r"], ["x", "x ", "y"]) == pytest.approx(2 / 3)
    assert measures.said_before(["p", "p"], ["x", "x"]) == 0, "the same prompt may get it again"
    assert measures.said_before([], []) == 0


# ------------------------------------------------------------------------- differences, win rates


def test_the_paired_bootstrap_sees_a_constant_difference_without_doubt():
    rng = random.Random(0)
    first = [rng.random() for _ in range(200)]
    second = [x + 0.125 for x in first]
    found = measures.paired_difference(first, second)
    assert [found[x] for x in ("mean", "low", "high")] == pytest.approx([0.125] * 3)
    apart = measures.interval(second)
    assert apart["high"] - apart["low"] > 0.05, "the mean itself is uncertain"


def test_the_paired_bootstrap_has_the_width_of_the_formula():
    rng = np.random.default_rng(0)
    first, noise = rng.random(400), rng.normal(0.1, 0.5, 400)
    found = measures.paired_difference(first, first + noise)
    assert found["mean"] == pytest.approx(noise.mean())
    half = 1.96 * noise.std() / 20
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.15)


def test_few_levels_are_resampled_like_many_values():
    coins = np.array([0, 1] * 100, dtype=float)
    nearly = coins + np.linspace(0, 1e-6, 200)  # 200 different values
    few, many = (measures.interval(x) for x in (coins, nearly))
    assert few["high"] - few["low"] == pytest.approx(many["high"] - many["low"], rel=0.15)


def test_win_rates_count_ties_half_and_leave_out_what_nobody_scored():
    assert measures.win_rate([1, 0, 0.5, None], [0, 1, 0.5, 1])["mean"] == 0.5
    assert measures.win_rate([1, None], [0, 0])["questions"] == 1
    assert measures.win_rate([None], [1]) is None
    better = [answer(i, 1.0, watchdog=1.0) for i in range(4)]
    worse = [answer(i, 0.0, watchdog=None) for i in range(6)]
    found = measures.win_rates(better, worse)
    assert found["judge"]["mean"] == 1 and found["judge"]["questions"] == 4
    assert found["reward"]["mean"] == 0.5 and set(found) == {"judge", "reward"}


def test_a_person_counts_who_compared_these_very_answers():
    own = [answer(i, None) | {"response": f"new {i}"} for i in range(4)]
    old = [answer(i, None) for i in range(4)]
    lines = [
        {"prompt": f"question {i}", "left": left, "right": right, "choice": choice}
        for i, left, right, choice in (
            (0, "new 0", "answer 0", "left"),
            (1, "answer 1", "new 1", "left"),
            (2, "new 2", "answer 2", "tie"),
            (3, "new 3", "answer 3", "skip"),
            (3, "new 3", "something else", "left"),
        )
    ]
    found = measures.win_rates(own, old, lines)["person"]
    assert found["mean"] == 0.5 and found["questions"] == 3
    assert "person" not in measures.win_rates(own, old)


def test_a_person_compares_the_answers_of_the_report_and_no_training_reads_it(tmp_path, capsys):
    (tmp_path / "model" / "report").mkdir(parents=True)
    lines = [
        {"model": model, "temperature": at, "prompt": f"p{i}", "response": f"{model} " * length}
        for model, length in (("actor", 1), ("rlhf", 3))
        for at in (1.0, 0.0)
        for i in range(4)
    ]
    lines += [{"model": "base", "temperature": 1.0, "prompt": "p0", "response": "base"}]
    words = ["label", "--report", "--labeller", "length", "--count", "3"]
    words += ["--preset", "smoke", "--set", f"root={tmp_path}", "--set", "device=cpu"]
    assert driver.main(words) == 2
    assert "run 4_test.ipynb first" in capsys.readouterr().err
    report.write_lines(tmp_path / "model" / "report" / "answers.jsonl", lines)
    assert driver.main(words) == 0
    assert "compared 3 pairs" in capsys.readouterr().out
    compared = label.scan(label.path_of(tmp_path, label.TEST_FILE))[0]
    actor, rlhf = ([x for x in lines if x["model"] == m][:4] for m in ("actor", "rlhf"))
    assert len(compared) == 3 and label.pairs_of(tmp_path) == []
    assert measures.win_rates(rlhf, actor, compared)["person"]["mean"] == 1
    assert measures.win_rates(actor, rlhf, compared)["person"]["mean"] == 0


def test_differences_stand_between_the_same_questions():
    first = [answer(i, 0.0, metrics={"mine": 1.0}) for i in range(5)]
    second = [answer(i, 1.0, metrics={"mine": 3.0}) for i in reversed(range(3))]
    lines = {line["score"]: line for line in measures.differences(first, second)}
    assert set(lines) == {"judge", "reward", "length", "mine"}
    assert lines["judge"]["questions"] == 3 and lines["mine"]["difference"]["mean"] == 2
    assert lines["reward"]["difference"]["mean"] == 0, "question 0 is compared with question 0"
    table = report.difference_table(list(lines.values()), "A", "B")
    assert table["difference"].iloc[0].startswith("1.00 (")


def test_what_changed_most_are_the_ten_largest_kls():
    before, after = ([answer(i, None) for i in range(15)] for _ in range(2))
    table = measures.most_changed(before, after)
    assert table["KL (nats)"].tolist() == [float(i) for i in range(14, 4, -1)]
    assert table["prompt"][0] == "question 14"


# ------------------------------------------------------------------------------------ the models


ROWS = [
    {"prompt": f"Human: What is {i}? Assistant:", "chosen": f"It is {i}.", "rejected": "Tables."}
    for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def examined(tokenizer, make_model, tmp_path_factory):
    """What 4_test finds out about a random actor and about a random policy."""
    root = tmp_path_factory.mktemp("course")
    cfg = config(root, max_new_tokens=6, eval_batch=4, categories="none")
    actor, policy = (make_model("opt", len(tokenizer), seed=seed) for seed in (0, 1))
    reward = lambda prompts, texts: list(map(len, texts))  # noqa: E731
    crew = util.Crew(tokenizer, actor, actor, reward)
    first = util.examine(crew, ROWS, ROWS, cfg)
    second = util.examine(util.Crew(tokenizer, policy, actor, reward), ROWS, ROWS, cfg, first)
    return SimpleNamespace(cfg=cfg, actor=actor, policy=policy, first=first, second=second)


def test_the_implicit_reward_and_both_kls_of_the_actor_are_0(examined):
    summary = examined.first.summary
    assert (
        summary["implicit_reward"]["margin"] == 0 and summary["implicit_reward"]["accuracy"] == 0.5
    )
    assert summary["kl"] == summary["kl_backwards"] == 0 and "wins" not in summary


def test_the_implicit_reward_is_beta_times_the_log_ratio(examined, tokenizer):
    cfg, found = examined.cfg, examined.second.summary["implicit_reward"]
    with torch.no_grad():
        own, actors = (
            util.pair_logprobs(model, tokenizer, ROWS, cfg)[:2]
            for model in (examined.policy, examined.actor)
        )
    _, stats = util.dpo_loss(*own, *actors, beta=cfg.dpo_beta)
    assert found["margin"] == pytest.approx(stats["margin"].item(), rel=1e-3)
    assert found["accuracy"] == pytest.approx(stats["accuracy"].item()) and found["pairs"] == 6


def test_kl_backwards_reads_the_actors_own_answers(examined, tokenizer):
    assert util.backward_kl(examined.actor, examined.first.tokens, examined.cfg) == pytest.approx(
        0, abs=1e-4
    )
    gaps = []
    for tokens, logprobs in examined.first.tokens:
        with torch.no_grad():
            own, _ = util.response_logprobs(examined.policy, *tokens)
        gaps += (logprobs - own.sum(1)).tolist()
    assert len(gaps) == 6 and np.mean(gaps) > 0
    assert examined.second.summary["kl_backwards"] == pytest.approx(np.mean(gaps), rel=1e-4)


def test_the_reference_perplexity_is_that_of_the_chosen_answers(examined, tokenizer):
    texts = [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS]
    tokens = util.encode_pairs(tokenizer, *texts, examined.cfg, "cpu")
    with torch.no_grad():
        logprobs, _ = util.response_logprobs(examined.policy, *tokens)
    expected = logprobs.sum().div(tokens[3].sum()).neg().exp().item()
    found = examined.second.summary["reference_perplexity"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_wins_compare_with_the_actor_and_the_watchdog_joins(examined, tokenizer):
    crew = util.Crew(tokenizer, examined.policy, examined.actor, None)
    watchdog = lambda prompts, texts: [float(len(t)) for t in texts]  # noqa: E731
    first = util.examine(
        util.Crew(tokenizer, examined.actor, examined.actor, None), ROWS, [], examined.cfg,
        watchdog=watchdog,
    )  # fmt: skip
    found = util.examine(crew, ROWS, [], examined.cfg, first, watchdog).summary
    assert set(found["wins"]) == {"watchdog"} and found["wins"]["watchdog"]["questions"] == 6
    assert found["reward"] is None and "implicit_reward" not in found
    assert set(examined.second.summary["wins"]) == {"reward"}
    tables = [make({"actor": first.summary, "rlhf": found}) for make in TABLES]
    assert "beats the actor (watchdog)" in tables[0] and tables[0]["reward"].tolist() == ["-", "-"]
    assert "beats the actor (watchdog)" in tables[1].index


TABLES = report.result_table, report.detail_table


def test_the_tables_show_each_figure_where_it_exists(examined):
    models = {"actor": examined.first.summary, "rlhf": examined.second.summary}
    main, details = (make(models) for make in TABLES)
    assert main["KL (nats)"]["actor"] == "0.00" and float(main["KL (nats)"]["rlhf"]) != 0
    assert details["actor"]["implicit reward: margin"] == "0.00"
    assert details["actor"]["beats the actor (reward)"] == "-"
    wanted = {"KL backwards (nats)", "self-BLEU", "perplexity of the reference answers"}
    assert wanted <= set(details.index)
    assert "calibration error" not in details.index, "no truth is known"
    table = report.preference_table({"reward model": None}, models)
    assert table["scores"].tolist() == ["actor, implicit reward", "rlhf, implicit reward"]


def test_a_model_with_another_tokenizer_has_no_distance(examined, tokenizer, make_model):
    stranger = make_model("llama", len(tokenizer), seed=3)
    crew = util.Crew(tokenizer, stranger, stranger, None)
    found = util.examine(crew, ROWS, ROWS, examined.cfg, examined.first)
    assert found.summary["kl"] is None and "kl_backwards" not in found.summary
    assert "implicit_reward" not in found.summary and found.summary["reference_perplexity"] > 1
    assert report.result_table({"x": found.summary})["KL (nats)"]["x"] == "-"


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def course(tokenizer, make_model, tmp_path_factory):
    """A folder with two small models outside the course, and rows of the embedded world."""
    root = tmp_path_factory.mktemp("models")
    (root / "dataset").mkdir()
    for split, count in (("train", 20), ("eval", 8)):
        lines = [json.dumps(row) + "\n" for row in world.rows(world.World(), split, count)]
        (root / "dataset" / f"{split}.json").write_text("".join(lines))
    for seed, name in enumerate(("one", "two")):
        models.save(make_model("opt", len(tokenizer), seed=seed), tokenizer, root / name)
    return root


def run(root, capsys, *words):
    given = ["--preset", "smoke", "--set", f"root={root}", "--set", "device=cpu"]
    code = driver.main(["evaluate", *map(str, words), *given, "--set", "max_new_tokens=8"])
    return code, capsys.readouterr()


def test_two_folders_side_by_side_with_their_differences(course, capsys):
    out = course / "answers.jsonl"
    code, said = run(course, capsys, "one", course / "two", "--out", out)
    assert code == 0 and "8 prompts" in said.out
    assert f"What {course / 'two'} scores more than one" in said.out
    for figure in (
        "judge, sampled",
        "KL (nats)",
        "self-BLEU",
        "helpful",
        "implicit reward: margin",
    ):
        assert figure in said.out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * 2 * 8
    assert {line["model"] for line in lines} == {"one", str(course / "two")}
    assert {"prompt", "response", "judge", "reward", "kl", "temperature"} <= lines[0].keys()


@pytest.mark.parametrize("name, text", [
    ("bare.json", '["What is this?", "Who are you?"]'),
    ("table.csv", "question\nWhat is this?\nWho are you?\n"),
    ("plain.txt", "What is this?\n\nWho are you?\n"),
])  # fmt: skip
def test_prompts_come_in_any_shape_and_keep_their_order(course, capsys, name, text):
    (course / name).write_text(text)
    out = course / "out.jsonl"
    words = "one", "--prompts", course / name, "--out", out, "--set", "categories=none"
    code, said = run(course, capsys, *words)
    assert code == 0 and "2 prompts" in said.out and "scores more" not in said.out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    asked = ["Human: What is this? Assistant:", "Human: Who are you? Assistant:"]
    assert [line["prompt"] for line in lines] == asked * 2


def test_own_prompts_get_the_four_files_and_their_differences(course, capsys):
    (course / "bare.json").write_text('["What is this?"]')
    out = course / "out.jsonl"
    words = "one", "two", "--prompts", course / "bare.json", "--out", out
    code, said = run(course, capsys, *words)
    assert code == 0
    after = said.out.split("What two scores more than one")[1]
    assert all(name in after for name in categories.SHIPPED)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(line.get("category") == "harmless" for line in lines) == 2 * 40


@pytest.mark.parametrize("words, told", [
    (["lost/model"], "lost/model"),
    (["actor"], "model/actor does not exist yet: run 1_actor.ipynb first"),
    (["one", "--prompts", "lost.json"], "lost.json does not exist"),
    (["one", "--set", "steps=3"], "evaluate does not read steps"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_a_sentence(course, capsys, words, told):
    code, said = run(course, capsys, *words)
    assert code == 2 and told in said.err


def test_compare_shows_what_the_second_report_scores_more(tmp_path):
    for name, judge in (("A", 0.0), ("B", 1.0)):
        (tmp_path / name).mkdir()
        lines = [
            {"model": model, "temperature": at} | answer(i, judge if model == "rlhf" else 0.5)
            for model in ("actor", "rlhf")
            for at in (1.0, 0.0)
            for i in range(6)
        ]
        lines += [
            {"model": "rlhf", "temperature": 1.0, "category": "harmless", "prompt": "p"}
            | {"score": judge}
        ]
        report.write_lines(tmp_path / name / "answers.jsonl", lines)
    table = compare.answer_differences(tmp_path / "A", tmp_path / "B")
    assert set(table["model"]) == {"rlhf"}, "equal models have no difference to show"
    found = table.set_index("score")
    assert found["difference"]["judge"].startswith("1.00 (") and found["questions"]["judge"] == "6"
    assert found["difference"]["harmless"].startswith("1.00 (")
    assert len(compare.answer_differences(tmp_path, tmp_path)) == 0, "a report without answers"


# ------------------------------------------------------------------------------------- the report


def write(folder, **files):
    for name, lines in files.items():
        report.write_lines(folder / f"{name}.jsonl", lines)


def test_the_report_shows_the_training_its_alerts_and_samples(tmp_path):
    assert report.training_parts(tmp_path) == []
    steps = [{"step": i, "reward": i / 9, "kl": 0.1 * i} for i in range(1, 10)]
    samples = [
        {"step": step, "temperature": at, "prompt": "p", "response": f"{step} at {at}"}
        for step in (0, 9)
        for at in (0.0, 1.0)
    ]
    alert = {"step": 7, "name": "kl", "sentence": "The KL is <high>.", "value": 12}
    write(tmp_path, metrics=steps, samples=samples, alerts=[alert])
    found = {title: part for title, part, *_ in report.training_parts(tmp_path)}
    assert list(found) == ["The training", "Alerts", "Samples"]
    assert found["Alerts"].to_dict("records") == [
        {x: alert[x] for x in ("step", "name", "sentence")}
    ]
    assert found["Samples"].table["before"].tolist() == ["0 at 0.0"]
    report.write_report(tmp_path, {}, report.training_parts(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "The KL is &lt;high&gt;." in page and "<details>" in page and "data:image/png" in page
    write(tmp_path, alerts=[])
    told = [part for title, part, *_ in report.training_parts(tmp_path) if title == "Alerts"]
    assert told == ["The training raised no alert."]


def test_a_report_with_and_without_a_critic_and_categories(examined, tmp_path):
    models = {"actor": examined.first.summary, "rlhf": examined.second.summary}
    answers = {"actor": examined.first.sampled, "rlhf": examined.second.sampled}
    beside = report.side_by_side(ROWS, answers)
    bare = [title for title, *_ in report.parts(models, answers, beside, None)]
    assert "Who is right about pairs" in bare and "Calibration of the reward model" not in bare
    entry = {"mean": 0.5, "low": 0.4, "high": 0.6, "prompts": 4, "kinds": {"x": 0.25, "y": 0.75}}
    graded = {
        name: m | {"categories": {"harmless": entry | {"unread": 1}}} for name, m in models.items()
    }
    pairs = pd.DataFrame({"kind": "x", "flaw": "bad", "chosen": [1.0, 2.0], "rejected": [0.0, 3.0]})
    critics = {"reward model": report.critic_summary(pairs), "watchdog": None}
    parts = report.parts(graded, answers, beside, pairs, critics)
    titles = [title for title, *_ in parts]
    assert {"What changed most", "Answers that no rule reads", "More figures"} <= set(titles)
    result = {"rows": 6, "models": graded, "critics": critics}
    report.write_report(tmp_path, result, parts)
    assert json.loads((tmp_path / "report.json").read_text()) == result
    page = (tmp_path / "report.html").read_text()
    assert page.count("<details>") == 2 and "harmless: x" in page and "reward model" in page
    assert report.judged_bars(graded).get_label().startswith("harmless. actor: sampled 0.50")


def test_the_page_shows_means_over_the_seeds_with_their_range(examined):
    pairs = pd.DataFrame({"kind": "x", "chosen": [1.0, 2.0], "rejected": [0.0, 3.0]})
    critics = {"reward model": report.critic_summary(pairs)}
    runs = []
    for judge in (0.25, 0.75):
        models = {"actor": examined.first.summary, "ppo": examined.second.summary}
        models["ppo"] = models["ppo"] | {"judge": {"mean": judge}}
        runs.append({"models": models, "critics": critics})
    page = record.evaluation(runs)
    assert "|  | actor | ppo |" in page and "| judge, sampled | - | 0.50 (0.25 to 0.75) |" in page
    assert "| implicit reward: margin | 0.00 |" in page, "equal seeds need no range"
    assert "| reward model | 0.50 |" in page


def test_every_key_of_the_report_is_described(examined, root):
    told = (root / "docs" / "report.md").read_text(encoding="utf-8")
    keys = set(examined.second.summary) | set(examined.second.sampled[0])
    keys |= set(measures.preference_summary(pd.DataFrame({"chosen": [1.0], "rejected": [0.0]})))
    keys |= {"rows", "models", "critic", "critics", "best_of", "seconds", "n", "unread", "measure"}
    assert not [key for key in keys if f"`{key}`" not in told]
