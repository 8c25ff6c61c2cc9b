"""RLHF in one file: read it from top to bottom.

Contents
    The tools
        1. Tokens              prompts padded on the left, answers on the right
        2. Reading a model     logits, scores and values at the tokens of an answer
        3. Generation          sampling with a cache
        4. Log-probs           how likely a model finds an answer
        5. Masked statistics   means over real tokens only
        6. Losses              reward model, PPO, GRPO, DPO: pure functions of tensors
    The course, one section per notebook
        7. Pretraining         0_download
        8. Fine-tuning         1_actor
        9. Reward model        2_critic
        10. PPO                3_rlhf: a rollout, its advantages, its loss, and the loop
        11. GRPO, RLOO, DPO    what they do differently
        12. Evaluation         4_test

Letters: B rows, P prompt length (padded on the left), R response length (padded on the right),
T = P + R, V vocabulary size. Everything about answers has the shape (B, R), with one bool mask
that is built from lengths. Logits and tokens are shifted by one in a single place,
`before_each_token`.

A training function is a generator that yields one dict of metrics per step. `stage.steps` numbers
the steps and saves checkpoints; `optimiser.step` is backward, gradient clipping and AdamW. Both are
in `lab/`, together with loading, memory limits and error messages.
"""

import math
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lab import (
    CourseError,
    alerts,
    categories,
    checks,
    decoding,
    errors,
    fast_path,
    label,
    matmul,
    measures,
    models,
    processes,
    safety,
    sharding,
    splits,
    world,
)
from lab.config import Config  # noqa: F401
from lab.data import with_pairs
from lab.models import choose_base, load_actor, load_both, load_scorer, load_tokenizer, pick_device  # noqa: F401
from lab.optimiser import Optimiser, chunks, text_length
from lab.passes import in_parts
from lab.rewards import (
    Ensemble,
    ask,
    code_of,
    metrics_of,
    models_in,
    name_of,
    named,
    normalised,
    parse,
)  # fmt: skip
from lab.runs import Stage, artifact, digest, has_record
from lab.splits import (
    batches,
    epochs,
    load_eval_rows,
    load_rows,
    prompt_batch,
    rng_for,
    stack,
)  # fmt: skip
from lab.tiny import blocks, tiny_model, train_tokenizer
from lab.tokens import encoder, stops_of
from lab.tracking import mean_of, rollout_metrics, timed

# ------------------------------------------------------------------------------------------------
# 1. Tokens


def encode_prompt(tokenizer, prompt, limit):
    """Token ids of a prompt, in the dialogue format of its tokenizer.

    A prompt that is too long loses its front; bos, the end of the question and "Assistant:" stay.
    """
    return encoder(tokenizer).prompts([prompt], limit)[0]


def encode_answer(tokenizer, answer, limit):
    """Token ids of an answer and its eos: a model learns to stop only where it sees an eos."""
    return encoder(tokenizer).answers([answer], limit)[0]


def pad(sequences, value, side, device):
    """Lists of ids as one tensor, with the mask of the real tokens, built from the lengths."""
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
    """Texts to (prompt_ids, prompt_mask), padded on the left, so that every answer starts in the
    same column."""
    ids = encoder(tokenizer).prompts(prompts, cfg.max_prompt)
    return pad(ids, tokenizer.pad_token_id, "left", device)  # (B, P)


def encode_pairs(tokenizer, prompts, answers, cfg, device):
    """Texts to the four tensors that every scoring function takes:
    prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, R)."""
    prompt_ids, prompt_mask = encode_prompts(tokenizer, prompts, cfg, device)
    ids = encoder(tokenizer).answers(answers, cfg.max_new_tokens)
    return prompt_ids, prompt_mask, *pad(ids, tokenizer.pad_token_id, "right", device)


def decode(tokenizer, ids, mask):
    """Answers as text, without eos and padding."""
    rows = zip(ids.cpu(), mask.cpu())
    return encoder(tokenizer).texts(row[real].tolist() for row, real in rows)


def ended(response_ids, response_mask, eos_token_id):
    """Which answers ended with an eos, (B,). `stops_of` lists the ids that count as eos."""
    last = response_ids.gather(1, response_mask.sum(1, keepdim=True).clamp(min=1) - 1)[:, 0]  # (B,)
    return torch.isin(last, as_ids(eos_token_id, last.device)) & response_mask.any(1)


def as_ids(token_id, device):
    """eos as a tensor: it may be one id, several, or None."""
    several = token_id if isinstance(token_id, (list, tuple)) else [token_id]
    ids = [one for one in several if one is not None]
    return torch.tensor(ids, dtype=torch.long, device=device)


# ------------------------------------------------------------------------------------------------
# 2. Reading a model


def before_each_token(prompt_ids, prompt_mask, response_ids, response_mask):
    """The input whose last R positions stand just before the R answer tokens, (B, T - 1).

    A causal model predicts token t from its output at position t - 1. So the last token is dropped.
    """
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    return ids[:, :-1], mask[:, :-1]


def before_answers(prompt_ids, response_mask):
    """True at the positions of (B, T - 1) that stand just before a real answer token."""
    return torch.cat([torch.zeros_like(prompt_ids[:, 1:], dtype=torch.bool), response_mask], dim=1)


