"""Compares the memory that `python -m lab fits` estimates with measured peaks.

    python bench/fits.py --out docs/fits.json             # measure and compare
    python bench/fits.py --out docs/fits.json --models    # estimate well-known models
    python bench/fits.py --page docs/fits.json            # write docs/scale.md
    python bench/fits.py --gpu                            # compare on this machine's GPU

Each case is two updates of small random models on the CPU, in a process of its own. Measured are
the peak of all tensors, from torch's profiler, and that of the process's resident memory, which
also holds free blocks between used ones. The estimate is compared with the first.
"""

import argparse
import json
import os
import random
import sys
import traceback
import warnings
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers import AutoModelForSequenceClassification as AutoModelForScores  # noqa: E402

import util  # noqa: E402
from bench import common  # noqa: E402
from lab import fits, matmul, memory, models, record  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = dict(pad_token_id=common.PAD, bos_token_id=common.EOS, eos_token_id=common.EOS)
OPT = SPECIAL | dict(
    model_type="opt", vocab_size=5000, hidden_size=384, word_embed_proj_dim=384, ffn_dim=1536,
    num_hidden_layers=4, num_attention_heads=6, dropout=0.0,
)  # fmt: skip
LLAMA = SPECIAL | dict(
    model_type="llama", vocab_size=16000, hidden_size=576, intermediate_size=1024,
    num_hidden_layers=5, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
QWEN = SPECIAL | dict(
    model_type="qwen2", vocab_size=50000, hidden_size=256, intermediate_size=1024,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
CASES = {  # name: (shape, stage, parameters)
    "OPT, SFT, 4 rows": (OPT, "1_actor SFT", dict(actor_batch=4)),
    "OPT, SFT, 12 rows": (OPT, "1_actor SFT", dict(actor_batch=12)),
    "Qwen2, SFT, LoRA": (QWEN, "1_actor SFT", dict(actor_batch=8, lora_rank=16)),
    "Llama, SFT, checkpointing": (
        LLAMA, "1_actor SFT", dict(actor_batch=8, gradient_checkpointing=True),
    ),
    "Llama, SFT, 2 of 8 rows": (LLAMA, "1_actor SFT", dict(actor_batch=8, micro_batch=2)),
    "Llama, critic": (LLAMA, "2_critic", dict(critic_batch=4)),
    "OPT, PPO": (OPT, "3_rlhf PPO", dict(rollout=8, minibatch=8)),
    "Llama, PPO, LoRA": (LLAMA, "3_rlhf PPO", dict(rollout=8, minibatch=8, lora_rank=16)),
    "Qwen2, GRPO": (QWEN, "3_rlhf GRPO, RLOO", dict(rollout=8, minibatch=8)),
    "OPT, DPO": (OPT, "3_rlhf DPO", dict(dpo_batch=4)),
    "Llama, DPO, LoRA, checkpointing": (
        LLAMA, "3_rlhf DPO", dict(dpo_batch=4, lora_rank=16, gradient_checkpointing=True),
    ),
}  # fmt: skip
QWEN_05B = fits.SHAPES["qwen2.5-0.5b"] | SPECIAL
ON_GPU = {  # the same for a GPU, with true shapes
    "opt-125m, PPO, 16 rows": (
        fits.SHAPES["opt-125m"] | SPECIAL | dict(dropout=0.0), "3_rlhf PPO",
        dict(rollout=16, minibatch=16),
    ),
    "Qwen2.5-0.5B, SFT, 16 rows": (QWEN_05B, "1_actor SFT", dict(actor_batch=16)),
    "Qwen2.5-0.5B, critic, 8 pairs": (QWEN_05B, "2_critic", dict(critic_batch=8)),
    "Qwen2.5-0.5B, PPO, LoRA, 16 rows": (
        QWEN_05B, "3_rlhf PPO", dict(rollout=16, minibatch=16, lora_rank=16),
    ),
    "Qwen2.5-0.5B, GRPO, 4 of 16 rows": (
        QWEN_05B, "3_rlhf GRPO, RLOO", dict(rollout=16, minibatch=16, micro_batch=4),
    ),
    "Qwen2.5-0.5B, PPO, checkpointing, 16 rows": (
        QWEN_05B, "3_rlhf PPO", dict(rollout=16, minibatch=16, gradient_checkpointing=True),
    ),
}  # fmt: skip
CPU = fits.Machine("CPU", None, 1e12, 1e10, "float32", gpu=False)
NARROW = dict(hidden_size=32, intermediate_size=64, word_embed_proj_dim=32, ffn_dim=64)
NARROW |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
LENGTHS = dict(max_prompt=48, max_new_tokens=32, watchdog=0, micro_batch=0)
MODELS = "opt-125m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"
ROOMS = 16, 24, 80  # GB
SHORT = {
    "": "all weights",
    "gradient_checkpointing=True": "checkpointing",
    "lora_rank=16": "LoRA",
    "lora_rank=16, gradient_checkpointing=True": "LoRA + checkpointing",
    "lora_rank=16, gradient_checkpointing=True, load_in_4bit=True": "4 bit",
}


def config_of(case, device="cpu"):
    _, stage, given = (CASES | ON_GPU)[case]
    given = LENGTHS | given | {"micro_batch": given.get("micro_batch", 64), "device": str(device)}
    return fits.config_of(util, given, fits.STAGES[stage][1])


def estimated(case, machine=CPU):
    """The estimate in MB, without what Python and the kernels need."""
    shape, stage, _ = (CASES | ON_GPU)[case]
    shape = AutoConfig.for_model(**shape)
    counter = fits.Counter(util, fits.STAGES[stage][0], config_of(case), shape, machine)
    counter.stage.writes = None  # updates only
    return (counter.estimate().peak - memory.OVERHEAD) / 1e6


def measured(case):
    """Two peaks of two updates in MB: of torch's allocations, and of the resident memory above what
    the process held before. A much narrower model has run by then, so the code that an update needs
    is in memory already."""
    shape, stage, _ = CASES[case]
    cfg, tokenizer = config_of(case), common.number_tokenizer(shape["vocab_size"])
    train(cfg.changed(max_prompt=20, max_new_tokens=8), stage, tokenizer, shape | NARROW)
    matmul.onednn_is_better()
    memory.give_back()
    peak = common.Peak().start()
    with torch.profiler.profile(profile_memory=True) as profile:
        train(cfg, stage, tokenizer, shape)
        peak.stop()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return {"allocated": max(accumulate(changes)) / 1e6, "resident": peak.increase_mb}


def row_on_gpu(case, device):
    """The estimate with all that `fits` adds to it, and the peak of all tensors, in MB."""
    shape, stage, _ = ON_GPU[case]
    cfg = config_of(case, device)
    machine = fits.Machine("GPU", None, 1e12, 1e10, models.precision(cfg))
    expected = estimated(case, machine) + memory.OVERHEAD / 1e6
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    train(cfg, stage, common.number_tokenizer(shape["vocab_size"]), shape)
    found = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return {"estimated": expected, "allocated": found, "error": expected / found - 1}


def train(cfg, stage, tokenizer, shape):
    """Two updates of a stage with new models."""

    def built(kind, **more):
        model = kind.from_config(AutoConfig.for_model(**shape, **more), dtype=torch.float32)
        return model.eval().to(models.pick_device(cfg))

    def learner(kind, **more):
        return models.trainable(built(kind, **more), cfg, drop=False)

    rng, vocabulary = random.Random(0), shape["vocab_size"]
    lengths = dict(prompt=cfg.max_prompt)  # with the template it is longer: its front is cut off
    lengths |= dict.fromkeys(("response", "chosen", "rejected"), cfg.max_new_tokens - 1)
    rows = [
        {name: common.random_text(rng, n, vocabulary) for name, n in lengths.items()}
        for _ in range(16)
    ]
    scorer = dict(num_labels=1)
    if stage == "2_critic":
        critic = learner(AutoModelForScores, **scorer).train()
        batch, frozen, learning = [[row] for row in rows[: cfg.critic_batch]], [], [critic]

        def loss_of(batch):
            return util.critic_loss([critic], tokenizer, cfg, batch)
    else:
        policy = learner(AutoModelForCausalLM)
        learning, frozen = [policy], []
    if stage == "1_actor SFT":
        batch = rows[: cfg.actor_batch]
        policy.train()

        def loss_of(batch):
            return util.sft_loss(policy, tokenizer, cfg, batch)

    if "3_rlhf" in stage:
        reference = None if cfg.lora_rank else models.frozen(built(AutoModelForCausalLM), cfg)
        crew = util.Crew(tokenizer, policy, reference, None)
        frozen = [m for m in [reference] if m is not None]
    if stage == "3_rlhf DPO":
        batch = rows[: cfg.dpo_batch]

        def loss_of(batch):
            pairs = util.pair_logprobs(policy, tokenizer, batch, cfg)
            loss, stats = util.dpo_loss(*pairs[:2], 0, 0, beta=cfg.dpo_beta)
            return loss, len(batch), stats
    elif "3_rlhf" in stage:
        frozen.append(models.frozen(built(AutoModelForScores, **scorer), cfg))  # the reward model
        if cfg.algorithm == "ppo":
            crew.value_model = learner(AutoModelForScores, **scorer)
            learning.append(crew.value_model)
        batch, rollout = list(range(cfg.minibatch)), sampled(cfg, vocabulary)
        loss_of = util.losses_of(crew, rollout, cfg, util.LOSSES[cfg.algorithm])

    rates = [(model, 1e-4) for model in learning]
    optimiser = util.Optimiser(cfg, rates, 2, batch=len(batch), frozen=frozen)
    for step in range(2):
        optimiser.step(batch, loss_of, step)


def sampled(cfg, vocabulary):
    """A rollout of random tokens, as long as they may be."""
    draw, device = torch.Generator().manual_seed(0), models.pick_device(cfg)
    prompts = torch.randint(
        2, vocabulary, (cfg.rollout // cfg.answers, cfg.max_prompt), generator=draw
    )
    answers = torch.randint(2, vocabulary, (cfg.rollout, cfg.max_new_tokens), generator=draw)
    prompts = prompts.repeat_interleave(cfg.answers, 0).to(device)
    answers = answers.to(device)
    tokens = prompts, torch.ones_like(prompts) > 0, answers, torch.ones_like(answers) > 0
    zeros = torch.zeros(answers.shape, device=device)
    found = util.Rollout(
        [], [], tokens, zeros, zeros - 9, zeros - 9, zeros, zeros[:, 0], zeros[:, 0], cfg.kl_coef,
        {}, {}, None,
    )  # fmt: skip
    found.advantages = found.returns = zeros + 1
    return found


def in_new_process(work):
    """What `work()` returns, computed by a copy of this process: nobody imports anything twice."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


def row_of(case):
    found = in_new_process(partial(measured, case))
    found["estimated"] = in_new_process(partial(estimated, case))
    return found | {"error": found["estimated"] / found["allocated"] - 1}


# ------------------------------------------------------------------------------------------------
# What fits on which card


def needs(name):
    """{stage: {GB of a card: [what to change, peak in GB]}}, each the first way that fits with one
    row at a time."""
    cfg, found = util.Config("colab"), {}
    machine, shape = fits.machine_of(cfg, ROOMS[-1]), fits.shape_of(name, cfg)
    for stage, (function, own) in fits.STAGES.items():
        if stage != "4_test":
            counter = fits.Counter(util, function, util.Config("colab", **own), shape, machine)
            ways = [("", counter, 1), *fits.lighter(counter)]
            found[stage] = {room: cheapest(ways, room) for room in ROOMS}
    return found


def cheapest(ways, room):
    if room == 16:  # a T4 knows no bf16, and fp16 cannot be sharded
        ways = [way for way in ways if way[2] == 1]
    for words, counter, shards in ways:
        if counter.within(room * 1e9, shards):
            return [words, counter.least(shards) / 1e9]
    return None


def as_text(way):
    if way is None:
        return "-"
    words, peak = way
    cards = "".join(filter(str.isdigit, words))
    return f"{SHORT.get(words, f'{cards} cards')}, {peak:.1f}"


def card_table(found, room):
    head = ["", *next(iter(found.values()))]
    rows = [[name, *(as_text(x[str(room)]) for x in ways.values())] for name, ways in found.items()]
    return record.table(head, rows, {})


def write_page(found):
    page, names = ROOT / "docs" / "scale.md", ("estimated", "allocated", "resident")
    cells = [
        [case, *(f"{x[name]:.0f}" for name in names), f"{abs(x['error']):.1%}"]
        for case, x in found["cases"].items()
    ]
    head = ["MB", *names, "error"]
    record.fill(page, "fits measured", record.table(head, cells, {}))
    for room in ROOMS:
        record.fill(page, f"fits {room} GB", card_table(found["needs"], room))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*CASES], help="default: all cases")
    parser.add_argument("--models", action="store_true", help="estimate well-known models instead")
    parser.add_argument("--out", type=Path, help="write all figures to this file as JSON")
    parser.add_argument("--page", type=Path, help="write docs/scale.md from this file and stop")
    parser.add_argument("--gpu", action="store_true", help="compare on a GPU, and stop")
    args = parser.parse_args()
    if args.page:
        return write_page(json.loads(args.page.read_text()))
    if args.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("This machine has no CUDA GPU.")
        for case in ON_GPU:
            print(case, row_on_gpu(case, models.find_device("cuda")), flush=True)
        return
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore", FutureWarning)
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    work, names = (needs, MODELS) if args.models else (row_of, args.only)
    found |= {"needs": {}} if args.models else {"machine": common.describe_machine(), "cases": {}}
    for name in names:
        result = found["needs" if args.models else "cases"][name] = work(name)
        print(name, result, flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
