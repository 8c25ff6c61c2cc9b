"""Alerts: rules that read the metrics of all steps so far and say when a training goes wrong.

A rule measures one number. Beyond its limit it raises an alert, with a likely cause and what to
change. The rules depend on the metrics only, so a resumed run raises the same alerts as one that
never stopped. A rule whose metrics an algorithm does not have never raises an alert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from lab import CourseError
from lab.settings import nearest

RECENT, WINDOW, QUIET = (
    3,
    5,
    5,
)  # steps of a short and a long mean, and before a rule repeats itself


# --------------------------------------------------------------------------------------------------
# Numbers that rules compare


def values(history, name):
    """Returns one metric of all steps that have it."""
    return [step[name] for step in history if step.get(name) is not None]


def latest(name):
    """Returns a function that measures a metric at the last step."""
    return lambda history: history[-1].get(name)


def recent(name, count=WINDOW):
    """Returns a function that measures the mean of a metric over the last `count` steps."""

    def measure(history):
        found = values(history[-count:], name)
        return fmean(found) if len(found) == count else None

    return measure


def growth(name, least=0.0):
    """Returns a function that divides a metric's recent mean by its value at the first step.

    `least` is the smallest start that it divides by.
    """

    def measure(history):
        found = values(history, name)
        start = max(found[0], least) if len(found) > RECENT else 0
        return fmean(found[-RECENT:]) / start if start > 0 else None

    return measure


def rise(name):
    """Returns a function that measures how far a metric's recent mean is above the first step."""

    def measure(history):
        found = values(history, name)
        return fmean(found[-RECENT:]) - found[0] if len(found) > RECENT else None

    return measure


def best_of_recent(name, count):
    """Returns a function that measures the largest value of a metric in the last `count` steps."""

    def measure(history):
        found = values(history[-count:], name)
        return max(found) if len(found) == count else None

    return measure


def unconfirmed(history):
    """Returns the share of the reward's gain that the watchdog does not confirm.

    It is the gain since the first time that the watchdog's score was as high as now, to a tenth.
    Both numbers are means over the last steps; by its scale the watchdog gives the actor 0 on
    average. While the reward has gained no more than its noise, the share is 0.
    """
    steps = [step for step in history if None not in (step.get("watchdog"), step.get("reward"))]
    if len(steps) < WINDOW:
        return None
    rewards = [step["reward"] for step in steps]
    points = [(0.0, rewards[0])]
    for end in range(RECENT, len(steps) + 1):
        part = steps[max(0, end - WINDOW) : end]
        points.append(tuple(fmean(step[name] for step in part) for name in ("watchdog", "reward")))
    score, reward = points[-1]
    gain = reward - rewards[0]
    late = rewards[-2 * WINDOW :]
    noise = fmean(abs(b - a) for a, b in zip(late, late[1:]))
    before = next(point for point in points if point[0] >= score - 0.1 * abs(score))
    return (reward - before[1]) / gain if gain > 3 * noise else 0.0


# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Rule:
    """One rule of the table. `told` describes the number x beyond the limit in a sentence."""

    name: str
    checks: str
    limit: float
    measure: Callable  # history -> a number; None: the rule does not apply
    told: str
    cause: str
    change: str
    below: bool = False  # the alert is below the limit, not above it

    def sentence(self, x, limit):
        return f"{self.told.format(x=x, limit=limit)}: {self.cause}. {self.change}"


