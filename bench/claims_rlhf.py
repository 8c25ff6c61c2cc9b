"""The numbers that the exercises of 3_rlhf claim."""

import json
import math
from functools import cache
from unittest import mock

import torch

import util
from bench.claims import answers_of, claim, judged

ROWS = 300  # eval rows that the judge sees


@cache
def trained(course, **changes):
    """(the judge's mean, metrics of every step) of 3_rlhf with some parameters changed."""
    with course.scratch("base", "actor", "critic") as cfg:
        cfg = cfg.changed(**changes)
        history = list(util.train_rlhf(cfg))
        return judged(answers_of(cfg, "rlhf", rows=ROWS)), history


def as_trained(course):
    """The same for 3_rlhf as it is."""
    lines = (course.root / "model" / "rlhf" / "metrics.jsonl").read_text().splitlines()
    return judged(answers_of(course.cfg, "rlhf", rows=ROWS)), [json.loads(line) for line in lines]


@claim("3_rlhf", "both tokens end equally likely at kl_coef = 1 / ln 4 = 0.72", 0.45, 0.55)
def kl_coef_of_equal_chances(course):
    """The bandit of the notebook at that kl_coef: the final probability of the good answer."""
    start, reward = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.0, 1.0])
    logits, rng = start.clone().requires_grad_(), torch.Generator().manual_seed(0)
    adam, mask = torch.optim.Adam([logits], lr=0.05), torch.ones(1000, 1, dtype=torch.bool)
    for _ in range(100):
        old = logits.detach().log_softmax(0)
        tokens = torch.multinomial(old.exp(), 1000, replacement=True, generator=rng)
        scores = reward[tokens] - (old - start)[tokens] / math.log(4)
        for _ in range(2):
            now = logits.log_softmax(0)[tokens]
            columns = (x[:, None] for x in (now, old[tokens], scores - scores.mean()))
            adam.zero_grad()
            util.ppo_policy_loss(*columns, mask, clip_ratio=0.2)[0].backward()
            adam.step()
    return logits.softmax(0)[1].item()


FREE = {"kl_coef": 0.0, "policy_lr": 2e-3, "steps": 60}


@claim("3_rlhf", "without a KL penalty the judge's score falls below 0.5", 0.0, 0.5)
def no_kl_penalty(course):
    return trained(course, **FREE)[0]


@claim("3_rlhf", "while the reward ends at least as high as with the penalty", -0.1, 1.0)
def reward_without_penalty(course):
    """The mean reward of the last ten steps, less that of the course's own run."""
    ends = [history[-10:] for history in (trained(course, **FREE)[1], as_trained(course)[1])]
    free, own = (sum(step["reward"] for step in end) / len(end) for end in ends)
    return free - own


@claim("3_rlhf", "the clip touches less than 5 % of the tokens on average", 0.0, 0.05)
def clipped_tokens(course):
    history = as_trained(course)[1]
    return sum(step["clip_fraction"] for step in history) / len(history)


@claim("3_rlhf", "without the clip the judge's score changes by less than 0.03", -0.03, 0.03)
def without_clip(course):
    return trained(course, clip_ratio=100.0)[0] - as_trained(course)[0]


@claim("3_rlhf", "values from the actor change the judge's score by less than 0.03", -0.03, 0.03)
def values_from_actor(course):
    return trained(course, value_init="actor")[0] - as_trained(course)[0]


@claim("3_rlhf", "at step 2 returns are about 0.6 above the values", 0.3, 1.0)
def values_lag_behind(course):
    """The mean difference of returns and values in the second rollout."""
    gaps, whole = [], util.explained_variance

    def watched(values, returns, mask):
        gaps.append(util.masked_mean(returns - values, mask).item())
        return whole(values, returns, mask)

    with (
        course.scratch("base", "actor", "critic") as cfg,
        mock.patch.object(util, "explained_variance", watched),
    ):
        steps = util.train_rlhf(cfg)
        next(steps), next(steps)
        steps.close()
    return gaps[1]


@claim("3_rlhf", "groups of two instead of four answers cost GRPO less than 0.05", -0.05, 0.05)
def groups_of_two(course):
    pairs, fours = (trained(course, algorithm="grpo", answers=n)[0] for n in (2, 4))
    return pairs - fours


@cache
def estimates(course):
    """k1 and k3 of each token between the trained policy and the actor."""
    cfg = course.cfg
    tokenizer, policy = util.load_pair(cfg, "rlhf")
    _, actor = util.load_pair(cfg, "actor")
    prompts = [row["prompt"] for row in util.load_rows(cfg, "prompt")]
    crew = util.Crew(tokenizer, policy, actor, lambda prompts, responses: [0.0] * len(prompts))
    rollout = util.make_rollout(crew, prompts, cfg, util.rng_for(cfg, "claims"))
    logprobs = rollout.logprobs, rollout.ref_logprobs
    return [util.kl_estimate(*logprobs, estimator=k)[rollout.mask] for k in ("k1", "k3")]


@claim("3_rlhf", "the bound of 99 % of all |k1| divided by that of k3", 1.5, 4.0)
def bound_of_k1(course):
    k1, k3 = estimates(course)
    return (k1.abs().quantile(0.99) / k3.quantile(0.99)).item()


@claim("3_rlhf", "the standard deviation of k3 divided by that of k1", 2.0, 100.0)
def spread_of_k3(course):
    k1, k3 = estimates(course)
    return (k3.std() / k1.std()).item()


@claim("3_rlhf", "the share of the largest thousandth of all k3 in their sum", 0.3, 0.9)
def largest_k3(course):
    k3 = estimates(course)[1].sort().values
    return (k3[-(len(k3) // 1000) :].sum() / k3.sum()).item()
