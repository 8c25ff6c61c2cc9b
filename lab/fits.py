"""python -m lab fits: how much memory and time each stage takes, from the config of a model alone.

Nothing is downloaded but the config, and no weight is loaded: the update of a stage runs on tensors
without values (see lab/dry_run.py), with two and with three layers of the model. Everything that is
counted grows by the same amount for each further layer.
"""

import copy
import math
import re
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lab import decoding, dry_run, memory, models
from lab.config import MODEL
from lab.sharding import layers, unwrapped

QWEN = dict(model_type="qwen2", vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True)
SHAPES = {  # well-known models, so that nobody has to ask the hub
    "opt-125m": dict(
        model_type="opt", vocab_size=50272, hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072,
        num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=2048,
    ),
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": QWEN | dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    ),
    "qwen2.5-1.5b": QWEN | dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    ),
    "qwen2.5-3b": QWEN | dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    ),
    "qwen2.5-7b": QWEN | dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
USED = 0.4  # the share of the peak of matrix products that an update is assumed to reach
LAYERS = 2, 3  # layers of the models that run: the last one is special, and one or two others

# --------------------------------------------------------------------------------------------------
# The model and the machine


def shape_of(name, cfg):
    """The config of a model: `tiny`, a folder, a well-known name, or a name on the hub."""
    if name == "tiny":
        return AutoConfig.for_model(
            "opt", vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, dropout=0.0,
            word_embed_proj_dim=cfg.hidden_size, ffn_dim=4 * cfg.hidden_size,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
            max_position_embeddings=cfg.pretrain_length,
        )  # fmt: skip
    known = SHAPES.get(name.rpartition("/")[2].lower().removesuffix("-instruct"))
    if known and not Path(name).exists():
        return AutoConfig.for_model(**known)
    return models.shape_of(name, cfg)


@dataclass
class Machine:
    """What a stage runs on."""

    name: str
    room: float | None  # bytes; None: there is no verdict
    flops: float  # matrix products, operations a second
    bandwidth: float  # of its memory, bytes a second
    precision: str
    gpu: bool = True


# GB: name, FLOP/s of dense products in half precision and in float32, bytes/s, half precision
CARDS = {
    16: ("T4", 65e12, 8.1e12, 320e9, "fp16"),
    24: ("A10", 125e12, 31e12, 600e9, "bf16"),
    40: ("A100", 312e12, 19.5e12, 1555e9, "bf16"),
    80: ("A100", 312e12, 19.5e12, 2039e9, "bf16"),
}


def machine_of(cfg, gpu=None):
    """A card with `gpu` GB, else the GPU of this machine, else its processor."""
    if gpu:
        size = max([x for x in CARDS if x <= gpu], default=min(CARDS))
        name, half, single, bandwidth, precision = CARDS[size]
        precision = precision if cfg.precision == "auto" else cfg.precision
        flops = single if precision == "float32" else half
        return Machine(name, gpu * 1e9, flops, bandwidth, precision)
    device, precision = models.pick_device(cfg), models.precision(cfg)
    flops, bandwidth = measured(device, models.HALF.get(precision, torch.float32))
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        room = torch.cuda.mem_get_info(device)[1]
        return Machine(card.name, room, flops, bandwidth, precision)
    return Machine("this machine's processor", None, flops, bandwidth, precision, gpu=False)


def measured(device, dtype, size=None):
    """The rates of this machine: operations a second of matrix products, bytes a second."""
    size = size or (1024 if device.type == "cpu" else 8192)
    x = torch.randn(size, size, device=device, dtype=dtype)  # a GPU multiplies ones faster
    y = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)  # more than its cache
    products, reads = (
        min(seconds(work, device) for _ in range(3)) for work in (lambda: x @ x, y.sum)
    )
    return 2 * size**3 / products, y.nbytes / reads


