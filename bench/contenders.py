"""Who competes in peers.py: this repository, a plain tutorial loop, TRL. Each runs for ever.

A contender builds its models once; then each `turns.wait()` lets it do one step, and `turns.tell()`
says how long that took and how much memory it held. All use float32 and learn next to nothing.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from functools import partial, wraps
from types import SimpleNamespace

from bench import common

PROMPTS, LONGEST, EPOCHS, MINIBATCH = 16, 64, 4, 8  # of PPO
GROUPS, ANSWERS, BETA = 2, 8, 0.04  # of GRPO
ROWS, BATCHES = 8, 64  # of SFT and reward models: rows a step, batches before they come again
RATE = 1e-7
SEED = 1  # its prompts of PPO are typical: 49 tokens on average, the longest 88


class Turns:
    """One end of the pipe to peers.py: a line in is one step to do, a line out what it took."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes elsewhere

    def wait(self):
        if not sys.stdin.readline():
            sys.exit()
        self.peak = common.Peak(every=0.005).start()
        self.laps, self.start = {}, time.perf_counter()

    def tell(self):
        laps = self.laps | {"total": time.perf_counter() - self.start}
        self.peak.stop()
        print(json.dumps(laps | {"peak": self.peak.whole}), file=self.out, flush=True)

    def lap(self, name):
        """The first time it is called in a step counts."""
        self.laps.setdefault(name, time.perf_counter() - self.start)

    def timed(self, name, function):
        """The function, its time added to a lap."""

        @wraps(function)
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.laps[name] = self.laps.get(name, 0) + time.perf_counter() - start

        return run


def rows_of(shape, case):
    """What everybody works on: of PPO the same prompts in each round, else another batch."""
    count = {"ppo": PROMPTS, "grpo": GROUPS * BATCHES}.get(case, ROWS * BATCHES)
    return common.written(SEED, count, common.SHAPES[shape]["vocab_size"])


# ------------------------------------------------------------------------------------------------
# This repository


def course_config(**values):
    import util

    limits = dict(max_prompt=125, max_new_tokens=125, steps=10**6, policy_lr=RATE, value_lr=RATE)
    return util.Config("tiny", **(limits | values))


def ppo_config(precision):
    return course_config(
        precision=precision,
        max_new_tokens=LONGEST, rollout=PROMPTS, minibatch=MINIBATCH, ppo_epochs=EPOCHS, lam=0.95,
        kl_coef=0.05, value_coef=0.1, missing_eos_penalty=0, stop_kl=0,
    )  # fmt: skip


def grpo_config():
    rows = GROUPS * ANSWERS
    return course_config(
        max_new_tokens=LONGEST, algorithm="grpo", rollout=rows, answers=ANSWERS, minibatch=rows,
        ppo_epochs=1, kl_in="loss", kl_estimator="k3", kl_coef=BETA, missing_eos_penalty=0,
        stop_kl=0,
    )  # fmt: skip


def a_number(completions, **_):
    """A rule that tells answers apart, for GRPO."""
    return [float(sum(map(int, words.split())) % 97) for words in completions]


def course_crew(shape, cfg):
    """Models with random weights in the roles of the course; PPO has two scorers besides."""
    import util

    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    policy, reference = (common.language_model(shape) for _ in range(2))
    if cfg.algorithm == "grpo":
        return util.Crew(tokenizer, policy, reference, lambda prompts, texts: a_number(texts))
    reward = util.RewardModel.__new__(util.RewardModel)  # as if loaded from a folder
    reward.model, reward.tokenizer, reward.cfg = common.scorer(shape), tokenizer, cfg
    reward.mean, reward.std = 0.0, 1.0
    return util.Crew(tokenizer, policy, reference, reward, common.scorer(shape))


