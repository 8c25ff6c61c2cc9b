"""RLHF on one blackboard: everything the course teaches, to be read from top to bottom.

Contents
    1. Tokens              prompts padded on the left, answers on the right
    2. Models              base, actor, critic: plain Hugging Face models
    3. Generation          sampling with a cache
    4. Log-probs           what a model thinks of an answer
    5. Masked statistics   means over real tokens only
    6. Losses              reward model, PPO, GRPO, DPO: pure functions of tensors
    7. Rewards             the reward model as a callable, the KL price, the rollout
    8. Optimisation        the one place where weights change
    9. Training            generators that yield one dict of metrics a step
    10. Evaluation         answers, their scores, their distance from the reference

Letters: B rows, P prompt length (left-padded), R response length (right-padded), T = P + R,
V vocabulary, G answers per prompt. Everything about answers is `(B, R)` with one bool mask made
from lengths. The shift by one between logits and tokens happens in `before_each_token`.

Left out on purpose: several machines, tools, several turns. What is no lesson lives in `lab/`.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lab import CourseError, decoding, fast_path, matmul, models, trouble, world
from lab.config import Config  # noqa: F401
from lab.data import with_pairs
from lab.models import choose_base, load_actor, load_both, load_scorer, load_tokenizer, pick_device  # noqa: F401
from lab.passes import in_parts
from lab.rewards import Ensemble, ask, code_of, models_in, name_of, named, normalised, parse
from lab.runs import Stage, artifact
from lab.shares import batches, dice, epochs, load_eval_rows, load_rows, prompt_batch, stack  # noqa: F401
from lab.tiny import blocks, tiny_model, train_tokenizer
from lab.tokens import encoder, stops_of
from lab.tracking import mean_of, rollout_metrics, samples_of, timed
from lab.trouble import Sturdy, alerts, note_texts

# ------------------------------------------------------------------------------------------------
# 1. Tokens


def encode_prompt(tokenizer, prompt, limit):
    """Token ids of a prompt, in the frame that its tokenizer is used to.

    One that is too long loses its front; its bos, the question's end and "Assistant:" stay.
    """
    return encoder(tokenizer).prompts([prompt], limit)[0]


def encode_answer(tokenizer, answer, limit):
    """Token ids of an answer and its end: a model learns to stop only where it sees a stop."""
    return encoder(tokenizer).answers([answer], limit)[0]


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
    ids = encoder(tokenizer).prompts(prompts, cfg.max_prompt)
    return pad(ids, tokenizer.pad_token_id, "left", device)  # (B, P)


def encode_pairs(tokenizer, prompts, answers, cfg, device):
    """Texts -> the four tensors that every scoring function takes."""
    prompt_ids, prompt_mask = encode_prompts(tokenizer, prompts, cfg, device)  # (B, P)
    ids = encoder(tokenizer).answers(answers, cfg.max_new_tokens)
    return prompt_ids, prompt_mask, *pad(ids, tokenizer.pad_token_id, "right", device)  # (B, R)


def decode(tokenizer, ids, mask):
    """The answers as text, without eos and padding; "</s>" that is written in letters stays."""
    return encoder(tokenizer).texts(row[real].tolist() for row, real in zip(ids, mask))


def ended(response_ids, response_mask, eos_token_id):
    """Which answers closed with an eos of their own; `stops_of` says which tokens are one."""
    last = response_ids.gather(1, response_mask.sum(1, keepdim=True).clamp(min=1) - 1)[:, 0]  # (B,)
    return torch.isin(last, as_ids(eos_token_id, last.device)) & response_mask.any(1)


def as_ids(token_id, device):
    """eos may be one id, several, or None."""
    several = token_id if isinstance(token_id, (list, tuple)) else [token_id]
    ids = [one for one in several if one is not None]
    return torch.tensor(ids, dtype=torch.long, device=device)


# ------------------------------------------------------------------------------------------------
# 2. Models


def before_each_token(prompt_ids, prompt_mask, response_ids, response_mask):
    """What to read so that the last R positions stand before the R answer tokens, (B, T - 1)."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    return ids[:, :-1], mask[:, :-1]


def before_answers(prompt_ids, response_mask):
    """Marks the places in (B, T - 1) that stand before a real answer token."""
    return torch.cat([torch.zeros_like(prompt_ids[:, 1:], dtype=torch.bool), response_mask], dim=1)


