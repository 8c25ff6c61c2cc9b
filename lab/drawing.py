"""Drawings of the course as SVG text: the four models of PPO, and the five stages.

They have no background; boxes are filled and everything else is grey, so that they are legible on
light and on dark pages. `notebook.draw` shows one in a notebook.
"""

from html import escape

LEARNS, FROZEN, RESULT, INK = "#C24E00", "#0068A3", "#007A5A", "#7C7C7C"
HEAD = (
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
    f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/>'
    "</marker></defs>"
)


def page(width, height, title, description, parts):
    """A whole drawing; title and description are for people who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n"
        + "\n".join([HEAD, *parts])
        + "\n</svg>\n"
    )


def text(x, y, words, size=15, colour=INK, anchor="middle", bold=False):
    weight = ' font-weight="600"' * bold
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def box(x, y, width, height, title, lines=(), colour=None):
    """A box with a title and lines below it: filled with a colour, or only outlined."""
    look = f'fill="{colour}"' if colour else f'fill="none" stroke="{INK}" stroke-width="1.5"'
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" {look}/>']
    ink, middle = "white" if colour else INK, x + width / 2
    top = y + height / 2 - 9.5 * len(lines) + 5.5
    parts.append(text(middle, top, title, 16, ink, bold=True))
    parts += [text(middle, top + 19 * i, line, 14, ink) for i, line in enumerate(lines, 1)]
    return "\n".join(parts)


def arrow(*points, dashed=False):
    """A line through points (x, y), with a head at the last one."""
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' * dashed
    return (
        f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="2" '
        f'stroke-linejoin="round"{dashes} marker-end="url(#head)"/>'
    )


def key(x, y, colour, words):
    """An entry of the legend."""
    square = f'<rect x="{x}" y="{y - 12}" width="14" height="14" rx="3" fill="{colour}"/>'
    return square + text(x + 21, y, words, 14, anchor="start")


def four_models():
    """PPO's four models and who feeds whom."""
    parts = [
        box(20, 20, 150, 44, "prompts"),
        arrow((95, 64), (95, 118)),
        box(20, 120, 150, 74, "policy", ["writes answers"], LEARNS),
        arrow((170, 157), (216, 157)),
        box(218, 120, 124, 74, "answers", ["and their", "log-probs"]),
        arrow((342, 140), (362, 140), (362, 51), (388, 51)),
        arrow((342, 157), (388, 157)),
        arrow((342, 174), (362, 174), (362, 263), (388, 263)),
        box(390, 14, 150, 74, "reward model", ["scores answers"], FROZEN),
        box(390, 120, 150, 74, "reference", ["log-probs for KL"], FROZEN),
        box(390, 226, 150, 74, "value model", ["expects a reward"], LEARNS),
        text(568, 42, "scores", 14),
        arrow((540, 51), (668, 51), (668, 74)),
        text(568, 148, "KL", 14),
        arrow((540, 157), (650, 157), (650, 132)),
        box(604, 76, 128, 54, "rewards", ["per token"]),
        text(568, 254, "values", 14),
        arrow((540, 263), (602, 263)),
        arrow((700, 130), (700, 234)),
        box(604, 236, 128, 54, "advantages", ["per token"]),
        arrow((668, 290), (668, 377), (542, 377)),
        box(390, 340, 150, 74, "update", ["clipped loss", "and value loss"]),
        arrow((465, 340), (465, 302), dashed=True),
        arrow((390, 377), (95, 377), (95, 196), dashed=True),
        text(242, 368, "changes the weights", 14),
        key(20, 440, LEARNS, "learns"),
        key(120, 440, FROZEN, "frozen"),
    ]
    return page(
        740,
        456,
        "The four models of PPO",
        "The policy writes answers to prompts. The reward model scores them. The reference gives "
        "log-probs for the KL. The value model gives the reward that it expects before each "
        "token. Scores and KL become rewards per token; rewards and values become advantages. "
        "The update changes the policy and the value model; the reward model and the reference "
        "stay frozen.",
        parts,
    )


STAGES = (  # notebook, what it makes, how
    ("0_download", "base model", "learns from plain text", "to continue a text"),
    ("1_actor", "actor", "learns from a crowd's answers,", "right ones and wrong ones"),
    (
        "2_critic",
        "critic = reward model",
        "learns from pairs of answers",
        "which one people prefer",
    ),
    ("3_rlhf", "rlhf = trained policy", "learns from its own answers,", "which the critic scores"),
    ("4_test", "report", "measures: a judge that knows", "the truth grades every model"),
)


def course():
    """The five stages of the course: what each makes, and how."""
    left, width, height, gap = 60, 220, 56, 34
    parts, middle, edge = [], left + width / 2, left + width
    tops = [14 + i * (height + gap) for i in range(len(STAGES))]
    for top, (notebook, makes, *how) in zip(tops, STAGES):
        colour = RESULT if makes == "report" else LEARNS
        parts.append(box(left, top, width, height, notebook, [makes], colour))
        for i, line in enumerate(how):
            parts.append(text(edge + 18, top + 24 + 20 * i, line, 15.5, anchor="start"))
    for top in tops[1:]:
        parts.append(arrow((middle, top - gap), (middle, top - 2)))
    base, actor, _, policy, test = (top + height / 2 for top in tops)
    parts.append(arrow((left, actor), (38, actor), (38, policy), (left - 2, policy)))
    parts.append(arrow((left, base), (16, base), (16, test), (left - 2, test), dashed=True))
    told = [
        f"{notebook} makes the {makes}: it {' '.join(how)}." for notebook, makes, *how in STAGES
    ]
    told.append("3_rlhf starts from the actor and uses the critic. 4_test compares all models.")
    height = tops[-1] + height + 14
    return page(590, height, "The five stages of the course", " ".join(told), parts)
