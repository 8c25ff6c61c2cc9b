"""All parameters of the course: names, defaults, meanings, presets and checks."""

import re
from dataclasses import dataclass
from pathlib import Path

from lab import CourseError, alerts
from lab.runs import has_record, read_record
from lab.settings import Settings, knob
from lab.tracking import tracker_names

COLAB = dict(
    actor_lr=2e-5, actor_batch=4, actor_epochs=3, critic_lr=1e-5, critic_batch=8, critic_epochs=1,
    max_prompt=384, max_new_tokens=128, steps=100, rollout=32, minibatch=8, ppo_epochs=4,
    policy_lr=1e-5, value_lr=1e-5, kl_coef=0.1, clip_ratio=0.2, lam=0.95, eval_batch=64,
    dpo_beta=0.1, dpo_lr=5e-6, dpo_batch=8, precision="auto",
)  # fmt: skip
REAL = COLAB | dict(
    base_model="smollm2", data="companion", labeller="lab.companion.parts", labels=500,
    metric="lab.companion.parts, lab.companion.whole, lab.companion.supportive",
    plain_text="dataset/companion/plain.txt", memory=6.0, lora_rank=16, temperature=0.7,
    max_prompt=96, max_new_tokens=64, sft_share=0.45, preference_share=0.25, prompt_share=0.3,
    watchdog=0, validation_rows=20, actor_lr=2e-3, actor_batch=8, actor_epochs=2, critic_lr=1e-3,
    norm_prompts=16, steps=14, minibatch=16, ppo_epochs=1, policy_lr=5e-4, value_lr=1e-3,
    kl_coef=0.05, test_rows=96, best_of_rows=32, dpo_lr=1e-4,
)  # fmt: skip
PRESETS = {
    "tiny": {},  # the defaults below
    "colab": COLAB,
    "real": REAL,
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
# The later notebooks take these parameters over from 0_download.
DATA = "data sft_data preference_data prompt_data eval_data eval_share max_rows reader".split()
MODEL = r"(?<![\w.])model(?![\w.])"  # the name of the reward model in a sum of rewards
ONE_OF = {
    "precision": ("float32", "bf16", "fp16", "auto"),
    "kl_in": ("reward", "loss"),
    "kl_estimator": ("k1", "k2", "k3"),
    "loss_mean": ("token", "answer"),
    "critic_kind": ("plain", "careful"),
    "value_init": ("critic", "actor"),
    "ensemble_rule": ("mean", "min", "cautious"),
    "dpo_loss": ("sigmoid", "hinge", "ipo"),
    "negatives": ("", "other", "cut", "base"),
}


@dataclass(init=False, frozen=True)
class Config(Settings):
    """Every number of the course. The defaults are those of the preset `tiny`.

    A parameter that you leave at None keeps the value of the preset.
    """

    # all stages
    preset: str = knob(
        "auto", "all", "tiny, colab, real, full or smoke; auto: the one that suits the base model"
    )
    root: str = knob(".", "all", "folder with dataset/, tokenizer/ and model/")
    seed: int = knob(0, "all", "seed of all random numbers")
    device: str = knob("auto", "all", "cpu, cuda, cuda:1, ...; auto: the first GPU, else the CPU")
    max_prompt: int = knob(
        80, "all", "maximum tokens of a prompt; longer ones lose their beginning"
    )
    max_new_tokens: int = knob(40, "all", "maximum tokens of an answer, including its eos")
    data: str = knob(
        "", "all", "file, folder or hub name; empty: train.json and eval.json in dataset/"
    )
    sft_data: str = knob("", "all", "rows of 1_actor, all of them; empty: a share of data")
    preference_data: str = knob("", "all", "pairs of 2_critic, all of them; empty: a share of data")
    prompt_data: str = knob("", "all", "prompts of 3_rlhf, all of them; empty: a share of data")
    eval_data: str = knob("", "all", "rows of 4_test; empty: those that belong to data")
    max_rows: int = knob(0, "all", "rows to take from each source, a random sample; 0: all")
    sft_share: float = knob(0.4, "all", "share of data for the SFT of 1_actor")
    preference_share: float = knob(0.5, "all", "share of data for the pairs of 2_critic")
    prompt_share: float = knob(0.1, "all", "share of data for the prompts of 3_rlhf")
    eval_share: float = knob(
        0.1, "all", "share of the prompts kept back for evaluation if data has no rows for it"
    )
    negatives: str = knob(
        "",
        "all",
        "rejected answers for rows without a pair: other (another row's), cut (a spoilt one) or "
        "base (the base model's own)",
    )
    eval_batch: int = knob(250, "all", "batch size where no gradients are needed")
    memory: float = knob(
        0.0,
        "all",
        "memory limit of a stage in GB, weights included; 0: 60 % of what is free, on a GPU 75 %",
    )
    validation_rows: int = knob(200, "actor", "rows of the SFT share held out for validation")
    weight_decay: float = knob(0.01, "base actor critic rlhf", "AdamW: weight decay")
    beta1: float = knob(0.9, "base actor critic rlhf", "AdamW: decay of the first moment")
    beta2: float = knob(0.95, "base actor critic rlhf", "AdamW: decay of the second moment")
    grad_clip: float = knob(1.0, "base actor critic rlhf", "largest norm of the gradients")
    lr_floor: float = knob(
        0.1, "base actor critic rlhf", "final learning rate as a share of the peak"
    )
    warmup: float = knob(0.05, "base actor critic rlhf", "share of the steps used for warm-up")
    resume: bool = knob(
        True, "base actor critic rlhf", "resume an interrupted run from its last checkpoint"
    )
    resume_changed: bool = knob(
        False, "base actor critic rlhf", "resume even if parameters or data have changed"
    )
    checkpoint_minutes: float = knob(
        2.0, "base actor critic rlhf", "minutes between checkpoints; 0: after every step"
    )
    tracker: str = knob(
        "tensorboard",
        "base actor critic rlhf",
        "where curves go, one or more of: tensorboard, wandb, trackio, swanlab; or none",
    )
    num_processes: int = knob(
        1, "base actor critic rlhf", "processes on this machine that train together, same result"
    )
    shard: bool = knob(
        False,
        "actor critic rlhf",
        "each of several processes holds a part of every model (FSDP2), same result",
    )
    micro_batch: int = knob(
        0,
        "base actor critic rlhf",
        "rows per forward pass of an update, same result; 0: as many as fit into memory",
    )
    cpu_fallback: bool = knob(
        False, "base actor critic rlhf", "continue on the CPU if the GPU cannot hold even one row"
    )
    reader: str = knob(
        "", "all", "module.function(path) -> rows: your own file reader; empty: by the file's name"
    )
    trust_remote_code: bool = knob(
        False, "all", "run Python code that comes with a model; read that code first"
    )
    precision: str = knob(
        "float32",
        "all",
        "of matrix products: float32, bf16, fp16; auto: bf16 or fp16 if the GPU has it",
    )
    lora_rank: int = knob(0, "actor critic rlhf", "rank of the LoRA adapters; 0: train all weights")
    lora_alpha: float = knob(32.0, "actor critic rlhf", "LoRA scales its adapters by alpha / rank")
    load_in_4bit: bool = knob(
        False, "actor critic rlhf", "QLoRA: frozen weights in 4 bits (a GPU and bitsandbytes)"
    )
    gradient_checkpointing: bool = knob(
        False,
        "actor critic rlhf",
        "recompute activations in the backward pass: less memory, a third more time",
    )
    # 0_download
    base_model: str = knob(
        "auto",
        "base",
        "tiny, smollm2, a model on the hub, a folder or a GGUF file; auto: tiny without a GPU",
    )
    fallback: bool = knob(True, "base", "use tiny if the base model does not load; False: an error")
    vocab_size: int = knob(1280, "base", "tiny: largest size of the vocabulary")
    hidden_size: int = knob(128, "base", "tiny: hidden size")
    layers: int = knob(2, "base", "tiny: number of layers")
    heads: int = knob(4, "base", "tiny: attention heads")
    init_std: float = knob(
        0.06,
        "base",
        "tiny: standard deviation of the random weights; see 0_download for its effect",
    )
    pretrain_data: str = knob(
        "", "base", "tiny: source of the pretraining text, also plain text; empty: training rows"
    )
    pretrain_documents: int = knob(50_000, "base", "tiny: documents of the pretraining text")
    pretrain_steps: int = knob(1_000, "base", "tiny: pretraining steps")
    pretrain_batch: int = knob(16, "base", "tiny: blocks per step")
    pretrain_length: int = knob(128, "base", "tiny: tokens per block, and the longest input")
    pretrain_lr: float = knob(4e-3, "base", "tiny: peak learning rate")
    # 1_actor
    actor_lr: float = knob(1e-3, "actor", "peak learning rate of SFT")
    actor_batch: int = knob(32, "actor", "rows per SFT step")
    actor_epochs: int = knob(1, "actor", "passes over the SFT rows")
    # 2_critic
    critic_lr: float = knob(5e-4, "critic", "peak learning rate of the reward model")
    critic_batch: int = knob(16, "critic", "pairs per step")
    critic_epochs: int = knob(1, "critic", "passes over the pairs")
    critic_kind: str = knob(
        "plain",
        "critic",
        "plain, or careful: mirrored pairs make it compare the answer with the question",
    )
    labeller: str = knob(
        "",
        "critic rlhf test",
        "module.function(prompts, responses) -> numbers: compares pairs of the actor's answers; "
        "empty: the pairs of the data",
    )
    labels: int = knob(400, "critic rlhf test", "how many pairs of answers the labeller compares")
    label_noise: float = knob(
        0.1, "critic", "share of the labeller's choices that are turned round"
    )
    score_penalty: float = knob(
        0.001, "critic", "weight of the mean squared score in the loss; keeps scores near zero"
    )
    ensemble: int = knob(1, "critic", "number of reward models, each with its own order of pairs")
    watchdog: float = knob(
        0.2,
        "critic rlhf",
        "share of the pairs for a second reward model, which only watches over 3_rlhf; 0: none",
    )
    norm_prompts: int = knob(64, "critic", "prompts that set the scale of the scores")
    norm_answers: int = knob(4, "critic", "answers to each of these prompts")
    feedback_weight: int = knob(
        20,
        "critic rlhf",
        "how many times each comparison of feedback.jsonl counts as a pair; 0: ignore the file",
    )
    # 3_rlhf
    algorithm: str = knob(
        "ppo", "rlhf", "ppo, grpo, rloo, dpo, or module.function: a loss of your own"
    )
    reward: str = knob(
        "model", "rlhf test", 'the reward: a sum like "model - 0.01*length + my.reward"'
    )
    ensemble_rule: str = knob(
        "mean",
        "rlhf test",
        "score of an ensemble: mean, min, or cautious: mean - k standard deviations",
    )
    ensemble_k: float = knob(1.0, "rlhf test", "k of the rule cautious")
    steps: int = knob(36, "rlhf", "number of rollouts")
    rollout: int = knob(128, "rlhf", "answers per rollout")
    answers: int = knob(1, "rlhf", "answers per prompt of a rollout (grpo and rloo: 4)")
    ppo_epochs: int = knob(2, "rlhf", "passes over each rollout")
    minibatch: int = knob(64, "rlhf", "answers per update")
    policy_lr: float = knob(6e-4, "rlhf", "peak learning rate of the policy")
    value_lr: float = knob(5e-4, "rlhf", "peak learning rate of the value model")
    temperature: float = knob(1.0, "rlhf test", "temperature of sampling and of all logprobs")
    kl_in: str = knob(
        "reward", "rlhf", "where the KL penalty is applied: reward (per token) or loss"
    )
    kl_estimator: str = knob(
        "k1", "rlhf", "KL estimator: k1, k2 or k3 (with kl_in = loss: k3 or k2)"
    )
    kl_coef: float = knob(0.2, "rlhf", "weight of the KL penalty (KL to the actor, per token)")
    kl_target: float = knob(
        0.0, "rlhf", "adapt kl_coef to reach this KL per answer; 0: kl_coef stays fixed"
    )
    kl_horizon: int = knob(2_000, "rlhf", "number of answers over which kl_coef adapts")
    gamma: float = knob(1.0, "rlhf", "discount of later rewards")
    lam: float = knob(1.0, "rlhf", "lambda of GAE; lower values rely more on the value model")
    clip_ratio: float = knob(
        0.2, "rlhf", "clip range: the loss clips every ratio to 1 plus or minus this"
    )
    value_clip: float = knob(
        0.2, "rlhf", "PPO: the value loss clips every value to its old value plus or minus this"
    )
    value_coef: float = knob(1.0, "rlhf", "weight of the value loss")
    entropy_coef: float = knob(
        0.0, "rlhf", "weight of the entropy bonus, which favours exploration"
    )
    whiten: bool = knob(True, "rlhf", "PPO: scale advantages to mean 0 and standard deviation 1")
    group_scale: bool = knob(
        True, "rlhf", "GRPO: divide advantages by the standard deviation of their group"
    )
    loss_mean: str = knob(
        "token", "rlhf", "token: every token weighs the same; answer: every answer does"
    )
    value_init: str = knob("critic", "rlhf", "initial weights of the value model: critic or actor")
    reward_norm: bool = knob(
        False, "rlhf", "normalise scores by their running mean and standard deviation"
    )
    reward_clip: float = knob(4.0, "rlhf", "clip scores to plus or minus this")
    missing_eos_penalty: float = knob(
        3.0, "rlhf", "subtracted from the score of an answer without eos"
    )
    length_penalty: float = knob(0.0, "rlhf", "subtracted from the score for every answer token")
    safety: str = knob(
        "",
        "rlhf",
        "safety filter of the answers: rules (word list and rules), or module.function(prompts, "
        "responses) -> reasons; empty: none",
    )
    safety_penalty: float = knob(
        0.0, "rlhf", "subtracted from the score of an answer that the filter finds unsafe"
    )
    stop_kl: float = knob(
        0.1,
        "rlhf",
        "end the passes over a rollout if the KL to its old policy exceeds this; 0: never",
    )
    kl_limit: float = knob(
        10.0, "rlhf", "alert when the KL per answer exceeds this many nats; 0: never"
    )
    stop_on_alert: str = knob(
        "", "rlhf", 'alerts that stop the run: all, or names like "kl, watchdog"; empty: none'
    )
    sample_every: int = knob(5, "rlhf", "steps between sample answers to a fixed set of prompts")
    dpo_beta: float = knob(0.3, "rlhf test", "DPO: beta, which keeps the policy near the reference")
    dpo_lr: float = knob(2e-4, "rlhf", "DPO: peak learning rate")
    dpo_batch: int = knob(32, "rlhf", "DPO: pairs per step")
    dpo_epochs: int = knob(1, "rlhf", "DPO: passes over the pairs")
    dpo_loss: str = knob("sigmoid", "rlhf", "DPO: sigmoid, hinge or ipo")
    dpo_smoothing: float = knob(0.0, "rlhf", "DPO: assumed share of pairs with the wrong label")
    dpo_nll: float = knob(0.0, "rlhf", "DPO: weight of the SFT loss on the chosen answers")
    # 4_test
    test_rows: int = knob(1_000, "test", "maximum number of evaluation rows to answer")
    best_of: int = knob(4, "test", "best-of-n: answers of the actor per question; 1: skip it")
    best_of_rows: int = knob(250, "test", "best-of-n: maximum number of rows to answer")
    metric: str = knob(
        "",
        "test",
        "module.function(prompts, responses) -> numbers: a metric of your own; separate several by "
        "commas",
    )
    plain_text: str = knob(
        "", "test", "text file in root or beside the notebooks: each model's perplexity on it"
    )
    categories: str = knob(
        "auto",
        "test",
        "auto: helpful, harmless, honest, empathetic; none; or your own as "
        "name:prompts-file:module.function, separated by commas",
    )
    extra_models: str = knob(
        "", "test", "more models to test: folders or names on the hub, separated by commas"
    )

    presets = PRESETS
    may_be_zero = frozenset(
        "seed validation_rows micro_batch lora_rank max_rows feedback_weight".split()
    )
    one_of = ONE_OF

    def __init__(self, preset="auto", **values):
        stop = str(values.get("stop_on_alert")).lower()
        if stop in ("true", "false"):
            values["stop_on_alert"] = {"true": "all", "false": ""}[stop]
        super().__init__(preset, **values)

    @staticmethod
    def implied(values):
        """Returns the usual settings of the chosen algorithm; your own values override them."""
        estimator = {"kl_estimator": "k3"} if values["kl_in"] == "loss" else {}
        return ALGORITHMS.get(values["algorithm"], {}) | estimator

    @classmethod
    def of(cls, preset="auto", root=".", **values):
        """Returns the Config of a notebook. What you leave open follows 0_download: the preset
        suits its base model, and the data are those that it showed."""
        if has_record(root, "base"):
            record = read_record(root, "base")
            if preset in ("auto", None):
                given = record["config"].get("preset")
                preset = record["metrics"].get("preset") if given == "auto" else given
                if preset not in cls.presets:
                    base = Path(root) / "model" / "base" / "stage.json"
                    raise CourseError(f"{base} cannot be read: run 0_download.ipynb again.")
            for name in DATA:
                if values.get(name) is None and name in record["config"]:
                    values[name] = record["config"][name]
        return cls(preset, root=root, **values)

    def check(self):
        """Raises a CourseError for values that cannot work; it names the value and the rule."""
        tracker_names(self.tracker)
        alerts.names(self.stop_on_alert)
        shares = self.sft_share, self.preference_share, self.prompt_share
        for name, fine, rule in (
            (
                "sft_share",
                min(shares) >= 0 and sum(shares) <= 1.0001,
                f"sft_share, preference_share and prompt_share add up to {sum(shares):.4g}; they "
                "must add up to at most 1",
            ),
            ("eval_share", self.eval_share < 1, "it must be at least 0 and below 1"),
            ("minibatch", 1 <= self.minibatch <= self.rollout, "it must lie between 1 and rollout"),
            ("hidden_size", self.hidden_size % self.heads == 0, "it must be a multiple of heads"),
            ("seed", self.seed < 2**63, "it must be below 2 to the power of 63"),
            ("beta1", self.beta1 < 1, "it must be at least 0 and below 1"),
            ("beta2", self.beta2 < 1, "it must be at least 0 and below 1"),
            ("gamma", 0 <= self.gamma <= 1, "it must lie between 0 and 1"),
            ("lam", 0 <= self.lam <= 1, "it must lie between 0 and 1"),
            ("watchdog", self.watchdog < 0.5, "it must be at least 0 and below 0.5"),
            ("temperature", self.temperature > 0, "it must be above 0"),
            ("warmup", 0 <= self.warmup < 1, "it must be at least 0 and below 1"),
            ("rollout", self.rollout % self.answers == 0, "it must be a multiple of answers"),
            (
                "answers",
                self.answers > 1 or self.algorithm not in ALGORITHMS,
                f"{self.algorithm} compares the answers to one prompt and needs at least 2 of them",
            ),
            (
                "kl_estimator",
                self.kl_in != "loss" or self.kl_estimator != "k1",
                "with kl_in = loss its gradient is zero on average, so it does not limit the KL; "
                "use k3 or k2, or set kl_in = reward",
            ),
            (
                "load_in_4bit",
                self.lora_rank or not self.load_in_4bit,
                "weights in 4 bits cannot be trained; set lora_rank to train adapters",
            ),
            ("dpo_smoothing", self.dpo_smoothing < 0.5, "it must be below 0.5"),
            (
                "dpo_smoothing",
                not self.dpo_smoothing or self.dpo_loss == "sigmoid",
                "only dpo_loss = sigmoid can use it; set it to 0",
            ),
            (
                "norm_answers",
                self.norm_answers >= 2,
                "a standard deviation needs at least 2 answers",
            ),
        ):
            if not fine:
                raise CourseError(f"{name} = {getattr(self, name)!r} is impossible: {rule}.")

    def starts_from(self, reward=None):
        """Returns the stages that 3_rlhf reads.

        It needs the critic only as the reward model or as the start of the value model.
        """
        values = self.algorithm == "ppo" and self.value_init == "critic"
        scores = reward is None and self.algorithm != "dpo" and re.search(MODEL, self.reward)
        return ["actor", "critic"] if values or scores else ["actor"]