def answer_logits(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Logits that predict each real answer token, (N, V): position t sees everything before t."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden, head = fast_path.hidden_states(model, *read, before_answers(prompt_ids, response_mask))
    return head(hidden).float()


def answer_scores(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """One score per answer, (B,): the number at its last real token, which has read all of it."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    last = prompt_ids.shape[1] + response_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return fast_path.scores(scorer, ids, mask, torch.zeros_like(mask).scatter(1, last, True))


def answer_values(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """What the value model expects before each answer token is written, (B, R)."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    wanted = before_answers(prompt_ids, response_mask)
    return spread(fast_path.scores(scorer, *read, wanted), response_mask)


def spread(x, mask):
    """One number per real token, (N,), back in its place, (B, R); 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


# ------------------------------------------------------------------------------------------------
# 3. Generation


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
    device, B = prompt_ids.device, len(prompt_ids)
    ids = torch.full((B, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    stops, live = as_ids(eos_token_id, device), torch.arange(B, device=device)
    luck = lots(B, max_new_tokens, generator, device)
    with models.eval_mode(model):
        reader, logits = decoding.start_decoding(model, prompt_ids, prompt_mask, max_new_tokens)
        for t in range(max_new_tokens):
            token, logprob = pick(logits.float(), luck[live, t], temperature, top_k, top_p)
            ids[live, t], logprobs[live, t] = token, logprob
            lengths[live[torch.isin(token, stops) & (lengths[live] > t + 1)]] = t + 1
            running = lengths[live] > t + 1
            if not running.any():
                break
            if running.float().mean() < 0.75:  # finished rows leave the batch and the cache
                keep = running.nonzero()[:, 0]
                reader.keep(keep)
                live, token = live[keep], token[keep]
            logits = reader.next(token)
    R = int(lengths.max())
    response_mask = torch.arange(R, device=device) < lengths[:, None]  # (B, R)
    response_ids = ids[:, :R].masked_fill(~response_mask, pad_token_id)
    return response_ids, response_mask, logprobs[:, :R] * response_mask


def lots(B, R, generator, device):
    """Numbers in [0, 1), (B, R), drawn where the generator lives: the same on every device.

    A row's numbers do not depend on the rows beside it, so a batch may be cut anywhere.
    """
    source = generator.device if generator else "cpu"
    luck = torch.rand(B, R, generator=generator, device=source, dtype=torch.float64)
    return luck.clamp(max=1 - 2**-24).to(device, models.finest_dtype(device))


def pick(logits, luck, temperature, top_k, top_p):
    """One token a row and its log-prob: `luck` in [0, 1) is looked up in the cumulative sum."""
    logits = logits if temperature in (0, 1) else logits / temperature  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        ladder = truncated(logits, top_k, top_p).softmax(-1)
        ladder = ladder.cumsum(-1, dtype=models.finest_dtype(logits.device))
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
# 4. Log-probs


def token_logprobs(logits, tokens):
    """log softmax(logits)[token] without ever holding the whole log-softmax."""
    if logits.requires_grad:  # the same, and its gradient in one sweep
        picked = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        return -picked.view(tokens.shape)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def entropies(logits):
    """How undecided each distribution is, in nats."""
    probs = logits.softmax(-1)
    return logits.logsumexp(-1) - (probs * logits).sum(-1)


def response_logprobs(
    model, prompt_ids, prompt_mask, response_ids, response_mask, *, temperature=1.0, entropy=True
):
    """Log-prob of each answer token, and the entropy of the choice: two tensors (B, R).

    `entropy=False` leaves the second one 0, and saves its time. Without gradients some tokens at a
    time: all logits of a large vocabulary would fill the memory.
    """
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden, head = fast_path.hidden_states(model, *read, before_answers(prompt_ids, response_mask))
    tokens = response_ids[response_mask]

    def measure(hidden, tokens):
        logits = head(hidden).float()  # (n, V)
        logits = logits if temperature == 1 else logits / temperature
        undecided = torch.zeros_like(logits[:, 0])
        if entropy:  # computed anew where somebody wants its gradient: nothing is kept for that
            undecided = checkpoint(entropies, logits, use_reentrant=False)
        return token_logprobs(logits, tokens), undecided

    size = max(1, len(tokens)) if torch.is_grad_enabled() else 128
    pieces = map(measure, hidden.split(size), tokens.split(size))
    return tuple(spread(torch.cat(column), response_mask) for column in zip(*pieces))


# ------------------------------------------------------------------------------------------------
# 5. Masked statistics


def masked_mean(x, mask):
    """Mean over what the mask keeps; 0 if it keeps nothing."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def mean_over(x, mask, unit="token"):
    """Mean over tokens, in which long answers weigh more, or over answers' own means."""
    if unit == "token":
        return masked_mean(x, mask)
    means = torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)  # (B,)
    return means.mean()


def masked_whiten(x, mask):
    """Mean 0 and deviation 1 over what the mask keeps, 0 elsewhere."""
    x = torch.where(mask, x, 0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0)


def masked_quantile(x, mask, share):
    """The number that `share` of what the mask keeps do not exceed; for numbers of at least 0."""
    ordered = torch.where(mask, x, 0).flatten().sort(descending=True).values
    above = ((1 - share) * mask.sum()).long()
    return ordered.gather(0, above[None])[0]


def explained_variance(values, returns, mask):
    """1: the values foresaw the returns. 0: no better than their mean. Below 0: worse."""
    mean = masked_mean(returns, mask)
    spread = masked_mean((returns - mean) ** 2, mask)
    return 1 - masked_mean((returns - values) ** 2, mask) / (spread + 1e-8)


# ------------------------------------------------------------------------------------------------
# 6. Losses


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


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_ratio, unit="token"):
    """PPO's clipped objective, as a loss:

    ratio = exp(logprobs - old_logprobs)        -min(ratio A, clip(ratio, 1 - c, 1 + c) A)
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    stats = {
        "clip_fraction": mean_over((clipped * advantages < ratio * advantages).float(), mask, unit),
        "approx_kl": mean_over(torch.expm1(log_ratio) - log_ratio, mask, unit),
        "ratio_error": mean_over((ratio - 1).abs(), mask, unit),
        "ratio_error_q99": masked_quantile((ratio - 1).abs(), mask, 0.99),
    }
    return mean_over(loss, mask, unit), detached(stats)


def ppo_value_loss(values, old_values, returns, mask, *, value_clip, unit="token"):
    """Half the squared error; a value that moved further than the clip gains nothing from it."""
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    stats = {"value_clip_fraction": mean_over((clipped_error > error).float(), mask, unit)}
    return 0.5 * mean_over(torch.maximum(error, clipped_error), mask, unit), detached(stats)


def group_advantages(rewards, group_size, *, scale=True):
    """GRPO: how much better an answer is than the other answers to its prompt, (B,)."""
    if group_size < 2 or len(rewards) % group_size:
        raise CourseError(f"{len(rewards)} rewards do not make groups of {group_size} (2 or more).")
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards are exactly 0: a rounding would be scaled up
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)  # far above rounding
    return centred.flatten()


def leave_one_out(rewards, group_size):
    """RLOO: an answer's reward minus the mean of the *other* answers to its prompt, (B,)."""
    return group_advantages(rewards, group_size, scale=False) * group_size / (group_size - 1)


