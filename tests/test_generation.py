"""`generate`: its guarantees and the distribution of its samples. test_families.py: the cache."""

import math

import pytest
import torch

import util

PAD, EOS = 0, 1
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [33, 20], [11, 11, 11, 11], [40, 3, 50]]


def run(model, prompts, pad_left, seed=None, **options):
    """Runs `generate` on lists of ids; returns the real answer ids and the three tensors."""
    options = dict(max_new_tokens=12, eos_token_id=None, pad_token_id=PAD) | options
    luck = None if seed is None else torch.Generator().manual_seed(seed)
    ids, mask, logprobs = util.generate(model, *pad_left(prompts), generator=luck, **options)
    return [row[real].tolist() for row, real in zip(ids, mask)], ids, mask, logprobs


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_logprobs_of_sampling_are_those_of_scoring(model, pad_left, temperature):
    stops = list(range(0, 61, 9))
    _, ids, mask, logprobs = run(
        model, PROMPTS, pad_left, seed=1, temperature=temperature, eos_token_id=stops
    )
    scored, _ = util.response_logprobs(
        model, *pad_left(PROMPTS), ids, mask, temperature=temperature
    )
    assert mask.sum(1).unique().numel() > 1  # the test needs unequal lengths
    assert (scored - logprobs).abs().max() <= 1e-5


@pytest.mark.parametrize("limits", [dict(top_k=3), dict(top_p=0.5)])
def test_truncated_sampling_reports_the_whole_distribution(model, pad_left, limits):
    _, ids, mask, logprobs = run(model, PROMPTS, pad_left, seed=2, temperature=0.8, **limits)
    scored, _ = util.response_logprobs(model, *pad_left(PROMPTS), ids, mask, temperature=0.8)
    assert (scored - logprobs).abs().max() <= 1e-5


def test_rows_that_finish_early_do_not_change_the_others(model, pad_left):
    prompts = PROMPTS * 6
    free, *_ = run(model, prompts, pad_left, seed=3, max_new_tokens=20)
    stops = list(range(0, 61, 12))
    stopped, *_ = run(model, prompts, pad_left, seed=3, max_new_tokens=20, eos_token_id=stops)
    for whole, part in zip(free, stopped):
        first = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        assert part == whole[:first]
    assert len({len(part) for part in stopped}) > 4


def test_the_first_eos_belongs_to_the_answer_and_ends_it(model, pad_left):
    prompts = PROMPTS * 4
    for stops in (17, [17], [17, 30, 45], (17, 30)):
        kinds = {17} if stops in (17, [17]) else set(stops)
        answers, *_ = run(
            model, prompts, pad_left, seed=4, max_new_tokens=40, temperature=3.0, eos_token_id=stops
        )
        assert any(answer[-1] in kinds for answer in answers)
        for answer in answers:
            assert not kinds & set(answer[:-1])
            assert answer[-1] in kinds or len(answer) == 40


def test_without_an_eos_nothing_stops(model, pad_left):
    _, ids, mask, _ = run(model, PROMPTS, pad_left, seed=5, eos_token_id=None)
    assert ids.shape == mask.shape == (6, 12) and mask.all()


def test_an_eos_right_away_is_an_answer_of_one_token(model, pad_left):
    every_id = list(range(61))
    answers, ids, mask, _ = run(model, PROMPTS, pad_left, seed=6, eos_token_id=every_id)
    assert [len(answer) for answer in answers] == [1] * 6 and ids.shape == (6, 1) and mask.all()


@pytest.mark.parametrize("pad", [PAD, 17, 60])
def test_the_mask_is_a_prefix_and_outside_it_lies_nothing(model, pad_left, pad):
    _, ids, mask, logprobs = run(
        model, PROMPTS * 4, pad_left, seed=7, temperature=3.0, max_new_tokens=40,
        eos_token_id=17, pad_token_id=pad,
    )  # fmt: skip
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True))
    assert mask.any(1).all() and mask.any(0).all() and not mask.all()
    assert (ids[~mask] == pad).all() and (logprobs[~mask] == 0).all()
    assert (logprobs[mask] < 0).all() and torch.isfinite(logprobs).all()


