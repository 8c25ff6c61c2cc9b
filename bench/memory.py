"""Measures the memory and time of each stage with a model of realistic shape.

    python bench/memory.py
    python bench/memory.py --stage rlhf --set memory=6

The model is a Llama of 135 million random weights (the shape of SmolLM2-135M). Prompts have 200
tokens and answers 64. Each stage runs in a process of its own, one at a time. If PYTHONPATH names
another checkout, the code of that checkout runs.
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
# The course splits the rows by these shares, so each stage gets the rows that its steps need.
ROWS = {"sft": 8 * STEPS, "preference": 16 * STEPS, "prompt": 16}
PARAMETERS = dict(
    preset="colab", device="cpu", max_prompt=PROMPT, max_new_tokens=ANSWER, validation_rows=0,
    actor_batch=8, actor_epochs=1, critic_batch=16, rollout=16, minibatch=8, ppo_epochs=1,
    steps=STEPS, stop_kl=0, norm_prompts=8, norm_answers=2, sample_every=100,
)  # fmt: skip
PARAMETERS |= {f"{name}_share": count / sum(ROWS.values()) for name, count in ROWS.items()}


def prepare(root):
    """Writes a base model and rows of equal lengths into the folder."""
    rng, tokenizer = random.Random(0), common.number_tokenizer(VOCABULARY)
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    util.models.save(model, tokenizer, root / "llama")
    (root / "dataset").mkdir()
    lengths = dict(prompt=PROMPT) | dict.fromkeys(("response", "chosen", "rejected"), ANSWER - 1)
    with open(root / "dataset" / "train.json", "w") as file:
        for _ in range(sum(ROWS.values())):
            row = {name: common.random_text(rng, n, VOCABULARY) for name, n in lengths.items()}
            file.write(json.dumps(row) + "\n")


def run_stage(stage, root, overrides):
    """Trains one stage in this process and prints its measurements as JSON."""
    parameters = PARAMETERS | {"base_model": str(root / "llama")} | overrides
    cfg = util.Config(root=str(root), **parameters)
    start, cpu_start = time.perf_counter(), time.process_time()
    steps = []
    for metrics in getattr(util, f"train_{stage}")(cfg):
        now, cpu_now = time.perf_counter(), time.process_time()
        steps.append((now - start, cpu_now - cpu_start, metrics["peak_memory_mb"]))
        start, cpu_start = now, cpu_now
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


def measure(stage, root, overrides):
    """Runs a stage in a process of its own; returns its measurements."""
    command = [sys.executable, __file__, "--stage", stage, "--inside", str(root)]
    command += ["--set", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = common.argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = ["actor", "critic", "rlhf"]
    parser.add_argument(
        "--stage",
        nargs="+",
        default=stages,
        choices=["base", *stages],
        help="stages to measure; default: all three",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the course"
    )
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    parser.add_argument("--inside", type=Path, help=common.argparse.SUPPRESS)
    args = parser.parse_args()
    overrides = dict(word.split("=", 1) for word in args.set)
    if args.inside:
        return run_stage(args.stage[0], args.inside, overrides)
    report, rows = common.Report(args.out), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        measure("base", root, args.set)
        for stage in stages[: stages.index(args.stage[-1]) + 1]:
            figures = measure(stage, root, args.set)
            if stage in args.stage:
                rows.append({"stage": stage} | figures)
        report.table(f"Llama of 135M weights, prompts of {PROMPT}, answers of {ANSWER}", rows)


if __name__ == "__main__":
    main()
