"""Every number of the course: its name, its default, its presets, its checks."""

import re
from dataclasses import dataclass
from pathlib import Path

from lab import CourseError
from lab.runs import has_record, read_record
from lab.settings import Settings, knob

COLAB = dict(
    actor_lr=2e-5, actor_batch=4, actor_epochs=3, critic_lr=1e-5, critic_batch=8, critic_epochs=1,
    max_prompt=384, max_new_tokens=128, steps=100, rollout=32, minibatch=8, ppo_epochs=4,
    policy_lr=1e-5, value_lr=1e-5, kl_coef=0.1, clip_ratio=0.2, lam=0.95, eval_batch=64,
    dpo_beta=0.1, dpo_lr=5e-6, dpo_batch=8, precision="auto",
)  # fmt: skip
PRESETS = {
    "tiny": {},  # the defaults below
    "colab": COLAB,
    "full": COLAB | dict(gamma=0.99, lam=0.95, value_coef=0.5, entropy_coef=0.01),
    "smoke": dict(
        pretrain_documents=1_500, pretrain_steps=12, pretrain_batch=4, hidden_size=32,
        vocab_size=600, sft_share=0.02, preference_share=0.02, prompt_share=0.01, actor_batch=16,
        validation_rows=16, norm_prompts=4, steps=2, rollout=8, minibatch=4, max_new_tokens=16,
        sample_every=1, test_rows=24, eval_batch=24,
    ),
}  # fmt: skip


ALGORITHMS = {
    "grpo": dict(answers=4, loss_mean="answer"),
    "rloo": dict(answers=4),
}
MODEL = r"(?<![\w.])model(?![\w.])"  # the reward model, as a word of its own
ONE_OF = {
    "precision": ("float32", "bf16", "fp16", "auto"),
    "kl_in": ("reward", "loss"),
    "kl_estimator": ("k1", "k2", "k3"),
    "loss_mean": ("token", "answer"),
    "value_init": ("critic", "actor"),
    "ensemble_rule": ("mean", "min", "cautious"),
    "dpo_loss": ("sigmoid", "hinge", "ipo"),
}


