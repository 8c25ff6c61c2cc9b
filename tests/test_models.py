"""Models: logprobs, explicit dtypes, and scores that are read at the last real token."""

import json
import math

import pytest
import torch

import util

PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [33, 20]]
ANSWERS = [[8, 8, 1], [30, 31, 32, 33, 1], [1], [12, 50]]


@pytest.fixture
def cfg():
    return util.Config("tiny", device="cpu")


def four(pad_left, pad_right, junk=0, extra=0, prompts=PROMPTS, answers=ANSWERS):
    """The four tensors for scoring, padded with the id `junk` and `extra` more columns of it."""
    return *pad_left(prompts, junk, extra), *pad_right(answers, junk, extra)


def alone(model, prompt, answer):
    """The logits (R, V) that predict the answer, from one row without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_response_logprobs_and_entropy(model, pad_left, pad_right, temperature):
    tokens = four(pad_left, pad_right, junk=44, extra=2)
    with torch.no_grad():
        logprobs, entropy = util.response_logprobs(model, *tokens, temperature=temperature)
    assert not logprobs[~tokens[3]].any() and not entropy[~tokens[3]].any()
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        for t, logits in enumerate(alone(model, prompt, answer).tolist()):
            weights = [math.exp(x / temperature) for x in logits]
            probs = [w / sum(weights) for w in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(probs[answer[t]]), abs=1e-4)
            slow = -sum(p * math.log(p) for p in probs)
            assert entropy[b, t].item() == pytest.approx(slow, abs=1e-4)


def test_logprobs_are_float32_even_from_a_half_precision_model(make_model, pad_left, pad_right):
    model = make_model("llama").to(torch.bfloat16)
    logprobs, entropy = util.response_logprobs(model, *four(pad_left, pad_right))
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_load_as_float32_in_eval_mode(make_model, tmp_path, cfg, dtype):
    model = make_model("opt")
    model.to(dtype).train().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    for loaded in (util.load_actor(tmp_path, cfg), util.load_scorer(tmp_path, cfg)):
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert not any(module.training for module in loaded.modules())
        assert all(p.requires_grad for p in loaded.parameters())


def test_a_new_scorer_has_no_opinion_and_starts_from_the_actor(
    model, tmp_path, cfg, pad_left, pad_right
):
    model.save_pretrained(tmp_path)
    scorer = util.load_scorer(tmp_path, cfg)
    with torch.no_grad():
        assert not util.answer_scores(scorer, *four(pad_left, pad_right)).any()
    body = getattr(scorer, scorer.base_model_prefix).state_dict()
    actors = getattr(model, model.base_model_prefix).state_dict()
    assert all(torch.equal(body[name], actors[name]) for name in actors)


def opinionated(model, folder, cfg, seed=1):
    """A scorer with a random head and the body of the model."""
    model.save_pretrained(folder)
    scorer = util.load_scorer(folder, cfg)
    luck = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scorer.score.weight.normal_(generator=luck)
    return scorer


def test_a_score_depends_neither_on_padding_nor_on_what_follows(
    model, tmp_path, cfg, pad_left, pad_right
):
    scorer = opinionated(model, tmp_path, cfg)
    with torch.no_grad():
        plain = util.answer_scores(scorer, *four(pad_left, pad_right))
        padded = util.answer_scores(scorer, *four(pad_left, pad_right, junk=44, extra=6))
        one_by_one = [
            util.answer_scores(scorer, *four(pad_left, pad_right, prompts=[p], answers=[a]))
            for p, a in zip(PROMPTS, ANSWERS)
        ]
        longer = [[*answer, 9] for answer in ANSWERS]
        other = util.answer_scores(scorer, *four(pad_left, pad_right, answers=longer))
    assert torch.allclose(plain, padded, atol=1e-4)
    assert torch.allclose(plain, torch.cat(one_by_one), atol=1e-4)
    assert (plain - other).abs().min() > 1e-3  # the last real token has an effect


def test_values_know_only_what_stands_before(model, tmp_path, cfg, pad_left, pad_right):
    scorer = opinionated(model, tmp_path, cfg)
    changed = [[*answer[:2], 40, *answer[3:]] if len(answer) > 2 else answer for answer in ANSWERS]
    with torch.no_grad():
        tokens = four(pad_left, pad_right)
        values = util.answer_values(scorer, *tokens)
        others = util.answer_values(scorer, *four(pad_left, pad_right, answers=changed))
        for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
            text = prompt + answer
            for t in range(len(prompt), len(text)):
                if t > 1:  # the value equals the score of the text before token t
                    seen = dict(prompts=[text[: t - 1]], answers=[[text[t - 1]]])
                    score = util.answer_scores(scorer, *four(pad_left, pad_right, **seen)).item()
                    assert values[b, t - len(prompt)].item() == pytest.approx(score, abs=1e-4)
    assert values.shape == tokens[2].shape and not values[~tokens[3]].any()
    assert torch.allclose(values[:, :3], others[:, :3], atol=1e-6)
    assert (values[1, 3] - others[1, 3]).abs() > 1e-3


def test_the_tiny_model_is_the_same_for_a_seed_and_leaves_the_dice_alone(tokenizer):
    cfg = util.Config("smoke")
    state = torch.get_rng_state()
    one, two = (util.tiny_model(cfg, tokenizer).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = util.tiny_model(util.Config("smoke", seed=1), tokenizer).state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)