RULES = (
    Rule(
        "kl", "KL to the actor, nats per answer", 10, latest("kl"),
        "KL is {x:.1f} nats per answer, above kl_limit = {limit:g}",
        "the policy is too far from the actor",
        "Raise kl_coef or lower policy_lr.",
    ),
    Rule(
        "watchdog", "share of the reward's gain that the watchdog does not confirm", 0.3,
        unconfirmed,
        "{x:.0%} of the reward's gain came while the watchdog's score did not rise",
        "the policy exploits errors of the reward",
        "Take an earlier step, raise kl_coef, or give the reward model more pairs.",
    ),
    Rule(
        "entropy", "entropy as a share of its start", 0.2, growth("entropy"),
        "Entropy is {x:.1%} of its start",
        "the policy gives the same answer every time and explores no more",
        "Raise kl_coef or entropy_coef, or lower policy_lr.",
        below=True,
    ),
    Rule(
        "scatter", "entropy as a multiple of its start", 2, growth("entropy"),
        "Entropy is {x:.1f} times as high as at the start",
        "the policy drifts into text that the actor never writes",
        "Raise kl_coef, or lower policy_lr or entropy_coef.",
    ),
    Rule(
        "long", "length as a multiple of its start", 2, growth("length"),
        "Answers are {x:.1f} times as long as at the start",
        "the reward favours length",
        "Set length_penalty, or raise kl_coef.",
    ),
    Rule(
        "short", "length as a share of its start", 0.5, growth("length"),
        "Answers have {x:.0%} of the length at the start",
        "the reward favours short answers",
        "Lower length_penalty, or raise kl_coef.",
        below=True,
    ),
    Rule(
        "empty", "share of empty answers", 0.5, latest("empty"),
        "{x:.0%} of the answers are empty",
        "the policy has collapsed, or the reward favours empty answers",
        "Raise kl_coef, and check the reward of an empty answer.",
    ),
    Rule(
        "endless", "share of answers that end within max_new_tokens", 0.5, latest("eos"),
        "Only {x:.0%} of the answers end within max_new_tokens",
        "answers are cut off, or the policy no longer stops",
        "Raise max_new_tokens or missing_eos_penalty.",
        below=True,
    ),
    Rule(
        "repetition", "rise of the share of repeated word pairs in an answer", 0.15,
        rise("repetition"),
        "The share of repeated word pairs in an answer has risen by {x:.0%}",
        "the reward does not see that answers repeat themselves",
        "Add - 1*repetition to the reward, or raise kl_coef.",
    ),
    Rule(
        "sameness", "rise of the share of answers that several prompts get word for word", 0.3,
        rise("sameness"),
        "The share of answers that several prompts get word for word has risen by {x:.0%}",
        "one answer earns reward for many prompts",
        "Raise kl_coef, and give the reward model pairs whose rejected answer is off topic.",
    ),
    Rule(
        "values", "best explained variance of the last 15 steps", 0,
        best_of_recent("explained_variance", 15),
        "Explained variance has been below 0 for 15 steps, at best {x:.2f}",
        "the value model predicts returns worse than their mean",
        "Raise value_lr, lower policy_lr, or set value_init = actor.",
        below=True,
    ),
    Rule(
        "value_loss", "value loss as a multiple of its start", 5, growth("value_loss", 0.1),
        "The value loss is {x:.1f} times as high as at the start",
        "the value model diverges",
        "Lower value_lr, or set reward_norm = True.",
    ),
    Rule(
        "clip", "share of clipped tokens, mean of 5 steps", 0.3, recent("clip_fraction"),
        "{x:.0%} of the tokens were clipped in the last steps",
        "updates are too large for one rollout",
        "Lower policy_lr or ppo_epochs.",
    ),
    Rule(
        "groups", "share of groups with equal scores, mean of 5 steps", 0.95,
        recent("zero_deviation"),
        "{x:.0%} of the groups had equal scores in the last steps and taught nothing",
        "all answers to a prompt are alike, or the reward cannot tell them apart",
        "Raise temperature or kl_coef, or take a finer reward.",
    ),
)  # fmt: skip


def limit_of(rule, cfg):
    """Returns the limit of a rule; None if it is switched off."""
    if rule.name == "kl":
        return cfg.kl_limit or None
    return rule.limit


def table(cfg):
    """Returns the rules as rows of a table."""
    rows = []
    for rule in RULES:
        limit = limit_of(rule, cfg)
        bound = "off" if limit is None else f"{'below' if rule.below else 'above'} {limit:g}"
        row = {"name": rule.name, "what it checks": rule.checks, "alert": bound}
        rows.append(row | {"likely cause": rule.cause, "what to change": rule.change})
    return rows


# --------------------------------------------------------------------------------------------------
# Raising alerts


def raised(history, cfg):
    """Returns {name: alert} for the metrics of all steps so far, the last step included."""
    found = {}
    for rule in RULES if history else ():
        x, limit = rule.measure(history), limit_of(rule, cfg)
        if None in (x, limit) or not (x < limit if rule.below else x > limit):
            continue
        alert = {"step": history[-1]["step"], "name": rule.name, "number": round(x, 4)}
        found[rule.name] = alert | {"sentence": rule.sentence(x, limit)}
    return found


def tell(stage, history, cfg):
    """Tells the alerts of the last step, unless they were raised shortly before it.

    Those that stop_on_alert names stop the run.
    """
    now, before = raised(history, cfg), {}
    for back in range(1, QUIET + 1) if now else ():
        before |= raised(history[:-back], cfg)
    new = [alert for name, alert in now.items() if name not in before]
    for alert in new:
        stage.alert(alert)
    fatal = [now[name]["sentence"] for name in names(cfg.stop_on_alert) if name in now]
    if fatal:
        raise CourseError(
            f"{' '.join(fatal)} The run stopped because stop_on_alert = {cfg.stop_on_alert!r}; set "
            'it to "" to resume from the last checkpoint.'
        )


def names(text):
    """Returns the names of the rules in a text like "kl, watchdog"; raises if one is unknown."""
    known = [rule.name for rule in RULES]
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in (*known, "all"):
            raise CourseError(
                f"stop_on_alert = {name!r} is not known{nearest(name, (*known, 'all'))}"
            )
    return known if "all" in found else found
