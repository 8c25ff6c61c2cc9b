"""Sampling answers: util.generate against the model's own generate, in one run.

    python bench/generation.py --shape tiny --out generation.json

The lengths are set by the model itself, so both sides do the same work and pay nothing for it: each
token is followed by the next higher id and eos is the highest, hence the last token of a prompt
says how long its answer becomes.
"""

import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import OPTForCausalLM  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402

BATCHES = {"tiny": (8, 16, 32, 64), "opt125m": (8, 16, 32)}
ROUNDS = {"tiny": 9, "opt125m": 2}
LONGEST = 64


def counting_model(name):
    """Writes n + 1 after n: what a token looks like in the body is what its successor answers to.

    The head is scaled so that other tokens are too unlikely to be met, yet no number underflows.
    """
    torch.manual_seed(0)
    shape = common.shape_of(name, tie_word_embeddings=False)
    model = OPTForCausalLM(shape).eval()
    with torch.no_grad():
        tokens = model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.copy_(tokens.roll(1, 0) * 60 / shape.hidden_size)
    return model


def prompts(name, batch, mixed):
    """Prompt ids and mask, and how many tokens each answer will have."""
    rng, vocabulary = random.Random(batch), common.SHAPES[name]["vocab_size"]
    rows, lengths = [], []
    for _ in range(batch):
        drawn = 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / 16))  # geometric, mean 16
        lengths.append(min(drawn, LONGEST) if mixed else LONGEST)
        last = vocabulary - 1 - (drawn if mixed else 2 * LONGEST)
        middle = [rng.randrange(2, vocabulary) for _ in range(common.prompt_length(rng) - 1)]
        rows.append([*middle, last])
    return *util.pad(rows, common.PAD, "left", "cpu"), lengths


def duel(model, name, batch, mixed, rounds):
    """One line of the table."""
    ids, mask, lengths = prompts(name, batch, mixed)
    eos, written = model.config.vocab_size - 1, {}
    limits = dict(max_new_tokens=LONGEST, eos_token_id=eos, pad_token_id=common.PAD)

    def ours():
        generator = torch.Generator().manual_seed(0)
        written["ours"] = util.generate(model, ids, mask, generator=generator, **limits)[1].sum(1)

    def theirs():
        sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True)
        out = model.generate(input_ids=ids, attention_mask=mask.long(), **sampling, **limits)
        written["HF generate"] = (out[:, ids.shape[1] :] != common.PAD).sum(1)

    seconds = common.in_turns({"ours": ours, "HF generate": theirs}, rounds)
    assert all(tokens.tolist() == lengths for tokens in written.values()), "not the same work"
    speeds = {f"{k}, tokens/s": [sum(lengths) / s for s in v] for k, v in seconds.items()}
    faster = {"ours is faster, times": common.ratios(seconds["HF generate"], seconds["ours"])}
    what = {"batch": batch, "lengths": "mixed" if mixed else "equal"}
    return what | {"share not padding": sum(lengths) / batch / max(lengths)} | speeds | faster


def main():
    args = common.arguments(__doc__, ROUNDS).parse_args()
    report = common.Report(args.out)
    for name in args.shape:
        model, rounds = counting_model(name), args.rounds or ROUNDS[name]
        rows = [
            duel(model, name, batch, mixed, rounds)
            for mixed in (False, True)
            for batch in BATCHES[name]
        ]
        report.table(f"Generation, {name}", rows)


if __name__ == "__main__":
    main()
