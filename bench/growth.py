"""Measures how time grows with prompts, answer length, layers, width and vocabulary.

    python bench/growth.py --out growth.json

Each size has a small model of its own, and the sizes of a sweep run in turns. An exponent is the
slope of log time over log size at the three largest sizes. The table also shows the slope of the
minimum arithmetic at those sizes. A smaller exponent of time means that some costs do not grow; a
larger one means that something grows too fast.
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
DEFAULTS = dict(prompts=16, prompt=48, answer=32)
SWEEPS = {  # quantity: its sizes
    "prompts": (4, 8, 16, 32, 64, 128),
    "answer": (16, 32, 64, 128, 256),
    "num_hidden_layers": (2, 4, 8, 16, 32),
    "hidden_size": (64, 128, 256, 512, 768),
    "vocab_size": (1024, 4096, 16384, 32768, 65536),
}
LABELS = {"answer": "tokens of an answer", "vocab_size": "vocabulary"}
BY_WEIGHTS = {"num_hidden_layers": "layers", "hidden_size": "width"}


class SweepPoint:
    """One size of a sweep: a model, its rows and the three phases to time."""

    def __init__(self, what, value):
        self.sizes = DEFAULTS | ({what: value} if what in DEFAULTS else {})
        config = common.opt_config("tiny", **({} if what in DEFAULTS else {what: value}))
        torch.manual_seed(0)
        self.model = OPTForCausalLM(config).eval()
        B, P, R = self.sizes.values()
        ids, ones = torch.randint(2, config.vocab_size, (B, P + R)), torch.ones(B, P + R).bool()
        self.tokens = ids[:, :P], ones[:, :P], ids[:, P:], ones[:, P:]
        self.optimiser = util.Optimiser(
            util.Config("tiny"), [(self.model, 1e-7)], 10**6, batch=B, say=lambda text: None
        )
        self.flops = common.forward_flops(config, [(P, R)] * B)
        self.x = common.count_weights(config) if what in BY_WEIGHTS else value

    def generate(self):
        """Generates without eos, so that every answer has its full length."""
        limits = dict(max_new_tokens=self.sizes["answer"], eos_token_id=None)
        util.generate(self.model, *self.tokens[:2], **limits, pad_token_id=common.PAD)

    def score(self):
        with torch.no_grad():
            util.response_logprobs(self.model, *self.tokens, entropy=False)

    def update(self):
        """Runs forward, backward and an AdamW step."""

        def loss_of(rows):
            logprobs, _ = util.response_logprobs(self.model, *(x[rows] for x in self.tokens))
            return -logprobs.mean(), len(rows), {}

        self.optimiser.step(list(range(self.sizes["prompts"])), loss_of, 0)


def table_rows(what, rounds):
    """Yields the rows of one sweep, one for each phase."""
    points = [SweepPoint(what, value) for value in SWEEPS[what]]
    largest = points[-3:]
    xs = [point.x for point in largest]
    label = f"weights, by {BY_WEIGHTS[what]}" if what in BY_WEIGHTS else LABELS.get(what, what)
    for phase in ("generate", "score", "update"):
        contenders = {i: partial(getattr(point, phase)) for i, point in enumerate(points)}
        seconds = list(common.time_interleaved(contenders, rounds).values())
        exponents = [common.loglog_slope(xs, ys) for ys in zip(*seconds[-3:])]
        yield {
            "size that grows": label,
            "from": f"{points[0].x:,}",
            "to": f"{xs[-1]:,}",
            "phase": phase,
            "time at smallest, s": seconds[0],
            "time at largest, s": seconds[-1],
            "exponent of time": exponents,
            "exponent of FLOPs": common.loglog_slope(xs, [point.flops for point in largest]),
        }


def main():
    parser = common.make_parser(__doc__, ROUNDS)
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=list(SWEEPS),
        choices=list(SWEEPS),
        help="quantities to grow; default: all",
    )
    args = parser.parse_args()
    report, rounds = common.Report(args.out), args.rounds or ROUNDS
    rows = [row for what in args.sweep for row in table_rows(what, rounds)]
    report.table("Growth of time with size", rows)


if __name__ == "__main__":
    main()
