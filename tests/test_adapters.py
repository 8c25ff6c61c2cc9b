"""Adapters, gradient checkpointing and half precision: they save memory and train as expected."""

import copy
import importlib.util
import json
import math
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lab.models
import util
from lab import CourseError
from tests.conftest import FAMILIES, random_model, run_loop

STAGES = ("actor", "critic", "rlhf")
SMALL = dict(
    device="cpu", fallback=False, max_new_tokens=8, validation_rows=4, eval_batch=16, test_rows=4,
    sft_share=0.1, preference_share=0.1, prompt_share=0.05, warmup=0.0, norm_prompts=2,
    actor_lr=1e-3, critic_lr=1e-3, policy_lr=1e-3, value_lr=1e-3, minibatch=8, ppo_epochs=1,
)  # fmt: skip
MILD = {name: dict(init_std=0.08, initializer_range=0.08) for name in FAMILIES}
ROWS = [
    {"prompt": "Human: What is the capital? Assistant:", "response": "It is far away."},
    {"prompt": "Human: Hello. Assistant:", "response": "Good day."},
]
HALVES = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


def config(folder, **changes):
    return util.Config("smoke", root=str(folder), **SMALL | changes)


def train(cfg, stage):
    return list(getattr(util, f"train_{stage}")(cfg))


def based(folder, family, tokenizer, root):
    """Makes a course whose base is a random model of the family; returns its folder."""
    folder.mkdir(exist_ok=True)
    model = random_model(family, len(tokenizer), **MILD[family])
    lab.models.save(model, tokenizer, folder / "mine")
    (folder / "dataset").mkdir()
    with open(root / "dataset" / "train.json", encoding="utf-8") as rows:
        (folder / "dataset" / "train.json").write_text("".join(islice(rows, 400)))
    train(config(folder, base_model=str(folder / "mine")), "base")
    return folder


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])  # test_matrix.py covers all families
def family(request):
    return request.param


@pytest.fixture(scope="module")
def course(family, tokenizer, root, tmp_path_factory):
    """The config of a small course that trained all stages with adapters."""
    folder = based(tmp_path_factory.mktemp("course") / family, family, tokenizer, root)
    cfg = config(folder, lora_rank=4)
    for stage in STAGES:
        train(cfg, stage)
    return cfg


@pytest.fixture
def tokens(tokenizer):
    texts = [row["prompt"] for row in ROWS], [row["response"] for row in ROWS]
    return util.encode_pairs(tokenizer, *texts, config("."), "cpu")


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def plain(course, stage, kind=AutoModelForCausalLM, **more):
    return kind.from_pretrained(f"{course.root}/model/{stage}", **more).eval()


@torch.no_grad()
def said(model, tokens):
    return util.answer_logits(model, *tokens)


# ------------------------------------------------------------------------------------------------
# Adapters


