"""How time grows with prompts, answers, layers, width and vocabulary: exponents.

    python bench/growth.py --out growth.json

Each size is a small model of its own; all sizes of a sweep take turns, and an exponent is the slope
of log time over log size at the three largest. Beside it stands the slope of the least arithmetic
at those sizes: below it there are costs that do not grow, above it something grows too fast.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import OPTForCausalLM  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402

ROUNDS = 3
USUAL = dict(prompts=16, prompt=48, answer=32)
SWEEPS = {  # what grows: its sizes
    "prompts": (4, 8, 16, 32, 64, 128),
    "answer": (16, 32, 64, 128, 256),
    "num_hidden_layers": (2, 4, 8, 16, 32),
    "hidden_size": (64, 128, 256, 512, 768),
    "vocab_size": (1024, 4096, 16384, 32768, 65536),
}
NAMES = {"answer": "tokens of an answer", "vocab_size": "vocabulary"}
WEIGHTS = {"num_hidden_layers": "layers", "hidden_size": "width"}


class Size:
    """One point of a sweep: a model, its rows, and the three things that are done with them."""

    def __init__(self, what, value):
        self.sizes = USUAL | ({what: value} if what in USUAL else {})
        shape = common.shape_of("tiny", **({} if what in USUAL else {what: value}))
        torch.manual_seed(0)
        self.model = OPTForCausalLM(shape).eval()
        B, P, R = self.sizes.values()
        ids, ones = torch.randint(2, shape.vocab_size, (B, P + R)), torch.ones(B, P + R).bool()
        self.tokens = ids[:, :P], ones[:, :P], ids[:, P:], ones[:, P:]
        self.optimiser = util.Optimiser(
            util.Config("tiny"), [(self.model, 1e-7)], 10**6, batch=B, say=lambda text: None
        )
        self.flops = common.forward_flops(shape, [(P, R)] * B)
        self.x = common.parameters(shape) if what in WEIGHTS else value

    def generate(self):
        """No eos: every answer has its full length."""
        limits = dict(max_new_tokens=self.sizes["answer"], eos_token_id=None)
        util.generate(self.model, *self.tokens[:2], **limits, pad_token_id=common.PAD)

    def score(self):
        with torch.no_grad():
            util.response_logprobs(self.model, *self.tokens, entropy=False)

    def update(self):
        """Forward, backward, AdamW."""

        def loss_of(rows):
            logprobs, _ = util.response_logprobs(self.model, *(x[rows] for x in self.tokens))
            return -logprobs.mean(), len(rows), {}

        self.optimiser.step(list(range(self.sizes["prompts"])), loss_of, 0)


def lines(what, rounds):
    """The three lines of one sweep."""
    points = [Size(what, value) for value in SWEEPS[what]]
    xs, end = [point.x for point in points[-3:]], points[-3:]
    grows = f"weights, by {WEIGHTS[what]}" if what in WEIGHTS else NAMES.get(what, what)
    for phase in ("generate", "score", "update"):
        contenders = {i: partial(getattr(point, phase)) for i, point in enumerate(points)}
        seconds = list(common.in_turns(contenders, rounds).values())
        exponents = [common.exponent(xs, ys) for ys in zip(*seconds[-3:])]
        yield {
            "what grows": grows,
            "from": f"{points[0].x:,}",
            "to": f"{xs[-1]:,}",
            "phase": phase,
            "smallest, s": seconds[0],
            "largest, s": seconds[-1],
            "exponent": exponents,
            "of arithmetic": common.exponent(xs, [point.flops for point in end]),
        }


def main():
    parser = common.arguments(__doc__, ROUNDS)
    parser.add_argument("--sweep", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    args = parser.parse_args()
    report, rounds = common.Report(args.out), args.rounds or ROUNDS
    report.table("Growth", [line for what in args.sweep for line in lines(what, rounds)])


if __name__ == "__main__":
    main()