def seconds(work, device):
    """The seconds that work() takes until the device has done all of it."""
    wait = getattr(getattr(torch, device.type), "synchronize", lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# The stages


def causal(shape, cfg, packed=False):
    return built(AutoModelForCausalLM, shape, cfg, packed)


def scorer(shape, cfg, packed=False):
    shape = copy.deepcopy(shape)
    shape.num_labels = 1
    return built(AutoModelForSequenceClassification, shape, cfg, packed)


def built(kind, shape, cfg, packed):
    with dry_run.META:
        model = kind.from_config(shape, dtype=torch.float32).eval()
    if not packed:
        return model
    return dry_run.in_4_bits(model, models.HALF.get(models.precision(cfg), torch.float32))


def rows_of(count):
    return [dict(prompt=i, response=0, chosen=0, rejected=1) for i in range(count)]


def token_tensors(cfg, prompts, answers):
    """The four token tensors of rows as long as they may be; prompts and answers are numbers. Equal
    prompts have equal tokens, which the fast path computes once."""
    P, R = cfg.max_prompt, cfg.max_new_tokens
    prompt, answer = (torch.tensor(x)[:, None] for x in (prompts, answers))
    ids = prompt.repeat(1, P), answer.repeat(1, R)
    masks = [torch.ones_like(x, dtype=torch.bool) for x in ids]
    return ids[0], masks[0], ids[1], masks[1]


class Rollout:
    """Stands for util.Rollout: answers without values."""

    def __init__(self, cfg):
        self.cfg, self.kl_coef = cfg, cfg.kl_coef

    def minibatch(self, rows, device):
        tokens = token_tensors(self.cfg, [i // self.cfg.answers for i in rows], rows)
        names = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        return tokens, dict.fromkeys(names, torch.zeros(tokens[3].shape))


@dataclass
class Stage:
    """What a stage holds, and its update."""

    batch: int  # rows of an update
    learning: list  # models that learn
    frozen: list  # models that only read
    losses: list = ()  # one for each backward pass: loss(number of rows) -> tensor
    resting: list = ()  # models that learn, but not in this update
    updates: float = 0  # updates of `batch` rows in a step
    writes: object = None  # the model that generates, if there is one
    answers: int = 0  # answers that it generates in a step
    scores: list = ()  # models that read the answers


def actor(course, cfg, shape):
    model = models.trainable(causal(shape, cfg, cfg.load_in_4bit), cfg).train()

    def loss(count):
        return course.sft_loss(model, None, cfg, rows_of(count))[0]

    return Stage(cfg.actor_batch, [model], [], [loss], updates=1)


def critic(course, cfg, shape):
    def one():
        return models.trainable(scorer(shape, cfg, cfg.load_in_4bit), cfg).train()

    members = [one() for _ in range(cfg.ensemble)]
    resting = [one()] if cfg.watchdog else []

    def loss(count):
        pairs = [[row] * cfg.ensemble for row in rows_of(count)]
        return course.critic_loss(members, None, cfg, pairs)[0]

    return Stage(cfg.critic_batch, members, [], [loss], resting, updates=1)


def rewards(course, cfg, shape):
    """The reward models that 3_rlhf and 4_test load."""
    count = cfg.ensemble if re.search(MODEL, cfg.reward) else 0
    count += bool(cfg.watchdog and "critic" in cfg.starts_from())
    return [models.frozen(scorer(shape, cfg), cfg) for _ in range(count)]


def crew_of(course, cfg, shape, values):
    """The models that load_crew loads, without rewards."""

    def learner(kind):
        return models.trainable(kind(shape, cfg, cfg.load_in_4bit), cfg, drop=False)

    reference = None if cfg.lora_rank else models.frozen(causal(shape, cfg), cfg)
    crew = course.Crew(None, learner(causal), reference, None)
    crew.value_model = learner(scorer) if values else None
    return crew


def rlhf(course, cfg, shape):
    """PPO, GRPO and RLOO."""
    crew = crew_of(course, cfg, shape, values=cfg.algorithm == "ppo")
    one, critics = Rollout(cfg), rewards(course, cfg, shape)
    every = torch.randperm(cfg.rollout, generator=torch.Generator().manual_seed(0)).tolist()
    losses = course.losses_of(crew, one, cfg, course.LOSSES[cfg.algorithm])
    losses = [lambda count, loss=loss: loss(every[:count])[0] for loss in losses]
    learning = [model for model in (crew.policy, crew.value_model) if model is not None]
    readers = [crew.policy] * (models.precision(cfg) != "float32")  # see make_rollout
    readers += [*filter(None, [crew.reference or crew.policy, crew.value_model]), *critics]
    return Stage(
        cfg.minibatch, learning, [*filter(None, [crew.reference]), *critics], losses,
        writes=crew.policy, answers=cfg.rollout, scores=readers,
        updates=cfg.ppo_epochs * cfg.rollout / cfg.minibatch,
    )  # fmt: skip


def dpo(course, cfg, shape):
    crew = crew_of(course, cfg, shape, values=False)

    def loss(count):
        pairs = course.pair_logprobs(crew.policy, None, rows_of(count), cfg)
        loss, _ = course.dpo_loss(*pairs[:2], 0, 0, beta=cfg.dpo_beta)
        return loss + cfg.dpo_nll * pairs[2]

    frozen = [*filter(None, [crew.reference])]
    return Stage(cfg.dpo_batch, [crew.policy], frozen, [loss], updates=1)


def test(course, cfg, shape):
    """Each model of 4_test beside the actor and the reward models."""
    both = causal(shape, cfg), causal(shape, cfg)
    frozen = [*both, *rewards(course, cfg, shape)]
    return Stage(0, [], frozen, writes=both[0], answers=min(cfg.eval_batch, cfg.test_rows))


STAGES = {  # name: (its function, the parameters that it sets)
    "1_actor SFT": (actor, {}),
    "2_critic": (critic, {}),
    "3_rlhf PPO": (rlhf, {"algorithm": "ppo"}),
    "3_rlhf GRPO, RLOO": (rlhf, {"algorithm": "grpo"}),
    "3_rlhf DPO": (dpo, {"algorithm": "dpo"}),
    "4_test": (test, {}),
}


# --------------------------------------------------------------------------------------------------
# Counting


def clone(shape, layers):
    """The config of the same model with fewer layers."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shape


def size(parameters):
    return sum(p.nbytes for p in {id(p): p for p in parameters}.values())


def trainable(learners):
    return [p for model in learners for p in model.parameters() if p.requires_grad]


def weights(stage, cfg):
    """The bytes of a stage that do not depend on its rows."""
    learning = [*stage.learning, *stage.resting]
    each = [size(layer.parameters()) for model in learning for layer in layers(model)]
    return {
        "weights": size(p for model in (*learning, *stage.frozen) for p in model.parameters()),
        "gathered": sum(map(size, map(outside, stage.learning))) + 2 * max(each, default=0),
        "moments": 2 * size(trainable(learning)),
        "gradients": size(trainable(stage.learning)),
        "scoring": scoring(stage, cfg),
        "writes": size(stage.writes.parameters()) if stage.writes is not None else 0,
    }


def outside(model):
    """The weights outside the layers: embeddings, norm and head."""
    inside = {id(p) for layer in layers(model) for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def update(stage, rows, several, watch, autocast):
    """The peaks of an update of `rows` rows, besides weights and moments. `several`: there were
    rows before, whose gradients exist already."""
    if several:
        for p in trainable(stage.learning):
            p.grad = torch.empty_like(p)
    for i, model in enumerate(stage.learning):
        for n, layer in enumerate(own := layers(model)):
            where = "first" if n == 0 else "last" if layer is own[-1] else "middle"
            for p in trainable([layer]):
                p.register_post_accumulate_grad_hook(partial(enter, watch, f"{i} {where}"))
    for i, loss_of in enumerate(stage.losses):
        watch.phase = f"{i} forward"
        autocast.enter()
        loss = loss_of(rows)
        autocast.leave()
        loss.backward()
        del loss
    return {f"peak {phase}": x for phase, x in watch.peaks.items()} | {"flops": watch.flops}


def enter(watch, phase, _):
    watch.phase = phase


@torch.no_grad()
def reading(stage, cfg, rows, watch):
    """The peak while `rows` answers are generated, and the operations."""
    tokens = token_tensors(cfg, range(rows), range(rows))
    with models.eval_mode(stage.writes) as model:
        reader, _ = decoding.start_decoding(model, *tokens[:2], cfg.max_new_tokens)
        prompt_flops = watch.flops
        reader.next(tokens[2][:, 0])
    peak = max(watch.peaks.values())
    return {"peak": peak, "prompt": prompt_flops, "token": watch.flops - prompt_flops}


def scoring(stage, cfg):
    """Operations of reading one answer with every model: two for each weight and token."""
    total = 0
    for model in map(unwrapped, stage.scores):
        embedding = model.get_input_embeddings().weight.numel()
        body = sum(p.numel() for p in model.parameters()) - embedding
        head = embedding if hasattr(model, "lm_head") else 0
        total += 2 * body * (cfg.max_prompt + cfg.max_new_tokens) + 2 * head * cfg.max_new_tokens
    return total


def grown(one, two, more):
    """The counts of a model with `more` layers than `two` has; `one` has one layer less."""
    slopes = {name: x - one[name] for name, x in two.items() if name in one}
    steepest = max((x for name, x in slopes.items() if "peak" in name), default=0)
    return {name: x + more * slopes.get(name, steepest) for name, x in two.items()}


class Counter:
    """Counts for one stage, with one set of parameters."""

    def __init__(self, course, function, cfg, shape, machine):
        self.course, self.function, self.machine = course, function, machine
        self.given = course, function, cfg, shape, machine
        self.cfg = cfg.changed(precision=machine.precision if machine.gpu else "float32")
        self.shape, self.known = shape, {}

    @cached_property
    def stage(self):
        """For its numbers."""
        return self.function(self.course, self.cfg, clone(self.shape, 1))

    def changed(self, change):
        """A Counter with other parameters, which do not change what generating needs."""
        course, function, cfg, *more = self.given
        new = Counter(course, function, cfg.changed(**change), *more)
        new.known |= {key: x for key, x in self.known.items() if key[0] == "reading"}
        return new

    def count(self, what, rows=0, several=False):
        """{name: number} for the whole model."""
        key = what, rows, several
        if key not in self.known:
            whole = self.shape.get_text_config().num_hidden_layers
            few = LAYERS if whole > LAYERS[1] else [whole]
            *one, found = [self.run(what, clone(self.shape, n), rows, several) for n in few]
            self.known[key] = grown(one[0], found, whole - few[1]) if one else found
        return self.known[key]

    def run(self, what, shape, rows, several):
        stage = self.function(self.course, self.cfg, shape)
        if what == "weights":
            return weights(stage, self.cfg)
        half, groups = models.HALF.get(self.machine.precision), 1 if self.machine.gpu else 8
        tokens = lambda _, prompts, answers, cfg, device: token_tensors(cfg, prompts, answers)  # noqa: E731
        with (
            mock.patch.object(self.course, "encode_pairs", tokens),
            dry_run.dry(half, groups) as (watch, autocast),
        ):
            if what == "update":
                return update(stage, rows, several, watch, autocast)
            return reading(stage, self.cfg, rows, watch)

    # ----------------------------------------------------------------------------------------------

    def held(self, shards=1):
        """Bytes of weights and of AdamW's moments; if shared out, of gradients and of what FSDP
        gathers at a time too."""
        fixed = self.count("weights")
        held = fixed["weights"] + fixed["moments"]
        if shards == 1:
            return held
        return (held + fixed["gradients"]) / shards + fixed["gathered"]

    def updating(self, rows, several=False, shards=1):
        """The peak of an update, `rows` rows at once, in bytes."""
        found = self.count("update", rows, several and shards == 1)
        names = [name for name in found if name.startswith("peak")]
        if shards > 1:  # before a layer has gradients
            names = ["peak 0 forward"]
        return self.held(shards) + max(found[name] for name in names) + memory.OVERHEAD

    def writing(self, rows, shards=1):
        """The peak while `rows` answers are generated, in bytes."""
        writer = self.count("weights")["writes"] if shards > 1 else 0  # gathered for all tokens
        return self.held(shards) + writer + self.count("reading", rows)["peak"] + memory.OVERHEAD

    def estimate(self, shards=1):
        """The Estimate, with as many rows at once as fit."""
        stage, fixed = self.stage, self.count("weights")
        most, given = -(-stage.batch // shards), min(self.cfg.micro_batch, stage.batch)
        peaks, rows, answers = [self.held(shards) + memory.OVERHEAD], given or most, 0
        if stage.losses:
            whole = partial(self.updating, several=rows < most, shards=shards)
            piece = partial(self.updating, several=True, shards=shards)
            rows, peak = self.rows(rows, whole, piece, shards, given)
            peaks.append(peak)
        if stage.writes is not None:
            write = partial(self.writing, shards=shards)
            answers, peak = self.rows(-(-stage.answers // shards), write, write, shards)
            peaks.append(peak)
        learning = (fixed["moments"] + fixed["gradients"]) / shards
        weights = fixed["weights"] / shards
        seconds = self.seconds(answers, shards)
        return Estimate(rows, most, weights, learning, max(peaks), seconds)

    def least(self, shards=1):
        """The peak in bytes with one row at a time."""
        rows = max(1, min(self.cfg.micro_batch, self.stage.batch))
        peak = self.updating(rows, several=True, shards=shards)
        return peak if self.stage.writes is None else max(peak, self.writing(1, shards))

    def within(self, room, shards=1):
        """Whether one row at a time fits into `room` bytes."""
        enough = self.held(shards) + memory.OVERHEAD <= room  # else nothing has to be counted
        return enough and self.least(shards) <= room

    def per_row(self, what, name):
        """Operations for each row, from what has been counted already."""
        found = [(rows, x) for (kind, rows, _), x in self.known.items() if kind == what]
        rows, numbers = max(found, key=lambda pair: pair[0])
        return numbers[name] / rows

    def rows(self, most, whole, piece, shards, given=False):
        """(rows, peak): as many of `most` rows as fit, as the course finds them; `whole(rows)` and
        `piece(rows)` are the peaks of all rows at once and of one piece of several."""
        room, fixed = self.machine.room or math.inf, self.held(shards)
        if given or most == 1 or fixed < room:
            peak = whole(most)
            if given or most == 1 or peak <= room:
                return most, peak
        one = piece(1)
        if one > room:
            return 1, one
        row = piece(2) - one
        rows = memory.at_once(most, row, room - one + row)
        return rows, one + (rows - 1) * row

    def seconds(self, at_once, shards):
        """Seconds of a step in which `at_once` answers are generated at a time."""
        stage, machine, fixed = self.stage, self.machine, self.count("weights")
        rate, answers = machine.flops * USED, stage.answers / shards  # of this process
        work, streams = fixed["scoring"] * answers, 0
        if stage.losses:
            rows = stage.batch * stage.updates / shards
            work += rows * self.per_row("update", "flops")
        if stage.writes is not None:
            work += answers * self.per_row("reading", "prompt")
            share = 0.5 if machine.precision in models.HALF else 1
            streamed = share * fixed["writes"] * math.ceil(answers / at_once)
            token = answers * self.per_row("reading", "token") / rate
            streams = self.cfg.max_new_tokens * max(token, streamed / machine.bandwidth)
        return work / rate + streams


@dataclass
class Estimate:
    rows: int  # at once
    batch: int  # of an update
    weights: float  # bytes
    training: float  # bytes of gradients and moments
    peak: float  # bytes
    seconds: float  # of a step


# --------------------------------------------------------------------------------------------------
# The table

LIGHTER = (  # what makes a stage fit, the cheapest first
    {"gradient_checkpointing": True},
    {"lora_rank": 16},
    {"lora_rank": 16, "gradient_checkpointing": True},
    {"lora_rank": 16, "gradient_checkpointing": True, "load_in_4bit": True},
)
SHARDS = (2, 4, 8, 16)


def estimates(course, shape, given, machine, shards=1):
    """Yields (name of the stage, its Estimate, verdict). `given`: the parameters of the course."""
    for name, (function, own) in STAGES.items():
        cfg = config_of(course, given, own)
        counter = Counter(course, function, cfg, shape, machine)
        among = shards if counter.stage.learning else 1
        found = counter.estimate(among)
        yield name, found, verdict(counter, found, among)


def config_of(course, given, own):
    """The Config of a stage. What was given for one algorithm does not hold for the others."""
    chosen = given.get("algorithm", "ppo")
    if own.get("algorithm", chosen) != chosen:
        given = {x: value for x, value in given.items() if x not in ("answers", "loss_mean")}
    return course.Config(**given | own)


def verdict(counter, found, shards):
    """Whether a stage fits, else the cheapest change that makes it fit; empty without a GPU."""
    room = counter.machine.room
    if room is None:
        return ""
    if found.peak <= room:
        return "yes"
    if not counter.stage.learning:
        return "no"
    for words, other, more in lighter(counter, shards):
        if other.within(room, more):
            return f"no; {words}: {other.least(more) / 1e9:.1f}"
    return "no"


def lighter(counter, shards=1):
    """Yields (what to change, a Counter, shards), cheap changes first."""
    for change in LIGHTER:
        change = {x: value for x, value in change.items() if not getattr(counter.cfg, x)}
        if change:
            words = ", ".join(f"{name}={value}" for name, value in change.items())
            yield words, counter.changed(change), shards
    if counter.machine.precision != "fp16":  # which sharding does not know
        for more in (n for n in SHARDS if n > shards):
            yield f"shard=True in {more} processes", counter, more


HEAD = "stage", "rows at once", "weights", "training", "work", "peak", "seconds", "fits"


def table(course, shape, given, machine, shards=1):
    """Yields the lines of the table as lists of texts."""
    yield list(HEAD)
    for name, found, fits in estimates(course, shape, given, machine, shards):
        rows = f"{found.rows} of {found.batch}" if found.batch else "-"
        rest = max(0, found.peak - found.weights - found.training)
        sizes = found.weights, found.training, rest, found.peak
        yield [name, rows, *(f"{x / 1e9:.1f}" for x in sizes), f"{found.seconds:.3g}", fits or "-"]


def sentences(name, shape, cfg, machine):
    """What stands above the table, and what below."""
    count = sum(p.numel() for p in causal(shape, cfg).parameters())
    room = "" if machine.room is None else f" ({machine.room / 1e9:.0f} GB)"
    above = (
        f"{name}: {count:,} weights. {machine.name}{room}, {machine.precision}. Prompts of "
        f"{cfg.max_prompt} tokens, answers of {cfg.max_new_tokens}."
    )
    below = (
        "All sizes in GB, of one process. training: gradients and AdamW's moments; work: "
        f"activations, logits, caches and {memory.OVERHEAD / 1e9:.1f} GB for Python and kernels. "
        f"A step of 4_test is one batch of answers. Seconds: at {USED:.0%} of "
        f"{machine.flops / 1e12:.3g} TFLOP/s, and {machine.bandwidth / 1e9:,.0f} GB/s for each "
        "further token."
    )
    return above, below