@dataclass(init=False, frozen=True)
class Config(Settings):
    """Every number of the course. The defaults are `tiny`; None means "as the preset says"."""

    # all stages
    preset: str = knob("auto", "all", "tiny, colab, full or smoke; auto: what suits the base model")
    root: str = knob(".", "all", "the folder that holds dataset/, tokenizer/ and model/")
    seed: int = knob(0, "all", "the same seed on the same machine gives the same numbers")
    device: str = knob("auto", "all", "cpu, cuda, cuda:1, ...; auto: the first GPU, else the CPU")
    max_prompt: int = knob(80, "all", "tokens of a prompt; longer ones lose their front")
    max_new_tokens: int = knob(40, "all", "tokens of an answer, its eos included")
    sft_share: float = knob(0.4, "all", "share of train.json that 1_actor learns from")
    preference_share: float = knob(0.5, "all", "share whose pairs 2_critic learns from")
    prompt_share: float = knob(0.1, "all", "share whose prompts 3_rlhf answers")
    eval_batch: int = knob(250, "all", "rows at a time where no gradient is needed")
    memory: float = knob(
        0.0, "all", "GB that a stage may take, weights included; 0: 60 % of what is free"
    )
    validation_rows: int = knob(200, "actor", "rows of the SFT share kept for validation")
    weight_decay: float = knob(0.01, "base actor critic rlhf", "AdamW's weight decay")
    beta1: float = knob(0.9, "base actor critic rlhf", "AdamW's first moment decay")
    beta2: float = knob(0.95, "base actor critic rlhf", "AdamW's second moment decay")
    grad_clip: float = knob(1.0, "base actor critic rlhf", "largest norm of a gradient")
    lr_floor: float = knob(0.1, "base actor critic rlhf", "share of the peak rate at the end")
    warmup: float = knob(0.05, "base actor critic rlhf", "share of the steps spent warming up")
    resume: bool = knob(True, "base actor critic rlhf", "go on where a stopped run was")
    resume_changed: bool = knob(
        False, "base actor critic rlhf", "go on although parameters or data are other ones now"
    )
    checkpoint_minutes: float = knob(
        2.0, "base actor critic rlhf", "minutes between two checkpoints; 0: one after every step"
    )
    micro_batch: int = knob(
        0, "base actor critic rlhf", "rows at once in an update, which stays the same; 0: as fit"
    )
    cpu_fallback: bool = knob(
        False, "base actor critic rlhf", "GPU memory too small for one row: go on with the CPU"
    )
    reader: str = knob("", "all", "module.function(path) -> rows: a reader of your own; else JSON")
    trust_remote_code: bool = knob(False, "all", "run the code that a model brings along; read it")
    precision: str = knob(
        "float32", "all", "what matrices multiply in: float32, bf16, fp16; auto: what the GPU likes"
    )
    lora_rank: int = knob(0, "actor critic rlhf", "rank of the adapters that learn; 0: all weights")
    lora_alpha: float = knob(32.0, "actor critic rlhf", "adapters count alpha / rank times")
    load_in_4bit: bool = knob(
        False, "actor critic rlhf", "QLoRA: frozen weights in 4 bits (a GPU and bitsandbytes)"
    )
    gradient_checkpointing: bool = knob(
        False, "actor critic rlhf", "less memory, a third more time: activations anew in backward"
    )
    # 0_download
    base_model: str = knob("auto", "base", "auto, tiny, a hub name or a local folder")
    fallback: bool = knob(True, "base", "a model that will not load: take tiny (else: an error)")
    vocab_size: int = knob(1280, "base", "tiny: tokens of the tokenizer at most")
    hidden_size: int = knob(128, "base", "tiny: width")
    layers: int = knob(2, "base", "tiny: layers")
    heads: int = knob(4, "base", "tiny: attention heads")
    init_std: float = knob(0.06, "base", "tiny: scale of the random weights; decides all (see 0)")
    pretrain_documents: int = knob(50_000, "base", "tiny: documents of pretraining text")
    pretrain_steps: int = knob(1_000, "base", "tiny: steps of pretraining")
    pretrain_batch: int = knob(16, "base", "tiny: blocks a step")
    pretrain_length: int = knob(128, "base", "tiny: tokens a block, and of the longest text")
    pretrain_lr: float = knob(4e-3, "base", "tiny: peak learning rate")
    # 1_actor
    actor_lr: float = knob(1e-3, "actor", "peak learning rate")
    actor_batch: int = knob(32, "actor", "rows a step")
    actor_epochs: int = knob(1, "actor", "passes over the rows")
    # 2_critic
    critic_lr: float = knob(5e-4, "critic", "peak learning rate")
    critic_batch: int = knob(16, "critic", "pairs a step")
    critic_epochs: int = knob(1, "critic", "passes over the pairs")
    score_penalty: float = knob(0.001, "critic", "price of large scores: keeps them near zero")
    ensemble: int = knob(1, "critic", "reward models, each on a shuffle of its own")
    norm_prompts: int = knob(64, "critic", "prompts whose answers set the scale of the scores")
    norm_answers: int = knob(4, "critic", "answers to each of them")
    # 3_rlhf
    algorithm: str = knob(
        "ppo", "rlhf", "ppo, grpo, rloo, dpo, or module.function: a loss of yours"
    )
    reward: str = knob("model", "rlhf test", 'a sum like "model - 0.01*length + my.reward"')
    ensemble_rule: str = knob(
        "mean", "rlhf test", "mean, min, or cautious: mean minus k deviations"
    )
    ensemble_k: float = knob(1.0, "rlhf test", "the k of cautious")
    steps: int = knob(24, "rlhf", "rollouts")
    rollout: int = knob(96, "rlhf", "answers a rollout")
    answers: int = knob(1, "rlhf", "answers to each prompt of a rollout (grpo, rloo: 4)")
    ppo_epochs: int = knob(2, "rlhf", "passes over each rollout")
    minibatch: int = knob(48, "rlhf", "answers an update")
    policy_lr: float = knob(4e-4, "rlhf", "peak learning rate of the policy")
    value_lr: float = knob(5e-4, "rlhf", "peak learning rate of the value model")
    temperature: float = knob(1.0, "rlhf test", "of sampling, and of every log-prob")
    kl_in: str = knob("reward", "rlhf", "reward or loss: where the KL is paid for")
    kl_estimator: str = knob(
        "k1", "rlhf", "k1, k2 or k3: how the KL is estimated (in the loss: k3 or k2)"
    )
    kl_coef: float = knob(0.2, "rlhf", "price of a nat of KL to the actor, per token")
    kl_target: float = knob(0.0, "rlhf", "KL per answer that kl_coef aims at; 0: it stays fixed")
    kl_horizon: int = knob(2_000, "rlhf", "answers over which kl_coef adapts")
    gamma: float = knob(1.0, "rlhf", "discount of later rewards")
    lam: float = knob(1.0, "rlhf", "GAE's lambda: 1 trusts the reward, 0 trusts the values")
    clip_ratio: float = knob(0.2, "rlhf", "how far the ratio may move before its gradient stops")
    value_clip: float = knob(0.2, "rlhf", "how far a value may move before its gradient stops")
    value_coef: float = knob(1.0, "rlhf", "weight of the value loss")
    entropy_coef: float = knob(0.0, "rlhf", "bonus for staying undecided")
    whiten: bool = knob(True, "rlhf", "ppo: advantages with mean 0 and deviation 1")
    group_scale: bool = knob(True, "rlhf", "grpo: advantages in deviations of the group")
    loss_mean: str = knob("token", "rlhf", "token: long answers weigh more; answer: all the same")
    value_init: str = knob("critic", "rlhf", "critic or actor: where the value model starts")
    reward_norm: bool = knob(False, "rlhf", "scores around their running mean, in deviations")
    reward_clip: float = knob(4.0, "rlhf", "scores are cut to plus or minus this")
    missing_eos_penalty: float = knob(3.0, "rlhf", "taken off the score of an answer without eos")
    length_penalty: float = knob(0.0, "rlhf", "taken off the score for each token of an answer")
    stop_kl: float = knob(0.1, "rlhf", "KL to the rollout at which the epochs on it end; 0: never")
    kl_limit: float = knob(10.0, "rlhf", "nats per answer beyond which there is an alert; 0: never")
    stop_on_alert: bool = knob(
        False, "rlhf", "an alert (KL, empty or endless answers) stops the run"
    )
    sample_every: int = knob(5, "rlhf", "steps between two looks at the same fixed prompts")
    dpo_beta: float = knob(0.3, "rlhf", "dpo: price of the distance from the reference")
    dpo_lr: float = knob(2e-4, "rlhf", "dpo: peak learning rate")
    dpo_batch: int = knob(32, "rlhf", "dpo: pairs a step")
    dpo_epochs: int = knob(1, "rlhf", "dpo: passes over the pairs")
    dpo_loss: str = knob("sigmoid", "rlhf", "dpo: sigmoid, hinge or ipo")
    dpo_smoothing: float = knob(0.0, "rlhf", "dpo: share of pairs thought to be labelled wrongly")
    dpo_nll: float = knob(0.0, "rlhf", "dpo: weight of the chosen answer's own loss")
    # 4_test
    test_rows: int = knob(1_000, "test", "rows of eval.json to answer, at most")
    best_of: int = knob(
        4, "test", "best-of-n: answers of the actor to choose from; 1: leave it out"
    )
    best_of_rows: int = knob(250, "test", "rows that best-of-n answers, at most")
    metric: str = knob("", "test", "module.function(prompts, responses) -> numbers, reported too")

    presets = PRESETS
    may_be_zero = frozenset({"seed", "validation_rows", "micro_batch", "lora_rank"})
    one_of = ONE_OF

    @staticmethod
    def implied(values):
        """What other choices are usually run with, unless something else is given."""
        estimator = {"kl_estimator": "k3"} if values["kl_in"] == "loss" else {}
        return ALGORITHMS.get(values["algorithm"], {}) | estimator

    @classmethod
    def of(cls, preset="auto", root=".", **values):
        """A Config for a notebook: preset auto is what suits the base model of 0_download."""
        if preset == "auto" and has_record(root, "base"):
            record = read_record(root, "base")
            given = record["config"].get("preset")
            preset = record["metrics"].get("preset") if given == "auto" else given
            if preset not in cls.presets:
                base = Path(root) / "model" / "base" / "stage.json"
                raise CourseError(f"{base} cannot be read: run 0_download.ipynb again.")
        return cls(preset, root=root, **values)

    def check(self):
        """Raises on what cannot work, with the numbers in the message."""
        shares = self.sft_share, self.preference_share, self.prompt_share
        for name, fine, rule in (
            (
                "sft_share",
                min(shares) >= 0 and sum(shares) <= 1.0001,
                "the shares must add up to at most 1",
            ),
            ("minibatch", 1 <= self.minibatch <= self.rollout, "it must lie between 1 and rollout"),
            ("hidden_size", self.hidden_size % self.heads == 0, "it must be a multiple of heads"),
            ("seed", self.seed < 2**63, "it must be below 2 to the power of 63"),
            ("beta1", self.beta1 < 1, "it must be at least 0, below 1"),
            ("beta2", self.beta2 < 1, "it must be at least 0, below 1"),
            ("gamma", 0 <= self.gamma <= 1, "it must lie between 0 and 1"),
            ("lam", 0 <= self.lam <= 1, "it must lie between 0 and 1"),
            ("temperature", self.temperature > 0, "it must be above 0"),
            ("warmup", 0 <= self.warmup < 1, "it must be at least 0, below 1"),
            ("rollout", self.rollout % self.answers == 0, "it must be a multiple of answers"),
            ("answers", self.answers > 1 or self.algorithm not in ALGORITHMS, "a group needs two"),
            (
                "kl_estimator",
                self.kl_in != "loss" or self.kl_estimator != "k1",
                "with kl_in = loss its gradient is zero on average and nothing holds the policy "
                "back; use k3 or k2, or kl_in = reward",
            ),
            ("load_in_4bit", self.lora_rank or not self.load_in_4bit, "it needs lora_rank"),
            ("dpo_smoothing", self.dpo_smoothing < 0.5, "it must be below 0.5"),
            (
                "dpo_smoothing",
                not self.dpo_smoothing or self.dpo_loss == "sigmoid",
                "it belongs to dpo_loss = sigmoid",
            ),
            ("norm_answers", self.norm_answers >= 2, "a spread needs two answers or more"),
        ):
            if not fine:
                raise CourseError(f"{name} = {getattr(self, name)!r} is impossible: {rule}.")

    def starts_from(self, reward=None):
        """The stages 3_rlhf reads: the critic only for its scores, or where values begin."""
        values = self.algorithm == "ppo" and self.value_init == "critic"
        scores = reward is None and self.algorithm != "dpo" and re.search(MODEL, self.reward)
        return ["actor", "critic"] if values or scores else ["actor"]
