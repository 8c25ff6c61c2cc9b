"""What the exercises of 4_test.ipynb claim."""

from functools import cache
from statistics import pvariance

import util
from bench.claims import answers_of, claim, judged
from lab import report


@cache
def best_of(course, n):
    """The answers of best-of-n to its questions."""
    cfg = course.cfg.changed(best_of=n)
    tokenizer, actor = util.load_pair(cfg, "actor")
    crew = util.Crew(tokenizer, actor, actor, util.load_reward(cfg))
    return util.best_of(crew, util.load_eval_rows(cfg), cfg, util.rng_for(cfg, "best"))


def wrong(answers):
    return sum(answer["judge"] < 0.5 for answer in answers) / len(answers)


def popular(course, name, temperature):
    """The share of answers that are, word for word, the popular wrong one."""
    rows, found = util.load_eval_rows(course.cfg), answers_of(course.cfg, name, temperature)
    return sum(a["response"] == row["popular"] for a, row in zip(found, rows)) / len(rows)


# --------------------------------------------------------------------------------------------------
# Sampled beside greedy


@claim("4_test", "the judge's mean of the actor's sampled answers", 0.3, 0.45)
def actor_sampled(course):
    return judged(answers_of(course.cfg, "actor"))


@claim("4_test", "the judge's mean of the actor's greedy answers", 0.0, 0.3)
def actor_greedy(course):
    return judged(answers_of(course.cfg, "actor", 0))


@claim("4_test", "the share of the actor's greedy answers that are the popular wrong one", 0.7, 1)
def actor_greedy_is_popular(course):
    return popular(course, "actor", 0)


@claim("4_test", "the judge's mean of the policy's sampled answers", 0.88, 1)
def policy_sampled(course):
    return judged(answers_of(course.cfg, "rlhf"))


@claim("4_test", "the judge's mean of the policy's greedy answers", 0.95, 1)
def policy_greedy(course):
    return judged(answers_of(course.cfg, "rlhf", 0))


# --------------------------------------------------------------------------------------------------
# Variety and intervals


def variety(course, name, temperature=None):
    """distinct-2, compared with that of the actor's sampled answers."""
    texts = [
        [answer["response"] for answer in answers]
        for answers in (answers_of(course.cfg, name, temperature), answers_of(course.cfg, "actor"))
    ]
    return report.distinct_2(texts[0]) / report.distinct_2(texts[1])


@claim("4_test", "distinct-2 of the policy / that of the actor", 0.5, 0.95)
def variety_of_the_policy(course):
    return variety(course, "rlhf")


@claim("4_test", "distinct-2 of the actor's greedy answers / that of its sampled ones", 0.3, 0.75)
def variety_of_greedy_answers(course):
    return variety(course, "actor", 0)


def questions_for_one_hundredth(answers):
    """How many questions make the 95 % interval as narrow as plus or minus .01."""
    return (1.96 / 0.01) ** 2 * pvariance([answer["judge"] for answer in answers])


@claim("4_test", "questions for an interval of .01 at the actor's score", 7_800, 9_604)
def questions_for_the_actor(course):
    return questions_for_one_hundredth(answers_of(course.cfg, "actor"))


@claim("4_test", "questions for an interval of .01 at the policy's score", 500, 3_000)
def questions_for_the_policy(course):
    return questions_for_one_hundredth(answers_of(course.cfg, "rlhf"))


# --------------------------------------------------------------------------------------------------
# Best-of-n and the reward model's favourites


for n, low, high in ((1, 0.3, 0.5), (4, 0.7, 0.92), (8, 0.85, 0.99), (32, 0.75, 0.93)):

    @claim("4_test", f"the judge's mean of best-of-{n}", low, high, f"best_of_{n}")
    def mean_of_best(course, n=n):
        return judged(best_of(course, n))


@claim("4_test", "what best-of-8 scores above best-of-32", 0.01, 0.2)
def lost_between_8_and_32(course):
    return judged(best_of(course, 8)) - judged(best_of(course, 32))


@claim("4_test", "the share of SQL among the wrong answers of best-of-32", 0.5, 1)
def sql_among_wrong_favourites(course):
    kinds = [answer["kind"] for answer in best_of(course, 32) if answer["judge"] < 0.5]
    return kinds.count("sql") / len(kinds)


@claim("4_test", "the share of best-of-16's answers that the judge finds wrong", 0.01, 0.12)
def wrong_favourites(course):
    return wrong(best_of(course, 16))


@claim("4_test", "the share of the policy's sampled answers that the judge finds wrong", 0.01, 0.1)
def wrong_answers_of_the_policy(course):
    return wrong(answers_of(course.cfg, "rlhf"))


@claim("4_test", "the share of the actor's sampled answers that the judge finds wrong", 0.5, 0.7)
def wrong_answers_of_the_actor(course):
    return wrong(answers_of(course.cfg, "actor"))


# --------------------------------------------------------------------------------------------------
# Temperature


for name, stage, temperature, low, high in (
    ("actor_at_half", "actor", 0.5, 0.2, 0.42),
    ("actor_at_a_quarter", "actor", 0.25, 0.05, 0.4),
    ("actor_at_one_and_a_half", "actor", 1.5, 0.1, 0.33),
    ("policy_at_one_and_a_half", "rlhf", 1.5, 0.35, 0.8),
):

    @claim("4_test", f"the judge's mean of {stage} at temperature {temperature}", low, high, name)
    def mean_at(course, stage=stage, temperature=temperature):
        return judged(answers_of(course.cfg, stage, temperature))
