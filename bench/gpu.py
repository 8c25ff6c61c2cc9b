"""Tests the course on a GPU and measures it there, in at most eight minutes.

    make gpu                                        # or, with any Python that has torch:
    python bench/gpu.py --out bench/gpu.json

The tests marked `gpu` come first. Then models with random weights generate answers, beside their
own `generate`, and learn from them with PPO. Each phase is compared with the rates that large
matrix products and reading reach on the same GPU. The tables are written as JSON and, beside it, as
markdown. Without a GPU the command says so and does nothing.

Needs torch, transformers, pandas, psutil, pytest and hypothesis, and no network. Tests of LoRA and
of 4 bits need peft and bitsandbytes; without them they are skipped, with a line that says so.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import util  # noqa: E402
from bench import common  # noqa: E402
from lab import fits, models  # noqa: E402

ANSWER, EPOCHS = 64, 4
SPECIAL = dict(pad_token_id=common.PAD, bos_token_id=common.EOS, eos_token_id=common.EOS)
SHAPES = {
    "tiny": lambda: common.opt_config("tiny"),
    "opt-125m": lambda: common.opt_config("opt125m"),
    "Qwen2.5-0.5B": lambda: AutoConfig.for_model(**fits.SHAPES["qwen2.5-0.5b"] | SPECIAL),
}


def seconds_of(function, device, rounds):
    """The seconds of each of a few runs, after one warm-up."""
    return [fits.seconds(function, device) for _ in range(rounds + 1)][1:]


def model_of(kind, config, device, seed=0):
    torch.manual_seed(seed)
    with torch.device(device):
        return kind.from_config(config).eval()


def generation(config, cfg, device, batch, rounds):
    """Tokens per second of util.generate and of the model's own generate, on the same prompts.

    Ours generates as in training, from weights in float32 under autocast; the other side gets its
    weights in the precision of the products.
    """
    model = model_of(AutoModelForCausalLM, config, device)
    rows = common.random_rows(1, batch, config.vocab_size)
    tokenizer = common.number_tokenizer(config.vocab_size)
    ids, mask = util.encode_prompts(tokenizer, [row["prompt"] for row in rows], cfg, device)
    dtype = models.HALF.get(models.precision(cfg), torch.float32)

    def ours():
        how = dict(max_new_tokens=ANSWER, eos_token_id=-1, pad_token_id=common.PAD)
        with models.autocast(cfg, model):
            util.generate(model, ids, mask, generator=torch.Generator().manual_seed(0), **how)

    def theirs():
        how = dict(do_sample=True, top_k=0, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
        half.generate(input_ids=ids, attention_mask=mask.long(), **how)

    found = {"ours": seconds_of(ours, device, rounds)}
    half = model.to(dtype)
    found["model.generate"] = seconds_of(theirs, device, rounds)
    tokens = batch * ANSWER
    speeds = {f"{name}, tokens/s": [tokens / s for s in took] for name, took in found.items()}
    return speeds | {"speedup": common.ratios(found["model.generate"], found["ours"])}


def crew_of(config, cfg, device):
    """The four models of PPO; the value model and the reward model have the policy's body."""
    tokenizer = common.number_tokenizer(config.vocab_size)
    policy = models.trainable(model_of(AutoModelForCausalLM, config, device), cfg, drop=False)
    reference = models.frozen(model_of(AutoModelForCausalLM, config, device), cfg)
    config = copy.deepcopy(config)
    config.num_labels = 1
    reward = util.RewardModel.__new__(util.RewardModel)  # as if loaded from a folder
    critic = model_of(AutoModelForSequenceClassification, config, device, seed=1)
    reward.model, reward.tokenizer, reward.cfg = models.frozen(critic, cfg), tokenizer, cfg
    reward.mean, reward.std = 0.0, 1.0
    value = model_of(AutoModelForSequenceClassification, config, device, seed=1)
    return util.Crew(tokenizer, policy, reference, reward, models.trainable(value, cfg, drop=False))