def grpo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, mask, *,
    clip_ratio, kl_coef, estimator="k3", unit="token",
):  # fmt: skip
    """PPO's clipped objective with one advantage per answer (B,), and the KL in the loss."""
    advantages = advantages[:, None].expand_as(logprobs)  # (B, R)
    loss, stats = ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_ratio=clip_ratio, unit=unit
    )
    kl = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator, unit=unit)
    return loss + kl_coef * kl, stats | detached({"kl": kl})


def kl_loss(logprobs, ref_logprobs, mask, *, estimator, unit="token"):
    """The mean KL to the reference, as a term of a loss.

    The gradient of k1 is that of the log-probs alone, and its expectation over the policy's own
    samples is 0: as a loss k1 would hold nothing back. k2 and k3 do.
    """
    if estimator == "k1":
        raise CourseError(
            "estimator = 'k1' has a gradient of zero on average, so as a loss it holds nothing "
            "back: use 'k2' or 'k3'."
        )
    gap = torch.where(mask, logprobs - ref_logprobs, 0)
    return mean_over(kl_estimate(gap, 0, estimator=estimator), mask, unit)


def dpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, *, beta, loss_type="sigmoid", label_smoothing=0.0
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
# 7. Rewards


class RewardModel:
    """A trained critic as a reward: `reward(prompts, responses) -> list[float]`.

    Its raw scores have no scale of their own. They come out in units of the spread between answers
    of the actor to one and the same prompt, with the actor's mean at 0.
    """

    def __init__(self, path, cfg):
        self.model = models.frozen(load_scorer(path, cfg), cfg)
        self.tokenizer = load_tokenizer(path, cfg)
        self.cfg = cfg
        self.mean = getattr(self.model.config, "reward_mean", 0.0)
        self.std = getattr(self.model.config, "reward_std", 1.0)

    def __call__(self, prompts, responses):
        def work(rows):
            tokens = encode_pairs(self.tokenizer, *zip(*rows), self.cfg, self.model.device)
            return answer_scores(self.model, *tokens).tolist()

        scores = sum(in_parts(work, list(zip(prompts, responses)), self.cfg, self.model), [])
        return [(score - self.mean) / self.std for score in scores]


def chunks(rows, size):
    """A list, a tensor or a range in slices."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass
class Crew:
    """Who takes part in RLHF. A test needs no value model."""

    tokenizer: object
    policy: torch.nn.Module  # learns
    reference: torch.nn.Module | None  # the actor as it was; None: the policy without its adapter
    reward: object  # any callable reward(prompts, responses) -> list[float]
    value_model: torch.nn.Module | None = None  # learns what to expect; PPO alone needs it

    def as_reference(self):
        """`with crew.as_reference() as model:` the model that says where learning began."""
        if self.reference is not None:
            return nullcontext(self.reference)
        return models.without_adapter(self.policy)


@dataclass
class Rollout:
    """What one round of answers left behind. Tensors are (B, R) unless they say otherwise."""

    prompts: list
    responses: list  # texts
    tokens: tuple  # prompt_ids, prompt_mask (B, P), response_ids, response_mask
    sampled: torch.Tensor  # log pi_old(a | s), found while sampling
    logprobs: torch.Tensor  # the same, found by scoring: what ratios are taken from
    ref_logprobs: torch.Tensor  # log pi_ref(a | s)
    values: torch.Tensor  # V(s)
    scores: torch.Tensor  # (B,), what the reward says, after clip and penalties
    ended: torch.Tensor  # (B,), whether an answer closed with its eos
    advantages: torch.Tensor
    returns: torch.Tensor
    kl_coef: float  # the price of KL
    parts: dict  # {name: mean} of the rewards that make up the sum
    seconds: dict  # that it took to generate and to score

    @property
    def mask(self):
        return self.tokens[3]

    @property
    def sampling_error(self):
        """How far scoring finds an average token's probability off the one it was sampled with."""
        return masked_mean((self.logprobs - self.sampled).expm1().abs(), self.mask).item()

    @property
    def kl(self):
        """KL to the reference per answer, (B,)."""
        return kl_estimate(self.logprobs, self.ref_logprobs).sum(1)

    def lengths(self):
        """Tokens of each prompt and its answer."""
        return (self.tokens[1].sum(1) + self.mask.sum(1)).tolist()

    def part(self, rows, device):
        """The rows of one minibatch, without the columns that only they do not need."""
        prompt_ids, prompt_mask, response_ids, mask = (x[rows].to(device) for x in self.tokens)
        P, R = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
        tokens = prompt_ids[:, -P:], prompt_mask[:, -P:], response_ids[:, :R], mask[:, :R]
        names = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        return tokens, {name: getattr(self, name)[rows, :R].to(device) for name in names}


def token_rewards(scores, kl, mask, kl_coef):
    """The price of each token's KL, and the score of the answer on its last real token, (B, R)."""
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return torch.where(mask, last * scores[:, None] - kl_coef * kl, 0)


@torch.no_grad()
def collect(crew, prompts, cfg, *, kl_coef, generator, size=None, running=None):
    """Answers to some prompts, scored, and priced by their distance from the reference.

    `size` rows go through the models at once: all of them, unless that needs too much memory.
    `running` holds what `normalised` knows of earlier scores.
    """
    prompt = encode_prompts(crew.tokenizer, prompts, cfg, crew.policy.device)
    index = chunks(range(len(prompts)), size or len(prompts))
    pieces = [answer_and_score(crew, prompts, prompt, rows, cfg, generator) for rows in index]
    texts, parts, seconds, *columns = zip(*pieces)
    ids, mask, sampled, logprobs, ref_logprobs, values, scores = map(stack, columns)
    tokens = (*prompt, ids.masked_fill(~mask, crew.tokenizer.pad_token_id), mask)
    if cfg.reward_norm:
        scores = normalised(scores, {} if running is None else running)
    scores = scores.clamp(-cfg.reward_clip, cfg.reward_clip) - cfg.length_penalty * mask.sum(1)
    whole = ended(ids, mask, stops_of(crew.policy, crew.tokenizer))
    scores -= cfg.missing_eos_penalty * ~whole
    kl = kl_estimate(logprobs, ref_logprobs, estimator=cfg.kl_estimator)
    price = kl_coef if cfg.kl_in == "reward" else 0
    found = advantages_of(scores, kl, price, values, mask, cfg)
    means = {name: sum(sum(p[name]) for p in parts) / len(prompts) for name in parts[0]}
    seconds = {name: sum(s[name] for s in seconds) for name in seconds[0]}
    models_say = tokens, sampled, logprobs, ref_logprobs, values, scores, whole
    return Rollout(prompts, sum(texts, []), *models_say, *found, kl_coef, means, seconds)


