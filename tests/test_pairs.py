"""The pairs of 2_critic and DPO: a labeller compares the actor's answers; the base model's own."""

import json

import pytest
import torch

import util
from lab import CourseError


def even(prompts, answers):
    """A wish that is easy to check: an even number of characters."""
    return [1.0 - len(answer) % 2 for answer in answers]


def picky(prompts, answers):
    return [0.0 for _ in answers]


def broken(prompts, answers):
    return answers[0].no_such_thing


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer, make_model):
    """A course whose base and actor are one random model; its rows have no pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    brought = folder / "brought"
    make_model("opt", len(tokenizer)).save_pretrained(brought)
    tokenizer.save_pretrained(brought)
    (folder / "dataset").mkdir()
    for name, count in (("train", 90), ("eval", 12)):
        rows = [{"prompt": f"{name} {i}?", "response": f"It is {i}."} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "dataset" / f"{name}.json").write_text(text)
    cfg = config(folder, base_model=str(brought), fallback=False)
    for steps in (util.train_base(cfg), util.train_actor(cfg)):
        for _ in steps:
            pass
    return folder


def config(root, **values):
    small = dict(
        sft_share=0.3, preference_share=0.4, prompt_share=0.3, validation_rows=2, max_new_tokens=8,
        labels=40, label_noise=0.0, norm_prompts=2, norm_answers=2, critic_batch=8, steps=1,
        rollout=4, minibatch=4, dpo_batch=16,
    )  # fmt: skip
    return util.Config("smoke", root=str(root), device="cpu", **small | values)


def wished(rows):
    chosen, rejected = (even(None, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    return [c - r for c, r in zip(chosen, rejected)]


def test_the_labeller_chooses_among_two_answers_of_the_actor(root):
    cfg = config(root, labeller="test_pairs.even")
    rows = util.preference_rows(cfg)
    assert 5 < len(rows) < cfg.labels, "a tie gives no pair"
    assert set(wished(rows)) == {1.0}
    known = {row["prompt"] for row in util.load_rows(cfg, "preference")}
    assert {row["prompt"] for row in rows} <= known
    assert rows == util.preference_rows(cfg), "the same seed, the same pairs"
    assert rows != util.preference_rows(cfg.changed(seed=1))


def test_noise_turns_its_share_of_the_choices_round(root):
    cfg = config(root, labeller="test_pairs.even", labels=160)
    clean, noisy = util.preference_rows(cfg), util.preference_rows(cfg.changed(label_noise=0.25))
    assert len(clean) == len(noisy)
    turned = [a["chosen"] == b["rejected"] for a, b in zip(clean, noisy)]
    assert 0.1 < sum(turned) / len(turned) < 0.4
    same = (a["chosen"] == b["chosen"] for a, b in zip(clean, noisy))
    assert all(a != b for a, b in zip(turned, same)), "the answers themselves stay the same"


def test_held_out_pairs_come_from_other_prompts_and_have_no_noise(root):
    cfg = config(root, labeller="test_pairs.even", label_noise=0.4)
    rows = util.held_out_pairs(cfg)
    assert 0 < len(rows) <= cfg.labels // 4 and set(wished(rows)) == {1.0}
    assert {row["prompt"] for row in rows} <= {f"Human: eval {i}? Assistant:" for i in range(12)}


def test_critic_and_dpo_learn_from_the_labeller(root):
    cfg = config(root, labeller="test_pairs.even", labels=24)
    steps = list(util.train_critic(cfg))
    assert steps and util.artifact(cfg.root, "critic").name == "critic"
    dpo = list(util.train_rlhf(cfg.changed(algorithm="dpo")))
    pairs = util.preference_rows(cfg)
    assert len(dpo) == -(-len(pairs) // cfg.dpo_batch)


def test_given_pairs_are_those_that_are_learned(root):
    cfg = config(root)
    rows = [
        {"prompt": f"Human: {i}? Assistant:", "chosen": "yes", "rejected": "no"} for i in range(9)
    ]
    assert len(list(util.train_critic(cfg, rows))) == 2, "nine pairs in batches of eight"


def test_a_resumed_run_notices_other_pairs(root):
    cfg = config(root, checkpoint_minutes=0)
    answers = {"chosen": "yes", "rejected": "no"}
    rows = [{"prompt": f"Human: {i}? Assistant:"} | answers for i in range(40)]
    run = util.train_critic(cfg, rows)
    next(run), next(run), next(run)
    run.close()
    with pytest.raises(CourseError, match="interrupted at step 2, and the list of pairs has chan"):
        next(util.train_critic(cfg, rows[:-1]))
    assert next(util.train_critic(cfg, rows))["step"] == 1, "the steps of before come first"


def test_a_labeller_without_a_preference_is_an_error(root):
    with pytest.raises(CourseError, match="picky.*same number to both"):
        util.preference_rows(config(root, labeller="test_pairs.picky"))
    with pytest.raises(CourseError, match=r"The labeller failed \(test_pairs.py, line"):
        util.preference_rows(config(root, labeller="test_pairs.broken"))
    with pytest.raises(CourseError, match="labeller = 'nowhere.wish' cannot be imported"):
        util.preference_rows(config(root, labeller="nowhere.wish"))


def test_the_base_model_writes_the_rejected_answers(root):
    cfg = config(root, negatives="base")
    rows = util.preference_rows(cfg)
    assert len(rows) > 30 and all(row["chosen"] == row["response"] for row in rows)
    assert len({row["rejected"] for row in rows}) > 5
    tokenizer, base = util.load_pair(cfg, "base")
    prompts = [row["prompt"] for row in rows[:3]]
    tokens = next(util.generate_answers(base, tokenizer, prompts, cfg, torch.Generator()))
    assert tokens[2].shape[1] <= cfg.max_new_tokens
    held_out = util.held_out_pairs(cfg)
    assert {row["prompt"] for row in held_out} <= {
        f"Human: eval {i}? Assistant:" for i in range(12)
    }
    assert len(held_out) > 6