def ours_online(turns, shape, case, precision="float32"):
    """PPO or GRPO in the loop of 3_rlhf, a step each turn."""
    import util

    cfg = ppo_config(precision) if case == "ppo" else grpo_config()
    crew, rows, sample = course_crew(shape, cfg), rows_of(shape, case), util.make_rollout
    util.generate = turns.timed("generate", util.generate)

    def steps(total, optimiser):
        for step in itertools.count():
            turns.wait()
            yield step
            turns.tell()

    def rollout_lap(*args, **how):
        rollout = sample(*args, **how)
        turns.lap("rollout")
        return rollout

    util.make_rollout, util.load_rows = rollout_lap, lambda *_, **__: rows
    nothing = lambda *_, **__: None  # noqa: E731
    stage = SimpleNamespace(
        past=[], say=print, steps=steps, samples=nothing, append=nothing, alert=nothing
    )
    for _ in util.rlhf_loop(crew, cfg, stage, util.LOSSES[case]):
        pass


def ours_offline(turns, shape, case):
    """A step of 1_actor or of 2_critic."""
    import util

    cfg, rows, step = course_config(), rows_of(shape, case), 0
    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    if case == "sft":
        model = common.language_model(shape, dropout=0.1).train()
        loss_of = partial(util.sft_loss, model, tokenizer, cfg)
    else:
        model = common.scorer(shape).train()
        loss_of = partial(util.critic_loss, [model], tokenizer, cfg)
    optimiser = util.Optimiser(cfg, [(model, RATE)], cfg.steps, batch=ROWS)
    while True:
        turns.wait()
        first = step * ROWS % len(rows)
        batch = rows[first : first + ROWS]
        optimiser.step(batch if case == "sft" else [[row] for row in batch], loss_of, step)
        turns.tell()
        step += 1


# ------------------------------------------------------------------------------------------------
# TRL


def gate(turns):
    """A callback that holds the trainer before each step."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.wait()

        def on_step_end(self, *args, **kwargs):
            turns.tell()
            turns.wait()

    return Gate()


def quiet(folder):
    """Arguments of every trainer: float32 on the CPU, nothing said, nothing saved."""
    return dict(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, learning_rate=RATE,
    )  # fmt: skip


def trl_ppo(turns, shape, case):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows_of(shape, case)]
    ppo_trainer.batch_generation = turns.timed("generate", ppo_trainer.batch_generation)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **quiet(folder), per_device_train_batch_size=PROMPTS, total_episodes=PROMPTS * 10**6,
            num_mini_batches=PROMPTS // MINIBATCH, num_ppo_epochs=EPOCHS, response_length=LONGEST,
            temperature=1.0, num_sample_generations=0,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=common.language_model(shape),
            ref_model=common.language_model(shape), reward_model=common.scorer(shape),
            value_model=common.scorer(shape), train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=[gate(turns)],
        )  # fmt: skip
        # Policy and value model run together in the update only.
        trainer.model.register_forward_pre_hook(lambda *_: turns.lap("rollout"))
        trainer.train()


def trl_grpo(turns, shape, case):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of(shape, case)])
    with tempfile.TemporaryDirectory() as folder:
        common.language_model(shape).save_pretrained(folder)  # the reference is read from there
        args = GRPOConfig(
            **quiet(folder), per_device_train_batch_size=GROUPS * ANSWERS, num_generations=ANSWERS,
            max_completion_length=LONGEST, beta=BETA, max_steps=10**6, shuffle_dataset=False,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=folder, args=args, reward_funcs=a_number, train_dataset=rows,
            processing_class=common.number_tokenizer(common.SHAPES[shape]["vocab_size"]),
            callbacks=[gate(turns)],
        )  # fmt: skip
        write, score = trainer._generate_single_turn, trainer._generate_and_score_completions
        trainer._generate_single_turn = turns.timed("generate", write)
        trainer._generate_and_score_completions = turns.timed("rollout", score)
        trainer.train()


def trl_offline(turns, shape, case):
    """SFT or reward model, on rows that TRL turns into ids beforehand."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    rows = rows_of(shape, case)
    if case == "sft":
        rows = [{"prompt": r["prompt"], "completion": f" {r['response']}"} for r in rows]
        trainer, config = SFTTrainer, SFTConfig
        model = common.language_model(shape, dropout=0.1)
    else:
        names = ("chosen", "rejected")
        rows = [{"prompt": r["prompt"]} | {n: f" {r[n]}" for n in names} for r in rows]
        trainer, config, model = RewardTrainer, RewardConfig, common.scorer(shape)
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            **quiet(folder), per_device_train_batch_size=ROWS, max_steps=10**6,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=common.number_tokenizer(common.SHAPES[shape]["vocab_size"]),
            callbacks=[gate(turns)],
        ).train()  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A tutorial


