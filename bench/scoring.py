"""Compares util.response_logprobs with log_softmax over every position.

    python bench/scoring.py --shape tiny --out scoring.json

Both sides compute the logprobs of answers in eight rows of 128 + 64 tokens. The script measures
memory in separate runs after the timed ones. util.response_logprobs can also return entropies; the
other side does not compute them, so they are switched off here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402
from lab import memory  # noqa: E402

ROUNDS = {"tiny": 15, "opt125m": 3}
ROWS, PROMPT, ANSWER = 8, 128, 64


def over_all_positions(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """The textbook version: logits and log_softmax at every position, then a lookup."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs[:, -response_ids.shape[1] :] * response_mask


def contenders(model, tokens, backward):
    """Both versions as functions without arguments, on the same model."""

    def run(score):
        with torch.set_grad_enabled(backward):
            logprobs = score(model, *tokens)
            if backward:
                (-logprobs.mean()).backward()
                model.zero_grad(set_to_none=True)
        return logprobs.detach()

    return {
        "ours": lambda: run(lambda *args: util.response_logprobs(*args, entropy=False)[0]),
        "all positions": lambda: run(over_all_positions),
    }


def table_rows(name, rounds):
    """Yields two rows of the table: without gradients and with them."""
    model, rng = common.language_model(name), torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (ROWS, PROMPT + ANSWER), generator=rng)
    ones = torch.ones_like(ids, dtype=torch.bool)
    tokens = ids[:, :PROMPT], ones[:, :PROMPT], ids[:, PROMPT:], ones[:, PROMPT:]
    for backward in (False, True):
        both = contenders(model, tokens, backward)
        torch.testing.assert_close(*(run() for run in both.values()), rtol=0, atol=1e-4)
        seconds = common.time_interleaved(both, rounds)
        peaks = {}
        for who, run in both.items():
            memory.give_back()
            peak = common.Peak().start()
            run()
            peak.stop()
            peaks[f"{who}, MB added"] = peak.increase_mb
        speedup = common.ratios(seconds["all positions"], seconds["ours"])
        yield {
            "pass": "forward and backward" if backward else "forward",
            **{f"{who}, s": took for who, took in seconds.items()},
            "speedup": speedup,
            **peaks,
        }


def main():
    args = common.make_parser(__doc__, ROUNDS).parse_args()
    report = common.Report(args.out)
    for name in args.shape:
        title = f"Logprobs of {ROWS} x ({PROMPT} + {ANSWER}), {name}"
        report.table(title, list(table_rows(name, args.rounds or ROUNDS[name])))


if __name__ == "__main__":
    main()