def answer_and_score(crew, prompts, prompt, rows, cfg, generator):
    """Texts of the answers to some rows, all that the models say about them, and the seconds."""
    prompt, prompts = [x[rows.start : rows.stop] for x in prompt], [prompts[i] for i in rows]
    how, start = {"temperature": cfg.temperature, "entropy": False}, time.perf_counter()
    with models.autocast(cfg, crew.policy):
        response_ids, mask, sampled = sample(crew.policy, crew.tokenizer, *prompt, cfg, generator)
        tokens = (*prompt, response_ids, mask)
        responses = decode(crew.tokenizer, response_ids, mask)
        written = time.perf_counter()
        with matmul.fast_matmul(crew.policy):
            scores, parts = ask(crew.reward, prompts, responses)
            logprobs = sampled
            if models.precision(cfg) != "float32":  # half precision rounds differently in sampling
                logprobs, _ = response_logprobs(crew.policy, *tokens, **how)
            with crew.as_reference() as reference:
                ref_logprobs, _ = response_logprobs(reference, *tokens, **how)
            values = torch.zeros_like(logprobs)
            if crew.value_model is not None:
                values = answer_values(crew.value_model, *tokens)
    scores = scores.to(mask.device)
    seconds = {"generate": written - start, "score": time.perf_counter() - written}
    models_say = response_ids, mask, sampled, logprobs, ref_logprobs, values, scores
    return responses, parts, seconds, *models_say


def advantages_of(scores, kl, price, values, mask, cfg):
    """(advantages, returns), (B, R): how much better things went than was to be expected.

    PPO expects what its value model says before each token; GRPO and RLOO the mean of the other
    answers to the same prompt; any other algorithm gets the distance from the rollout's mean.
    """
    if cfg.algorithm == "ppo":
        rewards = token_rewards(scores, kl, mask, price)
        advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
        return (masked_whiten(advantages, mask) if cfg.whiten else advantages), returns
    totals = scores - price * (kl * mask).sum(1)
    if cfg.algorithm == "grpo":
        advantages = group_advantages(totals, cfg.answers, scale=cfg.group_scale)
    elif cfg.algorithm == "rloo":
        advantages = leave_one_out(totals, cfg.answers)
    else:
        advantages = totals - totals.mean()
    return advantages[:, None] * mask, totals[:, None] * mask


def sample(model, tokenizer, prompt_ids, prompt_mask, cfg, generator, temperature=None):
    """`generate` in the course's one way: no top-k, no top-p, no repetition penalty."""
    return generate(
        model,
        prompt_ids,
        prompt_mask,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature if temperature is None else temperature,
        eos_token_id=stops_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        generator=generator,
    )


# ------------------------------------------------------------------------------------------------
# 8. Optimisation


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
        fp16, device = models.precision(cfg) == "fp16", self.models[0].device.type
        # Small gradients of fp16 stay above 0; losses are sums here, so torch's 2**16 is too much.
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=fp16)
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
        if "scaler" in self.state:  # of fp16, as it was at the last step
            self.scaler.load_state_dict(self.state["scaler"])

        def work(_):
            with models.autocast(self.cfg, self.models[0]):
                size = self.update_size(rows, loss_of)
            return self.gradient(rows, loss_of, size)

        stats = self.fit(work, "micro_batch")
        ramp = min(1.0, (progress + 1) / max(1.0, self.cfg.warmup * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress / self.steps)))
        scale = ramp * (self.cfg.lr_floor + (1 - self.cfg.lr_floor) * cosine)
        for group, peak in zip(self.adamw.param_groups, self.peaks):
            group["lr"] = peak * scale
        self.scaler.unscale_(self.adamw)
        clip = torch.nn.utils.clip_grad_norm_
        norms = [float(clip(group, self.cfg.grad_clip)) for group in self.parameters]
        self.take(all(map(math.isfinite, [stats["loss"], *norms])), int(progress) + 1)
        figures = {"grad_norm": norms[0], "lr": self.peaks[0] * scale}
        return stats | figures | {"skipped": self.state["skipped"]}

    def gradient(self, rows, loss_of, size):
        """Backward, `size` rows at once: pieces weighted by their size make the same gradient."""
        self.adamw.zero_grad()
        self.tidy()
        parts, total, pieces = [], 0, chunks(rows, size)
        for piece in pieces:
            with matmul.fast_matmul(self.models[0]):
                with models.autocast(self.cfg, self.models[0]):
                    loss, weight, stats = loss_of(piece)
                weight = weight if pieces[1:] else 1
                self.scaler.scale(loss * weight).backward()
            parts.append((weight, stats | {"loss": loss.detach()}))
            total += weight
        learning = [p for group in self.parameters for p in group if p.grad is not None]
        for parameter in learning if pieces[1:] else []:
            parameter.grad /= total
        figures = {name: [float(s[name]) for _, s in parts] for name in parts[0][1]}
        means = {n: sum(w * x for (w, _), x in zip(parts, xs)) / total for n, xs in figures.items()}
        return means | {n: max(xs) for n, xs in figures.items() if n.endswith("_q99")}


def next_kl_coef(kl_coef, kl, cfg):
    """Ziegler's controller: KL above its target raises the price, below lowers it, 20 % at most."""
    if not cfg.kl_target:
        return kl_coef
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return kl_coef * (1 + error * cfg.rollout / cfg.kl_horizon)


