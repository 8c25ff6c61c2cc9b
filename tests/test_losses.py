"""Compares the losses with Python loops in float64 on many shapes, some with empty rows.

test_exact.py checks their precision, their gradients and values outside the mask.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import util
from lab.runs import CourseError

NUMBER = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def batch(draw, columns):
    """`columns` nested lists (B, R) and the row lengths. Some rows may be empty, but not all."""
    B, R = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, R), min_size=B, max_size=B).filter(any))
    grid = st.lists(st.lists(NUMBER, min_size=R, max_size=R), min_size=B, max_size=B)
    return [draw(grid) for _ in range(columns)], lengths


def tensors(grids):
    return [torch.tensor(grid, dtype=torch.float64, requires_grad=True) for grid in grids]


def mask_of(lengths, R):
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def inside(lengths):
    """The (row, column) of each real token."""
    return [(b, t) for b, length in enumerate(lengths) for t in range(length)]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def near(a, b, tolerance=1e-9):
    return torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64).detach(),
        torch.as_tensor(b, dtype=torch.float64).detach(),
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# -------------------------------------------------------------------------------- masked statistics


@given(batch(1))
def test_masked_mean_is_the_mean_of_the_real_tokens(case):
    (grid,), lengths = case
    mask = mask_of(lengths, len(grid[0]))
    near(util.masked_mean(*tensors([grid]), mask), mean(grid[b][t] for b, t in inside(lengths)))


def test_masked_mean_of_nothing_is_zero():
    assert util.masked_mean(torch.full((2, 3), 7.0), torch.zeros(2, 3, dtype=torch.bool)) == 0


@given(batch(1))
def test_masked_whiten(case):
    (grid,), lengths = case
    real = [grid[b][t] for b, t in inside(lengths)]
    variance = mean((x - mean(real)) ** 2 for x in real)
    out = util.masked_whiten(*tensors([grid]), mask_of(lengths, len(grid[0])))
    for b, row in enumerate(grid):
        for t, x in enumerate(row):
            white = (x - mean(real)) / math.sqrt(variance + 1e-8) if t < lengths[b] else 0.0
            assert out[b, t].item() == pytest.approx(white, abs=1e-6)


# ------------------------------------------------------------------------------------ reward model


def test_pairwise_loss_survives_a_margin_of_minus_100():
    chosen = torch.tensor([-50.0], requires_grad=True)
    loss, _ = util.pairwise_loss(chosen, torch.tensor([50.0]))
    loss.backward()
    assert loss.item() == pytest.approx(100, abs=1e-4)
    assert chosen.grad.item() == pytest.approx(-1, abs=1e-6)


def test_pairwise_loss_is_float32_whatever_comes_in():
    scores = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.0], dtype=torch.bfloat16)
    loss, _ = util.pairwise_loss(*scores)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-log_sigmoid(1.0), abs=1e-6)


def test_equal_scores_are_half_right():
    loss, stats = util.pairwise_loss(torch.zeros(3), torch.zeros(3))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats["accuracy"] == 0.5


# ---------------------------------------------------------------------------------------------- KL

KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


def test_the_expectations_of_k1_and_k3_are_the_exact_kl():
    torch.manual_seed(2)
    p, q = (torch.randn(1, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p[0].tolist(), q[0].tolist()))
    assert exact > 0.1
    for estimator in ("k1", "k3"):
        near((p.exp() * util.kl_estimate(p, q, estimator=estimator)).sum(), exact)


def test_k1_is_the_default_and_an_unknown_estimator_raises():
    a, b = torch.tensor([[-1.0]]), torch.tensor([[-3.0]])
    assert util.kl_estimate(a, b).item() == 2.0
    with pytest.raises(CourseError, match="k4"):
        util.kl_estimate(a, b, estimator="k4")


# --------------------------------------------------------------------------------------------- GAE


def slow_gae(rewards, values, gamma, lam):
    """GAE of one row without padding, written as sums of discounted TD errors, no recursion."""
    T, next_values = len(rewards), [*values[1:], 0.0]
    delta = [rewards[t] + gamma * next_values[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, T)) for t in range(T)]


@given(batch(2), st.floats(0, 1), st.floats(0, 1))
def test_gae(case, gamma, lam):
    (rewards, values), lengths = case
    mask = mask_of(lengths, len(rewards[0]))
    advantages, returns = util.gae(*tensors([rewards, values]), mask, gamma=gamma, lam=lam)
    for b, n in enumerate(lengths):
        slow = slow_gae(rewards[b][:n], values[b][:n], gamma, lam)
        near(advantages[b, :n], torch.tensor(slow, dtype=torch.float64))
        near(returns[b, :n], torch.tensor([a + v for a, v in zip(slow, values[b])]).double(), 1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_with_gamma_and_lambda_1_is_what_is_still_to_come():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[0.5, 0.5, 0.5, 9.0]])
    _, returns = util.gae(rewards, values, mask_of([3], 4), gamma=1.0, lam=1.0)
    assert torch.allclose(returns, torch.tensor([[7.0, 6.0, 4.0, 0.0]]))


def test_gae_changes_none_of_its_arguments():
    given_ = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    before = given_.clone()
    util.gae(*given_, mask_of([3, 1], 3), gamma=0.9, lam=0.8)
    assert torch.equal(given_, before)


# --------------------------------------------------------------------------------------------- PPO


def slow_policy(new, old, advantage, lengths, c):
    losses, clipped, kl = [], [], []
    for b, t in inside(lengths):
        a, ratio = advantage[b][t], math.exp(new[b][t] - old[b][t])
        bounded = min(max(ratio, 1 - c), 1 + c)
        losses.append(-min(ratio * a, bounded * a))
        clipped.append(float(bounded * a < ratio * a))
        kl.append(ratio - 1 - math.log(ratio))
    return mean(losses), mean(clipped), mean(kl)


@given(batch(3), st.floats(0.05, 0.5))
def test_ppo_policy_loss(case, c):
    grids, lengths = case
    mask = mask_of(lengths, len(grids[0][0]))
    loss, stats = util.ppo_policy_loss(*tensors(grids), mask, clip_ratio=c)
    slow, clipped, kl = slow_policy(*grids, lengths, c)
    near(loss, slow)
    near(stats["approx_kl"], kl)
    near(stats["clip_fraction"], clipped, 1e-6)


def test_ppo_starts_with_ratio_1_and_minus_the_mean_advantage():
    torch.manual_seed(4)
    logprobs, advantages = torch.randn(2, 3, 5, dtype=torch.float64)
    mask = mask_of([5, 2, 3], 5)
    loss, stats = util.ppo_policy_loss(logprobs, logprobs, advantages, mask, clip_ratio=0.2)
    near(loss, -advantages[mask].mean())
    assert stats["ratio_error"] == 0 and stats["clip_fraction"] == 0 and stats["approx_kl"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, moves", [(1.5, 1, 0), (1.5, -1, 1), (0.5, 1, 1), (0.5, -1, 0)]
)
def test_the_clip_stops_only_what_already_gained(ratio, advantage, moves):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    args = torch.zeros(1, 1), torch.full((1, 1), float(advantage)), mask_of([1], 1)
    util.ppo_policy_loss(logprobs, *args, clip_ratio=0.2)[0].backward()
    assert bool(logprobs.grad.item()) == bool(moves)


def slow_value(values, old, returns, lengths, c):
    losses, worse = [], []
    for b, t in inside(lengths):
        v, o, r = values[b][t], old[b][t], returns[b][t]
        near_old = o + min(max(v - o, -c), c)
        losses.append(0.5 * max((v - r) ** 2, (near_old - r) ** 2))
        worse.append(float((near_old - r) ** 2 > (v - r) ** 2))
    return mean(losses), mean(worse)


@given(batch(3), st.floats(0.05, 1.0))
def test_ppo_value_loss(case, c):
    grids, lengths = case
    mask = mask_of(lengths, len(grids[0][0]))
    loss, stats = util.ppo_value_loss(*tensors(grids), mask, value_clip=c)
    slow, worse = slow_value(*grids, lengths, c)
    near(loss, slow)
    assert 0 <= stats["value_clip_fraction"].item() <= 1
    # Rounding decides at the edge of the clip, so inputs with a value that close are not compared.
    edge = any(abs(abs(grids[0][b][t] - grids[1][b][t]) - c) < 1e-6 for b, t in inside(lengths))
    assert edge or stats["value_clip_fraction"].item() == pytest.approx(worse, abs=1e-6)


LOSSES = {
    "policy": lambda a, b, c, d, m: util.ppo_policy_loss(a, b, c, m, clip_ratio=0.2),
    "value": lambda a, b, c, d, m: util.ppo_value_loss(a, b, c, m, value_clip=0.2),
    "grpo": lambda a, b, c, d, m: util.grpo_loss(a, b, c, d, m, clip_ratio=0.2, kl_coef=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_wider_padding_changes_nothing(name):
    torch.manual_seed(6)
    grids, per_answer = torch.randn(3, 3, 4, dtype=torch.float64), torch.randn(3).double()
    mask = mask_of([4, 2, 3], 4)
    wide = torch.cat([grids, torch.zeros(3, 3, 5).double()], dim=2)
    a, _ = LOSSES[name](*grids, per_answer, mask)
    b, _ = LOSSES[name](*wide, per_answer, mask_of([4, 2, 3], 9))
    near(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_stats_carry_no_gradient(name):
    grids = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    _, stats = LOSSES[name](*grids, torch.randn(2), mask_of([3, 2], 3))
    assert stats and not any(value.requires_grad for value in stats.values())


# -------------------------------------------------------------------------------------------- GRPO


@given(st.integers(2, 5), st.lists(NUMBER, min_size=5, max_size=15), st.booleans())
def test_group_advantages(size, rewards, scale):
    rewards = rewards[: len(rewards) // size * size]
    out = util.group_advantages(torch.tensor(rewards, dtype=torch.float64), size, scale=scale)
    for i, reward in enumerate(rewards):
        group = rewards[i // size * size : i // size * size + size]
        deviation = math.sqrt(sum((x - mean(group)) ** 2 for x in group) / (size - 1))
        slow = (reward - mean(group)) / (deviation + 1e-4 if scale else 1.0)
        assert out[i].item() == pytest.approx(slow, rel=1e-4, abs=1e-6)


def test_groups_must_divide_the_rewards():
    with pytest.raises(CourseError, match="7"):
        util.group_advantages(torch.zeros(7), 3)


@given(batch(3), st.floats(0, 1), st.data())
def test_grpo_loss(case, kl_coef, data):
    grids, lengths = case
    B, R = len(grids[0]), len(grids[0][0])
    advantages = data.draw(st.lists(NUMBER, min_size=B, max_size=B))
    each = [[a] * R for a in advantages]
    loss, stats = util.grpo_loss(
        *tensors(grids), torch.tensor(advantages).double(), mask_of(lengths, R),
        clip_ratio=0.2, kl_coef=kl_coef,
    )  # fmt: skip
    kl = mean(KL["k3"](grids[0][b][t] - grids[2][b][t]) for b, t in inside(lengths))
    near(loss, slow_policy(grids[0], grids[1], each, lengths, 0.2)[0] + kl_coef * kl)
    near(stats["kl"], kl)


# --------------------------------------------------------------------------------------------- DPO


def test_dpo_starts_at_ln_2_with_margin_0_and_pushes_the_pair_apart():
    chosen, rejected = (torch.tensor([-5.0, -7.0], requires_grad=True) for _ in range(2))
    ref = chosen.detach(), rejected.detach()
    loss, stats = util.dpo_loss(chosen, rejected, *ref, beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats["margin"] == 0 and stats["accuracy"] == 0.5, "a tie is half right"
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_dpo_is_finite_far_out_and_refuses_what_it_does_not_know():
    far = torch.tensor([-1e4]), torch.tensor([1e4]), torch.zeros(1), torch.zeros(1)
    assert util.dpo_loss(*far, beta=1.0)[0].item() == pytest.approx(2e4)
    with pytest.raises(CourseError, match="hinges"):
        util.dpo_loss(*far, beta=1.0, loss_type="hinges")