def test_the_same_seed_gives_the_same_answers(model, pad_left):
    a, b, c = (run(model, PROMPTS, pad_left, seed=seed) for seed in (8, 8, 9))
    assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:])) and a[0] != c[0]


def test_a_generator_leaves_the_global_dice_alone(model, pad_left):
    state = torch.get_rng_state()
    run(model, PROMPTS, pad_left, seed=8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("limits", [dict(top_k=1), dict(top_p=1e-9), dict(top_k=1, top_p=0.3)])
def test_the_narrowest_sampling_is_greedy(model, pad_left, limits):
    greedy, *_ = run(model, PROMPTS, pad_left, temperature=0)
    assert run(model, PROMPTS, pad_left, seed=10, temperature=1.3, **limits)[0] == greedy


def test_top_k_beyond_the_vocabulary_and_top_p_1_change_nothing(model, pad_left):
    plain, *_ = run(model, PROMPTS, pad_left, seed=11)
    assert run(model, PROMPTS, pad_left, seed=11, top_k=1_000, top_p=1.0)[0] == plain


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(make_model, pad_left, training):
    model = make_model("opt", dropout=0.5)
    quiet, *_ = run(model.eval(), PROMPTS, pad_left, temperature=0)
    model.train(training)
    assert run(model, PROMPTS, pad_left, temperature=0)[0] == quiet
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_no_gradient_is_kept(model, pad_left):
    *_, logprobs = run(model, PROMPTS, pad_left, seed=12)
    assert not logprobs.requires_grad


# -------------------------------------------------------------------------- frequencies

MANY, TINY = 20_000, 6


def chi_square(counts, probs):
    """Whether the chi-square statistic is less than 4 standard deviations above its mean."""
    kept = [(c, p * sum(counts)) for c, p in zip(counts, probs) if p * sum(counts) >= 5]
    rest = sum(counts) - sum(c for c, _ in kept), sum(counts) - sum(e for _, e in kept)
    kept += [rest] if rest[1] >= 5 else []
    assert sum(c for c, p in zip(counts, probs) if p == 0) == 0
    freedom = len(kept) - 1
    assert freedom >= 1
    return sum((c - e) ** 2 / e for c, e in kept) < freedom + 4 * math.sqrt(2 * freedom)


def probabilities(model, ids, temperature, keep=lambda ordered: ordered):
    """The distribution of the next token. `keep` selects from the sorted (prob, token) pairs."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    probs = (logits / temperature).softmax(-1).tolist()
    ordered = sorted(((p, token) for token, p in enumerate(probs)), reverse=True)
    kept = {token: p for p, token in keep(ordered)}
    return [kept.get(t, 0) / sum(kept.values()) for t in range(len(probs))]


def nucleus(p):
    def keep(ordered):
        total, kept = 0.0, []
        for pair in ordered:
            if total >= p:
                break
            kept.append(pair)
            total += pair[0]
        return kept

    return keep


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_pairs_of_tokens_come_as_often_as_they_should(make_model, pad_left, temperature):
    model, prompt = make_model("gpt2", TINY), [2, 5, 3]
    _, ids, *_ = run(
        model, [prompt] * MANY, pad_left, seed=13, temperature=temperature, max_new_tokens=2
    )
    counts = torch.bincount(ids[:, 0] * TINY + ids[:, 1], minlength=TINY**2).tolist()
    first = probabilities(model, prompt, temperature)
    after = [probabilities(model, [*prompt, t], temperature) for t in range(TINY)]
    assert chi_square(counts, [first[a] * after[a][b] for a in range(TINY) for b in range(TINY)])


@pytest.mark.parametrize(
    "limits, keep",
    [
        (dict(top_k=3), lambda o: o[:3]),
        (dict(top_p=0.6), nucleus(0.6)),
        (dict(top_p=0.9), nucleus(0.9)),
    ],
)
def test_truncated_frequencies(make_model, pad_left, limits, keep):
    model, prompt = make_model("gpt2", TINY), [2, 5, 3]
    options = dict(seed=14, temperature=1.5, max_new_tokens=1) | limits
    _, ids, *_ = run(model, [prompt] * MANY, pad_left, **options)
    counts = torch.bincount(ids[:, 0], minlength=TINY).tolist()
    assert chi_square(counts, probabilities(model, prompt, 1.5, keep))
