"""The process keeps memory that it frees, and pieces of an update are as large as memory allows."""

import copy
import gc
import json
import shutil
import subprocess
import sys
import weakref
from functools import partial
from itertools import accumulate

import pytest
import torch

import util
from lab import CourseError, memory, notebook
from lab.runs import Stage
from util import Config

# Prints the page faults of filling 64 MB twenty times, then the MB that `give_back` returns.
WORK = """
import gc, resource, sys
import psutil, torch
from lab import memory

if sys.argv[1] == "keep":
    memory.keep()

def held():
    return psutil.Process().memory_info().rss / 2**20

def fill():
    return torch.ones(2**24).sum().item()

fill()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
used = held()
memory.give_back()
print(used - held())
"""


def pages_and_returned(how):
    done = subprocess.run(
        [sys.executable, "-c", WORK, how], capture_output=True, text=True, check=True
    )
    return map(float, done.stdout.split())


@pytest.mark.skipif(memory.c_library("mallopt") is None, reason="another C library than glibc")
def test_the_same_block_is_not_asked_for_again_and_comes_back_on_demand():
    pages, returned = pages_and_returned("keep")
    assert returned > 60
    usual, nothing = pages_and_returned("as it comes")
    assert usual > 300_000 and nothing < 4  # without "keep" there is something to gain
    assert pages < usual / 2


