"""RLHF on one blackboard: everything the course teaches, to be read from top to bottom.

Contents
    1. Device and luck     where it runs; a random generator for every purpose
    2. Data                rows, their shares, batches
    3. Tokens              prompts padded on the left, answers on the right
    4. Models              base, actor, critic: plain Hugging Face models
    5. Generation          sampling with a cache
    6. Log-probs           what a model thinks of an answer
    7. Masked statistics   means over real tokens only
    8. Losses              reward model, PPO, GRPO, DPO: pure functions of tensors
    9. Rewards             the reward model as a callable, the KL price, the rollout
    10. Optimisation       the one place where weights change
    11. Training           generators that yield one dict of metrics a step
    12. Evaluation         answers, their scores, their distance from the reference

Letters: B rows, P prompt length (left-padded), R response length (right-padded), T = P + R,
V vocabulary, G answers per prompt. Everything about answers is `(B, R)` with one bool mask made
from lengths. The shift by one between logits and tokens happens in `before_each_token`.

Left out on purpose: several machines, tools, several turns. What is no lesson lives in `lab/`.
"""

import hashlib
import inspect
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from lab import CourseError, trouble, world
from lab.config import Config  # noqa: F401
from lab.data import apart, read_rows, with_pairs
from lab.runs import Stage, artifact
from lab.trouble import Sturdy, alerts, find_device, loading, note_texts

# ------------------------------------------------------------------------------------------------
# 1. Device and luck


def pick_device(cfg):
    """The first GPU or the CPU for "auto"; otherwise what was asked for, if it is there."""
    return find_device(cfg.device)