def answer_logits(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """The logits that predict each real answer token, (N, V) for N real tokens."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden, head = fast_path.hidden_states(model, *read, before_answers(prompt_ids, response_mask))
    return head(hidden).float()


def answer_scores(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """One score per answer, (B,): the head's output at the last real token, the only one that has
    seen the whole answer."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, T)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    last = prompt_ids.shape[1] + response_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return fast_path.scores(scorer, ids, mask, torch.zeros_like(mask).scatter(1, last, True))


def answer_values(scorer, prompt_ids, prompt_mask, response_ids, response_mask):
    """The value before each answer token is written, (B, R): what return the model expects."""
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    wanted = before_answers(prompt_ids, response_mask)
    return to_padded(fast_path.scores(scorer, *read, wanted), response_mask)


def to_padded(x, mask):
    """One number per real token, (N,), put back into the shape of the mask, (B, R); 0 elsewhere."""
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

    Temperature 0 is greedy decoding. The first eos belongs to the answer; padding follows it. The
    log-probs are those of the full distribution at this temperature, before top-k and top-p, so
    that `response_logprobs` finds the same numbers.
    """
    device, B = prompt_ids.device, len(prompt_ids)
    ids = torch.full((B, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    stops, live = as_ids(eos_token_id, device), torch.arange(B, device=device)
    uniforms = draw_uniforms(B, max_new_tokens, generator, device)
    every = decoding.ASK_EVERY.get(device.type, 8)
    with models.eval_mode(model), sharding.whole(model):
        reader, logits = decoding.start_decoding(model, prompt_ids, prompt_mask, max_new_tokens)
        for t in range(max_new_tokens):
            token, logprob = pick(logits.float(), uniforms[live, t], temperature, top_k, top_p)
            ids[live, t], logprobs[live, t] = token, logprob
            length = lengths[live]
            ends = torch.isin(token, stops) & (length > t + 1)
            lengths[live] = length.masked_fill(ends, t + 1)
            if t + 1 == max_new_tokens:
                break
            if (t + 1) % every == 0:
                running = (lengths[live] > t + 1).nonzero()[:, 0]
                if not len(running):
                    break
                if len(running) < 0.75 * len(live):  # finished rows leave the batch and the cache
                    reader.keep(running)
                    live, token = live[running], token[running]
            logits = reader.next(token)
    R = int(lengths.max())
    response_mask = torch.arange(R, device=device) < lengths[:, None]  # (B, R)
    response_ids = ids[:, :R].masked_fill(~response_mask, pad_token_id)
    return response_ids, response_mask, logprobs[:, :R] * response_mask


def draw_uniforms(B, R, generator, device):
    """Random numbers in [0, 1), (B, R), drawn where the generator lives: the same on every device.

    The numbers of a row do not depend on the rows beside it, so a batch may be cut anywhere.
    """
    source = generator.device if generator else "cpu"
    uniforms = torch.rand(B, R, generator=generator, device=source, dtype=torch.float64)
    return uniforms.clamp(max=1 - 2**-24).to(device, models.finest_dtype(device))


def pick(logits, uniforms, temperature, top_k, top_p):
    """One token per row and its log-prob. Sampling looks the row's uniform number up in the
    cumulative distribution."""
    logits = logits if temperature in (0, 1) else logits / temperature  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        probs = truncated(logits, top_k, top_p).softmax(-1)
        cumulative = probs.cumsum(-1, dtype=models.finest_dtype(logits.device))
        drawn = uniforms[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True)
        token = token[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, token_logprobs(logits, token)


def truncated(logits, top_k, top_p):
    """Logits with -inf outside the k likeliest tokens and outside the smallest set that reaches
    probability p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(drop.scatter(1, index, drop), -math.inf)
    return logits


def sampling(cfg, model, tokenizer, temperature=None):
    """The keyword arguments of `generate` for this course. All answers are sampled with these, so
    that scoring sees the distribution that sampling used: no top-k, no top-p, no penalties."""
    return {
        "max_new_tokens": cfg.max_new_tokens,
        "temperature": cfg.temperature if temperature is None else temperature,
        "eos_token_id": stops_of(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }


def generate_answers(model, tokenizer, prompts, cfg, generator, temperature=None, then=None):
    """Generates one answer per prompt, in parts that fit into memory.

    Yields the four token tensors of each part, or what `then(*tensors)` makes of them.
    """

    def work(part):
        tokens = answer_batch(model, tokenizer, part, cfg, generator, temperature)
        return then(*tokens) if then else tokens

    yield from in_parts(work, prompts, cfg, model, generator)


def answer_batch(model, tokenizer, prompts, cfg, generator, temperature=None):
    """One answer to each prompt, all at once: the four token tensors."""
    prompt = encode_prompts(tokenizer, prompts, cfg, model.device)
    how = sampling(cfg, model, tokenizer, temperature)
    return *prompt, *generate(model, *prompt, **how, generator=generator)[:2]


# ------------------------------------------------------------------------------------------------
# 4. Log-probs


def token_logprobs(logits, tokens):
    """log softmax(logits)[token], without storing the whole log-softmax."""
    if logits.requires_grad:  # cross_entropy computes the gradient in one pass
        picked = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        return -picked.view(tokens.shape)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def entropies(logits):
    """The entropy of each distribution in nats: 0 if one token is certain, log V at most."""
    probs = logits.softmax(-1)
    return logits.logsumexp(-1) - (probs * logits).sum(-1)


def response_logprobs(
    model, prompt_ids, prompt_mask, response_ids, response_mask, *, temperature=1.0, entropy=True
):
    """The log-prob of each answer token and the entropy of its distribution: two tensors (B, R).

    `entropy=False` skips the entropy and returns 0 for it. Without gradients the logits of 128
    tokens are computed at a time, because those of a large vocabulary would fill the memory.
    """
    read = before_each_token(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden, head = fast_path.hidden_states(model, *read, before_answers(prompt_ids, response_mask))
    tokens = response_ids[response_mask]  # (N,)

    def measure(hidden, tokens):
        logits = head(hidden).float()  # (n, V)
        logits = logits if temperature == 1 else logits / temperature
        uncertainty = torch.zeros_like(logits[:, 0])
        if entropy:  # checkpointed: recomputed in the backward pass, if its gradient is needed
            uncertainty = checkpoint(entropies, logits, use_reentrant=False)
        return token_logprobs(logits, tokens), uncertainty

    size = max(1, len(tokens)) if torch.is_grad_enabled() else 128
    pieces = map(measure, hidden.split(size), tokens.split(size))
    return tuple(to_padded(torch.cat(column), response_mask) for column in zip(*pieces))


# ------------------------------------------------------------------------------------------------
# 5. Masked statistics


def masked_mean(x, mask):
    """The mean over the masked tokens; 0 if there are none."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def mean_over(x, mask, unit="token"):
    """The mean over tokens (long answers count for more), or over answers (all count the same)."""
    if unit == "token":
        return masked_mean(x, mask)
    means = torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)  # (B,)
    return means.mean()


def masked_whiten(x, mask):
    """Shifted and scaled to mean 0 and standard deviation 1 over the masked tokens; 0 elsewhere."""
    x = torch.where(mask, x, 0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0)


def masked_quantile(x, mask, share):
    """The number that `share` of the masked x do not exceed, for x of at least 0."""
    ordered = torch.where(mask, x, 0).flatten().sort(descending=True).values
    above = ((1 - share) * mask.sum()).long()
    return ordered.gather(0, above[None])[0]


def explained_variance(values, returns, mask):
    """1: the values predict the returns. 0: no better than their mean. Below 0: worse than that."""
    mean = masked_mean(returns, mask)
    variance = masked_mean((returns - mean) ** 2, mask)
    return 1 - masked_mean((returns - values) ** 2, mask) / (variance + 1e-8)


# ------------------------------------------------------------------------------------------------
# 6. Losses


def pairwise_loss(chosen, rejected):
    """The Bradley-Terry loss, -log sigmoid(chosen - rejected), in float32; both scores are (B,).

    A tie counts as half right.
    """
    margin = chosen.float() - rejected.float()
    accuracy = (margin > 0).float().mean() + 0.5 * (margin == 0).float().mean()
    return -F.logsigmoid(margin).mean(), detached({"accuracy": accuracy, "margin": margin.mean()})


def kl_estimate(logprobs, ref_logprobs, *, estimator="k1"):
    """Estimates KL(policy || reference) from the policy's own tokens, one number per token.

    With d = logprobs - ref_logprobs: k1 = d is unbiased and may be negative; k2 = d^2 / 2 is never
    negative but biased; k3 = exp(-d) - 1 + d is unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise CourseError(f"estimator = {estimator!r} is not known; use k1, k2 or k3.")


def token_rewards(scores, kl, mask, kl_coef):
    """The reward of each token, (B, R): minus kl_coef times its KL, and on the last real token
    plus the score of the answer, (B,)."""
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return torch.where(mask, last * scores[:, None] - kl_coef * kl, 0)


def gae(rewards, values, mask, *, gamma, lam):
    """Generalised advantage estimation, from the last token to the first:

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    After the last real token the value is 0. Returns (advantages, returns = advantages + values).
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
    """Half the squared error. The larger of the clipped and the unclipped error counts, so that a
    value gains nothing by moving further than `value_clip` in one rollout."""
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    stats = {"value_clip_fraction": mean_over((clipped_error > error).float(), mask, unit)}
    return 0.5 * mean_over(torch.maximum(error, clipped_error), mask, unit), detached(stats)


def group_advantages(rewards, group_size, *, scale=True):
    """GRPO's advantages, (B,): the reward minus the mean of the answers to the same prompt,
    divided by their standard deviation if `scale`."""
    if group_size < 2 or len(rewards) % group_size:
        raise CourseError(
            f"{len(rewards)} rewards cannot be divided into groups of {group_size}: a group needs "
            "two or more answers, and every group the same number."
        )
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards become exactly 0, no rounding gets scaled up
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)  # 1e-4 is far above rounding
    return centred.flatten()


def leave_one_out(rewards, group_size):
    """RLOO's advantages, (B,): the reward minus the mean of the *other* answers to the prompt."""
    return group_advantages(rewards, group_size, scale=False) * group_size / (group_size - 1)


def grpo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, mask, *,
    clip_ratio, kl_coef, estimator="k3", unit="token",
):  # fmt: skip
    """PPO's clipped objective with one advantage per answer, (B,), plus kl_coef times the KL."""
    advantages = advantages[:, None].expand_as(logprobs)  # (B, R)
    loss, stats = ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_ratio=clip_ratio, unit=unit
    )
    kl = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator, unit=unit)
    return loss + kl_coef * kl, stats | detached({"kl": kl})


def kl_loss(logprobs, ref_logprobs, mask, *, estimator, unit="token"):
    """The mean KL to the reference, as a term of a loss.

    The gradient of k1 is the gradient of the log-probs alone. Its expectation over the policy's own
    samples is 0, so as a loss k1 holds nothing back; k2 and k3 do.
    """
    if estimator == "k1":
        raise CourseError(
            "estimator = 'k1' has a gradient of zero on average, so as a loss it does not hold the "
            "policy near the reference: use 'k2' or 'k3'."
        )
    gap = torch.where(mask, logprobs - ref_logprobs, 0)
    return mean_over(kl_estimate(gap, 0, estimator=estimator), mask, unit)


def dpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, *, beta, loss_type="sigmoid", label_smoothing=0.0
):
    """DPO: -log sigmoid(beta margin), from the summed log-probs of whole answers, (B,) each.

    The margin compares how much more likely the chosen and the rejected answer have become since
    the reference. `hinge` and `ipo` replace the log-sigmoid.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if loss_type == "sigmoid":
        right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        loss = (1 - label_smoothing) * right + label_smoothing * wrong
    elif label_smoothing:
        raise CourseError(f"label_smoothing = {label_smoothing} works with loss_type = 'sigmoid'.")
    elif loss_type == "hinge":
        loss = torch.relu(1 - beta * margin)
    elif loss_type == "ipo":
        loss = (margin - 1 / (2 * beta)) ** 2
    else:
        raise CourseError(f"loss_type = {loss_type!r} is not known; use sigmoid, hinge or ipo.")
    stats = {
        "accuracy": (margin > 0).float().mean() + 0.5 * (margin == 0).float().mean(),
        "margin": beta * margin.mean(),
        "chosen_logprob": chosen.mean(),
        "rejected_logprob": rejected.mean(),
    }
    return loss.mean(), detached(stats)


def detached(stats):
    return {name: value.detach() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------
# 7. Pretraining (0_download)


def open_stage(cfg, name, inputs=(), code=None, pairs=False):
    """The folder that a training fills. It appears as model/<name> when it is complete.

    `code` identifies your own functions, and `pairs` are the pairs to learn from (True: those of
    `preference_rows`), so that a resumed run never continues with other ones.
    """
    torch.manual_seed(cfg.seed)  # for models with dropout
    data = splits.data_digests(cfg, name)
    if pairs and cfg.feedback_weight and label.path_of(cfg.root).exists():
        data[label.FILE] = digest(label.path_of(cfg.root))
    config, minutes = asdict(cfg) | (code or {}), cfg.checkpoint_minutes
    how = {"resume": cfg.resume, "resume_changed": cfg.resume_changed, "minutes": minutes}
    how["pairs"] = pairs if isinstance(pairs, list) else ()
    return Stage(cfg.root, name, config, inputs, data, tracker=cfg.tracker, **how)


@processes.spread("download")
def train_base(cfg, base=None):
    """Copies a base model that exists already, or pretrains `tiny`. Writes tokenizer/ too.

    `base` is the result of `choose_base(cfg)`, if you have called it already.
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
        processes.from_first(lambda: tokenizer.save_pretrained(Path(cfg.root) / "tokenizer"))


def pretrain(cfg, stage):
    """From random weights, `tiny` learns to predict the next token of a text: the embedded world's,
    or that of your own rows."""
    texts = splits.load_documents(cfg, stage.say)
    sample = (world.TEMPLATE.format(question) + " " + answer for question, answer in texts[:8_000])
    tokenizer = train_tokenizer(sample, cfg.vocab_size)
    data = blocks(tokenizer, texts, cfg)  # (blocks, pretrain_length)
    checks.check_pretraining(cfg, data)
    checks.warn_about_length(stage.say, tokenizer, texts[:1_000], cfg)
    model = tiny_model(cfg, tokenizer).to(pick_device(cfg)).train()
    rates, size = [(model, cfg.pretrain_lr)], cfg.pretrain_batch
    optimiser = Optimiser(cfg, rates, cfg.pretrain_steps, batch=size, say=stage.say)
    yield from stage.past

    def loss_of(rows):
        return next_token_loss(model, data[rows].to(model.device)), len(rows), {}

    for step in stage.steps(cfg.pretrain_steps, optimiser):
        start = time.perf_counter()
        rows = torch.randint(len(data), (size,), generator=rng_for(cfg, "block", step)).tolist()
        metrics = {"step": step + 1, "steps": cfg.pretrain_steps}
        metrics |= optimiser.step(rows, loss_of, step)
        if step % 20 == 0 or step == cfg.pretrain_steps - 1:
            metrics["copying"] = copying(model, tokenizer, texts[-48:], cfg)
        yield stage.log(timed(metrics, start, tokens=size * cfg.pretrain_length))
    return model, tokenizer


def next_token_loss(model, ids):
    """The cross-entropy of every token given the tokens before it; ids are (B, T)."""
    read = ids[:, :-1], torch.ones_like(ids[:, 1:], dtype=torch.bool)
    hidden, head = fast_path.hidden_states(model, *read, read[1])
    return F.cross_entropy(head(hidden).float(), ids[:, 1:].flatten())


@torch.no_grad()
def copying(model, tokenizer, texts, cfg):
    """Of the answer tokens that also occur in the question: the share that the model predicts."""
    questions, answers = zip(*texts)
    tokens = encode_pairs(tokenizer, questions, answers, cfg, model.device)
    copied = (tokens[2][:, :, None] == tokens[0][:, None, :]).any(2) & tokens[3]  # (B, R)
    with models.autocast(cfg, model):
        right = answer_logits(model, *tokens).argmax(-1) == tokens[2][tokens[3]]  # (N,)
    return masked_mean(right.float(), copied[tokens[3]]).item()


# ------------------------------------------------------------------------------------------------
# 8. Fine-tuning (1_actor)


def load_pair(cfg, name, **extra):
    """The tokenizer and the language model of a finished stage."""
    return load_both(cfg, artifact(cfg.root, name), f"model/{name}", **extra)


