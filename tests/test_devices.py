"""Trains on every device of this machine (CPU and GPU, if any), one after the other."""

import importlib.util
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import util
from bench import common, gpu
from lab import decoding, memory, models
from tests.conftest import random_model

pytestmark = pytest.mark.gpu

GPUS = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = [*GPUS, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
FIGURES = "loss", "kl", "reward", "grad_norm"
WORDS = "apple bread cloud dream eagle flute grape horse island jewel".split()


@pytest.fixture
def course(tokenizer, write_rows, tmp_path):
    """A small course with a base model; returns a function that makes its config for a device."""
    rows = [
        {"prompt": f"What is {a} {b}?", "response": f"A {a}.", "chosen": f"It is {b}.",
         "rejected": f"No {a}."}
        for a in WORDS for b in WORDS
    ]  # fmt: skip
    write_rows(rows)
    base = tmp_path / "mine"
    models.save(random_model("llama", len(tokenizer), initializer_range=0.1), tokenizer, base)

    def config(device, **changes):
        small = dict(
            root=str(tmp_path), base_model=str(base), fallback=False, device=device, steps=2,
            rollout=8, minibatch=8, max_new_tokens=8, validation_rows=8, norm_prompts=4,
            sft_share=0.4, preference_share=0.4, prompt_share=0.2, warmup=0.0,
        )  # fmt: skip
        return util.Config("smoke", **small | changes)

    list(util.train_base(config("cpu")))
    return config


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "dpo"])
def test_all_devices_take_turns_in_one_process_and_agree(course, algorithm, monkeypatch):
    """The CPU runs first and last, and a GPU learns the same as the CPU."""
    made = []
    whole = util.Optimiser.__init__

    def noted(self, *args, **more):
        whole(self, *args, **more)
        made.append({str(p.device) for model in self.models for p in model.parameters()})

    monkeypatch.setattr(util.Optimiser, "__init__", noted)
    found = {}
    for device in ("cpu", *DEVICES):
        cfg, where = course(device, algorithm=algorithm), str(torch.device(device))
        history = [list(train(cfg)) for train in (util.train_actor, util.train_critic)]
        history.append(list(util.train_rlhf(cfg)))
        assert [devices for devices in made if devices != {where}] == [], where
        made.clear()
        found[device] = losses(history[0]), losses(history[1])
        assert all(math.isfinite(x) for x in losses(history[2]))
    for device, (actor, critic) in found.items():
        assert actor == pytest.approx(found["cpu"][0], abs=2e-3), device
        assert critic == pytest.approx(found["cpu"][1], abs=2e-3), device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_ppo_in_every_precision_on_every_device(course, device, precision, rank):
    cfg = course(device, precision=precision, lora_rank=rank)
    for train in (util.train_actor, util.train_critic):
        list(train(cfg))
    history = list(util.train_rlhf(cfg))
    assert all(math.isfinite(step["loss"]) for step in history)
    assert abs(history[0]["kl"]) < 0.05, "policy and reference are still the same"


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_and_scoring_agree_on_every_device(tokenizer, device):
    model = random_model("llama", len(tokenizer), initializer_range=0.1).to(device)
    cfg = util.Config("smoke", device=device)
    prompts = [f"Human: {a} {b}? Assistant:" for a in WORDS for b in WORDS[:3]]
    tokens = util.encode_prompts(tokenizer, prompts, cfg, model.device)
    how = util.sampling(cfg, model, tokenizer)
    ids, mask, sampled = util.generate(model, *tokens, **how, generator=util.rng_for(cfg, "x"))
    with torch.no_grad():
        scored, _ = util.response_logprobs(model, *tokens, ids, mask)
    assert torch.allclose(scored, sampled, atol=1e-3)
    home = random_model("llama", len(tokenizer), initializer_range=0.1)
    there = util.encode_prompts(tokenizer, prompts, cfg, "cpu")
    expected = util.generate(home, *there, **how, generator=util.rng_for(cfg, "x"))[0]
    same = (ids[:, : expected.shape[1]].cpu() == expected[:, : ids.shape[1]]).float().mean()
    assert same > 0.95, "the same random numbers choose the same tokens"


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_how_often_finished_rows_leave(
    tokenizer, monkeypatch, family, temperature
):
    """A GPU is asked every eight tokens who has finished, the CPU at every token."""
    model = random_model(family, len(tokenizer), initializer_range=0.1)
    cfg = util.Config("smoke", max_new_tokens=21)
    prompts = [f"Human: {a} {b}? Assistant:" for a in WORDS[:4] for b in WORDS]
    tokens = util.encode_prompts(tokenizer, prompts, cfg, "cpu")
    how = util.sampling(cfg, model, tokenizer, temperature)
    how["eos_token_id"] = [*range(1, len(tokenizer), 8)]
    found, steps, step, rows = [], [], decoding.CachedDecoder.next, []

    def counted(self, token):
        rows.append(len(token))
        return step(self, token)

    monkeypatch.setattr(decoding.CachedDecoder, "next", counted)
    for every in (1, 8, 100):
        monkeypatch.setitem(decoding.ASK_EVERY, "cpu", every)
        found.append(util.generate(model, *tokens, **how, generator=util.rng_for(cfg, "x")))
        steps.append(sum(rows))
        rows.clear()
    for ids, mask, logprobs in found[1:]:
        assert torch.equal(ids, found[0][0]) and torch.equal(mask, found[0][1])
        assert torch.allclose(logprobs, found[0][2], atol=1e-5)
    assert steps[0] < steps[1] < steps[2], "rows end at different tokens, so waiting takes longer"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen2"])
