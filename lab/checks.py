"""Checks of the texts before training, and of the metrics while it runs."""

import math

from lab import CourseError
from lab.data import repeated
from lab.formats import framed
from lab.tokens import encoder


def check_pretraining(cfg, blocks):
    """Raises if pretraining has too little text, or blocks too short for the later stages."""
    longest = cfg.max_prompt + cfg.max_new_tokens
    if cfg.pretrain_length < longest:
        raise CourseError(
            f"pretrain_length = {cfg.pretrain_length} is impossible: it must be at least "
            f"max_prompt + max_new_tokens = {longest}."
        )
    if not len(blocks):
        raise CourseError(
            f"pretrain_documents = {cfg.pretrain_documents} is impossible: their text is shorter "
            f"than one block of pretrain_length = {cfg.pretrain_length} tokens; raise it."
        )


def warn_about_texts(say, tokenizer, rows, answers, cfg):
    """Reports how many texts will be cut, at which end, and how many rows are copies."""
    written, encode = [("prompt", "max_prompt", "beginning")], encoder(tokenizer)
    written += [(field, "max_new_tokens", "end") for field in answers]
    for field, name, end in written:
        ids_of, limit = encode.answers if field in answers else encode.prompts, getattr(cfg, name)
        ids = ids_of([row[field] for row in rows], math.inf)
        if count := sum(len(text) > limit for text in ids):
            what = f"{count} of {len(rows)} texts in {field!r} are longer than {name} allows"
            say(f"{what} ({limit} tokens): they lose their {end}.")
    if copies := repeated(rows):
        say(f"{copies} of {len(rows)} rows are copies of other rows: each copy counts.")


def warn_about_length(say, tokenizer, documents, cfg):
    """Reports how many of some (question, answer) pairs are too long for the later stages."""
    encode, (questions, answers) = encoder(tokenizer), zip(*documents)
    prompts = encode.prompts([framed(question) for question in questions], math.inf)
    long = sum(len(ids) > cfg.max_prompt for ids in prompts)
    wide = sum(len(ids) > cfg.max_new_tokens for ids in encode.answers(answers, math.inf))
    if long or wide:
        say(
            f"of {len(documents)} documents, {long} questions are longer than max_prompt = "
            f"{cfg.max_prompt} tokens and {wide} answers are longer than max_new_tokens = "
            f"{cfg.max_new_tokens}: the next notebooks cut them. Raise these two, and "
            f"pretrain_length (now {cfg.pretrain_length}) to at least their sum."
        )


# Before the first update the ratio of every token should be 1. Rounding alone moves the average
# ratio by at most this much; a wrong temperature, dropout or shifted positions move it further.
ROUNDING = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.02}


def check_ratios(rollout, stats, precision, optimiser):
    """Raises if sampling, scoring and training do not use the same distribution.

    A shift of the average ratio is an error. Ratios of single unlikely tokens may be further off
    because of rounding; the user is told so once.
    """
    limit, outliers = ROUNDING[precision], stats.get("ratio_error_q99", 0)
    error = max(rollout.sampling_error, stats.get("ratio_error", 0))
    if error > limit:
        raise CourseError(
            f"The first ratios of a rollout are off by {error:.2g} on average; rounding explains "
            f"only {limit:g}. Sampling and scoring use different distributions: look for dropout, "
            "a second temperature, or a model whose output depends on padding."
        )
    if outliers > 3 * limit and not optimiser.state.get("rounding_said"):
        optimiser.state["rounding_said"] = True
        optimiser.say(
            f"Before the first update, one ratio in a hundred is off by {outliers:.2g} or more "
            "because of rounding. Set precision = float32 to avoid this."
        )


def alerts(metrics, kl_limit):
    """Returns {name: sentence} for metrics that show a training that goes wrong."""
    rules = {
        "kl": (
            kl_limit and metrics["kl"] > kl_limit,
            f"KL is {metrics['kl']:.1f} nats per answer, above kl_limit = {kl_limit:g}: the policy "
            "is too far from the actor. Raise kl_coef or lower policy_lr.",
        ),
        "empty": (
            metrics["empty"] > 0.5,
            f"{metrics['empty']:.0%} of the answers are empty. Raise kl_coef, and check whether "
            "the reward favours empty answers.",
        ),
        "endless": (
            metrics["eos"] < 0.5,
            f"Only {metrics['eos']:.0%} of the answers end within max_new_tokens. Raise "
            "max_new_tokens or missing_eos_penalty.",
        ),
    }
    return {name: sentence for name, (risen, sentence) in rules.items() if risen}
