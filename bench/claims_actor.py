"""What the exercises of 1_actor.ipynb claim."""

import math

import torch

import util
from bench.claims import answers_of, claim, judged
from bench.claims_download import first_metrics
from lab import world


def entropy_at(course, first):
    """The mean entropy of the first token of the validation answers, or of all their tokens."""
    cfg = course.cfg
    tokenizer, model = util.load_pair(cfg, "actor")
    rows = util.load_rows(cfg, "sft")[: cfg.validation_rows]
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    tokens = util.encode_pairs(tokenizer, *texts, cfg, model.device)
    with torch.no_grad():
        _, entropy = util.response_logprobs(model, *tokens)
    return entropy[:, 0].mean() if first else util.masked_mean(entropy, tokens[3])


@claim("1_actor", "share of the real tokens of 1,000 rows that count in the loss", 0.33, 0.45)
def share_of_tokens_in_the_loss(course):
    tokenizer = util.load_tokenizer(course.root / "model" / "base")
    rows = util.load_rows(course.cfg, "sft")[:1_000]
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    _, prompt_mask, _, response_mask = util.encode_pairs(tokenizer, *texts, course.cfg, "cpu")
    return response_mask.sum() / (response_mask.sum() + prompt_mask.sum())


@claim("1_actor", "nats per answer token at the first step", 0.7, 3.2)
def first_sft_loss(course):
    return first_metrics(course, "actor")["loss"]


def crowd(item, known):
    """{answer: its probability in the crowd}, but for the rare answers that are one word off."""
    wrong = known.bad * (1 - known.popular - known.subtle)
    answers = dict.fromkeys(item.good, (1 - known.bad) / len(item.good))
    answers[item.popular] = known.bad * known.popular
    return answers | dict.fromkeys(item.bad, wrong / len(item.bad))


@claim("1_actor", "nats per token of a perfect imitator of the crowd", 0.08, 0.15)
def loss_of_a_perfect_imitator(course):
    """A lower bound: the answers that are one word off count as one, and the numbers in guesses
    as known."""
    tokenizer, known = util.load_tokenizer(course.root / "model" / "base"), world.World()
    rng, nats, tokens = known.rng("imitator"), 0.0, 0.0
    for _ in range(1_000):
        item = world.draw(rng, world.kind_of(rng, "train"), "train")
        answers = crowd(item, known)
        rest = known.bad * known.subtle
        nats -= rest * math.log(rest) + sum(p * math.log(p) for p in answers.values())
        for answer, p in answers.items():
            ids = util.encode_answer(tokenizer, answer, course.cfg.max_new_tokens)
            tokens += p / (1 - rest) * len(ids)
    return nats / tokens


@claim("1_actor", "validation loss of the actor", 0.13, 0.2)
def validation_loss_of_the_actor(course):
    _, model = util.load_pair(course.cfg, "actor")
    tokenizer = util.load_tokenizer(course.root / "model" / "actor")
    rows = util.load_rows(course.cfg, "sft")[: course.cfg.validation_rows]
    return util.validation_loss(model, tokenizer, rows, course.cfg)


@claim("1_actor", "entropy of the first token, in nats", 0.6, 1.1)
def entropy_of_the_first_token(course):
    return entropy_at(course, first=True)


@claim("1_actor", "mean entropy of all answer tokens, in nats", 0.1, 0.2)
def entropy_of_all_tokens(course):
    return entropy_at(course, first=False)


for name, temperature, low, high in (
    ("judge_at_temperature_one", 1.0, 0.3, 0.45),
    ("judge_at_half_temperature", 0.5, 0.22, 0.42),
    ("judge_at_temperature_zero", 0.0, 0.0, 0.3),
):

    @claim("1_actor", f"the judge's mean at temperature {temperature:g}", low, high, name)
    def judge_at(course, temperature=temperature):
        return judged(answers_of(course.cfg, "actor", temperature, purpose="temperature"))


@claim("1_actor", "validation loss after a tenth of the rows", 0.15, 0.3)
def validation_loss_with_a_tenth(course):
    with course.scratch("base") as cfg:
        return list(util.train_actor(cfg.changed(sft_share=0.05)))[-1]["validation_loss"]
