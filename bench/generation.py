"""Compares util.generate with the model's own generate, in one run.

    python bench/generation.py --shape tiny --out generation.json

The model itself sets the lengths of the answers, so that both sides do the same work at no extra
cost: after each token it writes the next higher id, and eos is the highest id. The last token of a
prompt therefore determines the length of its answer.
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
MAX_NEW_TOKENS = 64


def counting_model(name):
    """A model that writes id n + 1 after id n.

    The row of the LM head for id n + 1 is the embedding of id n. The head is scaled so that every
    other token is too unlikely to be sampled, yet no number underflows.
    """
    torch.manual_seed(0)
    config = common.opt_config(name, tie_word_embeddings=False)
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        tokens = model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.copy_(tokens.roll(1, 0) * 60 / config.hidden_size)
    return model


def make_prompts(name, batch, mixed):
    """Prompt ids, their mask, and the number of tokens that each answer will have."""
    rng, vocabulary = random.Random(batch), common.SHAPES[name]["vocab_size"]
    rows, lengths = [], []
    for _ in range(batch):
        drawn = 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / 16))  # geometric, mean 16
        lengths.append(min(drawn, MAX_NEW_TOKENS) if mixed else MAX_NEW_TOKENS)
        last = vocabulary - 1 - (drawn if mixed else 2 * MAX_NEW_TOKENS)
        middle = [rng.randrange(2, vocabulary) for _ in range(common.prompt_length(rng) - 1)]
        rows.append([*middle, last])
    return *util.pad(rows, common.PAD, "left", "cpu"), lengths


def compare(model, name, batch, mixed, rounds):
    """Measures both sides on one batch; returns one row of the table."""
    ids, mask, lengths = make_prompts(name, batch, mixed)
    eos, written = model.config.vocab_size - 1, {}
    limits = dict(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=common.PAD)

    def ours():
        generator = torch.Generator().manual_seed(0)
        written["ours"] = util.generate(model, ids, mask, generator=generator, **limits)[1].sum(1)

    def theirs():
        sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True)
        out = model.generate(input_ids=ids, attention_mask=mask.long(), **sampling, **limits)
        written["HF generate"] = (out[:, ids.shape[1] :] != common.PAD).sum(1)

    seconds = common.time_interleaved({"ours": ours, "HF generate": theirs}, rounds)
    planned = all(tokens.tolist() == lengths for tokens in written.values())
    assert planned, "a side wrote answers of other lengths than planned"
    speeds = {f"{k}, tokens/s": [sum(lengths) / s for s in v] for k, v in seconds.items()}
    speedup = {"speedup": common.ratios(seconds["HF generate"], seconds["ours"])}
    setting = {"batch": batch, "lengths": "mixed" if mixed else "equal"}
    real = {"share of real tokens": sum(lengths) / batch / max(lengths)}
    return setting | real | speeds | speedup


def main():
    args = common.make_parser(__doc__, ROUNDS).parse_args()
    report = common.Report(args.out)
    for name in args.shape:
        model, rounds = counting_model(name), args.rounds or ROUNDS[name]
        rows = [
            compare(model, name, batch, mixed, rounds)
            for mixed in (False, True)
            for batch in BATCHES[name]
        ]
        report.table(f"Generation, {name}", rows)


if __name__ == "__main__":
    main()
