"""What the exercises of 4_test.ipynb claim."""

from functools import cache
from statistics import pvariance

import util
from bench.claims import claim
from lab import report


@cache
def models(course, name):
    """The tokenizer, the model and the rows of the test, as the notebook loads them."""
    return *util.load_pair(course.cfg, name), util.load_eval_rows(course.cfg)


@cache
def answers_of(course, name, temperature=1.0, purpose="test"):
    """What `util.evaluate` finds for a model and all questions of the test."""
    tokenizer, model, rows = models(course, name)
    crew = util.Crew(tokenizer, model, models(course, "actor")[1], None)
    rng = util.rng_for(course.cfg, purpose)
    return util.evaluate(crew, rows, course.cfg, rng, temperature=temperature)


@cache
def best_of(course, n):
    """The answers of best-of-n to its questions."""
    tokenizer, actor, rows = models(course, "actor")
    crew = util.Crew(tokenizer, actor, actor, util.load_reward(course.cfg))
    cfg = course.cfg.changed(best_of=n)
    return util.best_of(crew, rows, cfg, util.rng_for(cfg, "best"))


def judged(answers):
    return sum(answer["judge"] for answer in answers) / len(answers)


def wrong(answers):
    return sum(answer["judge"] < 0.5 for answer in answers) / len(answers)


def popular(course, name, temperature):
    """The share of answers that are, word for word, the popular wrong one."""
    rows, found = models(course, name)[2], answers_of(course, name, temperature)
    return sum(a["response"] == row["popular"] for a, row in zip(found, rows)) / len(rows)


# --------------------------------------------------------------------------------------------------
# Sampled beside greedy


@claim("4_test", "the judge's mean of the actor's sampled answers", 0.3, 0.45)
def actor_sampled(course):
    return judged(answers_of(course, "actor"))


@claim("4_test", "the judge's mean of the actor's greedy answers", 0.0, 0.3)
def actor_greedy(course):
    return judged(answers_of(course, "actor", 0))


@claim("4_test", "the share of the actor's greedy answers that are the popular wrong one", 0.7, 1)
def actor_greedy_is_popular(course):
    return popular(course, "actor", 0)


@claim("4_test", "the judge's mean of the policy's sampled answers", 0.88, 1)
def policy_sampled(course):
    return judged(answers_of(course, "rlhf"))


@claim("4_test", "the judge's mean of the policy's greedy answers", 0.95, 1)
def policy_greedy(course):
    return judged(answers_of(course, "rlhf", 0))


# --------------------------------------------------------------------------------------------------
# Variety and intervals


def variety(course, name, temperature=1.0):
    """distinct-2, compared with that of the actor's sampled answers."""
    texts = [
        [answer["response"] for answer in answers]
        for answers in (answers_of(course, name, temperature), answers_of(course, "actor"))
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
    return questions_for_one_hundredth(answers_of(course, "actor"))


@claim("4_test", "questions for an interval of .01 at the policy's score", 500, 3_000)
def questions_for_the_policy(course):
    return questions_for_one_hundredth(answers_of(course, "rlhf"))


# --------------------------------------------------------------------------------------------------
# Best-of-n and the reward model's favourites


@claim("4_test", "the judge's mean of best-of-1", 0.3, 0.5)
def best_of_1(course):
    return judged(best_of(course, 1))


@claim("4_test", "the judge's mean of best-of-4", 0.7, 0.92)
def best_of_4(course):
    return judged(best_of(course, 4))


@claim("4_test", "the judge's mean of best-of-8", 0.85, 0.99)
def best_of_8(course):
    return judged(best_of(course, 8))


@claim("4_test", "the judge's mean of best-of-32", 0.75, 0.93)
def best_of_32(course):
    return judged(best_of(course, 32))


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
    return wrong(answers_of(course, "rlhf"))


@claim("4_test", "the share of the actor's sampled answers that the judge finds wrong", 0.5, 0.7)
def wrong_answers_of_the_actor(course):
    return wrong(answers_of(course, "actor"))


# --------------------------------------------------------------------------------------------------
# Temperature


@claim("4_test", "the judge's mean of the actor's answers at temperature 0.5", 0.2, 0.42)
def actor_at_half(course):
    return judged(answers_of(course, "actor", 0.5))


@claim("4_test", "the judge's mean of the actor's answers at temperature 0.25", 0.05, 0.4)
def actor_at_a_quarter(course):
    return judged(answers_of(course, "actor", 0.25))


@claim("4_test", "the judge's mean of the actor's answers at temperature 1.5", 0.1, 0.33)
def actor_at_one_and_a_half(course):
    return judged(answers_of(course, "actor", 1.5))


@claim("4_test", "the judge's mean of the policy's answers at temperature 1.5", 0.35, 0.8)
def policy_at_one_and_a_half(course):
    return judged(answers_of(course, "rlhf", 1.5))