def test_other_systems_have_no_such_function(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.c_library("mallopt") is None
    memory.keep()
    memory.give_back()


def test_who_trains_keeps_and_a_notebook_that_has_trained_gives_back(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "keep", lambda: calls.append("keep"))
    monkeypatch.setattr(memory, "give_back", lambda: calls.append("give back"))
    monkeypatch.setattr(notebook, "redraw", lambda *_: None)

    def steps():
        util.Optimiser(Config("smoke"), [(torch.nn.Linear(2, 2), 0.1)], 1, batch=1)
        yield {"step": 1}
        calls.append("trained")

    notebook.watch(steps(), {}, "training")
    assert calls == ["keep", "trained", "give back"]


def test_large_models_tidy_up_before_each_update_and_small_ones_lose_no_time(actor, monkeypatch):
    model, cfg, loss_of, _ = actor
    calls, optimiser = [], optimiser_of(model, cfg.changed(micro_batch=4))

    def had():
        return sum(p.nbytes for p in model.parameters() if p.grad is not None)

    monkeypatch.setattr(memory, "trim", lambda: calls.append(had()))
    optimiser.step(ROWS, loss_of, 0)
    assert not calls
    monkeypatch.setattr(memory, "LARGE", 1000)
    optimiser.step(ROWS, loss_of, 1)
    assert calls == [0], "before the update"
    calls.clear()
    assert list(optimiser.in_parts(len, ROWS, None)) == [8] and calls == [0], "before a rollout"


def test_where_two_large_models_learn_free_blocks_go_back_between_the_gradients(
    actor, tokenizer, monkeypatch
):
    model, cfg, loss_of, _ = actor
    other, calls, whole = copy.deepcopy(model), [], sum(p.nbytes for p in model.parameters())
    optimiser = util.Optimiser(cfg, [(model, 1e-3), (other, 1e-3)], 10, batch=8)

    def other_loss(rows):
        return util.sft_loss(other, tokenizer, cfg, rows)

    def had():
        parameters = (p for m in (model, other) for p in m.parameters())
        return sum(p.nbytes for p in parameters if p.grad is not None)

    monkeypatch.setattr(memory, "trim", lambda: calls.append(had()))
    monkeypatch.setattr(memory, "LARGE", 1000)
    monkeypatch.setattr(memory, "OFTEN", whole // 4)
    optimiser.step(ROWS, [loss_of, other_loss], 0)
    assert calls[:3] == [0, 0, 0], "before the update and before both passes of the first model"
    first = [x for x in calls[3:] if x < whole]
    assert first and first == sorted(set(first)) and first[0] > whole // 4
    assert calls.count(whole) >= 2 and max(calls) > whole, "the same for the second model"
    assert not any(
        p._post_accumulate_grad_hooks for p in (*model.parameters(), *other.parameters())
    )


# ---------------------------------------------------------------------------- updates in pieces

ROWS = [
    {"prompt": f"Human: {question} Assistant:", "response": answer, "chosen": "yes", "rejected": ""}
    for question, answer in (
        ("Who?", "me"), ("What is a farm?", "a place"), ("How old is it?", "three years old"),
        ("Where is the boat, and who owns it?", "I do not know"), ("Why?", "because"),
        ("Tell me all.", "all of it is far too long"), ("And now?", "no"), ("x", "y"),
    )
]  # fmt: skip


@pytest.fixture
def actor(tokenizer, make_model):
    """(model, cfg, loss function, list of the row counts of its calls)"""
    model, seen = make_model("llama", len(tokenizer), initializer_range=0.05), []
    cfg = Config("smoke", device="cpu", max_prompt=30, max_new_tokens=8)

    def loss_of(rows):
        seen.append(len(rows))
        return util.sft_loss(model, tokenizer, cfg, rows)

    return model, cfg, loss_of, seen


def kept_of(model, loss_of, rows):
    """Bytes that torch keeps for the backward pass of these rows."""
    blocks, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        blocks[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        told = loss_of(rows)
    del told
    return sum(size for where, size in blocks.items() if where not in own)


def limit_for(room, model):
    """The value of `memory` that leaves `room` bytes besides weights, gradients and moments."""
    weights = sum(p.nbytes for p in model.parameters())
    return (memory.OVERHEAD + 4 * weights + room) / 1e9


def optimiser_of(model, cfg, say=print):
    return util.Optimiser(cfg, [(model, 1e-3)], 10, batch=8, say=say)


def test_an_update_takes_as_many_rows_at_once_as_memory_allows(actor):
    model, cfg, loss_of, seen = actor
    whole = optimiser_of(model, cfg)
    whole.combine([whole.backward(ROWS, loss_of, 8)])
    expected = [p.grad.clone() for p in model.parameters()]
    most = kept_of(model, loss_of, ROWS)
    sizes = {}
    for share in (4, 0.9, 0.5, 0.01):
        said = []
        given = cfg.changed(memory=limit_for(most * share, model))
        limited = optimiser_of(model, given, said.append)
        seen.clear()
        sizes[share] = limited.update_size(ROWS, loss_of)
        assert seen == [1], "one row is enough to know"
        limited.combine([limited.backward(ROWS, loss_of, sizes[share])])
        pieces = [kept_of(model, loss_of, part) for part in util.chunks(ROWS, sizes[share])]
        assert max(pieces) <= most * share or sizes[share] == 1
        for parameter, one in zip(model.parameters(), expected):
            assert torch.allclose(parameter.grad, one, rtol=1e-4, atol=1e-6)
        assert ("too little" in " ".join(said)) == (share == 0.01)
    assert sizes[4] == 8 > sizes[0.9] > sizes[0.5] >= sizes[0.01] == 1


def test_two_models_that_learn_need_the_memory_of_one_graph(actor):
    model, cfg, loss_of, _ = actor
    weights = sum(p.nbytes for p in model.parameters())
    once, row = memory.of_update(lambda: loss_of(ROWS[5:6]), [model])  # the longest row
    limit = limit_for(once + 8.5 * row + 4 * weights, model)
    other, ready = copy.deepcopy(model), []

    def later(rows):
        if len(rows) > 1:
            ready.append([p.grad is not None for p in model.parameters()])
        return loss_of(rows)

    rates = [(model, 1e-3), (other, 1e-3)]
    optimiser = util.Optimiser(cfg.changed(memory=limit), rates, 10, batch=8)
    assert optimiser.update_size(ROWS, [loss_of, later]) == 8
    optimiser.step(ROWS, [loss_of, later], 0)
    assert ready and all(map(all, ready)), "the first graph is used up before the second begins"


def test_the_first_pass_of_a_model_is_measured_like_all_others(tokenizer, make_model):
    """The first pass compares the fast path with the model's own forward, which saves tensors."""
    model = make_model("opt", len(tokenizer))
    cfg = Config("smoke", device="cpu", max_prompt=30, max_new_tokens=8)

    def needed():
        return memory.of_update(lambda: util.sft_loss(model, tokenizer, cfg, ROWS[:1]), [model])

    first = needed()
    assert first[1] == pytest.approx(needed()[1], rel=0.1)


def peak_of(work):
    """The most bytes of tensors that work() holds at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    return max(accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))


def test_a_batch_stays_whole_where_its_gradients_leave_room_for_it(tokenizer, make_model):
    """Beside pieces there are all gradients; beside one piece they come as its graph goes."""
    wide = dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024)
    model = make_model("opt", len(tokenizer), **wide)
    cfg = Config("smoke", device="cpu", max_prompt=30, max_new_tokens=8)

    def loss_of(rows):
        return util.sft_loss(model, tokenizer, cfg, rows)

    longest = max(ROWS, key=util.text_length)
    loss_of([longest])  # the first pass of a model also tests its fast path
    once, row = memory.of_update(lambda: loss_of([longest]), [model])
    sizes = [p.nbytes for p in model.parameters()]
    enough = once + 8 * row + max(sizes) - sum(sizes)
    assert row < enough < 4 * row, "without its gradients it would be cut"
    for room in (enough + row, enough - row):
        optimiser = optimiser_of(model, cfg.changed(memory=limit_for(room, model)))
        size = optimiser.update_size(ROWS, loss_of)
        assert size == 8 if room > enough else size <= 2
    optimiser = optimiser_of(model, cfg.changed(memory=limit_for(enough + row, model)))
    optimiser.room()
    optimiser.state["micro_batch"] = 4  # memory had run out
    assert optimiser.update_size(ROWS, loss_of) <= 4
    peaks = {}
    for size in (8, 4):
        optimiser.adamw.zero_grad()
        peaks[size] = peak_of(partial(optimiser.backward, ROWS, loss_of, size))
    assert peaks[8] < enough + sum(sizes) and peaks[8] < peaks[4]


def test_the_second_graph_stands_beside_the_gradients_of_the_first_model(monkeypatch):
    policy, values = (torch.nn.Linear(100, 100, bias=False) for _ in range(2))  # 40 kB each
    rates = [(policy, 0.1), (values, 0.1)]
    optimiser = util.Optimiser(Config("smoke"), rates, 1, batch=8)
    monkeypatch.setattr(optimiser, "room", lambda: 20_000)
    assert optimiser.fits_whole([(0, 7_000), (0, 2_000)], 8)  # 40 + 56 and 40 + 40 + 16 of 100 kB
    assert not optimiser.fits_whole([(0, 2_000), (0, 7_000)], 8)  # 40 + 40 + 56
    assert not optimiser.fits_whole([(5_000, 7_000), (0, 2_000)], 8)
    assert optimiser.fits_whole([(0, 7_000)], 8)  # one loss for both
    assert not optimiser.fits_whole([(14_000, 7_000)], 1), "at the end: 80 + 21"


def test_measuring_leaves_no_trace(actor):
    model, cfg, loss_of, _ = actor
    luck = torch.get_rng_state()

    def dropping(rows):
        loss, *more = loss_of(rows)
        return loss * torch.nn.functional.dropout(torch.ones(())), *more

    optimiser_of(model, cfg).update_size(ROWS, dropping)
    assert torch.equal(torch.get_rng_state(), luck)
    assert all(p.grad is None for p in model.parameters())


def test_measuring_holds_no_memory_afterwards(actor):
    model, cfg, loss_of, _ = actor
    alive = []

    class Passes(torch.autograd.Function):
        """Shows through a weak reference how long torch keeps the graph for the backward pass."""

        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def marked(rows):
        loss, *more = loss_of(rows)
        return Passes.apply(loss).exp(), *more

    optimiser_of(model, cfg).update_size(ROWS, marked)
    gc.collect()
    assert [ref() for ref in alive] == [None]


def test_a_longer_row_is_measured_when_it_comes(actor):
    model, cfg, loss_of, seen = actor
    room = 6 * kept_of(model, loss_of, ROWS[5:6])
    optimiser = optimiser_of(model, cfg.changed(memory=limit_for(room, model)))
    short, long = ROWS[-1:] * 8, [ROWS[5]] * 8
    first = optimiser.update_size(short, loss_of)
    seen.clear()
    assert optimiser.update_size(short, loss_of) == first and not seen
    later = optimiser.update_size(long, loss_of)
    assert seen == [1] and later < first
    assert optimiser.update_size(short, loss_of) == later, "a run does not forget"


def test_micro_batch_is_what_was_given(actor):
    model, cfg, loss_of, seen = actor
    optimiser_of(model, cfg.changed(micro_batch=3, memory=0.1)).step(ROWS, loss_of, 0)
    assert seen == [3, 3, 2]


def test_on_a_cpu_a_piece_is_no_larger_than_keeps_it_busy(actor, monkeypatch):
    model, cfg, loss_of, _ = actor
    assert optimiser_of(model, cfg).update_size(ROWS, loss_of) == 8
    cores = max(2, torch.get_num_threads())
    monkeypatch.setattr(memory, "BUSY", kept_of(model, loss_of, ROWS) / 2 / cores)
    assert optimiser_of(model, cfg).update_size(ROWS, loss_of) == 8, "a laptop has room for it"
    monkeypatch.setattr(memory, "LAPTOP", 0)
    assert optimiser_of(model, cfg).update_size(ROWS, loss_of) < 8


def test_what_is_free_bounds_an_update_where_no_limit_is_given(actor, monkeypatch):
    model, cfg, loss_of, _ = actor
    coming = 3 * sum(p.nbytes for p in model.parameters())  # memory for gradients and moments
    half = kept_of(model, loss_of, ROWS) / 2
    monkeypatch.setattr(memory, "free", lambda device: (coming + half) / 0.6)
    assert optimiser_of(model, cfg).update_size(ROWS, loss_of) < 8


def test_copies_in_half_precision_count_once(actor):
    model, cfg, loss_of, _ = actor
    with torch.autocast("cpu", torch.bfloat16):
        once, row = memory.of_update(lambda: loss_of(ROWS[:1]), [model])
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0.5 * matrices <= once <= 2.2 * matrices
    assert memory.of_update(lambda: loss_of(ROWS[:1]), [model])[0] < 0.1 * once
    assert row > 0


def test_answers_and_scores_too_go_as_many_at_once_as_fit(text_model, tokenizer):
    cfg = Config("smoke", device="cpu", max_prompt=30, max_new_tokens=8, eval_batch=8)
    row = memory.of_reading(text_model, 38)
    weights = sum(p.nbytes for p in text_model.parameters())
    limit = (memory.OVERHEAD + weights + 3 * row) / 1e9
    texts, sizes = [], []
    for given in (0.0, limit):
        cfg, luck = cfg.changed(memory=given), util.rng_for(cfg, "test")
        prompts = [row["prompt"] for row in ROWS]
        parts = list(util.generate_answers(text_model, tokenizer, prompts, cfg, luck))
        sizes.append([len(part[0]) for part in parts])
        texts.append([text for part in parts for text in util.decode(tokenizer, *part[2:])])
    assert sizes == [[8], [2, 2, 2, 2]]
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------ whole stages


@pytest.fixture(scope="module")
def course(tmp_path_factory, root):
    """A folder with a trained base and actor."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "dataset").symlink_to(root / "dataset")
    for train in (util.train_base, util.train_actor):
        list(train(Config("smoke", root=str(folder))))
    return folder


@pytest.fixture
def begin(course, tmp_path):
    def make(name):
        shutil.copytree(course, tmp_path / name, symlinks=True)
        return tmp_path / name

    return make


def result(folder, stage):
    """The weights, and the metrics without times and memory."""
    model = folder / "model" / stage
    rows = map(json.loads, (model / "metrics.jsonl").read_text().splitlines())
    figures = [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows
    ]
    return (model / "model.safetensors").read_bytes(), figures


def test_a_run_with_little_memory_goes_on_with_the_same_bits(begin, monkeypatch):
    asked, sizes = dict(memory=0.6, actor_batch=8, checkpoint_minutes=0), []
    whole = util.Optimiser.backward

    def gradient(self, rows, loss_of, size, spare):
        sizes.append(size)
        return whole(self, rows, loss_of, size, spare)

    monkeypatch.setattr(util.Optimiser, "backward", gradient)
    one, other = begin("one"), begin("other")
    list(util.train_actor(Config("smoke", root=str(one), **asked)))
    assert set(sizes) == {1}
    run = util.train_actor(Config("smoke", root=str(other), **asked))
    for _ in range(3):
        next(run)
    run.close()
    list(util.train_actor(Config("smoke", root=str(other), **asked)))
    assert result(one, "actor") == result(other, "actor")


@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_critic_whose_scale_fails_is_not_trained_again(begin, ensemble, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    one, other = begin("one"), begin("other")
    given = dict(ensemble=ensemble, norm_prompts=2)
    list(util.train_critic(Config("smoke", root=str(one), **given)))
    cfg = Config("smoke", root=str(other), **given)
    with monkeypatch.context() as patch:
        patch.setattr(util, "generate", no_memory)
        with pytest.raises(CourseError, match="model/critic was not written. Memory ran out"):
            list(util.train_critic(cfg))
    steps = []
    monkeypatch.setattr(util.Optimiser, "step", lambda *_: steps.append(1))
    history = list(util.train_critic(cfg))
    assert not steps and [row["step"] for row in history] == list(range(1, len(history) + 1))
    assert result(one, "critic") == result(other, "critic")
    records = [json.loads((f / "model/critic/stage.json").read_text()) for f in (one, other)]
    assert records[0]["metrics"] == records[1]["metrics"]


def test_metrics_know_the_memory_of_a_gpu_and_none_without(tmp_path, monkeypatch):
    with Stage(tmp_path, "base", {}) as stage:
        assert "peak_device_mb" not in stage.log({"step": 1})
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i=0: (i + 1) * 2**30)
        metrics = stage.log({"step": 2})
        assert metrics["peak_device_mb"] == 2048 and metrics["peak_memory_mb"] > 1