def test_a_recorded_step_gives_the_same_answers(tokenizer, monkeypatch, family, device):
    """A GPU records the kernels of a token; the CPU runs the same step again, unrecorded."""
    cfg = util.Config("smoke", device=device, max_new_tokens=21)
    model = random_model(family, len(tokenizer), initializer_range=0.1).to(device)
    prompts = [f"Human: {a} {b}? Assistant:" for a in WORDS[:4] for b in WORDS]
    prompts += ["Human: Why? Assistant:"]  # unequal lengths
    tokens = util.encode_prompts(tokenizer, prompts, cfg, model.device)
    how = util.sampling(cfg, model, tokenizer) | {"eos_token_id": [*range(1, len(tokenizer), 8)]}
    found, record, recorded = [], decoding.RECORDERS.get("cuda"), []

    def noted(step, token):
        recorded.append(len(token))
        return record(step, token) if token.is_cuda else step

    for recorders in ({torch.device(device).type: noted}, {}):
        monkeypatch.setattr(decoding, "RECORDERS", recorders)
        found.append(util.generate(model, *tokens, **how, generator=util.rng_for(cfg, "x")))
    assert recorded[0] == 2, "the comparison with the plain path"
    assert recorded[1] == len(prompts) and recorded[-1] < len(prompts), "rows have left the batch"
    (ids, mask, logprobs), (others, other_mask, expected) = found
    assert torch.equal(ids, others) and torch.equal(mask, other_mask)
    assert torch.allclose(logprobs, expected, atol=1e-4)


def test_the_error_of_a_step_is_not_hidden_by_its_recording(monkeypatch):
    """Out of memory must stay what it is, so that the batch is halved."""

    class Graph:
        def capture_begin(self, **_):
            pass

        def capture_end(self):
            raise RuntimeError("capture failed")

    def step(token):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(decoding, "side_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    with pytest.raises(torch.OutOfMemoryError):
        decoding.record(step, torch.zeros(1))


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_recorded_steps_neither_wait_nor_keep_memory(tokenizer):
    cfg = util.Config("smoke", device=GPUS[0], max_new_tokens=7)
    model = random_model("llama", len(tokenizer)).to(GPUS[0])
    tokens = util.encode_prompts(tokenizer, ["Human: Why? Assistant:"] * 4, cfg, model.device)
    how = util.sampling(cfg, model, tokenizer) | {"eos_token_id": None}
    util.generate(model, *tokens, **how)
    before, waits = torch.cuda.memory_allocated(), []
    real = decoding.CachedDecoder.next

    def watched(self, token):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, token)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(self.launch is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.CachedDecoder, "next", watched)
        util.generate(model, *tokens, **how)
    assert waits == [True] * 6
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache_has_the_precision_of_the_products(tokenizer, device):
    prompts = [f"Human: {a}? Assistant:" for a in WORDS]
    for family in ("opt", "llama", "qwen2"):
        model = random_model(family, len(tokenizer)).to(device)
        cfg = util.Config("smoke", device=device, precision="bf16")
        tokens = util.encode_prompts(tokenizer, prompts, cfg, model.device)
        with torch.no_grad(), models.eval_mode(model), models.autocast(cfg, model):
            reader, _ = decoding.start_decoding(model, *tokens, 4)
            reader.next(tokens[0][:, -1])
        assert {x.dtype for x in (*reader.keys, *reader.values)} == {torch.bfloat16}, family