# ------------------------------------------------------------------------------------------------
# 9. Training


def open_stage(cfg, name, inputs=(), data="train.json", code=None):
    """The folder that a stage fills; it appears in model/ when it is whole.

    `code` tells functions of one's own apart, so that a stopped run never goes on with others.
    """
    torch.manual_seed(cfg.seed)  # for the dropout of models that have some
    data = [Path(cfg.root) / "dataset" / data]
    config, minutes = asdict(cfg) | (code or {}), cfg.checkpoint_minutes
    how = {"resume": cfg.resume, "resume_changed": cfg.resume_changed, "minutes": minutes}
    return Stage(cfg.root, name, config, inputs, data, **how)


def train_base(cfg, base=None):
    """A ready base model is copied, `tiny` is pretrained; its tokenizer goes to tokenizer/ too.

    `base` is what `choose_base(cfg)` found, if it was asked before.
    """
    base = base or choose_base(cfg)
    with open_stage(cfg, "base") as stage:
        if base.source == "tiny":
            model, tokenizer = yield from pretrain(cfg, stage)
        else:
            tokenizer, model = base.loaded
            yield stage.log({"step": 1, "steps": 1})
        stage.summary = {"preset": "tiny" if base.source == "tiny" else "colab"}
        models.save(model, tokenizer, stage.folder)
        tokenizer.save_pretrained(Path(cfg.root) / "tokenizer")


def pretrain(cfg, stage):
    """From random weights, learn to predict the next token of the world's text."""
    texts = list(world.documents(world.World(seed=cfg.seed), cfg.pretrain_documents))
    sample = (world.TEMPLATE.format(question) + " " + answer for question, answer in texts[:8_000])
    tokenizer = train_tokenizer(sample, cfg.vocab_size)
    data, model = (
        blocks(tokenizer, texts, cfg),
        tiny_model(cfg, tokenizer).to(pick_device(cfg)),
    )
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
        yield stage.log(timed(stats, start, tokens=size * cfg.pretrain_length))
    return model, tokenizer


def next_token_loss(model, ids):
    """Cross-entropy of every token given those before it; ids (B, T)."""
    read = ids[:, :-1], torch.ones_like(ids[:, 1:], dtype=torch.bool)
    hidden, head = fast_path.hidden_states(model, *read, read[1])
    return F.cross_entropy(head(hidden).float(), ids[:, 1:].flatten())


@torch.no_grad()
def copying(model, tokenizer, texts, cfg):
    """How often the model foresees a word of the answer that stands in the question."""
    questions, answers = zip(*texts)
    tokens = encode_pairs(tokenizer, questions, answers, cfg, model.device)
    copied = (tokens[2][:, :, None] == tokens[0][:, None, :]).any(2) & tokens[3]  # (B, R)
    with models.autocast(cfg, model):
        foreseen = answer_logits(model, *tokens).argmax(-1) == tokens[2][tokens[3]]  # (N,)
    return masked_mean(foreseen.float(), copied[tokens[3]]).item()


def train_actor(cfg):
    """Supervised fine-tuning: the crowd's answers become likelier; prompts do not count."""
    with open_stage(cfg, "actor", inputs=["base"]) as stage:
        tokenizer, model = load_pair(cfg, "base", **models.in_4_bits(cfg))
        model = models.trainable(model, cfg)
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
            yield stage.log(timed(metrics, start, rows=len(plan[step])))
        del optimiser  # its moments
        stage.summary = {"loss": metrics.get("validation_loss", metrics["loss"])}
        models.save(model, tokenizer, stage.folder)


def load_pair(cfg, name, **extra):
    """Tokenizer and language model of a finished stage."""
    return load_both(cfg, artifact(cfg.root, name), f"model/{name}", **extra)


def sft_loss(model, tokenizer, cfg, rows):
    """Minus the mean log-prob of the answers' tokens, eos included; and how many there are."""
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    tokens = encode_pairs(tokenizer, *texts, cfg, model.device)
    logprobs, _ = response_logprobs(model, *tokens, entropy=False)
    return -masked_mean(logprobs, tokens[3]), int(tokens[3].sum()), {}


def validation_loss(model, tokenizer, rows, cfg):
    work = partial(sft_loss, model, tokenizer, cfg)
    losses = [told[:2] for told in in_parts(work, rows, cfg, model, learning=[model])]
    return sum(loss.item() * count for loss, count in losses) / sum(n for _, n in losses)


def train_critic(cfg):
    """The reward model: of two answers to a prompt, the one people chose should score higher.

    An ensemble learns side by side, each member from the same pairs in an order of its own.
    """
    with open_stage(cfg, "critic", inputs=["actor"]) as stage:
        tokenizer = load_tokenizer(artifact(cfg.root, "actor"), cfg)
        members = [critic_from_actor(cfg, i) for i in range(cfg.ensemble)]
        rows = load_rows(cfg, "preference", needs=("prompt", "chosen", "rejected"))
        note_texts(stage.say, tokenizer, rows, ["chosen", "rejected"], cfg)
        plans = [
            epochs(cfg, ("pairs", i), len(rows), cfg.critic_batch, cfg.critic_epochs)
            for i in range(cfg.ensemble)
        ]
        rates, loss_of = (
            [(m, cfg.critic_lr) for m in members],
            partial(critic_loss, members, tokenizer, cfg),
        )
        optimiser = Optimiser(cfg, rates, len(plans[0]), batch=cfg.critic_batch, say=stage.say)
        yield from stage.past
        metrics = stage.past[-1] if stage.past else {}
        for step in stage.steps(len(plans[0]), optimiser, keep_last=True):  # the scale may fail
            start = time.perf_counter()
            batch = [[rows[i] for i in places] for places in zip(*(plan[step] for plan in plans))]
            metrics = {"step": step + 1, "steps": len(plans[0])}
            metrics |= optimiser.step(batch, loss_of, step)
            metrics = stage.log(timed(metrics, start, rows=len(batch)))
            yield metrics
        del optimiser  # its moments make room for the actor
        stage.summary = {"accuracy": metrics["accuracy"]}
        for i, model in enumerate(members):
            model.config.reward_mean, model.config.reward_std = score_scale(model, cfg)
            models.save(model, tokenizer, stage.folder / f"member-{i}" if i else stage.folder)