def iteration(crew, cfg, prompts, optimiser):
    """One step of 3_rlhf; returns the rollout and the seconds of each phase."""
    device, made = crew.policy.device, []

    def answer():
        rng = util.rng_for(cfg, "x")
        made.append(util.make_rollout(crew, prompts, cfg, rng, optimiser=optimiser))
        made[0].advantages, made[0].returns = util.ppo_advantages(made[0], cfg)

    def update():
        optimiser.length = made[0].lengths().__getitem__
        losses = util.losses_of(crew, made[0], cfg, util.ppo_minibatch_loss)
        for epoch in range(cfg.ppo_epochs):
            for rows in util.batches(len(prompts), cfg.minibatch, util.rng_for(cfg, "y", epoch)):
                optimiser.step(rows, losses, 0)

    answering, updating = fits.seconds(answer, device), fits.seconds(update, device)
    generating = made[0].seconds["generate"]
    spent = {"generate": generating, "score": answering - generating, "update": updating}
    return made[0], spent


def ppo(config, cfg, device, rounds, flops_rate, bytes_rate):
    """Yields a row for each phase of an iteration: its seconds and its share of the GPU's rates."""
    crew = crew_of(config, cfg, device)
    prompts = [r["prompt"] for r in common.random_rows(2, cfg.rollout, config.vocab_size)]
    optimiser = util.rlhf_optimiser(crew, cfg)
    found = [iteration(crew, cfg, prompts, optimiser) for _ in range(rounds + 1)][1:]
    rollout = found[-1][0]
    lengths = list(zip(rollout.tokens[1].sum(1).tolist(), rollout.mask.sum(1).tolist()))
    whole, body = (common.forward_flops(config, lengths, head) for head in (True, False))
    again = models.precision(cfg) != "float32"  # half precision scores the policy, too
    work = {
        "generate": whole,
        "score": (1 + again) * whole + 2 * body,
        "update": 3 * EPOCHS * (whole + body),
    }
    size = 4 if models.precision(cfg) == "float32" else 2
    streamed = size * common.count_weights(config) * rollout.mask.shape[1]
    for phase, flops in work.items():
        seconds = [spent[phase] for _, spent in found]
        yield {
            "phase": phase,
            "seconds": seconds,
            "minimum TFLOP": flops / 1e12,
            "share of the matmul rate": [flops / s / flops_rate for s in seconds],
            "share of the read rate": (
                [streamed / s / bytes_rate for s in seconds] if phase == "generate" else "-"
            ),
        }


def config_for(device, batch, minibatch):
    limits = dict(max_prompt=125, max_new_tokens=ANSWER, steps=10**6, tracker="none")
    rows = dict(rollout=batch, minibatch=minibatch, ppo_epochs=EPOCHS)
    rates = dict(policy_lr=1e-7, value_lr=1e-7, stop_kl=0.0, precision="auto")
    return util.Config("tiny", device=str(device), **limits | rows | rates)


def measure(device, report, shapes=SHAPES, batch=64, minibatches=(16, 64), rounds=3, size=None):
    """All tables for one device."""
    cfg = config_for(device, batch, batch)
    name = models.precision(cfg)
    flops_rate, bytes_rate = fits.measured(device, models.HALF.get(name, torch.float32), size)
    report.table(
        f"Rates of {device}",
        [
            {"what": f"matrix products, {name}", "rate": f"{flops_rate / 1e12:.3g} TFLOP/s"},
            {"what": "reading memory", "rate": f"{bytes_rate / 1e9:.3g} GB/s"},
        ],
    )
    made = [
        {"shape": shape} | generation(make(), cfg, device, batch, rounds)
        for shape, make in shapes.items()
    ]
    report.table(f"Generation of {ANSWER} tokens, batch {batch}, {name}, on {device}", made)
    made = [
        {"shape": shape, "minibatch": minibatch} | row
        for shape, make in shapes.items()
        for minibatch in minibatches
        for row in ppo(
            make(), config_for(device, batch, minibatch), device, rounds, flops_rate, bytes_rate
        )
    ]
    report.table(f"PPO iteration, {batch} answers, {EPOCHS} epochs, {name}, on {device}", made)


def run_tests():
    """Runs the tests marked `gpu`; returns whether all passed."""
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", *map(str, marked)]
    return subprocess.run(line, cwd=ROOT).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu.json")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    args = parser.parse_args()
    device = models.find_device("auto")
    if device.type == "cpu":
        print("This machine has no GPU: nothing to test, nothing to measure.")
        return 0
    passed = args.no_tests or run_tests()
    report = common.Report(args.out)
    measure(device, report)
    measure(torch.device("cpu"), report, {"tiny": SHAPES["tiny"]}, minibatches=(16,))
    args.out.with_suffix(".md").write_text(report.text, encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