@pytest.mark.parametrize("device", DEVICES)
def test_a_stopped_training_goes_on_with_the_same_numbers_on_every_device(
    course, device, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cfg, made, sample = course(device, steps=3, checkpoint_minutes=0), [], util.make_rollout
    for train in (util.train_actor, util.train_critic):
        list(train(cfg))
    monkeypatch.setattr(util, "make_rollout", lambda *a, **k: made.append(1) or sample(*a, **k))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = list(util.train_rlhf(cfg))
        stopped = util.train_rlhf(cfg)
        next(stopped), next(stopped)
        stopped.close()
        resumed = list(util.train_rlhf(cfg))
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(made) == 3 + 2 + 2, "the second step saved the checkpoint of the first"
    told, expected = ([[s[x] for x in FIGURES] for s in h[-1:]] for h in (resumed, whole))
    assert told == expected


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_rows_are_halved_when_a_gpu_is_really_full():
    total, state, tried = torch.cuda.get_device_properties(0).total_memory, {"rows": 64}, []

    def work(size):  # 64 MB a row
        tried.append(size)
        return torch.ones(size, 2**24, device="cuda").sum().item()

    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        found = memory.halving(work, state, "rows", print, None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == tried[-1] * 2**24 and 1 <= state["rows"] == tried[-1] < 64


@pytest.mark.skipif(
    not GPUS or not importlib.util.find_spec("bitsandbytes"), reason="needs a GPU and bitsandbytes"
)
def test_ppo_with_weights_in_4_bits(course):
    cfg = course(GPUS[0], lora_rank=4, load_in_4bit=True)
    for train in (util.train_actor, util.train_critic):
        list(train(cfg))
    assert all(math.isfinite(step["loss"]) for step in util.train_rlhf(cfg))


# ------------------------------------------------------------------------------------------------
# make gpu


def test_the_measurements_of_make_gpu(tmp_path, monkeypatch):
    """The same tables on the CPU, with a model that takes a second."""
    small = {"small": lambda: common.opt_config("tiny", hidden_size=32, num_hidden_layers=1)}
    monkeypatch.setattr(gpu, "ANSWER", 6)
    report = common.Report(tmp_path / "gpu.json")
    gpu.measure(torch.device("cpu"), report, small, 4, (2, 4), rounds=1, size=256)
    titles = [title.split(" on ")[0] for title in report.tables if title != "machine"]
    assert [t.split(",")[0] for t in titles] == [
        "Rates of cpu", "Generation of 6 tokens", "PPO iteration"
    ]  # fmt: skip
    rows = next(x for title, x in report.tables.items() if title.startswith("PPO"))
    phases = [(n, phase) for n in (2, 4) for phase in ("generate", "score", "update")]
    assert [(row["minibatch"], row["phase"]) for row in rows] == phases
    assert all(0 < share < 1 for row in rows for share in row["share of the matmul rate"])
    assert "| small" in report.text and (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("shape", gpu.SHAPES)
def test_the_benchmarks_count_the_matrices_of_a_layer(shape):
    config = gpu.SHAPES[shape]()
    config.num_hidden_layers = 1
    model = gpu.model_of(gpu.AutoModelForCausalLM, config, "meta")
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    found = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert common.layer_weights(config) == found


def test_make_gpu_says_so_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(models, "find_device", lambda name: SimpleNamespace(type="cpu"))
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no GPU" in capsys.readouterr().out