def critic_from_actor(cfg, member=0):
    """The actor's body under a new head of zeros: it can read, it has no opinion yet."""
    torch.manual_seed(cfg.seed + member)  # for the adapters, which begin at random
    return models.trainable(
        load_scorer(artifact(cfg.root, "actor"), cfg, **models.in_4_bits(cfg)), cfg
    ).train()


def critic_loss(members, tokenizer, cfg, batch):
    """Pairs put in order, at a small price for scores far from zero; a column a member."""
    losses, stats = [], []
    for model, rows in zip(members, zip(*batch)):
        scores = pair_scores(model, tokenizer, rows, cfg)
        loss, told = pairwise_loss(*scores)
        losses.append(loss + cfg.score_penalty * torch.cat(scores).square().mean())
        stats.append(told)
    means = {name: sum(told[name] for told in stats) / len(stats) for name in stats[0]}
    return sum(losses), len(batch), means


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
    score = partial(answer_scores, model)
    with models.eval_mode(model):
        parts = answer(actor, tokenizer, prompts, cfg, dice(cfg, "scale"), then=score)
        groups = torch.cat(list(parts)).view(-1, cfg.norm_answers)  # (prompts, answers)
    return groups.mean().item(), max(groups.var(1).mean().sqrt().item(), 1e-3)


def answer(model, tokenizer, prompts, cfg, generator, temperature=None, then=lambda *t: t):
    """Answers to many prompts, as many at once as fit: what `then` makes of each batch's tokens."""

    def work(part):
        prompt = encode_prompts(tokenizer, part, cfg, model.device)
        out = sample(model, tokenizer, *prompt, cfg, generator, temperature)
        return then(*prompt, *out[:2])

    yield from in_parts(work, prompts, cfg, model, generator)


def value_model_of(cfg):
    """The value model: the reward model, its head in the reward's units; or the actor's body."""
    if cfg.value_init == "actor":
        return load_scorer(artifact(cfg.root, "actor"), cfg, **models.in_4_bits(cfg))
    model = load_scorer(artifact(cfg.root, "critic"), cfg, **models.in_4_bits(cfg))
    mean, std = model.config.reward_mean, model.config.reward_std
    head = torch.nn.Linear(model.score.in_features, 1, device=model.device)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score = head
    return model


def load_reward(cfg):
    """What cfg.reward spells out: a sum of named rewards, `model` being the trained ones."""

    def trained():
        folder = artifact(cfg.root, "critic")
        members = [RewardModel(path, cfg) for path in (folder, *sorted(folder.glob("member-*")))]
        return Ensemble(members, cfg.ensemble_rule, cfg.ensemble_k) if members[1:] else members[0]

    return parse(cfg.reward, trained)


def assemble(cfg, reward=None):
    """Policy and reference start as the actor, the value model (for PPO) as the critic.

    With adapters the reference needs no model of its own: it is the policy without them.
    """
    tokenizer, policy = load_pair(cfg, "actor", **models.in_4_bits(cfg))
    policy = models.trainable(policy, cfg, drop=False)
    reference = None if cfg.lora_rank else models.frozen(load_pair(cfg, "actor")[1], cfg)
    reward = None if cfg.algorithm == "dpo" else reward or load_reward(cfg)
    values = (
        models.trainable(value_model_of(cfg), cfg, drop=False) if cfg.algorithm == "ppo" else None
    )
    return Crew(tokenizer, policy, reference, reward, values)


def ppo(crew, rollout, cfg, rows):
    """The loss of some rows: policy, values and entropy together. `old` is what was true then."""
    tokens, old = rollout.part(rows, crew.policy.device)
    mask, unit = tokens[3], cfg.loss_mean
    logprobs, entropy = response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    policy_loss, stats = ppo_policy_loss(
        logprobs, old["logprobs"], old["advantages"], mask, clip_ratio=cfg.clip_ratio, unit=unit
    )
    values = answer_values(crew.value_model, *tokens)
    value_loss, value_stats = ppo_value_loss(
        values, old["values"], old["returns"], mask, value_clip=cfg.value_clip, unit=unit
    )
    entropy = mean_over(entropy, mask, unit)
    loss = policy_loss + cfg.value_coef * value_loss
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy
    if cfg.kl_in == "loss":
        ref_logprobs, estimator = old["ref_logprobs"], cfg.kl_estimator
        kl = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator, unit=unit)
        loss, stats = loss + rollout.kl_coef * kl, stats | {"kl_in_loss": kl}
    stats |= value_stats | {"value_loss": value_loss, "entropy": entropy}
    return loss, weight_of(mask, unit), detached(stats | {"policy_loss": policy_loss})


def grpo(crew, rollout, cfg, rows):
    """The same without values: GRPO and RLOO differ in their advantages alone."""
    tokens, old = rollout.part(rows, crew.policy.device)
    mask, unit = tokens[3], cfg.loss_mean
    logprobs, entropy = response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    if cfg.kl_in == "loss":
        loss, stats = grpo_loss(
            logprobs, old["logprobs"], old["ref_logprobs"], old["advantages"][:, 0], mask,
            clip_ratio=cfg.clip_ratio, kl_coef=rollout.kl_coef, estimator=cfg.kl_estimator,
            unit=unit,
        )  # fmt: skip
        stats["kl_in_loss"] = stats.pop("kl")
    else:  # the advantages have paid for the KL already
        loss, stats = ppo_policy_loss(
            logprobs, old["logprobs"], old["advantages"], mask, clip_ratio=cfg.clip_ratio, unit=unit
        )
    entropy = mean_over(entropy, mask, unit)
    stats |= detached({"policy_loss": loss, "entropy": entropy})
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy
    return loss, weight_of(mask, unit), stats