def dice(cfg, *purpose):
    """A random generator for one purpose, e.g. ("rollout", 7): no state from step to step."""
    name = hashlib.md5(repr((cfg.seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(name[:15], 16))


# ------------------------------------------------------------------------------------------------
# 2. Data


def load_rows(cfg, share, needs=("prompt",)):
    """The rows of train.json that belong to one stage: "sft", "preference" or "prompt"."""
    rows = read_rows(Path(cfg.root) / "dataset" / "train.json", needs)
    order = torch.randperm(len(rows), generator=dice(cfg, "shares")).tolist()
    first = {"sft": 0, "preference": cfg.sft_share}
    start = first.get(share, cfg.sft_share + cfg.preference_share)
    stop = start + getattr(cfg, f"{share}_share")
    chosen = order[round(start * len(rows)) : round(stop * len(rows))]
    if not chosen:
        raise CourseError(
            f"{share}_share = {stop - start:g} of {len(rows)} rows is none: raise it."
        )
    return [rows[i] for i in chosen]


def load_eval_rows(cfg):
    """The first rows of eval.json, after making sure that no training has seen one of them."""
    path, train = (Path(cfg.root) / "dataset" / name for name in ("eval.json", "train.json"))
    rows = read_rows(path)
    if train.exists():
        apart(read_rows(train), rows, path)
    return rows[: cfg.test_rows]


def batches(count, size, generator):
    """One epoch of index lists, in random order; every row once."""
    return [part.tolist() for part in torch.randperm(count, generator=generator).split(size)]


def epochs(cfg, purpose, count, size, laps):
    """The index lists of a whole training, one a step."""
    return [index for lap in range(laps) for index in batches(count, size, dice(cfg, purpose, lap))]


# ------------------------------------------------------------------------------------------------
# 3. Tokens


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE: any text can be written, and words that occur often become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    )


def load_tokenizer(path):
    """A tokenizer from a folder or the hub. One without padding pads with its eos: masks tell."""
    with loading(path, "its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise CourseError(f"The tokenizer in {path} has no eos token, so no answer could end.")
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CourseError(f"The tokenizer in {path} knows no words: its files are missing.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer, prompt, limit):
    """Token ids of a prompt. One that is too long loses its front, so that "Assistant:" stays."""
    ids = tokenizer(prompt)["input_ids"]
    return ids[len(ids) - limit :] if len(ids) > limit else ids


def encode_answer(tokenizer, answer, limit):
    """Token ids of an answer, eos at its end: a model learns to stop only where it sees a stop."""
    eos = tokenizer.eos_token_id
    ids = tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"] + [eos]
    return ids[: min(ids.index(eos), limit - 1)] + [eos]


def pad(sequences, value, side, device):
    """Lists of ids as one tensor, and the mask of what is real. The mask comes from the lengths."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = max(int(lengths.max()), 1)
    position = torch.arange(width)
    if side == "left":
        rows = [[value] * (width - len(ids)) + list(ids) for ids in sequences]
        mask = position >= width - lengths[:, None]
    else:
        rows = [list(ids) + [value] * (width - len(ids)) for ids in sequences]
        mask = position < lengths[:, None]
    return torch.tensor(rows).to(device), mask.to(device)


def encode_prompts(tokenizer, prompts, cfg, device):
    """Texts -> (prompt_ids, prompt_mask), left-padded: every answer starts in the same column."""
    ids = [encode_prompt(tokenizer, prompt, cfg.max_prompt) for prompt in prompts]
    return pad(ids, tokenizer.pad_token_id, "left", device)  # (B, P)


def encode_pairs(tokenizer, prompts, answers, cfg, device):
    """Texts -> the four tensors that every scoring function takes."""
    prompt_ids, prompt_mask = encode_prompts(tokenizer, prompts, cfg, device)  # (B, P)
    ids = [encode_answer(tokenizer, answer, cfg.max_new_tokens) for answer in answers]
    return prompt_ids, prompt_mask, *pad(ids, tokenizer.pad_token_id, "right", device)  # (B, R)


def decode(tokenizer, ids, mask):
    """The answers as text, without eos and padding."""
    rows = [row[real].tolist() for row, real in zip(ids, mask)]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def ended(response_ids, response_mask, eos_token_id):
    """Which answers closed with an eos of their own."""
    last = response_ids.gather(1, response_mask.sum(1, keepdim=True).clamp(min=1) - 1)[:, 0]  # (B,)
    return torch.isin(last, as_ids(eos_token_id, last.device)) & response_mask.any(1)


def as_ids(token_id, device):
    """eos may be one id, several, or None."""
    several = token_id if isinstance(token_id, (list, tuple)) else [token_id]
    ids = [one for one in several if one is not None]
    return torch.tensor(ids, dtype=torch.long, device=device)


# ------------------------------------------------------------------------------------------------
# 4. Models


def tiny_model(cfg, tokenizer):
    """A small OPT with random weights. At this width OPT's own 0.02 learns to copy far later."""
    shape = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        word_embed_proj_dim=cfg.hidden_size,
        ffn_dim=4 * cfg.hidden_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.pretrain_length,
        init_std=cfg.init_std,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return OPTForCausalLM(shape)


SAFE = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
MISFITS = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # `checked` refuses them


def load_actor(path, cfg):
    """A causal language model in float32: half precision would lose small updates."""
    return load(AutoModelForCausalLM, path, cfg)


def load(kind, path, cfg, may_lack="", **extra):
    """A model with all its weights: one that is not in the file would be random, without a word."""
    with loading(path):
        model, found = kind.from_pretrained(path, **MISFITS, **SAFE, **extra)
    trouble.checked(path, found, may_lack)
    return model.to(pick_device(cfg)).eval()


def load_scorer(path, cfg):
    """A model with one number per token on top: reward model and value model alike.

    A language model gets its new head set to zero, so that every score starts out equal.
    """
    with loading(path):
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
    fresh = not any("SequenceClassification" in name for name in shape.architectures or [])
    kind, head = AutoModelForSequenceClassification, "score" if fresh else ""
    model = load(kind, path, cfg, may_lack=head, num_labels=1)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


def positions(mask):
    """Position ids that count real tokens only: padding on the left must not shift the text."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def call(model, ids, mask, **extra):
    """One forward pass over left-padded rows, with what this model's forward understands."""
    understood = inspect.signature(model.forward).parameters
    extra["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    extra = {name: value for name, value in extra.items() if name in understood}
    return model(input_ids=ids, attention_mask=mask.long(), **extra)


def before_each_token(prompt_ids, prompt_mask, response_ids, response_mask):
    """What to read so that the last R positions stand before the R answer tokens, (B, T - 1)."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    return ids[:, :-1], mask[:, :-1]


def answer_logits(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Logits that predict each answer token, (B, R, V): position t sees everything before t."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    R = response_ids.shape[1]
    return call(model, *read, use_cache=False, logits_to_keep=R).logits[:, -R:].float()


def token_scores(scorer, ids, mask):
    """The scorer's number at every token, (B, T)."""
    body = getattr(scorer, scorer.base_model_prefix)
    hidden = call(body, ids, mask, use_cache=False).last_hidden_state
    return scorer.score(hidden)[..., 0].float()


def answer_scores(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """One score per answer, (B,): the number at its last real token, which has read all of it."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    last = prompt_ids.shape[1] + response_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return token_scores(scorer, ids, mask).gather(1, last)[:, 0]


def answer_values(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """What the value model expects before each answer token is written, (B, R)."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    return token_scores(scorer, *read)[:, -response_ids.shape[1] :] * response_mask


# ------------------------------------------------------------------------------------------------
# 5. Generation


@torch.no_grad()
def generate(
    model,
    prompt_ids,
    prompt_mask,
    *,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_token_id,
    pad_token_id,
    generator=None,
):
    """Answers, their masks and the log-probs of their tokens: three tensors (B, R).

    Temperature 0 is greedy. The first eos belongs to the answer; behind it lies padding. The
    log-probs are those of the whole distribution at this temperature, as `response_logprobs` finds.
    """
    was_training, device, B = model.training, prompt_ids.device, len(prompt_ids)
    model.eval()
    ids = torch.full((B, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    stops, live = as_ids(eos_token_id, device), torch.arange(B, device=device)
    luck = lots(B, max_new_tokens, generator, device)
    feed, mask, cache = prompt_ids, prompt_mask, DynamicCache(config=model.config)
    for t in range(max_new_tokens):
        out = call(model, feed, mask, use_cache=True, past_key_values=cache, logits_to_keep=1)
        token, logprob = pick(out.logits[:, -1].float(), luck[live, t], temperature, top_k, top_p)
        ids[live, t], logprobs[live, t] = token, logprob
        lengths[live[torch.isin(token, stops) & (lengths[live] > t + 1)]] = t + 1
        running = lengths[live] > t + 1
        if not running.any():
            break
        if running.float().mean() < 0.75:  # finished rows leave the batch, and the cache with them
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            live, mask, token = live[keep], mask[keep], token[keep]
        feed, mask = token[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    model.train(was_training)
    R = int(lengths.max())
    response_mask = torch.arange(R, device=device) < lengths[:, None]  # (B, R)
    response_ids = ids[:, :R].masked_fill(~response_mask, pad_token_id)
    return response_ids, response_mask, logprobs[:, :R] * response_mask


def lots(B, R, generator, device):
    """Numbers in [0, 1), (B, R), drawn where the generator lives: the same luck on every machine.

    A row's luck does not depend on the rows beside it, so a batch may be cut anywhere.
    """
    source = generator.device if generator else "cpu"
    luck = torch.rand(B, R, generator=generator, device=source, dtype=torch.float64)
    return luck.to(device)


def pick(logits, luck, temperature, top_k, top_p):
    """One token a row and its log-prob: `luck` in [0, 1) is looked up in the cumulative sum."""
    logits = logits / (temperature or 1.0)  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        ladder = truncated(logits, top_k, top_p).softmax(-1).double().cumsum(-1)
        token = torch.searchsorted(ladder, luck[:, None] * ladder[:, -1:], right=True)
        token = token[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, token_logprobs(logits, token)


def truncated(logits, top_k, top_p):
    """-inf for all but the k likeliest tokens, and all behind the first that together reach p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(drop.scatter(1, index, drop), -math.inf)
    return logits


# ------------------------------------------------------------------------------------------------
# 6. Log-probs


def token_logprobs(logits, tokens):
    """log softmax(logits)[token] without ever holding the whole log-softmax."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def entropies(logits):
    """How undecided each distribution is, in nats."""
    probs = logits.softmax(-1)
    return logits.logsumexp(-1) - (probs * logits).sum(-1)


def response_logprobs(
    model, prompt_ids, prompt_mask, response_ids, response_mask, *, temperature=1.0
):
    """Log-prob of each answer token, and the entropy of the choice: two tensors (B, R)."""
    logits = answer_logits(model, prompt_ids, prompt_mask, response_ids, response_mask)
    logits = logits / temperature  # (B, R, V)
    logprobs = token_logprobs(logits, response_ids)
    return logprobs * response_mask, entropies(logits) * response_mask


# ------------------------------------------------------------------------------------------------
# 7. Masked statistics


def masked_mean(x, mask):
    """Mean over what the mask keeps; 0 if it keeps nothing."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask):
    """Mean 0 and deviation 1 over what the mask keeps, 0 elsewhere."""
    x = torch.where(mask, x, 0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0)


def explained_variance(values, returns, mask):
    """1: the values foresaw the returns. 0: no better than their mean. Below 0: worse."""
    mean = masked_mean(returns, mask)
    spread = masked_mean((returns - mean) ** 2, mask)
    return 1 - masked_mean((returns - values) ** 2, mask) / (spread + 1e-8)


# ------------------------------------------------------------------------------------------------
# 8. Losses


def pairwise_loss(chosen, rejected):
    """Bradley-Terry: -log sigmoid(chosen - rejected), in float32; (B,) each."""
    margin = chosen.float() - rejected.float()
    stats = {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
    return -F.logsigmoid(margin).mean(), detached(stats)


def kl_estimate(logprobs, ref_logprobs, *, estimator="k1"):
    """KL(policy || reference) from the policy's own tokens, one estimate a token.

    With d = log policy - log reference: k1 = d is unbiased and may be negative; k2 = d^2 / 2 never
    is, but is biased; k3 = exp(-d) - 1 + d is unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise CourseError(f"estimator = {estimator!r} is not known; known are k1, k2, k3.")


def gae(rewards, values, mask, *, gamma, lam):
    """Generalised advantage estimation, from the last token to the first:

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    Nothing follows the last real token. Gives (advantages, returns = advantages + values).
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, (advantages + values) * mask


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_ratio):
    """PPO's clipped objective, as a loss:

    ratio = exp(logprobs - old_logprobs)        -min(ratio A, clip(ratio, 1 - c, 1 + c) A)
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    stats = {
        "clip_fraction": masked_mean((clipped * advantages < ratio * advantages).float(), mask),
        "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
        "ratio_error": (ratio - 1).abs().max(),
    }
    return masked_mean(loss, mask), detached(stats)


def ppo_value_loss(values, old_values, returns, mask, *, value_clip):
    """Half the squared error; a value that moved further than the clip gains nothing from it."""
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    stats = {"value_clip_fraction": masked_mean((clipped_error > error).float(), mask)}
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask), detached(stats)


def group_advantages(rewards, group_size, *, scale=True):
    """GRPO: how much better an answer is than the other answers to its prompt, (B,)."""
    if group_size < 2 or len(rewards) % group_size:
        raise CourseError(f"{len(rewards)} rewards do not make groups of {group_size} (2 or more).")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)
    return centred.flatten()


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_ratio, kl_coef):
    """PPO's clipped objective with one advantage per answer (B,), and the KL (k3) in the loss."""
    advantages = advantages[:, None].expand_as(logprobs)  # (B, R)
    loss, stats = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip_ratio=clip_ratio)
    gap = torch.where(mask, logprobs - ref_logprobs, 0)
    kl = masked_mean(kl_estimate(gap, 0, estimator="k3"), mask)
    return loss + kl_coef * kl, stats | detached({"kl": kl})


def dpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
):
    """DPO from summed log-probs (B,); its reward is implicit: beta log(policy / reference)."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if label_smoothing and loss_type != "sigmoid":
        raise CourseError(f"label_smoothing = {label_smoothing} is for the sigmoid loss only.")
    if loss_type == "sigmoid":
        wins, fails = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        loss = (1 - label_smoothing) * wins + label_smoothing * fails
    elif loss_type == "hinge":
        loss = torch.relu(1 - beta * margin)
    elif loss_type == "ipo":
        loss = (margin - 1 / (2 * beta)) ** 2
    else:
        raise CourseError(f"loss_type = {loss_type!r} is not known; known are sigmoid, hinge, ipo.")
    stats = {
        "accuracy": (margin > 0).float().mean(),
        "margin": beta * margin.mean(),
        "chosen_logprob": chosen.mean(),
        "rejected_logprob": rejected.mean(),
    }
    return loss.mean(), detached(stats)


def detached(stats):
    return {name: value.detach() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------
# 9. Rewards


class RewardModel:
    """A trained critic as a reward: `reward(prompts, responses) -> list[float]`.

    Its raw scores have no scale of their own. They come out in units of the spread between answers
    of the actor to one and the same prompt, with the actor's mean at 0.
    """

    def __init__(self, path, cfg):
        self.model, self.tokenizer, self.cfg = load_scorer(path, cfg), load_tokenizer(path), cfg
        self.mean = getattr(self.model.config, "reward_mean", 0.0)
        self.std = getattr(self.model.config, "reward_std", 1.0)

    @torch.no_grad()
    def __call__(self, prompts, responses):
        device, scores = self.model.device, []
        for rows in chunks(range(len(prompts)), self.cfg.eval_batch):
            texts = [prompts[i] for i in rows], [responses[i] for i in rows]
            tokens = encode_pairs(self.tokenizer, *texts, self.cfg, device)
            scores += answer_scores(self.model, *tokens).tolist()
        return [(score - self.mean) / self.std for score in scores]


def chunks(rows, size):
    """A list, a tensor or a range in slices."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass
class Crew:
    """Who takes part in RLHF. A test needs no value model."""

    tokenizer: object
    policy: torch.nn.Module  # learns
    reference: torch.nn.Module  # the actor as it was, frozen
    reward: object  # any callable reward(prompts, responses) -> list[float]
    value_model: torch.nn.Module | None = None  # learns what to expect


@dataclass
class Rollout:
    """What one round of answers left behind. Tensors are (B, R) unless they say otherwise."""

    prompts: list
    responses: list  # texts
    tokens: tuple  # prompt_ids, prompt_mask (B, P), response_ids, response_mask
    logprobs: torch.Tensor  # log pi_old(a | s), as sampled
    ref_logprobs: torch.Tensor  # log pi_ref(a | s)
    values: torch.Tensor  # V(s)
    scores: torch.Tensor  # (B,), what the reward says, after clip and penalty
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def mask(self):
        return self.tokens[3]

    @property
    def kl(self):
        """KL to the reference per answer, (B,)."""
        return kl_estimate(self.logprobs, self.ref_logprobs).sum(1)

    def part(self, rows, device):
        """The rows of one minibatch, without the columns that only they do not need."""
        prompt_ids, prompt_mask, response_ids, mask = (x[rows].to(device) for x in self.tokens)
        P, R = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
        tokens = prompt_ids[:, -P:], prompt_mask[:, -P:], response_ids[:, :R], mask[:, :R]
        names = ("logprobs", "values", "advantages", "returns")
        return tokens, {name: getattr(self, name)[rows, :R].to(device) for name in names}


def token_rewards(scores, kl, mask, kl_coef):
    """The price of each token's KL, and the score of the answer on its last real token, (B, R)."""
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return (last * scores[:, None] - kl_coef * kl) * mask


@torch.no_grad()
def collect(crew, prompts, cfg, *, kl_coef, generator, size=None):
    """Answers to some prompts, scored, and priced by their distance from the reference.

    `size` rows go through the models at once: all of them, unless that needs too much memory.
    """
    prompt = encode_prompts(crew.tokenizer, prompts, cfg, crew.policy.device)
    index = chunks(range(len(prompts)), size or len(prompts))
    pieces = [answer_and_score(crew, prompts, prompt, rows, cfg, generator) for rows in index]
    texts, *columns = zip(*pieces)
    ids, mask, logprobs, ref_logprobs, values, scores = map(stack, columns)
    rewards = token_rewards(scores, kl_estimate(logprobs, ref_logprobs), mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
    if cfg.whiten:
        advantages = masked_whiten(advantages, mask)
    tokens = (*prompt, ids.masked_fill(~mask, crew.tokenizer.pad_token_id), mask)
    return Rollout(
        prompts, sum(texts, []), tokens, logprobs, ref_logprobs, values, scores, advantages, returns
    )


def answer_and_score(crew, prompts, prompt, rows, cfg, generator):
    """Texts of the answers to some rows, and all that the models say about them."""
    prompt, prompts = [x[rows.start : rows.stop] for x in prompt], [prompts[i] for i in rows]
    response_ids, mask, logprobs = sample(crew.policy, crew.tokenizer, *prompt, cfg, generator)
    tokens = (*prompt, response_ids, mask)
    responses = decode(crew.tokenizer, response_ids, mask)
    scores = ask(crew.reward, prompts, responses).to(mask.device)
    scores = scores.clamp(-cfg.reward_clip, cfg.reward_clip)
    scores -= cfg.missing_eos_penalty * ~ended(response_ids, mask, crew.tokenizer.eos_token_id)
    ref_logprobs, _ = response_logprobs(crew.reference, *tokens, temperature=cfg.temperature)
    values = answer_values(crew.value_model, *tokens)
    return responses, response_ids, mask, logprobs, ref_logprobs, values, scores


def stack(pieces):
    """Pieces of a batch below each other, (b, R) with R of their own or (b,): zeros right."""
    if pieces[0].dim() == 1:
        return torch.cat(pieces)
    R = max(piece.shape[1] for piece in pieces)
    return torch.cat([F.pad(piece, (0, R - piece.shape[1])) for piece in pieces])


def ask(reward, prompts, responses):
    """The reward of each answer, (B,). A reward that is no number would spoil every weight."""
    with trouble.judging():
        scores = torch.tensor([float(score) for score in reward(prompts, responses)])
    if len(scores) != len(prompts) or not scores.isfinite().all():
        raise CourseError(
            f"The reward must give a finite number for each of {len(prompts)} answers; it gave "
            f"{len(scores)}, of which {int(scores.isfinite().sum())} are finite."
        )
    return scores


def sample(model, tokenizer, prompt_ids, prompt_mask, cfg, generator, temperature=None):
    """`generate` in the course's one way: no top-k, no top-p, no repetition penalty."""
    return generate(
        model,
        prompt_ids,
        prompt_mask,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature if temperature is None else temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generator=generator,
    )


# ------------------------------------------------------------------------------------------------
# 10. Optimisation


class Optimiser(Sturdy):
    """AdamW with warm-up, decay and gradient clipping for one or more models.

    `state` holds the few numbers, besides weights and moments, that a stopped run needs again.
    """

    def __init__(self, cfg, rates, steps, *, batch, frozen=(), say=print):
        """`rates`: (model, peak learning rate) pairs; `batch`: rows of an update."""
        super().__init__(cfg, [model for model, _ in rates], frozen, say)
        self.steps = max(steps, 1)
        self.parameters = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        self.peaks = [rate for _, rate in rates]
        self.sizes |= {"micro_batch": cfg.micro_batch or batch}
        self.state |= self.sizes
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in self.parameters],
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def step(self, rows, loss_of, progress):
        """One update from the loss of `rows`, at `progress`, the number of steps before it.

        `loss_of(rows)` gives a mean loss, the number of tokens or rows it is a mean of, and stats.
        """
        stats = self.fit(lambda size: self.gradient(rows, loss_of, size), "micro_batch")
        ramp = min(1.0, (progress + 1) / max(1.0, self.cfg.warmup * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress / self.steps)))
        scale = ramp * (self.cfg.lr_floor + (1 - self.cfg.lr_floor) * cosine)
        for group, peak in zip(self.adamw.param_groups, self.peaks):
            group["lr"] = peak * scale
        clip = torch.nn.utils.clip_grad_norm_
        norms = [float(clip(group, self.cfg.grad_clip)) for group in self.parameters]
        if all(map(math.isfinite, [stats["loss"], *norms])):
            self.adamw.step()
            self.state["in_a_row"] = 0
        else:
            self.skip(int(progress) + 1)
        self.adamw.zero_grad()
        figures = {"grad_norm": norms[0], "lr": self.peaks[0] * scale}
        return stats | figures | {"skipped": self.state["skipped"]}

    def gradient(self, rows, loss_of, size):
        """Backward, `size` rows at once: pieces weighted by their size make the same gradient."""
        self.adamw.zero_grad()
        parts, total = [], 0
        for piece in chunks(rows, size):
            loss, weight, stats = loss_of(piece)
            (loss * weight).backward()
            parts.append((weight, stats | {"loss": loss.detach()}))
            total += weight
        for parameter in (p for group in self.parameters for p in group if p.grad is not None):
            parameter.grad /= total
        return {name: sum(w * s[name].item() for w, s in parts) / total for name in parts[0][1]}


def next_kl_coef(kl_coef, kl, cfg):
    """Ziegler's controller: KL above its target raises the price, below lowers it, 20 % at most."""
    if not cfg.kl_target:
        return kl_coef
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return kl_coef * (1 + error * cfg.rollout / cfg.kl_horizon)


# ------------------------------------------------------------------------------------------------
# 11. Training


def open_stage(cfg, name, inputs=(), data="train.json"):
    """The folder that a stage fills; it appears in model/ when it is whole."""
    torch.manual_seed(cfg.seed)  # for the dropout of models that have some
    data = [Path(cfg.root) / "dataset" / data]
    goes_on = {"resume": cfg.resume, "resume_changed": cfg.resume_changed}
    return Stage(cfg.root, name, asdict(cfg), inputs, data, every=cfg.checkpoint_every, **goes_on)


def finish(stage, model, tokenizer, summary):
    """What `from_pretrained` of plain transformers wants, and the last figures."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(stage.folder)
    tokenizer.save_pretrained(stage.folder)
    stage.summary = summary


def choose_base(cfg):
    """(what 0_download takes, one sentence that says why): "tiny", a hub name or a local folder."""
    made = "the embedded tiny model is made here, from random weights."
    if cfg.base_model == "tiny":
        return "tiny", f"As asked, {made}"
    if cfg.base_model == "auto" and pick_device(cfg).type == "cpu":
        return "tiny", f"There is no GPU here, so {made}"
    name = "facebook/opt-125m" if cfg.base_model == "auto" else cfg.base_model
    try:
        ready_pair(cfg, name, name)
        return name, f"The base model is {name}."
    except CourseError as error:
        if not cfg.fallback:
            raise CourseError(f"{error} Choose another base_model, or fallback = True.") from None
        return "tiny", f"{error} So {made}"


def train_base(cfg):
    """A ready base model is copied, `tiny` is pretrained; its tokenizer goes to tokenizer/ too."""
    source, _ = choose_base(cfg)
    with open_stage(cfg, "base") as stage:
        if source == "tiny":
            model, tokenizer = yield from pretrain(cfg, stage)
        else:
            tokenizer, model = ready_pair(cfg, source, source)
            yield stage.log({"step": 1, "steps": 1})
        finish(stage, model, tokenizer, {"preset": "tiny" if source == "tiny" else "colab"})
        tokenizer.save_pretrained(Path(cfg.root) / "tokenizer")


def pretrain(cfg, stage):
    """From random weights, learn to predict the next token of the world's text."""
    texts = list(world.documents(world.World(seed=cfg.seed), cfg.pretrain_documents))
    sample = (world.TEMPLATE.format(question) + " " + answer for question, answer in texts[:8_000])
    tokenizer = train_tokenizer(sample, cfg.vocab_size)
    data, model = blocks(tokenizer, texts, cfg), tiny_model(cfg, tokenizer).to(pick_device(cfg))
    trouble.enough(cfg, data)
    rates, size = [(model.train(), cfg.pretrain_lr)], cfg.pretrain_batch
    optimiser = Optimiser(cfg, rates, cfg.pretrain_steps, batch=size, say=stage.say)
    yield from stage.past

    def loss_of(rows):
        return next_token_loss(model, data[rows].to(model.device)), len(rows), {}

    for step in stage.steps(cfg.pretrain_steps, optimiser):
        start = time.perf_counter()
        rows = torch.randint(len(data), (size,), generator=dice(cfg, "block", step)).tolist()
        stats = {"step": step + 1, "steps": cfg.pretrain_steps}
        stats |= optimiser.step(rows, loss_of, step)
        if step % 20 == 0 or step == cfg.pretrain_steps - 1:
            stats["copying"] = copying(model, tokenizer, texts[-48:], cfg)
        yield stage.log(stats | {"seconds": time.perf_counter() - start})
    return model, tokenizer


def blocks(tokenizer, texts, cfg):
    """The pretraining text as blocks of equal length, one document after the other, (N, length)."""
    ids = tokenizer([f"{question} {answer}" for question, answer in texts])["input_ids"]
    stream = torch.tensor([token for doc in ids for token in (*doc, tokenizer.eos_token_id)])
    usable = len(stream) // cfg.pretrain_length * cfg.pretrain_length
    return stream[:usable].view(-1, cfg.pretrain_length)


def next_token_loss(model, ids):
    """Cross-entropy of every token given those before it; ids (B, T)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def copying(model, tokenizer, texts, cfg):
    """How often the model foresees a word of the answer that stands in the question."""
    questions, answers = zip(*texts)
    tokens = encode_pairs(tokenizer, questions, answers, cfg, model.device)
    copied = (tokens[2][:, :, None] == tokens[0][:, None, :]).any(2) & tokens[3]  # (B, R)
    foreseen = answer_logits(model, *tokens).argmax(-1) == tokens[2]
    return masked_mean(foreseen.float(), copied).item()


def train_actor(cfg):
    """Supervised fine-tuning: the crowd's answers become likelier; prompts do not count."""
    with open_stage(cfg, "actor", inputs=["base"]) as stage:
        tokenizer, model = load_pair(cfg, "base")
        rows = load_rows(cfg, "sft", needs=("prompt", "response"))
        held, rows = rows[: cfg.validation_rows], rows[cfg.validation_rows :]
        if not rows:
            raise CourseError(f"validation_rows = {len(held)} leaves none of {len(held)} rows.")
        note_texts(stage.say, tokenizer, rows, ["response"], cfg)
        plan = epochs(cfg, "sft", len(rows), cfg.actor_batch, cfg.actor_epochs)
        rates, loss_of = [(model, cfg.actor_lr)], partial(sft_loss, model, tokenizer, cfg)
        optimiser = Optimiser(cfg, rates, len(plan), batch=cfg.actor_batch, say=stage.say)
        yield from stage.past
        for step in stage.steps(len(plan), optimiser):
            start = time.perf_counter()
            model.train()
            metrics = {"step": step + 1, "steps": len(plan)}
            metrics |= optimiser.step([rows[i] for i in plan[step]], loss_of, step)
            if held and ((step + 1) % max(1, len(plan) // 8) == 0 or step + 1 == len(plan)):
                metrics["validation_loss"] = validation_loss(model, tokenizer, held, cfg)
            yield stage.log(metrics | {"seconds": time.perf_counter() - start})
        finish(stage, model, tokenizer, {"loss": metrics.get("validation_loss", metrics["loss"])})


def load_pair(cfg, name):
    """Tokenizer and language model of a finished stage."""
    return ready_pair(cfg, artifact(cfg.root, name), f"model/{name}")


def ready_pair(cfg, source, name):
    """The same from any source, after checking that they fit each other and the parameters."""
    model, tokenizer = load_actor(source, cfg), load_tokenizer(source)
    trouble.suited(cfg, tokenizer, model, name)
    return tokenizer, model


def sft_loss(model, tokenizer, cfg, rows):
    """Minus the mean log-prob of the answers' tokens, eos included; and how many there are."""
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    tokens = encode_pairs(tokenizer, *texts, cfg, model.device)
    logprobs, _ = response_logprobs(model, *tokens)
    return -masked_mean(logprobs, tokens[3]), int(tokens[3].sum()), {}


@torch.no_grad()
def validation_loss(model, tokenizer, rows, cfg):
    model.eval()
    losses = [sft_loss(model, tokenizer, cfg, p)[:2] for p in chunks(rows, cfg.eval_batch)]
    return sum(loss.item() * count for loss, count in losses) / sum(n for _, n in losses)


def train_critic(cfg):
    """The reward model: of two answers to a prompt, the one people chose should score higher."""
    with open_stage(cfg, "critic", inputs=["actor"]) as stage:
        tokenizer, model = load_tokenizer(artifact(cfg.root, "actor")), critic_from_actor(cfg)
        rows = load_rows(cfg, "preference", needs=("prompt", "chosen", "rejected"))
        note_texts(stage.say, tokenizer, rows, ["chosen", "rejected"], cfg)
        plan = epochs(cfg, "pairs", len(rows), cfg.critic_batch, cfg.critic_epochs)
        rates, loss_of = [(model, cfg.critic_lr)], partial(critic_loss, model, tokenizer, cfg)
        optimiser = Optimiser(cfg, rates, len(plan), batch=cfg.critic_batch, say=stage.say)
        yield from stage.past
        for step in stage.steps(len(plan), optimiser):
            start = time.perf_counter()
            model.train()
            metrics = {"step": step + 1, "steps": len(plan)}
            metrics |= optimiser.step([rows[i] for i in plan[step]], loss_of, step)
            yield stage.log(metrics | {"seconds": time.perf_counter() - start})
        model.config.reward_mean, model.config.reward_std = score_scale(model, cfg)
        finish(stage, model.eval(), tokenizer, {"accuracy": metrics["accuracy"]})


def critic_from_actor(cfg):
    """The actor's body under a new head of zeros: it can read, it has no opinion yet."""
    return load_scorer(artifact(cfg.root, "actor"), cfg)


def critic_loss(model, tokenizer, cfg, rows):
    """Pairs put in order, at a small price for scores far from zero."""
    scores = pair_scores(model, tokenizer, rows, cfg)
    loss, stats = pairwise_loss(*scores)
    return loss + cfg.score_penalty * torch.cat(scores).square().mean(), len(rows), stats


def pair_scores(model, tokenizer, rows, cfg):
    """Scores of the chosen and of the rejected answers, (B,) each, from one forward pass."""
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    prompts = [row["prompt"] for row in rows] * 2
    tokens = encode_pairs(tokenizer, prompts, answers, cfg, model.device)
    return answer_scores(model, *tokens).chunk(2)


def score_scale(model, cfg):
    """Mean of the scores of the actor's answers, and their spread between answers to one prompt."""
    tokenizer, actor = load_pair(cfg, "actor")
    rows = load_rows(cfg, "prompt")[: cfg.norm_prompts]
    prompts = [row["prompt"] for row in rows for _ in range(cfg.norm_answers)]
    tokens = answer(actor, tokenizer, prompts, cfg, dice(cfg, "scale"))
    with torch.no_grad():
        parts = [answer_scores(model.eval(), *part) for part in tokens]
    groups = torch.cat(parts).view(-1, cfg.norm_answers)  # (prompts, answers)
    return groups.mean().item(), max(groups.var(1).mean().sqrt().item(), 1e-3)


def answer(model, tokenizer, prompts, cfg, generator, temperature=None):
    """Answers to many prompts, `eval_batch` at a time: the tokens of each batch."""
    for part in chunks(prompts, cfg.eval_batch):
        prompt = encode_prompts(tokenizer, part, cfg, model.device)
        out = sample(model, tokenizer, *prompt, cfg, generator, temperature)
        yield *prompt, *out[:2]


def value_from_critic(cfg):
    """The value model: the reward model itself, its head rescaled to the reward's units."""
    model = load_scorer(artifact(cfg.root, "critic"), cfg)
    mean, std = model.config.reward_mean, model.config.reward_std
    head = torch.nn.Linear(model.score.in_features, 1, device=model.device)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score = head
    return model


def assemble(cfg, reward=None):
    """Policy and reference start as the actor, the value model as the critic."""
    (tokenizer, policy), (_, reference) = load_pair(cfg, "actor"), load_pair(cfg, "actor")
    reward = reward or RewardModel(artifact(cfg.root, "critic"), cfg)
    return Crew(tokenizer, policy, reference, reward, value_from_critic(cfg))


def ppo_loss(crew, rollout, cfg, rows):
    """Loss of some rows: policy, values and entropy together. `old` is what the rollout saw."""
    tokens, old = rollout.part(rows, crew.policy.device)
    mask = tokens[3]
    logprobs, entropy = response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    policy_loss, stats = ppo_policy_loss(
        logprobs, old["logprobs"], old["advantages"], mask, clip_ratio=cfg.clip_ratio
    )
    values = answer_values(crew.value_model, *tokens)
    value_loss, value_stats = ppo_value_loss(
        values, old["values"], old["returns"], mask, value_clip=cfg.value_clip
    )
    entropy = masked_mean(entropy, mask)
    loss = policy_loss + cfg.value_coef * value_loss - cfg.entropy_coef * entropy
    stats |= value_stats | {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
    }
    return loss, int(mask.sum()), detached(stats)


def improve(crew, optimiser, rollout, cfg, step):
    """Several epochs over one rollout, in minibatches. Yields the stats of each update."""
    rows, updates, loss_of = len(rollout.prompts), 0, partial(ppo_loss, crew, rollout, cfg)
    per_step = cfg.ppo_epochs * math.ceil(rows / cfg.minibatch)
    for epoch in range(cfg.ppo_epochs):
        order = torch.randperm(rows, generator=dice(cfg, "minibatch", step, epoch))
        for index in order.split(cfg.minibatch):
            stats = optimiser.step(index.tolist(), loss_of, step + updates / per_step)
            if updates == 0 and stats["ratio_error"] > 1e-3:
                raise CourseError(
                    f"The first ratio of a rollout is off by {stats['ratio_error']:.1g}: sampling "
                    "and scoring do not see the same distribution."
                )
            updates += 1
            yield stats
        if cfg.stop_kl and stats["approx_kl"] > cfg.stop_kl:
            return


def prompt_batch(cfg, prompts, step):
    """The prompts of one step: through all of them in a new order each time, none left out."""
    batch = []
    for i in range(step * cfg.rollout, (step + 1) * cfg.rollout):
        lap, place = divmod(i, len(prompts))
        if place == 0 or not batch:
            order = torch.randperm(len(prompts), generator=dice(cfg, "prompts", lap)).tolist()
        batch.append(prompts[order[place]])
    return batch


def roll_out(crew, optimiser, prompts, cfg, step):
    """The rollout of one step, with as many rows at once as fit into memory."""
    batch, kl_coef = prompt_batch(cfg, prompts, step), optimiser.state["kl_coef"]

    def work(size):
        luck = dice(cfg, "rollout", step)
        return collect(crew, batch, cfg, kl_coef=kl_coef, generator=luck, size=size)

    return optimiser.fit(work, "rollout_batch")


def train_rlhf(cfg, reward=None):
    """PPO: answer, judge, price the distance from the actor, improve; again.

    `reward` is any callable `reward(prompts, responses) -> list[float]`; else the reward model.
    """
    with open_stage(cfg, "rlhf", inputs=["actor", "critic"]) as stage:
        crew = assemble(cfg, reward)
        rows = load_rows(cfg, "prompt")
        note_texts(stage.say, crew.tokenizer, rows, [], cfg)
        prompts = [row["prompt"] for row in rows]
        optimiser = crew_optimiser(crew, cfg, stage.say)
        yield from stage.past
        risen = alerts(stage.past[-1], cfg.kl_limit) if stage.past else {}
        for step in stage.steps(cfg.steps, optimiser):
            start = time.perf_counter()
            rollout = roll_out(crew, optimiser, prompts, cfg, step)
            half = time.perf_counter()
            updates = list(improve(crew, optimiser, rollout, cfg, step))
            metrics = {"step": step + 1, "steps": cfg.steps, "kl_coef": optimiser.state["kl_coef"]}
            metrics |= rollout_metrics(rollout, crew.tokenizer) | mean_of(updates)
            metrics |= {"seconds_rollout": half - start, "seconds": time.perf_counter() - start}
            stage.samples(samples_of(crew, rollout, prompts, cfg, step))
            yield stage.log(metrics)
            before, risen = risen, alerts(metrics, cfg.kl_limit)
            stage.alert(before, risen, stop=cfg.stop_on_alert)
            price = optimiser.state["kl_coef"]
            optimiser.state["kl_coef"] = next_kl_coef(price, metrics["kl"], cfg)
        summary = {name: metrics[name] for name in ("reward", "kl", "length", "entropy", "skipped")}
        finish(stage, crew.policy, crew.tokenizer, summary)


def crew_optimiser(crew, cfg, say=print):
    """What updates policy and value model; the rest of the crew only moves along."""
    rates = [(crew.policy, cfg.policy_lr), (crew.value_model, cfg.value_lr)]
    frozen = [
        crew.reference,
        *([crew.reward.model] if isinstance(crew.reward, RewardModel) else []),
    ]
    optimiser = Optimiser(cfg, rates, cfg.steps, batch=cfg.minibatch, frozen=frozen, say=say)
    optimiser.state["kl_coef"] = cfg.kl_coef
    return optimiser


def mean_of(dicts):
    """The mean of each figure; of ratio_error the first, which ought to be 0."""
    means = {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]}
    ends = {"ratio_error": dicts[0]["ratio_error"], "skipped": dicts[-1]["skipped"]}
    return means | ends | {"updates": len(dicts)}


def rollout_metrics(rollout, tokenizer):
    mask, ids = rollout.mask, rollout.tokens[2]
    whole = ended(ids, mask, tokenizer.eos_token_id)
    return {
        "reward": rollout.scores.mean().item(),
        "kl": rollout.kl.mean().item(),
        "length": mask.sum(1).float().mean().item(),
        "eos": whole.float().mean().item(),
        "empty": sum(not text for text in rollout.responses) / len(rollout.responses),
        "explained_variance": explained_variance(rollout.values, rollout.returns, mask).item(),
    }


def samples_of(crew, rollout, prompts, cfg, step, count=4):
    """Answers to be read: the first of a rollout, now and then the favourites at fixed prompts."""
    columns = rollout.prompts, rollout.responses, rollout.scores.tolist(), rollout.kl.tolist()
    for prompt, response, score, kl in list(zip(*columns))[:count]:
        row = {"prompt": prompt, "response": response, "reward": score, "kl": kl}
        yield {"step": step + 1, "fixed": False} | row
    if step % cfg.sample_every == 0 or step == cfg.steps - 1:
        for row in look(crew, prompts[:count], cfg):
            yield {"step": step + 1, "fixed": True} | row


# ------------------------------------------------------------------------------------------------
# 12. Evaluation


def look(crew, prompts, cfg):
    """The policy's favourite answer to a few prompts: text, reward, KL to the reference."""
    rows = [{"prompt": prompt} for prompt in prompts]
    answers = evaluate(crew, rows, cfg, dice(cfg, "look"), temperature=0)
    return [{name: row[name] for name in ("prompt", "response", "reward", "kl")} for row in answers]


@trouble.in_words
@torch.no_grad()
def evaluate(crew, rows, cfg, generator, *, temperature=None):
    """One answer of the policy to each row: text, judge's score, reward, KL, length, eos.

    The judge's score is None where a row does not say what would be right.
    """
    results, prompts, models = [], [row["prompt"] for row in rows], (crew.policy, crew.reference)
    for tokens in answer(crew.policy, crew.tokenizer, prompts, cfg, generator, temperature):
        logprobs = [response_logprobs(m, *tokens, temperature=cfg.temperature)[0] for m in models]
        part = rows[len(results) : len(results) + len(tokens[0])]
        texts = decode(crew.tokenizer, *tokens[2:])
        columns = {
            "response": texts,
            "reward": ask(crew.reward, [row["prompt"] for row in part], texts).tolist(),
            "kl": kl_estimate(*logprobs).sum(1).tolist(),
            "length": tokens[3].sum(1).tolist(),
            "eos": ended(*tokens[2:], crew.tokenizer.eos_token_id).tolist(),
        }
        for row, *values in zip(part, *columns.values()):
            result = {"prompt": row["prompt"], "kind": row.get("kind", "all")}
            result |= dict(zip(columns, values))
            truth = (row, result["response"], result["eos"])
            results.append(result | {"judge": world.judge(*truth) if world.knows(row) else None})
    return results


@trouble.in_words
@torch.no_grad()
def judge_critic(critic, tokenizer, rows, cfg):
    """The reward model on held-out pairs: both scores of each, and the kind."""
    rows, results = with_pairs(rows), []
    if not rows:
        raise CourseError("eval.json needs rows with chosen and rejected to measure the critic on.")
    for part in chunks(rows, cfg.eval_batch):
        scores = zip(part, *(s.tolist() for s in pair_scores(critic.eval(), tokenizer, part, cfg)))
        for row, chosen, rejected in scores:
            known = {"kind": row.get("kind", "all"), "flaw": row.get("flaw", "not said")}
            results.append(known | {"chosen": chosen, "rejected": rejected})
    return results
