"""The contenders of peers.py: this repository, TRL and a plain tutorial loop.

A contender is a function that never returns. It builds its models once. Then `timer.wait()` blocks
until peers.py asks for a step, and `timer.report()` sends back how long the step took and how much
memory the process held. All contenders use float32 unless their name says otherwise. The learning
rate is so small that they learn next to nothing.
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

PROMPTS, NEW_TOKENS, EPOCHS, MINIBATCH = 16, 64, 4, 8  # PPO; GRPO has the same NEW_TOKENS
GRPO_PROMPTS, ANSWERS, BETA = 2, 8, 0.04  # GRPO: prompts, answers per prompt, KL coefficient
BATCH_SIZE, BATCHES = 8, 64  # SFT and reward model; the batches repeat after BATCHES steps
LR = 1e-7
SEED = 1  # it gives typical prompts for PPO: 49 tokens on average, 88 at most


class StepTimer:
    """The contender's end of the pipe to peers.py: one line in per step, one line of JSON back."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints goes to stderr, not into the pipe

    def wait(self):
        """Blocks until the next step is due, then starts the clock; exits if the pipe is closed."""
        if not sys.stdin.readline():
            sys.exit()
        self.peak = common.Peak(interval=0.005).start()
        self.marks, self.start = {}, time.perf_counter()

    def report(self):
        """Sends the times and the peak memory of the step."""
        times = self.marks | {"total": time.perf_counter() - self.start}
        self.peak.stop()
        print(json.dumps(times | {"peak": self.peak.peak_mb}), file=self.out, flush=True)

    def mark(self, name):
        """Records the time since the start of the step; only the first call in a step counts."""
        self.marks.setdefault(name, time.perf_counter() - self.start)

    def timed(self, name, function):
        """Wraps the function so that its time is added up under `name`."""

        @wraps(function)
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks[name] = self.marks.get(name, 0) + time.perf_counter() - start

        return run


def rows_of(shape, case):
    """The rows for all contenders: the same prompts in every PPO step, other batches otherwise."""
    count = {"ppo": PROMPTS, "grpo": GRPO_PROMPTS * BATCHES}.get(case, BATCH_SIZE * BATCHES)
    return common.random_rows(SEED, count, common.SHAPES[shape]["vocab_size"])


# ------------------------------------------------------------------------------------------------
# This repository


def course_config(**values):
    import util

    limits = dict(max_prompt=125, max_new_tokens=125, steps=10**6, policy_lr=LR, value_lr=LR)
    return util.Config("tiny", **(limits | values))


def ppo_config(precision):
    return course_config(
        precision=precision, max_new_tokens=NEW_TOKENS,
        rollout=PROMPTS, minibatch=MINIBATCH, ppo_epochs=EPOCHS, lam=0.95, kl_coef=0.05,
        value_coef=0.1, missing_eos_penalty=0, stop_kl=0,
    )  # fmt: skip


def grpo_config():
    rows = GRPO_PROMPTS * ANSWERS
    return course_config(
        max_new_tokens=NEW_TOKENS, algorithm="grpo", rollout=rows, answers=ANSWERS, minibatch=rows,
        ppo_epochs=1, kl_in="loss", kl_estimator="k3", kl_coef=BETA, missing_eos_penalty=0,
        stop_kl=0,
    )  # fmt: skip


def rule_reward(completions, **_):
    """The reward of GRPO on both sides: a rule that gives different answers different numbers."""
    return [float(sum(map(int, words.split())) % 97) for words in completions]


def course_crew(shape, cfg):
    """The models of 3_rlhf with random weights; PPO also gets a reward and a value model."""
    import util

    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    policy, reference = (common.language_model(shape) for _ in range(2))
    if cfg.algorithm == "grpo":
        return util.Crew(tokenizer, policy, reference, lambda prompts, texts: rule_reward(texts))
    reward = util.RewardModel.__new__(util.RewardModel)  # as if loaded from a folder
    reward.model, reward.tokenizer, reward.cfg = common.scorer(shape), tokenizer, cfg
    reward.mean, reward.std = 0.0, 1.0
    return util.Crew(tokenizer, policy, reference, reward, common.scorer(shape))


