"""What the exercises of 2_critic.ipynb claim."""

import json
import math

import torch

import util
from bench.claims import claim
from lab import data


def held_out(cfg):
    """A data frame of the held-out pairs with their scores."""
    import pandas as pd

    folder = util.artifact(cfg.root, "critic")
    tokenizer, critic = util.load_tokenizer(folder, cfg), util.load_scorer(folder, cfg)
    rows = data.with_pairs(util.load_eval_rows(cfg))
    return pd.DataFrame(util.evaluate_critic(critic, tokenizer, rows, cfg))


def accuracy(pairs):
    margin = pairs["chosen"] - pairs["rejected"]
    return (margin > 0).mean() + 0.5 * (margin == 0).mean()


def last_quarter(course, column):
    """The mean of a metric over the last quarter of the critic's training."""
    text = (course.root / "model" / "critic" / "metrics.jsonl").read_text(encoding="utf-8")
    values = [json.loads(line)[column] for line in text.splitlines()]
    tail = values[-max(1, len(values) // 4) :]
    return sum(tail) / len(tail)


@claim("2_critic", "the margin at which a win is predicted with 90 %", 2.19, 2.21)
def margin_of_nine_to_one(course):
    low, high = 0.0, 10.0
    for _ in range(40):  # bisection on the loss, which is minus the log of the probability
        middle = (low + high) / 2
        loss, _ = util.pairwise_loss(torch.tensor([middle]), torch.zeros(1))
        low, high = (middle, high) if math.exp(-loss) < 0.9 else (low, middle)
    return low


@claim("2_critic", "the median margin on held-out pairs", 1.8, 3.0)
def margin_on_held_out_pairs(course):
    pairs = held_out(course.cfg)
    return (pairs["chosen"] - pairs["rejected"]).median()


@claim("2_critic", "the lowest loss on labels of which one in ten is flipped", 0.324, 0.326)
def lowest_loss_with_flipped_labels(course):
    margins = torch.linspace(0, 5, 5_001)
    losses = [
        0.9 * util.pairwise_loss(margin[None], torch.zeros(1))[0]
        + 0.1 * util.pairwise_loss(torch.zeros(1), margin[None])[0]
        for margin in margins
    ]
    return min(losses)


@claim("2_critic", "the loss in the last quarter of the training", 0.35, 0.43)
def loss_at_the_end(course):
    return last_quarter(course, "loss")


@claim("2_critic", "the accuracy on training labels in the last quarter", 0.8, 0.88)
def accuracy_on_training_labels(course):
    return last_quarter(course, "accuracy")


@claim("2_critic", "the accuracy on held-out pairs", 0.89, 0.96)
def accuracy_on_held_out_pairs(course):
    return accuracy(held_out(course.cfg))


@claim("2_critic", "the accuracy against the popular mistake", 0.97, 1.0)
def accuracy_against_the_popular_mistake(course):
    pairs = held_out(course.cfg)
    return accuracy(pairs[pairs["flaw"] == "popular"])


@claim("2_critic", "the accuracy on pairs that are off topic", 0.5, 0.78)
def accuracy_on_off_topic_answers(course):
    pairs = held_out(course.cfg)
    return accuracy(pairs[pairs["flaw"] == "off topic"])


def accuracy_with(course, share):
    """The accuracy on held-out pairs of a critic that learns from a share of train.json."""
    with course.scratch("base", "actor") as cfg:
        cfg = cfg.changed(preference_share=share)
        for _ in util.train_critic(cfg):
            pass
        return accuracy(held_out(cfg))


@claim("2_critic", "the accuracy with half the pairs", 0.87, 0.95)
def accuracy_with_half_the_pairs(course):
    return accuracy_with(course, 0.25)


@claim("2_critic", "the accuracy with a tenth of the pairs", 0.75, 0.94)
def accuracy_with_a_tenth_of_the_pairs(course):
    return accuracy_with(course, 0.05)


@claim("2_critic", "questions where the right answer beats itself said twice", 0.93, 1.0)
def chosen_beats_chosen_twice(course):
    cfg = course.cfg
    reward = util.RewardModel(util.artifact(cfg.root, "critic"), cfg)
    rows = data.with_pairs(util.load_eval_rows(cfg))
    prompts, chosen = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    once, twice = reward(prompts, chosen), reward(prompts, [f"{a} {a}" for a in chosen])
    return sum(one > two for one, two in zip(once, twice)) / len(rows)
