"""Checks on texts and on a running training: what is cut, and what looks wrong."""

import math

from lab import CourseError
from lab.data import repeated
from lab.tokens import encoder


def check_pretraining(cfg, blocks):
    """Raises where pretraining has no text, or text too short for what comes later."""
    longest = cfg.max_prompt + cfg.max_new_tokens
    if cfg.pretrain_length < longest:
        problem = f"pretrain_length = {cfg.pretrain_length} is impossible: at least"
        raise CourseError(f"{problem} max_prompt + max_new_tokens = {longest}.")
    if not len(blocks):
        problem = f"pretrain_documents = {cfg.pretrain_documents} is impossible: their text is"
        raise CourseError(f"{problem} shorter than pretrain_length = {cfg.pretrain_length} tokens.")


def warn_about_texts(say, tokenizer, rows, answers, cfg):
    """Says how many texts are longer than their limit and which end they lose, and what repeats."""
    written, encode = [("prompt", "max_prompt", "front")], encoder(tokenizer)
    written += [(field, "max_new_tokens", "end") for field in answers]
    for field, name, end in written:
        ids_of, limit = encode.answers if field in answers else encode.prompts, getattr(cfg, name)
        ids = ids_of([row[field] for row in rows], math.inf)
        if count := sum(len(text) > limit for text in ids):
            what = f"{count} of {len(rows)} texts in {field!r} are longer than {name} allows"
            say(f"{what} ({limit} tokens): they lose their {end}.")
    if copies := repeated(rows):
        say(
            f"{copies} of {len(rows)} rows are copies of others: they count as often as they occur."
        )


# How far rounding may move the ratio of an average token before any update, where it ought to be 1.
# A wrong temperature, dropout left on or shifted positions move it further.
ROUNDING = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.02}


def check_ratios(rollout, stats, precision, optimiser):
    """Raises where sampling, scoring and training do not see one distribution.

    What moves an average token is an error. Single tokens may lie further off, as rounding hits
    unlikely ones hard; that is said once.
    """
    limit, outliers = ROUNDING[precision], stats.get("ratio_error_q99", 0)
    error = max(rollout.sampling_error, stats.get("ratio_error", 0))
    if error > limit:
        raise CourseError(
            f"The first ratios of a rollout are off by {error:.2g} on average; rounding explains "
            f"{limit:g}. Sampling and scoring see different distributions: look for dropout, a "
            "second temperature, or a model whose answers depend on padding."
        )
    if outliers > 3 * limit and not optimiser.state.get("rounding_said"):
        optimiser.state["rounding_said"] = True
        optimiser.say(
            f"One first ratio in a hundred is off by {outliers:.2g} or more, by rounding: "
            "precision = float32 would be exact."
        )


def alerts(metrics, kl_limit):
    """{name: sentence} for what a person would want to be woken for."""
    rules = {
        "kl": (
            kl_limit and metrics["kl"] > kl_limit,
            f"KL is {metrics['kl']:.1f} nats an answer, beyond kl_limit = {kl_limit:g}: the policy "
            "has left the actor. Raise kl_coef or lower policy_lr.",
        ),
        "empty": (
            metrics["empty"] > 0.5,
            f"{metrics['empty']:.0%} of the answers are empty. Is the reward paid for saying "
            "nothing? Raise kl_coef, and look at the samples.",
        ),
        "endless": (
            metrics["eos"] < 0.5,
            f"Only {metrics['eos']:.0%} of the answers end within max_new_tokens. Raise "
            "max_new_tokens or missing_eos_penalty.",
        ),
    }
    return {name: sentence for name, (risen, sentence) in rules.items() if risen}