def test_only_adapters_and_a_scorers_head_learn(course, tokens):
    crew = util.load_crew(course)
    assert learning(crew.policy) and all("lora_" in name for name in learning(crew.policy))
    names = learning(crew.value_model)
    assert {name.split(".")[-3] for name in names if "lora_" not in name} == {"modules_to_save"}
    assert all("score" in name for name in names if "lora_" not in name)
    assert any("lora_" in name for name in names)
    frozen = {
        model: {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        for model in (crew.policy, crew.value_model)
    }
    before = said(crew.policy, tokens)
    head = [p.clone() for n, p in crew.value_model.named_parameters() if "modules_to_save" in n]
    a_few_steps(crew, course)
    for model, weights in frozen.items():
        now = dict(model.named_parameters())
        assert weights and all(torch.equal(now[name], weights[name]) for name in weights)
    assert not torch.equal(said(crew.policy, tokens), before)
    now = [p for n, p in crew.value_model.named_parameters() if "modules_to_save" in n]
    assert any(not torch.equal(a, b) for a, b in zip(head, now))


def a_few_steps(crew, cfg, count=2):
    """Runs rollouts and updates as the course does; returns the metrics of every step."""
    return run_loop(crew, cfg.changed(steps=count), [row["prompt"] for row in ROWS])


def test_the_reference_is_the_actor_bit_for_bit_before_and_after(course, tokens):
    crew, actor = util.load_crew(course), plain(course, "actor")
    assert crew.reference is None
    expected = said(actor, tokens)
    for _ in range(2):
        with crew.as_reference() as reference:
            assert torch.equal(said(reference, tokens), expected)
        stats = a_few_steps(crew, course, 1)
        assert stats[0]["ratio_error"] < 1e-3
    assert not torch.equal(said(crew.policy, tokens), expected)


def test_what_is_saved_is_the_policy_and_the_adapter_lies_beside(course, tokens, tmp_path):
    crew = util.load_crew(course)
    a_few_steps(crew, course)
    expected = said(crew.policy.eval(), tokens)
    lab.models.save(crew.policy, crew.tokenizer, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (said(whole, tokens) - expected).abs().max() < 1e-4
    assert not any("lora" in name for name in whole.state_dict())
    beside = PeftModel.from_pretrained(plain(course, "actor"), tmp_path / "adapter").eval()
    assert (said(beside, tokens) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("stage, before", [("actor", "base"), ("rlhf", "actor")])
def test_the_adapter_of_a_stage_fits_the_model_of_the_stage_before(course, tokens, stage, before):
    record = json.loads(Path(course.root, "model", stage, "stage.json").read_text())
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(
        record["files"]
    )
    start, end = said(plain(course, before), tokens), said(plain(course, stage), tokens)
    beside = f"{course.root}/model/{stage}/adapter"
    both = said(PeftModel.from_pretrained(plain(course, before), beside).eval(), tokens)
    assert (both - end).abs().max() < 1e-4 < (start - end).abs().max()


@torch.no_grad()
def test_the_adapter_of_the_critic_brings_its_head(course, tokens):
    critic = plain(course, "critic", AutoModelForSequenceClassification)
    actor = plain(course, "actor", AutoModelForSequenceClassification, num_labels=1)
    both = PeftModel.from_pretrained(actor, f"{course.root}/model/critic/adapter").eval()
    scores = util.answer_scores(critic, *tokens)
    assert scores.abs().min() > 0
    assert (util.answer_scores(both, *tokens) - scores).abs().max() < 1e-5
    value = util.load_value_model(course)
    told = (scores - critic.config.reward_mean) / critic.config.reward_std
    assert (util.answer_scores(value, *tokens) - told).abs().max() < 1e-3 * told.abs().max()


@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_with_an_adapter_is_whole_or_refused(course, tmp_path, stage):
    shutil.copytree(f"{course.root}/model", tmp_path / "model")
    assert util.artifact(tmp_path, stage) == tmp_path / "model" / stage
    file = tmp_path / "model" / stage / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CourseError, match=f"model/{stage} is damaged"):
        util.artifact(tmp_path, stage)


def copied(course, stage, folder):
    """Copies only the inputs of a stage into a new folder."""
    (folder / "model").mkdir(parents=True)
    (folder / "dataset").symlink_to(f"{course.root}/dataset")
    for source in ("base", *STAGES[: STAGES.index(stage)]):
        shutil.copytree(f"{course.root}/model/{source}", folder / "model" / source)
    return folder


def weights(folder, stage):
    files = sorted((folder / "model" / stage).rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stopped_and_resumed(folder, stage, **changes):
    """Runs a stage up to its first checkpoint, then resumes it and runs it to its end."""
    changes = dict(checkpoint_minutes=0, actor_epochs=2, critic_epochs=2, steps=3) | changes
    cfg = config(folder, **changes)
    run = getattr(util, f"train_{stage}")(cfg)
    for _ in range(2):
        next(run)
    run.close()
    assert not (folder / "model" / stage).exists()
    return train(cfg, stage), weights(folder, stage)


def in_one_go(folder, stage, **changes):
    changes = dict(actor_epochs=2, critic_epochs=2, steps=3) | changes
    return train(config(folder, **changes), stage), weights(folder, stage)


def without_clock(history):
    return [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in history
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_run_again_adapters_end_in_the_same_bits(course, stage, tmp_path, capsys):
    one = in_one_go(copied(course, stage, tmp_path / "one"), stage, lora_rank=4)
    two = stopped_and_resumed(copied(course, stage, tmp_path / "two"), stage, lora_rank=4)
    assert f"{stage}: resuming the interrupted run after step 1 of" in capsys.readouterr().out
    assert without_clock(one[0]) == without_clock(two[0]) and len(one[0]) > 2
    assert one[1] == two[1] and len(one[1]) == 2


def test_four_bits_need_a_gpu_and_bitsandbytes_and_say_so(tokenizer, root, tmp_path):
    if torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"):
        assert "quantization_config" in lab.models.in_4_bits(config(tmp_path, device="cuda"))
    folder = based(tmp_path / "a", "opt", tokenizer, root)
    wanted = config(folder, lora_rank=4, load_in_4bit=True)  # on the CPU, on every machine
    sentence = "load_in_4bit = True needs a GPU and the package bitsandbytes"
    with pytest.raises(CourseError, match=sentence) as told:
        train(wanted, "actor")
    assert "\n" not in str(told.value) and "set it to False" in str(told.value)
    assert not (folder / "model" / "actor").exists()
    assert lab.models.in_4_bits(config(folder)) == {}


@torch.no_grad()
def test_adapters_of_four_bits_are_added_to_whole_weights(course, tokens, tmp_path):
    """The weights are whole here and only marked as 4-bit, so the scores must stay the same."""
    cfg = config(course.root, lora_rank=4)
    tokenizer, _ = util.load_pair(cfg, "actor")
    critic = util.critic_from_actor(cfg).eval()
    for name, parameter in critic.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = util.answer_scores(critic, *tokens)
    critic.get_base_model().is_loaded_in_4bit = True
    critic.config.quantization_config = {"load_in_4bit": True}
    critic.config.reward_mean = 0.25
    lab.models.save(critic, tokenizer, tmp_path)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (util.answer_scores(whole, *tokens) - expected).abs().max() < 1e-4
    assert expected.abs().min() > 0.01 and whole.config.reward_mean == 0.25
    assert "quantization" not in (tmp_path / "config.json").read_text()


# ------------------------------------------------------------------------------------------------
# Gradient checkpointing


class Spy:
    """Records the calls of a matrix in the first layer: (length, grad enabled, half precision)."""

    def __init__(self, model):
        names = ("fc1", "mlp.c_fc", "mlp.gate_proj")
        found = [m for n, m in model.named_modules() if n.endswith(names) and ".0." in n]
        self.calls = []
        self.hook = found[0].register_forward_hook(self.note)

    def note(self, module, given, out):
        self.calls.append((out.shape[-2] if out.dim() > 2 else 0, torch.is_grad_enabled(), out))

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def noisy(family, vocabulary):
    """A model with every kind of dropout that its family has."""
    return random_model(
        family, vocabulary, **MILD[family], dropout=0.3, attention_dropout=0.3, layerdrop=0.5,
        resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
    )  # fmt: skip


def gradients(model, tokenizer, cfg):
    model.zero_grad()
    util.sft_loss(model, tokenizer, cfg, ROWS)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rank", [0, 4])
def test_recomputing_gives_the_same_gradients_with_twice_the_passes(family, tokenizer, rank):
    found, counts = [], []
    for again in (False, True):
        cfg = config(".", gradient_checkpointing=again, lora_rank=rank)
        torch.manual_seed(0)
        model = lab.models.trainable(noisy(family, len(tokenizer)), cfg, drop=False).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they start at zero, and then A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        spy = Spy(model)
        found.append(gradients(model, tokenizer, cfg))
        counts.append(len(spy.take()))
    assert counts == [1, 2]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).abs().max() < 1e-5, name
    assert all(any(g.any() for n, g in f.items() if n.endswith("weight")) for f in found)


@pytest.mark.parametrize("rank", [0, 4])
def test_recomputing_and_dropout_leave_ppo_alone(family, course, tokenizer, rank, monkeypatch):
    cfg = config(course.root, gradient_checkpointing=True, lora_rank=rank)
    torch.manual_seed(0)
    shape = noisy(family, len(tokenizer))
    policy = lab.models.trainable(copy.deepcopy(shape), cfg, drop=False)
    assert policy.training
    value = lab.models.trainable(util.load_value_model(cfg), cfg, drop=False)
    reward = lambda prompts, responses: [float(len(r)) for r in responses]  # noqa: E731
    crew = util.Crew(tokenizer, policy, None if rank else shape, reward, value)
    spy, seen, whole = Spy(policy), [], util.make_rollout

    def spied(*args, **how):
        seen.append((whole(*args, **how), spy.take()))
        return seen[-1][0]

    monkeypatch.setattr(util, "make_rollout", spied)
    (metrics,) = run_loop(crew, cfg.changed(steps=1, ppo_epochs=1), [r["prompt"] for r in ROWS])
    ((rollout, calls),) = seen
    steps = rollout.tokens[2].shape[1]
    if not rank:  # with adapters the reference calls this matrix once too
        assert len(calls) == steps
    assert not any(grad for _, grad, _ in calls), "nothing is recomputed during generation"
    assert sum(length == 1 for length, *_ in calls) == (steps - 1 if calls[0][0] else 0)
    updates = math.ceil(cfg.rollout / cfg.minibatch)
    assert len(spy.take()) == 1 + 2 * updates and policy.training  # 1: measures a row's memory
    assert metrics["ratio_error"] < 1e-4


# ------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("precision, half", HALVES)
def test_matrices_multiply_in_half_and_weights_stay_whole(family, tokenizer, precision, half):
    norms = []
    for one in ("float32", precision):
        cfg = config(".", precision=one)
        model = random_model(family, len(tokenizer), **MILD[family])
        before, spy = [p.clone() for p in model.parameters()], Spy(model)
        optimiser = util.Optimiser(cfg, [(model, 1e-4)], 4, batch=2)
        loss_of = util.partial(util.sft_loss, model, tokenizer, cfg)
        for _ in range(8):  # fp16 needs a few steps to find its loss scale
            norm = optimiser.step(ROWS, loss_of, 0)["grad_norm"]
            if math.isfinite(norm):
                break
        norms.append(norm)
        assert {call[2].dtype for call in spy.take()} == {half if one != "float32" else torch.float}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        moments = [state["exp_avg"].dtype for state in optimiser.adamw.state.values()]
        assert moments and set(moments) == {torch.float32}
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)  # gradients are unscaled first
    assert ("scaler" in optimiser.state) == (precision == "fp16")


def test_an_overflow_lowers_the_scale_and_is_no_bad_step(tokenizer, capsys):
    cfg, told = config(".", precision="fp16"), []
    model = random_model("opt", len(tokenizer), **MILD["opt"])
    before = [p.clone() for p in model.parameters()]
    optimiser = util.Optimiser(cfg, [(model, 1e-4)], 9, batch=2, say=told.append)

    def steep(rows):
        loss, count, stats = util.sft_loss(model, tokenizer, cfg, rows)
        return loss * 1e6, count, stats

    scale, scales = optimiser.scaler.get_scale(), []
    for step in range(4):
        stats = optimiser.step(ROWS, steep, step)
        scales.append(optimiser.scaler.get_scale())
        assert stats["skipped"] == 0
    assert scales == [scale / 2, scale / 4, scale / 8, scale / 16] and not told
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    kept = json.loads(json.dumps(optimiser.state))
    later = util.Optimiser(cfg, [(model, 1e-4)], 9, batch=2, say=told.append)
    later.state.update(kept)
    later.step(ROWS, util.partial(util.sft_loss, model, tokenizer, cfg), 4)
    assert later.scaler.get_scale() == scale / 16, "the scale survives a stop"
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_without_a_scale_to_lower_a_loss_that_is_no_number_counts(tokenizer):
    cfg, told = config(".", precision="fp16"), []
    model = random_model("opt", len(tokenizer), **MILD["opt"])
    optimiser = util.Optimiser(cfg, [(model, 1e-4)], 9, batch=2, say=told.append)

    def broken(rows):
        loss, count, stats = util.sft_loss(model, tokenizer, cfg, rows)
        return loss * float("nan"), count, stats

    halvings = int(math.log2(optimiser.scaler.get_scale()))
    with pytest.raises(CourseError, match="for the third time in a row"):
        for step in range(halvings + 9):
            optimiser.step(ROWS, broken, step)
    assert step == halvings + 2 and len(told) == 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision, half", HALVES)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_first_ratio_stays_within_what_half_precision_can_do(
    course, rank, precision, half, monkeypatch
):
    cfg = config(course.root, lora_rank=rank, precision=precision)
    crew = util.load_crew(cfg)
    spy, seen, whole = Spy(crew.policy), [], util.make_rollout
    rows = [row["prompt"] for row in util.load_rows(cfg, "prompt")]
    monkeypatch.setattr(
        util, "make_rollout", lambda *a, **k: seen.append(whole(*a, **k)) or seen[-1]
    )
    (metrics,) = run_loop(crew, cfg.changed(steps=1), rows)
    assert {call[2].dtype for call in spy.take()} == {half}
    assert seen[0].sampling_error < lab.checks.ROUNDING[precision] / 3
    assert metrics["ratio_error"] < lab.checks.ROUNDING[precision] / 3


def test_an_fp16_run_that_is_stopped_ends_in_the_same_bits(course, tmp_path):
    changes = dict(precision="fp16", lora_rank=4, gradient_checkpointing=True)
    one = in_one_go(copied(course, "rlhf", tmp_path / "one"), "rlhf", **changes)
    two = stopped_and_resumed(copied(course, "rlhf", tmp_path / "two"), "rlhf", **changes)
    assert without_clock(one[0]) == without_clock(two[0]) and one[1] == two[1]