def tutorial_logprobs(model, ids, mask, width):
    """Normalise everything everywhere, then look up; the last `width` tokens are the answer."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -width:]


def tutorial_scores(model, ids, mask):
    """A number at each token."""
    return model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]


def tutorial_rollout(models, ids, mask, turns):
    """Answers, scores, advantages: all that the update needs."""
    import torch
    import torch.nn.functional as F

    policy, reference, reward, value = models
    write, P = turns.timed("generate", policy.generate), ids.shape[1]
    options = dict(max_new_tokens=LONGEST, min_new_tokens=LONGEST, do_sample=True, top_k=0)
    ids = write(input_ids=ids, attention_mask=mask, pad_token_id=common.PAD, **options)
    mask = F.pad(mask, (0, ids.shape[1] - P), value=1)
    old = tutorial_logprobs(policy, ids, mask, LONGEST)
    rewards = -0.05 * (old - tutorial_logprobs(reference, ids, mask, LONGEST))
    rewards[:, -1] += tutorial_scores(reward, ids, mask)[:, -1]
    values = tutorial_scores(value, ids, mask)[:, P - 1 : -1]
    advantages, last = torch.zeros_like(values), 0
    for t in reversed(range(LONGEST)):
        following = values[:, t + 1] if t + 1 < LONGEST else 0
        last = rewards[:, t] + following - values[:, t] + 0.95 * last
        advantages[:, t] = last
    whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return ids, mask, old, values, whitened, advantages + values


def tutorial_loss(policy, value, part):
    ids, mask, old, old_values, advantages, returns = part
    ratio = (tutorial_logprobs(policy, ids, mask, LONGEST) - old).exp()
    policy_loss = -(ratio * advantages).minimum(ratio.clamp(0.8, 1.2) * advantages).mean()
    values = tutorial_scores(value, ids, mask)[:, -LONGEST - 1 : -1]
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    errors = ((values - returns) ** 2).maximum((clipped - returns) ** 2)
    return policy_loss + 0.1 * 0.5 * errors.mean()


def tutorial_ppo(turns, shape, case):
    """PPO as short introductions write it: four models, HF generate, AdamW as it comes."""
    import torch

    policy, reference = (common.language_model(shape) for _ in range(2))
    reward, value = (common.scorer(shape) for _ in range(2))
    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    weights = [*policy.parameters(), *value.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=RATE)
    texts = [row["prompt"] for row in rows_of(shape, case)]
    while True:
        turns.wait()
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        prompt = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            rollout = tutorial_rollout((policy, reference, reward, value), *prompt, turns)
        turns.lap("rollout")
        for _ in range(EPOCHS):
            for index in torch.randperm(PROMPTS).split(MINIBATCH):
                loss = tutorial_loss(policy, value, [column[index] for column in rollout])
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimiser.step()
        turns.tell()


CASES = {
    "ppo": {
        "ours": ours_online,
        "ours, bf16": partial(ours_online, precision="bf16"),
        "TRL 1.12.0": trl_ppo,
        "tutorial loop": tutorial_ppo,
    },
    "grpo": {"ours": ours_online, "TRL 1.16.0": trl_grpo},
    "sft": {"ours": ours_offline, "TRL 1.16.0": trl_offline},
    "reward": {"ours": ours_offline, "TRL 1.16.0": trl_offline},
}