def ours_online(timer, shape, case, precision="float32"):
    """Runs PPO or GRPO in the loop of 3_rlhf, one step per turn."""
    import util

    cfg = ppo_config(precision) if case == "ppo" else grpo_config()
    crew, rows, sample = course_crew(shape, cfg), rows_of(shape, case), util.make_rollout
    util.generate = timer.timed("generate", util.generate)

    def steps(total, optimiser):
        for step in itertools.count():
            timer.wait()
            yield step
            timer.report()

    def marked_rollout(*args, **how):
        rollout = sample(*args, **how)
        timer.mark("rollout")
        return rollout

    util.make_rollout, util.load_rows = marked_rollout, lambda *_, **__: rows
    nothing = lambda *_, **__: None  # noqa: E731
    stage = SimpleNamespace(past=[], say=print, steps=steps, samples=nothing, append=nothing)
    for _ in util.rlhf_loop(crew, cfg, stage, util.LOSSES[case]):
        pass


def ours_offline(timer, shape, case):
    """Runs SFT as in 1_actor or the reward model as in 2_critic, one step per turn."""
    import util

    cfg, rows, step = course_config(), rows_of(shape, case), 0
    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    if case == "sft":
        model = common.language_model(shape, dropout=0.1).train()
        loss_of = partial(util.sft_loss, model, tokenizer, cfg)
    else:
        model = common.scorer(shape).train()
        loss_of = partial(util.critic_loss, [model], tokenizer, cfg)
    optimiser = util.Optimiser(cfg, [(model, LR)], cfg.steps, batch=BATCH_SIZE)
    while True:
        timer.wait()
        first = step * BATCH_SIZE % len(rows)
        batch = rows[first : first + BATCH_SIZE]
        optimiser.step(batch if case == "sft" else [[row] for row in batch], loss_of, step)
        timer.report()
        step += 1


# ------------------------------------------------------------------------------------------------
# TRL


def wait_callback(timer):
    """A callback that makes the trainer wait before each step."""
    from transformers import TrainerCallback

    class WaitForTurn(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            timer.wait()

        def on_step_end(self, *args, **kwargs):
            timer.report()
            timer.wait()

    return WaitForTurn()


def trainer_args(folder):
    """Arguments for every trainer: float32 on the CPU, without logging and saving."""
    return dict(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, learning_rate=LR,
    )  # fmt: skip


def trl_ppo(timer, shape, case):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows_of(shape, case)]
    ppo_trainer.batch_generation = timer.timed("generate", ppo_trainer.batch_generation)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **trainer_args(folder), per_device_train_batch_size=PROMPTS,
            total_episodes=PROMPTS * 10**6, num_mini_batches=PROMPTS // MINIBATCH,
            num_ppo_epochs=EPOCHS, response_length=NEW_TOKENS, temperature=1.0,
            num_sample_generations=0,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=common.language_model(shape),
            ref_model=common.language_model(shape), reward_model=common.scorer(shape),
            value_model=common.scorer(shape), train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=[wait_callback(timer)],
        )  # fmt: skip
        # TRL calls policy and value model as one module only in the update: the rollout ends there.
        trainer.model.register_forward_pre_hook(lambda *_: timer.mark("rollout"))
        trainer.train()


