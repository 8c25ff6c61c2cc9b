"""How much memory and time each stage takes with a real model's shape.

    python bench/memory.py
    python bench/memory.py --stage rlhf --set memory=6

A Llama of 135 million random weights (the shape of SmolLM2-135M), prompts of 200 tokens, answers of
64; every stage is a process of its own, and one runs at a time. PYTHONPATH may name another
checkout, whose code then runs.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import transformers  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402

VOCABULARY, PROMPT, ANSWER = 49152, 200, 64
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=common.EOS, eos_token_id=common.EOS,
    pad_token_id=common.PAD,
)  # fmt: skip
STEPS = 2
# Shares of the rows give each stage its number of steps.
ROWS = {"sft": 8 * STEPS, "preference": 16 * STEPS, "prompt": 16}
PARAMETERS = dict(
    preset="colab", device="cpu", max_prompt=PROMPT, max_new_tokens=ANSWER, validation_rows=0,
    actor_batch=8, actor_epochs=1, critic_batch=16, rollout=16, minibatch=8, ppo_epochs=1,
    steps=STEPS, stop_kl=0, norm_prompts=8, norm_answers=2, sample_every=100,
)  # fmt: skip
PARAMETERS |= {f"{name}_share": count / sum(ROWS.values()) for name, count in ROWS.items()}


def prepare(root):
    """A base model and rows of equal lengths."""
    rng, tokenizer = random.Random(0), common.number_tokenizer(VOCABULARY)
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    util.models.save(model, tokenizer, root / "llama")
    (root / "dataset").mkdir()
    lengths = dict(prompt=PROMPT) | dict.fromkeys(("response", "chosen", "rejected"), ANSWER - 1)
    with open(root / "dataset" / "train.json", "w") as file:
        for _ in range(sum(ROWS.values())):
            row = {name: common.text(rng, n, VOCABULARY) for name, n in lengths.items()}
            file.write(json.dumps(row) + "\n")


def run(stage, root, given):
    """Trains one stage in this process; prints its figures as JSON."""
    cfg = util.Config(root=str(root), **PARAMETERS | {"base_model": str(root / "llama")} | given)
    start, worked = time.perf_counter(), time.process_time()
    steps = []
    for metrics in getattr(util, f"train_{stage}")(cfg):
        now, busy = time.perf_counter(), time.process_time()
        steps.append((now - start, busy - worked, metrics["peak_memory_mb"]))
        start, worked = now, busy
    record = json.loads((root / "model" / stage / "stage.json").read_text())
    later = steps[1:] or steps  # the first one warms up
    figures = {
        "seconds a step": statistics.median(s[0] for s in later),
        "CPU seconds a step": statistics.median(s[1] for s in later),
        "peak of steps, MB": steps[-1][2],
        "peak, MB": record["peak_memory_mb"],
        "loss": metrics.get("loss", 0.0),
    }
    print(json.dumps(figures))


def measured(stage, root, given):
    """The figures of a stage, from a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--inside", str(root), "--set", *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = common.argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = ["actor", "critic", "rlhf"]
    parser.add_argument("--stage", nargs="+", default=stages, choices=["base", *stages])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters")
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    parser.add_argument("--inside", type=Path, help=common.argparse.SUPPRESS)
    args = parser.parse_args()
    given = dict(word.split("=", 1) for word in args.set)
    if args.inside:
        return run(args.stage[0], args.inside, given)
    report, rows = common.Report(args.out), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        measured("base", root, args.set)
        for stage in stages[: stages.index(args.stage[-1]) + 1]:
            figures = measured(stage, root, args.set)
            if stage in args.stage:
                rows.append({"stage": stage} | figures)
        report.table(f"Llama of 135M weights, prompts of {PROMPT}, answers of {ANSWER}", rows)


if __name__ == "__main__":
    main()