ALGORITHMS = {"ppo": ppo, "grpo": grpo, "rloo": grpo}


def weight_of(mask, unit):
    """How much a piece of a batch counts: by its tokens, or by its answers."""
    return int(mask.sum()) if unit == "token" else len(mask)


def improve(crew, optimiser, rollout, cfg, step, algorithm=ppo):
    """Several epochs over one rollout, in minibatches. Yields the stats of each update."""
    rows, updates, loss_of = len(rollout.prompts), 0, partial(algorithm, crew, rollout, cfg)
    optimiser.length = rollout.lengths().__getitem__
    per_step = cfg.ppo_epochs * math.ceil(rows / cfg.minibatch)
    for epoch in range(cfg.ppo_epochs):
        order = torch.randperm(rows, generator=dice(cfg, "minibatch", step, epoch))
        for index in order.split(cfg.minibatch):
            stats = optimiser.step(index.tolist(), loss_of, step + updates / per_step)
            if updates == 0:
                trouble.check_ratios(rollout, stats, models.precision(cfg), optimiser)
            updates += 1
            yield stats
        if cfg.stop_kl and stats.get("approx_kl", 0) > cfg.stop_kl:
            return


def roll_out(crew, optimiser, prompts, cfg, step):
    """The rollout of one step, with as many rows at once as fit into memory."""
    batch, state = prompt_batch(cfg, prompts, step), optimiser.state
    given = {"kl_coef": state["kl_coef"], "running": state["running"]}

    def work(_):
        size, luck = optimiser.rollout_size(), dice(cfg, "rollout", step)
        return collect(crew, batch, cfg, generator=luck, size=size, **given)

    return optimiser.fit(work, "rollout_batch")


def train_rlhf(cfg, reward=None, algorithm=None):
    """Answer, judge, price the distance from the actor, improve; again. (DPO needs no answers.)

    `reward` is any callable `reward(prompts, responses) -> list[float]`, `algorithm` any loss like
    `ppo`; without them the parameters of the same name decide.
    """
    known, code = ALGORITHMS | {"dpo": from_pairs}, {}
    if algorithm is None:
        algorithm = named("algorithm", cfg.algorithm, known)
    else:  # whatever reads cfg.algorithm must read the name of this function
        cfg = cfg.changed(algorithm=name_of(algorithm, known, cfg.algorithm))
    if algorithm not in known.values():
        code["code of algorithm"] = code_of(algorithm)
    inputs = cfg.starts_from(reward)
    if reward is not None:
        cfg = cfg.changed(reward=name_of(reward, {}))
        code["code of reward"] = code_of(reward)
    with open_stage(cfg, "rlhf", inputs, code=code) as stage:
        crew = assemble(cfg, reward)
        if algorithm is from_pairs:
            steps = from_pairs(crew, cfg, stage)
        else:
            steps = from_answers(crew, cfg, stage, algorithm)
        yield from stage.past
        for metrics in steps:
            yield stage.log(metrics)
        names = ("loss", "reward", "kl", "length", "entropy", "accuracy", "margin", "skipped")
        stage.summary = {name: metrics[name] for name in names if name in metrics}
        models.save(crew.policy, crew.tokenizer, stage.folder)


def from_answers(crew, cfg, stage, algorithm):
    """PPO, GRPO, RLOO or a loss of one's own: learning from what the policy writes itself."""
    rows = load_rows(cfg, "prompt")
    note_texts(stage.say, crew.tokenizer, rows, [], cfg)
    prompts, optimiser = [row["prompt"] for row in rows], crew_optimiser(crew, cfg, stage.say)
    risen = alerts(stage.past[-1], cfg.kl_limit) if stage.past else {}
    for step in stage.steps(cfg.steps, optimiser):
        start = time.perf_counter()
        rollout = roll_out(crew, optimiser, prompts, cfg, step)
        half, price = time.perf_counter(), optimiser.state["kl_coef"]
        updates = list(improve(crew, optimiser, rollout, cfg, step, algorithm))
        metrics = {"step": step + 1, "steps": cfg.steps, "kl_coef": price}
        metrics |= rollout_metrics(rollout, cfg) | mean_of(updates)
        if cfg.algorithm == "ppo":
            foreseen = explained_variance(rollout.values, rollout.returns, rollout.mask)
            metrics["explained_variance"] = foreseen.item()
        end = time.perf_counter()
        metrics |= {"seconds_update": end - half, "seconds": end - start}
        again = step % cfg.sample_every == 0 or step == cfg.steps - 1
        stage.samples(samples_of(rollout, look(crew, prompts[:4], cfg) if again else [], step))
        optimiser.state["kl_coef"] = next_kl_coef(price, metrics["kl"], cfg)
        yield metrics
        before, risen = risen, alerts(metrics, cfg.kl_limit)
        stage.alert(before, risen, stop=cfg.stop_on_alert)