def trl_grpo(timer, shape, case):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of(shape, case)])
    with tempfile.TemporaryDirectory() as folder:
        common.language_model(shape).save_pretrained(folder)  # TRL loads the reference from here
        args = GRPOConfig(
            **trainer_args(folder), per_device_train_batch_size=GRPO_PROMPTS * ANSWERS,
            num_generations=ANSWERS, max_completion_length=NEW_TOKENS, beta=BETA,
            max_steps=10**6, shuffle_dataset=False, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=folder, args=args, reward_funcs=rule_reward, train_dataset=rows,
            processing_class=common.number_tokenizer(common.SHAPES[shape]["vocab_size"]),
            callbacks=[wait_callback(timer)],
        )  # fmt: skip
        generate, score = trainer._generate_single_turn, trainer._generate_and_score_completions
        trainer._generate_single_turn = timer.timed("generate", generate)
        trainer._generate_and_score_completions = timer.timed("rollout", score)
        trainer.train()


def trl_offline(timer, shape, case):
    """Runs SFT or the reward model on rows that TRL turns into ids beforehand."""
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
            **trainer_args(folder), per_device_train_batch_size=BATCH_SIZE, max_steps=10**6,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=common.number_tokenizer(common.SHAPES[shape]["vocab_size"]),
            callbacks=[wait_callback(timer)],
        ).train()  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A tutorial loop


def tutorial_logprobs(model, ids, mask, width):
    """log_softmax at every position, then a lookup; the last `width` tokens are the answer."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -width:]


def tutorial_scores(model, ids, mask):
    """The score at each token."""
    return model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]


def tutorial_rollout(models, ids, mask, timer):
    """Samples answers and returns what the update needs: logprobs, values, advantages, returns."""
    import torch
    import torch.nn.functional as F

    policy, reference, reward, value = models
    generate, P = timer.timed("generate", policy.generate), ids.shape[1]
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True, top_k=0)
    ids = generate(input_ids=ids, attention_mask=mask, pad_token_id=common.PAD, **options)
    mask = F.pad(mask, (0, ids.shape[1] - P), value=1)
    old = tutorial_logprobs(policy, ids, mask, NEW_TOKENS)
    rewards = -0.05 * (old - tutorial_logprobs(reference, ids, mask, NEW_TOKENS))
    rewards[:, -1] += tutorial_scores(reward, ids, mask)[:, -1]
    values = tutorial_scores(value, ids, mask)[:, P - 1 : -1]
    advantages, last = torch.zeros_like(values), 0
    for t in reversed(range(NEW_TOKENS)):
        next_value = values[:, t + 1] if t + 1 < NEW_TOKENS else 0
        last = rewards[:, t] + next_value - values[:, t] + 0.95 * last
        advantages[:, t] = last
    whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return ids, mask, old, values, whitened, advantages + values


def tutorial_loss(policy, value, minibatch):
    """The clipped objective of PPO plus 0.1 times the clipped value loss."""
    ids, mask, old, old_values, advantages, returns = minibatch
    ratio = (tutorial_logprobs(policy, ids, mask, NEW_TOKENS) - old).exp()
    policy_loss = -(ratio * advantages).minimum(ratio.clamp(0.8, 1.2) * advantages).mean()
    values = tutorial_scores(value, ids, mask)[:, -NEW_TOKENS - 1 : -1]
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    errors = ((values - returns) ** 2).maximum((clipped - returns) ** 2)
    return policy_loss + 0.1 * 0.5 * errors.mean()


def tutorial_ppo(timer, shape, case):
    """PPO as short introductions write it: four models, HF generate, AdamW with its defaults."""
    import torch

    policy, reference = (common.language_model(shape) for _ in range(2))
    reward, value = (common.scorer(shape) for _ in range(2))
    tokenizer = common.number_tokenizer(common.SHAPES[shape]["vocab_size"])
    weights = [*policy.parameters(), *value.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=LR)
    texts = [row["prompt"] for row in rows_of(shape, case)]
    while True:
        timer.wait()
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        prompt = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            rollout = tutorial_rollout((policy, reference, reward, value), *prompt, timer)
        timer.mark("rollout")
        for _ in range(EPOCHS):
            for index in torch.randperm(PROMPTS).split(MINIBATCH):
                loss = tutorial_loss(policy, value, [column[index] for column in rollout])
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimiser.step()
        timer.report()


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