@processes.spread("actor")
def train_actor(cfg):
    """Supervised fine-tuning (SFT): raises the log-probs of the answers, not of the prompts."""
    with open_stage(cfg, "actor", inputs=["base"]) as stage:
        tokenizer, model = load_pair(cfg, "base", **models.in_4_bits(cfg))
        model = models.trainable(model, cfg)
        rows = load_rows(cfg, "sft", ("prompt", "response"), stage.say)
        held_out, rows = rows[: cfg.validation_rows], rows[cfg.validation_rows :]
        if not rows:
            raise CourseError(
                f"validation_rows = {cfg.validation_rows} takes all {len(held_out)} rows of the "
                "SFT share and leaves none to train on: lower it."
            )
        checks.warn_about_texts(stage.say, tokenizer, rows, ["response"], cfg)
        plan = epochs(cfg, "sft", len(rows), cfg.actor_batch, cfg.actor_epochs)
        rates, loss_of = [(model, cfg.actor_lr)], partial(sft_loss, model, tokenizer, cfg)
        optimiser = Optimiser(cfg, rates, len(plan), batch=cfg.actor_batch, say=stage.say)
        yield from stage.past
        for step in stage.steps(len(plan), optimiser):
            start = time.perf_counter()
            model.train()
            metrics = {"step": step + 1, "steps": len(plan)}
            metrics |= optimiser.step([rows[i] for i in plan[step]], loss_of, step)
            if held_out and ((step + 1) % max(1, len(plan) // 8) == 0 or step + 1 == len(plan)):
                metrics["validation_loss"] = validation_loss(model, tokenizer, held_out, cfg)
            yield stage.log(timed(metrics, start, rows=len(plan[step])))
        del optimiser  # frees AdamW's moments
        stage.summary = {"loss": metrics.get("validation_loss", metrics["loss"])}
        models.save(model, tokenizer, stage.folder)


def sft_loss(model, tokenizer, cfg, rows):
    """Minus the mean log-prob of the answer tokens, eos included; their number; no stats."""
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    tokens = encode_pairs(tokenizer, *texts, cfg, model.device)
    logprobs, _ = response_logprobs(model, *tokens, entropy=False)
    return -masked_mean(logprobs, tokens[3]), int(tokens[3].sum()), {}


def validation_loss(model, tokenizer, rows, cfg):
    work = partial(sft_loss, model, tokenizer, cfg)
    losses = [loss[:2] for loss in in_parts(work, rows, cfg, model, learning=[model])]
    return sum(loss.item() * count for loss, count in losses) / sum(n for _, n in losses)


# ------------------------------------------------------------------------------------------------
# 9. Reward model (2_critic)


def preference_rows(cfg, say=print):
    """The pairs to learn from: those of the data, or the actor's own answers that `cfg.labeller`
    compares; and `feedback_weight` times each comparison that you made with lab/label.py."""
    rows = load_rows(cfg, "preference", needed_for_pairs(cfg), say)
    rows = pairs_from(cfg, rows, cfg.labels, cfg.label_noise, "train")
    own = label.pairs_of(cfg.root) if cfg.feedback_weight else []
    if own:
        weight = f"count {cfg.feedback_weight} times each, beside {len(rows)} other pairs"
        say(f"{len(own)} comparisons of {label.FILE} {weight}.")
    return rows + cfg.feedback_weight * [pair | {"by": "person"} for pair in own]


def held_out_pairs(cfg):
    """Pairs whose prompts no training reads. A labeller compares them without errors."""
    return with_pairs(pairs_from(cfg, load_eval_rows(cfg), cfg.labels // 4, 0, "eval"))


def needed_for_pairs(cfg):
    """The fields that a row needs so that it can become a pair."""
    if cfg.labeller:
        return ("prompt",)
    return ("prompt", "response") if cfg.negatives == "base" else ("prompt", "chosen", "rejected")


def pairs_from(cfg, rows, count, noise, purpose):
    """The rows as pairs, with the answers that a model has to write for them."""
    rng = rng_for(cfg, "pairs", purpose)
    if cfg.labeller:
        return own_pairs(cfg, rows, count, noise, rng)
    return pairs_with_base(cfg, rows, rng) if cfg.negatives == "base" else rows


def own_pairs(cfg, rows, count, noise, rng):
    """The actor answers `count` prompts twice, and `cfg.labeller` says which answer is better.

    A share `noise` of its choices is turned round. A tie gives no pair.
    """
    labeller = named("labeller", cfg.labeller, {})
    prompts = [rows[i % len(rows)]["prompt"] for i in range(count) for _ in range(2)]
    answers = sampled_answers(cfg, "actor", prompts, rng)
    scores, _ = ask(labeller, prompts, answers, "labeller")
    pairs, errs = [], torch.rand(count, generator=rng) < noise
    for i, (first, second) in enumerate(chunks(answers, 2)):
        lead = scores[2 * i] - scores[2 * i + 1]
        if lead:
            better, worse = (first, second) if (lead > 0) != errs[i] else (second, first)
            pairs.append({"prompt": prompts[2 * i], "chosen": better, "rejected": worse})
    if not pairs:
        raise CourseError(
            f"labeller = {cfg.labeller!r} gave the same number to both answers of every pair: it "
            "must prefer some answers, or the actor always says the same."
        )
    return pairs


def pairs_with_base(cfg, rows, rng):
    """Rows without a pair get one: their response is chosen, the base model's answer rejected."""
    alone = [i for i, row in enumerate(rows) if row.get("response") and not row.get("rejected")]
    answers = sampled_answers(cfg, "base", [rows[i]["prompt"] for i in alone], rng)
    made = {
        i: {"chosen": rows[i]["response"], "rejected": answer}
        for i, answer in zip(alone, answers)
        if answer.strip() and answer.strip() != rows[i]["response"].strip()
    }
    return with_pairs([row | made.get(i, {}) for i, row in enumerate(rows)])


def sampled_answers(cfg, name, prompts, rng):
    """An answer to each prompt, from the model of a finished stage."""
    tokenizer, model = load_pair(cfg, name)
    parts = generate_answers(models.frozen(model, cfg), tokenizer, prompts, cfg, rng)
    return [text for part in parts for text in decode(tokenizer, *part[2:])]


@processes.spread("critic")
def train_critic(cfg, rows=None):
    """Trains the reward model: of two answers, the one that people chose should score higher.

    The members of an ensemble are trained side by side on the same pairs, each in its own order.
    The watchdog learns beside them from a share of the pairs that they never see. `rows` are all
    pairs; without them it calls `preference_rows(cfg)`.
    """
    told = []
    rows = rows or preference_rows(cfg, told.append)
    with open_stage(cfg, "critic", inputs=["actor"], pairs=rows) as stage:
        for sentence in told:
            stage.say(sentence)
        rows, kept = splits.apart(cfg, rows, stage.say)
        tokenizer = load_tokenizer(artifact(cfg.root, "actor"), cfg)
        members = [critic_from_actor(cfg, i) for i in range(cfg.ensemble)]
        watchdog = [critic_from_actor(cfg, cfg.ensemble)] if kept else []
        rows, alone = careful_rows(cfg, rows, stage.say)
        checks.warn_about_texts(stage.say, tokenizer, rows, ["chosen", "rejected"], cfg)
        plans = [critic_plan(cfg, len(rows), alone, i) for i in range(cfg.ensemble)]
        due = splits.watchdog_plan(cfg, len(kept), len(plans[0]))  # {step: rows of kept}
        rates = [(model, cfg.critic_lr) for model in (*members, *watchdog)]
        loss_of = partial(critic_loss, members, tokenizer, cfg)
        optimiser = Optimiser(cfg, rates, len(plans[0]), batch=cfg.critic_batch, say=stage.say)
        yield from stage.past
        metrics = stage.past[-1] if stage.past else {}
        for step in stage.steps(len(plans[0]), optimiser, keep_last=True):  # score_scale may fail
            start = time.perf_counter()
            batch = [[rows[i] for i in places] for places in zip(*(plan[step] for plan in plans))]
            metrics = {"step": step + 1, "steps": len(plans[0])}
            metrics |= optimiser.step(batch, loss_of, step)
            if step in due:
                unseen = [[kept[i]] for i in due[step]]
                watch = partial(critic_loss, watchdog, tokenizer, cfg)
                metrics["watchdog_accuracy"] = optimiser.step(unseen, watch, step)["accuracy"]
            metrics = stage.log(timed(metrics, start, rows=len(batch) + len(due.get(step, []))))
            yield metrics
        del optimiser  # frees AdamW's moments for the actor
        stage.summary = {"accuracy": metrics["accuracy"]}
        names = ["", *(f"member-{i}" for i in range(1, cfg.ensemble)), "watchdog"]
        for name, model in zip(names, (*members, *watchdog)):
            model.config.reward_mean, model.config.reward_std = score_scale(model, cfg)
            models.save(model, tokenizer, stage.folder / name)


def careful_rows(cfg, rows, say=print):
    """(rows, alone): the pairs to learn from; the first `alone` of them come before the others.

    A careful critic also learns from mirrored pairs, which are made of the given ones without any
    further label. To see one wrong word, a model must compare the answer with the question, and a
    crowd's pairs rarely ask for that: most wrong answers give themselves away. In mirrored pairs,
    two questions differ in some words, their answers differ in the same words, and only the
    comparison tells which answer belongs to which question. Half of them come first, alone: beside
    pairs that are easier to tell apart, a critic would learn those and not to compare.
    """
    if cfg.critic_kind == "plain":
        return rows, 0
    more = splits.mirrored_pairs(rows, random.Random(f"{cfg.seed} mirrored"))
    alone = len(more) // 2
    say(f"{len(more)} mirrored pairs beside {len(rows)} others; {alone} of them come first.")
    return more[:alone] + rows + more[alone:], alone


def critic_plan(cfg, count, alone, member):
    """The row indices of each step: one pass over the first `alone` rows, then `critic_epochs`
    passes over the others. Each member has an order of its own."""
    first = epochs(cfg, ("mirrored", member), alone, cfg.critic_batch, 1) if alone else []
    others = epochs(cfg, ("pairs", member), count - alone, cfg.critic_batch, cfg.critic_epochs)
    return first + [[alone + i for i in step] for step in others]


def critic_from_actor(cfg, member=0):
    """The actor with a new head that gives one number. The head is zero: every answer scores 0."""
    torch.manual_seed(cfg.seed + member)  # adapters start at random
    scorer = load_scorer(artifact(cfg.root, "actor"), cfg, **models.in_4_bits(cfg))
    return models.trainable(scorer, cfg).train()


def critic_loss(members, tokenizer, cfg, batch):
    """The pairwise loss of every ensemble member, plus a small penalty that keeps scores near 0.

    Each row of the batch has one pair for each member.
    """
    losses, stats = [], []
    for model, rows in zip(members, zip(*batch)):
        scores = pair_scores(model, tokenizer, rows, cfg)
        loss, figures = pairwise_loss(*scores)
        losses.append(loss + cfg.score_penalty * torch.cat(scores).square().mean())
        stats.append(figures)
    means = {name: sum(figures[name] for figures in stats) / len(stats) for name in stats[0]}
    return sum(losses), len(batch), means


def pair_scores(model, tokenizer, rows, cfg):
    """The scores of the chosen and of the rejected answers, (B,) each, from one forward pass."""
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    prompts = [row["prompt"] for row in rows] * 2
    tokens = encode_pairs(tokenizer, prompts, answers, cfg, model.device)
    return answer_scores(model, *tokens).chunk(2)


def score_scale(model, cfg):
    """The mean score of the actor's answers, and their standard deviation within a prompt.

    Training fixes only differences between scores. These two numbers turn them into rewards with a
    known scale: 0 is the actor's mean, 1 one standard deviation of its answers to one prompt.
    """
    tokenizer, actor = load_pair(cfg, "actor")
    actor = models.frozen(actor, cfg)
    rows = load_rows(cfg, "prompt")[: cfg.norm_prompts]
    prompts = [row["prompt"] for row in rows for _ in range(cfg.norm_answers)]
    rng, score = rng_for(cfg, "scale"), partial(answer_scores, model)
    with models.eval_mode(model):
        parts = generate_answers(actor, tokenizer, prompts, cfg, rng, then=score)
        groups = torch.cat(list(parts)).view(-1, cfg.norm_answers)  # (prompts, answers)
    return groups.mean().item(), max(groups.var(1).mean().sqrt().item(), 1e-3)


class RewardModel:
    """A trained critic as a reward: `reward(prompts, responses) -> list[float]`."""

    def __init__(self, path, cfg):
        self.model = models.frozen(load_scorer(path, cfg), cfg)
        self.tokenizer = load_tokenizer(path, cfg)
        self.cfg = cfg
        self.mean = getattr(self.model.config, "reward_mean", 0.0)  # see score_scale
        self.std = getattr(self.model.config, "reward_std", 1.0)

    def __call__(self, prompts, responses):
        def work(rows):
            tokens = encode_pairs(self.tokenizer, *zip(*rows), self.cfg, self.model.device)
            return answer_scores(self.model, *tokens).tolist()

        scores = sum(in_parts(work, list(zip(prompts, responses)), self.cfg, self.model), [])
        return [(score - self.mean) / self.std for score in scores]


def load_reward(cfg):
    """The reward that cfg.reward describes: a weighted sum of named rewards. The name `model`
    stands for the reward model of 2_critic, or for its ensemble."""

    def trained():
        members = load_critics(cfg)
        return Ensemble(members, cfg.ensemble_rule, cfg.ensemble_k) if members[1:] else members[0]

    return parse(cfg.reward, trained)


def load_critics(cfg):
    """The reward models of 2_critic: one, or the members of its ensemble."""
    folder = artifact(cfg.root, "critic")
    return [RewardModel(path, cfg) for path in (folder, *sorted(folder.glob("member-*")))]


def load_watchdog(cfg):
    """The second reward model of 2_critic, as a score that no reward contains; None if there is
    none."""
    if not (cfg.watchdog and has_record(cfg.root, "critic")):
        return None
    folder = artifact(cfg.root, "critic") / "watchdog"
    return RewardModel(folder, cfg) if folder.exists() else None


def pairs_to_ask(cfg, count):
    """Pairs of answers for a person to compare, by the newest policy: that of 3_rlhf if it has run,
    else the actor. Those come first about which the reward model is least certain: there a
    comparison tells it most."""
    try:
        critics = load_critics(cfg)
    except CourseError as error:
        critics = []
        print(f"The pairs come in random order. {error}")
    prompts = list(dict.fromkeys(row["prompt"] for row in load_rows(cfg, "prompt")))
    prompts = [prompt for prompt in prompts[: 4 * count] for _ in range(4)]
    rng = rng_for(cfg, "pairs to ask")
    answers = sampled_answers(cfg, newest_policy(cfg), prompts, rng)
    scores = [critic(prompts, answers) for critic in critics]
    return label.ordered(prompts, answers, scores, rng)


def newest_policy(cfg):
    """The last stage that has trained the policy and fits the stages before it."""
    if has_record(cfg.root, "rlhf"):
        try:
            return artifact(cfg.root, "rlhf").name
        except CourseError as error:
            print(f"The answers to compare are those of model/actor. {error}")
    return "actor"


# ------------------------------------------------------------------------------------------------
# 10. PPO (3_rlhf)


@dataclass
class Crew:
    """The models of RLHF."""

    tokenizer: object
    policy: torch.nn.Module  # the model that learns
    reference: torch.nn.Module | None  # the actor, frozen; None: the policy without its adapters
    reward: object  # any callable reward(prompts, responses) -> list[float]
    value_model: torch.nn.Module | None = None  # predicts returns; only PPO needs it
    watchdog: object = None  # a reward model that only watches
    safety: object = None  # a filter of answers, see lab/safety.py

    def as_reference(self):
        """`with crew.as_reference() as model:` gives the reference model."""
        if self.reference is not None:
            return nullcontext(self.reference)
        return models.without_adapter(self.policy)


def load_crew(cfg, reward=None):
    """Policy and reference start as the actor, the value model as `cfg.value_init` says.

    With adapters the reference needs no weights of its own: it is the policy without them.
    """
    tokenizer, policy = load_pair(cfg, "actor", **models.in_4_bits(cfg))
    policy = models.trainable(policy, cfg, drop=False)  # dropout would move the ratio away from 1
    reference = None if cfg.lora_rank else models.frozen(load_pair(cfg, "actor")[1], cfg)
    watchdog = load_watchdog(cfg) if "critic" in cfg.starts_from(reward) else None
    reward = None if cfg.algorithm == "dpo" else reward or load_reward(cfg)
    crew = Crew(tokenizer, policy, reference, reward)
    crew.watchdog, crew.safety = watchdog, safety.load(cfg.safety)
    if cfg.algorithm == "ppo":
        crew.value_model = models.trainable(load_value_model(cfg), cfg, drop=False)
    return crew


def load_value_model(cfg):
    """The value model starts as the reward model, with the reward's scale built into its head; or
    as the actor's body with a head of zeros."""
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


@dataclass
class Rollout:
    """A batch of sampled answers and what every model said about them before the update.

    Tensors are (B, R) unless a comment says otherwise.
    """

    prompts: list
    responses: list  # texts
    tokens: tuple  # prompt_ids, prompt_mask (B, P), response_ids, response_mask
    sampled: torch.Tensor  # log-probs of the policy, from sampling
    logprobs: torch.Tensor  # the same from scoring: the old log-probs of the ratio
    ref_logprobs: torch.Tensor  # log-probs of the reference
    values: torch.Tensor
    scores: torch.Tensor  # (B,), the reward of each answer, clipped, with penalties
    ended: torch.Tensor  # (B,), whether the answer ended with an eos
    kl_coef: float
    parts: dict  # {name: mean} of the rewards in the sum
    seconds: dict  # spent on generating and on scoring
    unsafe: torch.Tensor  # (B,), whether the safety filter found something; None without a filter
    advantages: torch.Tensor = None
    returns: torch.Tensor = None

    @property
    def mask(self):
        return self.tokens[3]

    @property
    def kl(self):
        """KL to the reference per answer, (B,)."""
        return kl_estimate(self.logprobs, self.ref_logprobs).sum(1)

    @property
    def sampling_error(self):
        """How far the ratio between scoring and sampling is from 1 on average."""
        return masked_mean((self.logprobs - self.sampled).expm1().abs(), self.mask).item()

    def lengths(self):
        """Tokens of each prompt and its answer."""
        return (self.tokens[1].sum(1) + self.mask.sum(1)).tolist()

    def minibatch(self, rows, device):
        """Some rows, without the columns that are padding in all of them: the four token tensors,
        and a dict of what was computed before the update."""
        rows = torch.as_tensor(rows, device=self.mask.device)  # once, not for every tensor
        prompt_ids, prompt_mask, response_ids, mask = (x[rows].to(device) for x in self.tokens)
        P, R = torch.stack([prompt_mask.sum(1).max(), mask.sum(1).max()]).tolist()
        tokens = prompt_ids[:, -P:], prompt_mask[:, -P:], response_ids[:, :R], mask[:, :R]
        names = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        return tokens, {name: getattr(self, name)[rows, :R].to(device) for name in names}


def make_rollout(crew, prompts, cfg, generator, *, optimiser=None):
    """The policy answers the prompts, then every model reads the answers. No gradients.

    The optimiser of a training knows how many rows fit into memory at a time, the current kl_coef,
    and the running statistics of `reward_norm`.
    """
    seconds = {"generate": 0.0, "score": 0.0}
    prompt = encode_prompts(crew.tokenizer, prompts, cfg, crew.policy.device)  # (B, P)
    how = {"temperature": cfg.temperature, "entropy": False}

    def work(rows):
        start = time.perf_counter()
        asked, texts = [x[rows.start : rows.stop] for x in prompt], [prompts[i] for i in rows]
        config = sampling(cfg, crew.policy, crew.tokenizer)
        response_ids, mask, sampled = generate(crew.policy, *asked, **config, generator=generator)
        responses = decode(crew.tokenizer, response_ids, mask)
        seconds["generate"] += time.perf_counter() - start

        start, tokens = time.perf_counter(), (*asked, response_ids, mask)
        with matmul.fast_matmul(crew.policy):
            scores, parts = ask(crew.reward, texts, responses)  # (b,)
            logprobs = sampled
            if models.precision(cfg) != "float32":  # half precision rounds differently in sampling
                logprobs, _ = response_logprobs(crew.policy, *tokens, **how)
            with crew.as_reference() as reference:
                ref_logprobs, _ = response_logprobs(reference, *tokens, **how)
            values = torch.zeros_like(logprobs)
            if crew.value_model is not None:
                values = answer_values(crew.value_model, *tokens)
        seconds["score"] += time.perf_counter() - start
        tensors = response_ids, mask, sampled, logprobs, ref_logprobs, values
        return responses, parts, *tensors, scores.to(mask.device)

    rows = range(len(prompts))
    if optimiser:
        pieces = optimiser.in_parts(work, rows, generator)
    else:
        pieces = in_parts(work, rows, cfg, crew.policy, generator)
    responses, parts, *columns = zip(*pieces)
    ids, mask, sampled, logprobs, ref_logprobs, values, scores = map(stack, columns)  # (B, R)
    whole = ended(ids, mask, stops_of(crew.policy, crew.tokenizer))
    state = optimiser.state if optimiser else {"kl_coef": cfg.kl_coef, "running": {}}
    if cfg.reward_norm:
        scores = normalised(scores, state["running"])
    scores = scores.clamp(-cfg.reward_clip, cfg.reward_clip) - cfg.length_penalty * mask.sum(1)
    scores -= cfg.missing_eos_penalty * ~whole
    responses, unsafe = sum(responses, []), None
    if crew.safety is not None:
        found = safety.look(crew.safety, prompts, responses)
        unsafe = torch.tensor([bool(reason) for reason in found], device=mask.device)
        scores -= cfg.safety_penalty * unsafe
    return Rollout(
        prompts, responses,
        (*prompt, ids.masked_fill(~mask, crew.tokenizer.pad_token_id), mask),
        sampled, logprobs, ref_logprobs, values, scores, whole, state["kl_coef"],
        {name: sum(sum(part[name]) for part in parts) / len(prompts) for name in parts[0]},
        seconds, unsafe,
    )  # fmt: skip


def ppo_advantages(rollout, cfg):
    """(advantages, returns), (B, R): how much better things went than the value model expected."""
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator=cfg.kl_estimator)
    kl_coef = rollout.kl_coef if cfg.kl_in == "reward" else 0
    rewards = token_rewards(rollout.scores, kl, rollout.mask, kl_coef)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, gamma=cfg.gamma, lam=cfg.lam)
    return masked_whiten(advantages, rollout.mask) if cfg.whiten else advantages, returns


def ppo_minibatch_loss(crew, rollout, cfg, rows):
    """PPO's loss of the policy for some rows of a rollout. Returns the mean loss, how many tokens
    or answers it is a mean of, and stats."""
    tokens, old = rollout.minibatch(rows, crew.policy.device)
    mask, unit = tokens[3], cfg.loss_mean
    logprobs, entropy = response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    loss, stats = ppo_policy_loss(
        logprobs, old["logprobs"], old["advantages"], mask, clip_ratio=cfg.clip_ratio, unit=unit
    )
    entropy = mean_over(entropy, mask, unit)
    stats |= {"policy_loss": loss, "entropy": entropy}
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy
    if cfg.kl_in == "loss":
        ref_logprobs, estimator = old["ref_logprobs"], cfg.kl_estimator
        kl = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator, unit=unit)
        loss, stats = loss + rollout.kl_coef * kl, stats | {"kl_in_loss": kl}
    return loss, count_of(mask, unit), detached(stats)


def value_minibatch_loss(crew, rollout, cfg, rows):
    """The loss of the value model for the same rows."""
    tokens, old = rollout.minibatch(rows, crew.value_model.device)
    mask, unit = tokens[3], cfg.loss_mean
    values = answer_values(crew.value_model, *tokens)
    loss, stats = ppo_value_loss(
        values, old["values"], old["returns"], mask, value_clip=cfg.value_clip, unit=unit
    )
    stats = detached(stats | {"value_loss": loss})
    return cfg.value_coef * loss, count_of(mask, unit), stats


def losses_of(crew, rollout, cfg, minibatch_loss):
    """The losses of an update, one for each model that learns. The models share no weights, so the
    optimiser makes one backward pass after the other: it then holds one graph at a time."""
    each = [minibatch_loss] + [value_minibatch_loss] * (crew.value_model is not None)
    return [partial(loss, crew, rollout, cfg) for loss in each]


def count_of(mask, unit):
    """How much a micro-batch counts in the mean of its batch: its tokens, or its answers."""
    return int(mask.sum()) if unit == "token" else len(mask)


def rlhf_loop(crew, cfg, stage, minibatch_loss):
    """The loop of PPO. GRPO, RLOO and your own loss run in it with other advantages and losses."""
    rows = load_rows(cfg, "prompt", say=stage.say)
    checks.warn_about_texts(stage.say, crew.tokenizer, rows, [], cfg)
    prompts = [row["prompt"] for row in rows]
    advantages_of = ADVANTAGES.get(cfg.algorithm, centred_advantages)
    optimiser = rlhf_optimiser(crew, cfg, stage.say)
    for step in stage.steps(cfg.steps, optimiser):
        start, kl_coef = time.perf_counter(), optimiser.state["kl_coef"]
        if step % cfg.sample_every == 0:
            record_samples(crew, prompts[:8], cfg, stage, step)

        # 1. Rollout: sample answers; score them; log-probs of the reference; values
        batch = prompt_batch(cfg, prompts, step)  # every prompt cfg.answers times in a row
        generator = rng_for(cfg, "rollout", step)
        rollout = make_rollout(crew, batch, cfg, generator, optimiser=optimiser)

        # 2. Advantages: which tokens were better than expected?
        rollout.advantages, rollout.returns = advantages_of(rollout, cfg)

        # 3. Update: a few epochs over the rollout, in minibatches
        middle, updates = time.perf_counter(), []
        optimiser.length = rollout.lengths().__getitem__
        losses = losses_of(crew, rollout, cfg, minibatch_loss)
        per_step = cfg.ppo_epochs * math.ceil(len(batch) / cfg.minibatch)
        for epoch in range(cfg.ppo_epochs):
            for rows in batches(len(batch), cfg.minibatch, rng_for(cfg, "minibatch", step, epoch)):
                stats = optimiser.step(rows, losses, step + len(updates) / per_step)
                if not updates:  # nothing has changed yet: the ratio must be 1
                    checks.check_ratios(rollout, stats, models.precision(cfg), optimiser)
                updates.append(stats)
            if cfg.stop_kl and stats.get("approx_kl", 0) > cfg.stop_kl:
                break

        # 4. Measure; adapt kl_coef. `train_rlhf` logs the metrics and raises alerts.
        end = time.perf_counter()
        metrics = {"step": step + 1, "steps": cfg.steps, "kl_coef": kl_coef}
        metrics |= rollout_metrics(rollout, cfg) | mean_of(updates)
        if crew.value_model is not None:
            explained = explained_variance(rollout.values, rollout.returns, rollout.mask)
            metrics["explained_variance"] = explained.item()
        if crew.watchdog is not None:
            metrics["watchdog"] = watched(crew, rollout)
        metrics |= {"seconds_update": end - middle, "seconds": end - start}
        if step + 1 == cfg.steps:
            record_samples(crew, prompts[:8], cfg, stage, cfg.steps)
        optimiser.state["kl_coef"] = next_kl_coef(kl_coef, metrics["kl"], cfg)
        yield metrics


def watched(crew, rollout):
    """The mean score that the watchdog gives to about 32 answers of a rollout. No reward contains
    it, so the policy does not learn to please it."""
    every = max(1, len(rollout.prompts) // 32)
    with matmul.fast_matmul(crew.policy):
        scores = crew.watchdog(rollout.prompts[::every], rollout.responses[::every])
    return sum(scores) / len(scores)


def next_kl_coef(kl_coef, kl, cfg):
    """Ziegler's controller: raises kl_coef while KL is above `kl_target`, lowers it below."""
    if not cfg.kl_target:
        return kl_coef
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return kl_coef * (1 + error * cfg.rollout / cfg.kl_horizon)


def rlhf_optimiser(crew, cfg, say=print):
    """AdamW for the policy, and for the value model if there is one."""
    rates = [(crew.policy, cfg.policy_lr)]
    frozen = [crew.reference, *models_in(crew.reward), *models_in(crew.watchdog)]
    if crew.value_model is not None:
        rates.append((crew.value_model, cfg.value_lr))
    frozen = [model for model in frozen if model is not None]
    optimiser = Optimiser(cfg, rates, cfg.steps, batch=cfg.minibatch, frozen=frozen, say=say)
    optimiser.state |= {"kl_coef": cfg.kl_coef, "running": {}}
    return optimiser


def record_samples(crew, prompts, cfg, stage, step):
    """Keeps answers to the same few prompts after `step` steps, and values along fixed texts."""
    stage.samples(sample_answers(crew, prompts, cfg, step))
    if crew.value_model is not None:
        stage.append("values.jsonl", value_curves(crew, prompts, cfg, step))


def sample_answers(crew, prompts, cfg, step):
    """The policy's answers, greedy and sampled with the same random numbers at every step, so that
    you can compare steps."""
    rows = [{"prompt": prompt} for prompt in prompts]
    for temperature in (0.0, cfg.temperature):
        rng = rng_for(cfg, "samples")
        for answer in evaluate(crew, rows, cfg, rng, temperature=temperature):
            kept = {name: answer[name] for name in ("prompt", "response", "reward", "kl")}
            yield {"step": step, "temperature": temperature} | kept


def value_curves(crew, prompts, cfg, step):
    """What the value model expects before each token of the reference's greedy answers. The
    reference never changes, so the texts are the same at every step."""
    values_of = partial(answer_values, crew.value_model)
    with crew.as_reference() as model:
        parts = generate_answers(
            model, crew.tokenizer, prompts, cfg, rng_for(cfg, "values"), temperature=0,
            then=lambda *tokens: (*tokens[2:], values_of(*tokens)),
        )  # fmt: skip
        rows = [row for part in parts for row in zip(*part)]
    for prompt, (ids, mask, values) in zip(prompts, rows):
        tokens = [crew.tokenizer.decode(token) for token in ids[mask]]
        values = [round(value, 4) for value in values[mask].tolist()]
        yield {"step": step, "prompt": prompt, "tokens": tokens, "values": values}


@processes.spread("rlhf")
def train_rlhf(cfg, reward=None, algorithm=None):
    """Trains the policy with cfg.algorithm and saves it to model/rlhf.

    `reward` is any callable `reward(prompts, responses) -> list[float]`. `algorithm` is a loss of
    your own with the arguments of `ppo_minibatch_loss`. Both override the parameters of that name.
    """
    code = {}  # identifies functions of your own
    if algorithm is not None:  # functions that read cfg.algorithm need the name of this one
        cfg = cfg.changed(algorithm=name_of(algorithm, LOSSES, cfg.algorithm))
    loss = algorithm or named("algorithm", cfg.algorithm, LOSSES | {"dpo": None})
    if loss and loss not in LOSSES.values():
        code["code of algorithm"] = code_of(loss)
    inputs = cfg.starts_from(reward)
    if reward is not None:
        cfg = cfg.changed(reward=name_of(reward, {}))
        code["code of reward"] = code_of(reward)
    with open_stage(cfg, "rlhf", inputs, code=code, pairs=loss is None) as stage:
        crew = load_crew(cfg, reward)
        yield from stage.past
        history = list(stage.past)
        steps = rlhf_loop(crew, cfg, stage, loss) if loss else dpo_loop(crew, cfg, stage)
        for metrics in steps:
            history.append(stage.log(metrics))
            yield history[-1]
            alerts.tell(stage, history, cfg)
        names = "loss reward watchdog kl length entropy unsafe accuracy margin skipped".split()
        stage.summary = {name: metrics[name] for name in names if name in metrics}
        models.save(crew.policy, crew.tokenizer, stage.folder)


# ------------------------------------------------------------------------------------------------
# 11. GRPO, RLOO, DPO (3_rlhf)


def grpo_advantages(rollout, cfg):
    """GRPO: one advantage per answer, from the other answers to its prompt. No value model."""
    totals = scores_less_kl(rollout, cfg)
    advantages = group_advantages(totals, cfg.answers, scale=cfg.group_scale)
    return advantages[:, None] * rollout.mask, totals[:, None] * rollout.mask


def rloo_advantages(rollout, cfg):
    """RLOO: the same, with the mean of the other answers as baseline, and without scaling."""
    totals = scores_less_kl(rollout, cfg)
    advantages = leave_one_out(totals, cfg.answers)
    return advantages[:, None] * rollout.mask, totals[:, None] * rollout.mask


def centred_advantages(rollout, cfg):
    """For a loss of your own: the distance from the mean of the rollout."""
    totals = scores_less_kl(rollout, cfg)
    return (totals - totals.mean())[:, None] * rollout.mask, totals[:, None] * rollout.mask


def scores_less_kl(rollout, cfg):
    """The score of each answer minus kl_coef times its KL, (B,)."""
    if cfg.kl_in == "loss":
        return rollout.scores
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator=cfg.kl_estimator)
    return rollout.scores - rollout.kl_coef * (kl * rollout.mask).sum(1)


def grpo_minibatch_loss(crew, rollout, cfg, rows):
    """The loss of GRPO and RLOO: PPO's without values. The KL is in the reward or in the loss."""
    tokens, old = rollout.minibatch(rows, crew.policy.device)
    mask, unit = tokens[3], cfg.loss_mean
    logprobs, entropy = response_logprobs(crew.policy, *tokens, temperature=cfg.temperature)
    if cfg.kl_in == "loss":
        loss, stats = grpo_loss(
            logprobs, old["logprobs"], old["ref_logprobs"], old["advantages"][:, 0], mask,
            clip_ratio=cfg.clip_ratio, kl_coef=rollout.kl_coef, estimator=cfg.kl_estimator,
            unit=unit,
        )  # fmt: skip
        stats["kl_in_loss"] = stats.pop("kl")
    else:
        loss, stats = ppo_policy_loss(
            logprobs, old["logprobs"], old["advantages"], mask, clip_ratio=cfg.clip_ratio, unit=unit
        )
    entropy = mean_over(entropy, mask, unit)
    stats |= detached({"policy_loss": loss, "entropy": entropy})
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy
    return loss, count_of(mask, unit), stats


ADVANTAGES = {"ppo": ppo_advantages, "grpo": grpo_advantages, "rloo": rloo_advantages}
LOSSES = {"ppo": ppo_minibatch_loss, "grpo": grpo_minibatch_loss, "rloo": grpo_minibatch_loss}


def dpo_loop(crew, cfg, stage):
    """DPO learns from the preference pairs directly: no sampling, no reward model, no values."""
    rows, _ = splits.apart(cfg, preference_rows(cfg, stage.say))
    checks.warn_about_texts(stage.say, crew.tokenizer, rows, ["chosen", "rejected"], cfg)
    with crew.as_reference() as model:  # the reference never changes: once is enough
        work = partial(pair_logprobs, model, crew.tokenizer, cfg=cfg)
        parts = [part[:2] for part in in_parts(work, rows, cfg, model, say=stage.say)]
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
    rates, frozen = [(crew.policy, cfg.dpo_lr)], [crew.reference] if crew.reference else []
    optimiser = Optimiser(cfg, rates, len(plan), batch=cfg.dpo_batch, frozen=frozen, say=stage.say)
    optimiser.length = lambda i: text_length(rows[i])
    prompts = [row["prompt"] for row in rows[:8]]
    for step in stage.steps(len(plan), optimiser):
        start = time.perf_counter()
        if step == 0:
            record_samples(crew, prompts, cfg, stage, 0)
        metrics = {"step": step + 1, "steps": len(plan)} | optimiser.step(plan[step], loss_of, step)
        if step + 1 == len(plan):
            record_samples(crew, prompts, cfg, stage, len(plan))
        yield timed(metrics, start, rows=len(plan[step]))


def pair_logprobs(model, tokenizer, rows, cfg):
    """The summed log-probs of the chosen and the rejected answers, (B,) each, and the mean negative
    log-likelihood (nll) of the chosen ones."""
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    prompts = [row["prompt"] for row in rows] * 2
    tokens = encode_pairs(tokenizer, prompts, answers, cfg, model.device)
    with models.autocast(cfg, model):
        logprobs, _ = response_logprobs(model, *tokens, entropy=False)
    half = len(rows)
    nll = -mean_over(logprobs[:half], tokens[3][:half], "answer")
    return *logprobs.sum(1).chunk(2), nll


# ------------------------------------------------------------------------------------------------
# 12. Evaluation (4_test)


@errors.plain_errors
def evaluate(crew, rows, cfg, generator, *, temperature=None, kept=None):
    """One answer of the policy to each row: text, judge's score, your metrics, reward, log-prob,
    KL, length, eos. The judge's score is None for rows that do not say what a right answer is.

    The list `kept` gets the tokens of each part and the log-probs of its answers.
    """
    metrics = metrics_of(cfg.metric)

    def work(part):
        asked = [row["prompt"] for row in part]
        policy, tokenizer = crew.policy, crew.tokenizer
        tokens = answer_batch(policy, tokenizer, asked, cfg, generator, temperature)
        how = {"temperature": cfg.temperature, "entropy": False}
        logprobs = ref_logprobs = response_logprobs(crew.policy, *tokens, **how)[0]
        if crew.reference is not crew.policy:
            with crew.as_reference() as reference:
                ref_logprobs = response_logprobs(reference, *tokens, **how)[0]
        if kept is not None:
            kept.append((tokens, logprobs.sum(1)))
        texts = decode(crew.tokenizer, *tokens[2:])
        columns = {
            "response": texts,
            "reward": [None] * len(part),
            "logprob": logprobs.sum(1).tolist(),
            "kl": kl_estimate(logprobs, ref_logprobs).sum(1).tolist(),
            "length": tokens[3].sum(1).tolist(),
            "eos": ended(*tokens[2:], stops_of(crew.policy, crew.tokenizer)).tolist(),
        }
        if crew.reward is not None:
            columns["reward"] = ask(crew.reward, asked, texts)[0].tolist()
        if metrics:
            found = [ask(f, asked, texts, f"metric {x}")[0].tolist() for x, f in metrics.items()]
            columns["metrics"] = [dict(zip(metrics, numbers)) for numbers in zip(*found)]
        answers = []
        for row, *values in zip(part, *columns.values()):
            answer = {"prompt": row["prompt"], "kind": row.get("kind", "all")}
            answer |= dict(zip(columns, values))
            known = world.knows(row)
            answer["judge"] = world.judge(row, answer["response"], answer["eos"]) if known else None
            answers.append(answer)
        return answers

    return sum(in_parts(work, rows, cfg, crew.policy, generator), [])


@dataclass
class Examined:
    """What 4_test finds out about one model."""

    sampled: list  # the results of `evaluate` at cfg.temperature
    greedy: list  # and at temperature 0
    tokens: list  # what `evaluate` kept of the sampled answers, of the actor only
    summary: dict  # its entry in report.json
    graded: list = None  # its answers to the prompts of the categories
    pairs: object = None  # how likely it finds the held-out pairs, see `read_pairs`


def examine(crew, rows, pairs, cfg, actor=None, watchdog=None):
    """Everything that 4_test measures of one model, as an Examined. `actor` is what it has found
    out about the actor, with which it compares; None if this is the actor."""
    tokens, say = [], partial(category_answers, crew, cfg)
    kept = {} if actor else {"kept": tokens}
    sampled = evaluate(crew, rows, cfg, rng_for(cfg, "test"), **kept)
    greedy = evaluate(crew, rows, cfg, rng_for(cfg, "test"), temperature=0)
    watch(watchdog, sampled)
    summary = measures.summarise(sampled, greedy)
    found = Examined(sampled, greedy, tokens, summary)
    summary["categories"], found.graded = categories.graded(cfg, summary["judge"], say)
    if cfg.plain_text:
        summary["perplexity"] = perplexity(crew.policy, crew.tokenizer, cfg)
    if pairs:
        found.pairs = read_pairs(crew.policy, crew.tokenizer, pairs, cfg)
        summary["reference_perplexity"] = measures.reference_perplexity(found.pairs)
    compare_with_actor(found, actor, crew, cfg)
    return found


def compare_with_actor(found, actor, crew, cfg):
    """Adds what needs the actor: win rates, KL backwards, implicit rewards. A model whose reference
    is itself has other tokens than the actor, so the distance between them is not known."""
    summary = found.summary
    if actor:
        comparisons = label.scan(label.path_of(cfg.root, label.TEST_FILE))[0]
        summary["wins"] = measures.win_rates(found.sampled, actor.sampled, comparisons)
    if actor and crew.reference is crew.policy:
        summary["kl"] = None
        for answer in found.sampled + found.greedy:
            answer["kl"] = None
        return
    summary["kl_backwards"] = backward_kl(crew.policy, actor.tokens, cfg) if actor else 0.0
    if found.pairs is not None:
        actors = (actor or found).pairs
        implicit = measures.implicit_rewards(found.pairs, actors, cfg.dpo_beta)
        summary["implicit_reward"] = measures.preference_summary(implicit)


def examine_models(cfg, names, rows, pairs, reward, watchdog=None, actor="actor"):
    """{name: Examined} of some models: stages, folders or names on the hub. All of them are
    compared with the model `actor`, which is one of them."""
    tokenizer, reference = load_named(cfg, actor)
    crew = Crew(tokenizer, reference, reference, reward)
    first = examine(crew, rows, pairs, cfg, watchdog=watchdog)
    found = dict.fromkeys(names, first)
    for name in (name for name in names if name != actor):
        own, model = load_named(cfg, name)
        alike = own.get_vocab() == tokenizer.get_vocab()
        crew = Crew(own, model, reference if alike else model, reward)
        found[name] = examine(crew, rows, pairs, cfg, first, watchdog)
    return found


def models_to_test(cfg):
    """The names of the models of 4_test."""
    return ["base", "actor", "rlhf", *filter(None, map(str.strip, cfg.extra_models.split(",")))]


def load_named(cfg, name):
    """The tokenizer and the language model of a stage, of a folder or of a name on the hub."""
    if name in ("base", "actor", "rlhf"):
        return load_pair(cfg, name)
    places = Path(cfg.root) / "model" / name, Path(cfg.root) / name, Path(name).expanduser()
    return load_both(cfg, next((str(p) for p in places if p.exists()), name), name)


def watch(watchdog, results):
    """Adds the score of the second reward model to each answer."""
    if watchdog and results:
        texts = [result["prompt"] for result in results], [r["response"] for r in results]
        for result, score in zip(results, ask(watchdog, *texts, "watchdog")[0].tolist()):
            result["watchdog"] = score


def category_answers(crew, cfg, prompts):
    """A sampled answer of the policy to each prompt, as text."""
    parts = generate_answers(
        crew.policy, crew.tokenizer, prompts, cfg, rng_for(cfg, "categories"),
        then=lambda *tokens: decode(crew.tokenizer, *tokens[2:]),
    )  # fmt: skip
    return sum(parts, [])


@errors.plain_errors
def read_pairs(model, tokenizer, pairs, cfg):
    """How likely a language model finds the answers of each pair: a table with the summed log-probs
    of chosen and rejected, and the number of tokens of chosen."""
    work = partial(pair_logprobs, model, tokenizer, cfg=cfg)
    parts = [part[:2] for part in in_parts(work, pairs, cfg, model)]
    chosen, rejected = (torch.cat(column).tolist() for column in zip(*parts))
    answers = encoder(tokenizer).answers([row["chosen"] for row in pairs], cfg.max_new_tokens)
    return measures.logprob_table(chosen, rejected, [len(ids) for ids in answers])


def backward_kl(model, kept, cfg):
    """KL(actor || policy), from the actor's answers that `evaluate` kept: how much likelier the
    actor finds its own answers than the policy does. It is large where the policy has unlearned
    what the actor says; KL(policy || actor) is large where the policy says something new."""
    gaps = []
    for tokens, logprobs in kept:
        with torch.no_grad(), models.eval_mode(model), models.autocast(cfg, model):
            own, _ = response_logprobs(model, *tokens, temperature=cfg.temperature, entropy=False)
        gaps += (logprobs - own.sum(1)).tolist()
    return sum(gaps) / len(gaps)


@errors.plain_errors
def perplexity(model, tokenizer, cfg):
    """exp of the mean negative log-prob of the tokens of cfg.plain_text: 1 if the model knows every
    next token, V if it finds all tokens equally likely.

    The text is cut into blocks of equal length that every model of the course can read. The first
    token of a block counts only if the tokenizer puts a bos before it.
    """
    known, text = encoder(tokenizer), splits.load_plain_text(cfg)
    ids = known.ids([known.show(known.hide(text))], special=True)[0]
    bos, ids = ids[: known.front], ids[known.front : len(ids) - known.back]
    if len(ids) < 2:
        raise CourseError(
            f"plain_text = {cfg.plain_text!r} holds fewer than two tokens: choose a longer text."
        )
    count = math.ceil(len(ids) / (cfg.max_prompt + cfg.max_new_tokens - len(bos)))
    length = len(ids) // count  # the last tokens, fewer than `count`, are left out
    rows = [bos + ids[i * length : (i + 1) * length] for i in range(count)]
    given = max(1, len(bos))

    def work(part):
        ids = torch.tensor(part, device=model.device)  # (B, T)
        real = torch.ones_like(ids, dtype=torch.bool)
        tokens = ids[:, :given], real[:, :given], ids[:, given:], real[:, given:]
        return response_logprobs(model, *tokens, entropy=False)[0]

    logprobs = torch.cat([*in_parts(work, rows, cfg, model)])  # (blocks, tokens)
    return logprobs.cpu().double().mean().neg().exp().item()


def best_of(crew, rows, cfg, generator):
    """Best-of-n, which needs no training: n answers per question, the one with the highest reward.

    It moves away from the policy by at most log n - (n - 1) / n nats.
    """
    n, rows = cfg.best_of, rows[: cfg.best_of_rows]
    results = evaluate(crew, [row for row in rows for _ in range(n)], cfg, generator)
    best = [max(group, key=lambda r: r["reward"]) for group in chunks(results, n)]
    return [result | {"kl": math.log(n) - (n - 1) / n} for result in best]


def summarise(sampled, greedy, actor, watchdog=None):
    """An entry of report.json as far as it needs only answers; `actor` are the actor's sampled
    answers to the same questions and perhaps to more."""
    watch(watchdog, sampled)
    summary = measures.summarise(sampled, greedy)
    summary["categories"] = categories.of_the_world(summary["judge"])
    return summary | {"wins": measures.win_rates(sampled, actor)}


def critics_to_test(cfg, watchdog=None):
    """{name: reward model}: the one of 2_critic, the other members of its ensemble, the watchdog;
    none where a reward of your own has made them unnecessary."""
    if not has_record(cfg.root, "critic"):
        return {}
    first, *others = load_critics(cfg)
    found = {"reward model": first} | {f"member {i}": one for i, one in enumerate(others, 1)}
    return found | ({"watchdog": watchdog} if watchdog else {})


@errors.plain_errors
def evaluate_critic(critic, tokenizer, rows, cfg):
    """The reward model on held-out pairs: both scores of each pair, its kind and its flaw."""
    rows, results = with_pairs(rows), []
    if not rows:
        raise CourseError(
            "The reward model cannot be evaluated: no row of eval.json has both chosen and "
            "rejected. Add pairs to eval.json."
        )
    work = partial(pair_scores, critic, tokenizer, cfg=cfg)
    scores = map(torch.cat, zip(*in_parts(work, rows, cfg, critic)))
    for row, chosen, rejected in zip(rows, *(column.tolist() for column in scores)):
        known = {"kind": row.get("kind", "all"), "flaw": row.get("flaw", "unknown")}
        results.append(known | {"chosen": chosen, "rejected": rejected})
    return results