def from_pairs(crew, cfg, stage):
    """DPO: learning from the pairs themselves; no answers, no reward model, no values."""
    rows = load_rows(cfg, "preference", needs=("prompt", "chosen", "rejected"))
    note_texts(stage.say, crew.tokenizer, rows, ["chosen", "rejected"], cfg)
    with crew.as_reference() as model:  # once, not in every epoch
        work = partial(pair_logprobs, model, crew.tokenizer, cfg=cfg)
        parts = [told[:2] for told in in_parts(work, rows, cfg, model, say=stage.say)]
    reference = [torch.cat(column) for column in zip(*parts)]  # chosen and rejected, (N,) each

    def loss_of(index):
        device = crew.policy.device
        pairs = pair_logprobs(crew.policy, crew.tokenizer, [rows[i] for i in index], cfg)
        loss, stats = dpo_loss(
            *pairs[:2], *(column[index].to(device) for column in reference),
            beta=cfg.dpo_beta, loss_type=cfg.dpo_loss, label_smoothing=cfg.dpo_smoothing,
        )  # fmt: skip
        return loss + cfg.dpo_nll * pairs[2], len(index), stats | detached({"nll": pairs[2]})

    plan = epochs(cfg, "dpo", len(rows), cfg.dpo_batch, cfg.dpo_epochs)
    rates, more = [(crew.policy, cfg.dpo_lr)], [crew.reference] if crew.reference else []
    optimiser = Optimiser(cfg, rates, len(plan), batch=cfg.dpo_batch, frozen=more, say=stage.say)
    optimiser.length = lambda i: trouble.text_length(rows[i])
    for step in stage.steps(len(plan), optimiser):
        start = time.perf_counter()
        metrics = {"step": step + 1, "steps": len(plan)} | optimiser.step(plan[step], loss_of, step)
        if step in (0, len(plan) - 1):
            prompts = prompts_of(rows[:4])
            stage.samples(
                {"step": step + 1, "fixed": True} | row for row in look(crew, prompts, cfg)
            )
        yield timed(metrics, start, rows=len(plan[step]))


def pair_logprobs(model, tokenizer, rows, cfg):
    """Summed log-probs of chosen and rejected answers, (B,) each, and the chosen ones' loss."""
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    prompts = [row["prompt"] for row in rows] * 2
    tokens = encode_pairs(tokenizer, prompts, answers, cfg, model.device)
    with models.autocast(cfg, model):
        logprobs, _ = response_logprobs(model, *tokens, entropy=False)
    half = len(rows)
    nll = -mean_over(logprobs[:half], tokens[3][:half], "answer")
    return *logprobs.sum(1).chunk(2), nll


def crew_optimiser(crew, cfg, say=print):
    """What updates policy and value model; the rest of the crew only moves along."""
    rates, frozen = [(crew.policy, cfg.policy_lr)], [crew.reference, *models_in(crew.reward)]
    if crew.value_model is not None:
        rates.append((crew.value_model, cfg.value_lr))
    frozen = [model for model in frozen if model is not None]
    optimiser = Optimiser(cfg, rates, cfg.steps, batch=cfg.minibatch, frozen=frozen, say=say)
    optimiser.state |= {"kl_coef": cfg.kl_coef, "running": {}}
    return optimiser


# ------------------------------------------------------------------------------------------------
# 10. Evaluation


def look(crew, prompts, cfg):
    """The policy's favourite answer to a few prompts: text, reward, KL to the reference."""
    rows = [{"prompt": prompt} for prompt in prompts]
    answers = evaluate(crew, rows, cfg, dice(cfg, "look"), temperature=0)
    return [{name: row[name] for name in ("prompt", "response", "reward", "kl")} for row in answers]


def prompts_of(rows):
    return [row["prompt"] for row in rows]


@trouble.in_words
def evaluate(crew, rows, cfg, generator, *, temperature=None):
    """One answer of the policy to each row: text, judge's score, reward, KL, length, eos.

    The judge's score is None where a row does not say what would be right.
    """
    results, prompts = [], prompts_of(rows)

    def judge(*tokens):
        how = {"temperature": cfg.temperature, "entropy": False}
        ours = response_logprobs(crew.policy, *tokens, **how)[0]
        with crew.as_reference() as reference:
            theirs = response_logprobs(reference, *tokens, **how)[0]
        part = rows[len(results) : len(results) + len(tokens[0])]
        texts = decode(crew.tokenizer, *tokens[2:])
        columns = {
            "response": texts,
            "reward": [None] * len(part),
            "kl": kl_estimate(ours, theirs).sum(1).tolist(),
            "length": tokens[3].sum(1).tolist(),
            "eos": ended(*tokens[2:], stops_of(crew.policy, crew.tokenizer)).tolist(),
        }
        own = named("metric", cfg.metric, {}) if cfg.metric else None
        for name, score in (("reward", crew.reward), ("metric", own)):
            if score is not None:
                columns[name] = ask(score, prompts_of(part), texts, name)[0].tolist()
        for row, *values in zip(part, *columns.values()):
            result = {"prompt": row["prompt"], "kind": row.get("kind", "all")}
            result |= dict(zip(columns, values))
            truth = (row, result["response"], result["eos"])
            yield result | {"judge": world.judge(*truth) if world.knows(row) else None}

    more = {"temperature": temperature, "then": lambda *tokens: list(judge(*tokens))}
    for part in answer(crew.policy, crew.tokenizer, prompts, cfg, generator, **more):
        results += part
    return results


def best_of(crew, rows, cfg, generator):
    """Best-of-n, the rival that needs no training: the answer that the reward likes best.

    Choosing among n moves away from the policy by log n - (n - 1) / n nats at most.
    """
    n, rows = cfg.best_of, rows[: cfg.best_of_rows]
    results = evaluate(crew, [row for row in rows for _ in range(n)], cfg, generator)
    best = [max(group, key=lambda r: r["reward"]) for group in chunks(results, n)]
    return [result | {"kl": math.log(n) - (n - 1) / n} for result in best]


@trouble.in_words
def judge_critic(critic, tokenizer, rows, cfg):
    """The reward model on held-out pairs: both scores of each, and the kind."""
    rows, results = with_pairs(rows), []
    if not rows:
        raise CourseError("eval.json needs rows with chosen and rejected to measure the critic on.")
    work = partial(pair_scores, critic, tokenizer, cfg=cfg)
    scores = map(torch.cat, zip(*in_parts(work, rows, cfg, critic)))
    for row, chosen, rejected in zip(rows, *(column.tolist() for column in scores)):
        known = {"kind": row.get("kind", "all"), "flaw": row.get("flaw", "not said")}
        results.append(known | {"chosen": chosen, "rejected": rejected})
    return results
