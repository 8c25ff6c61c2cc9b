"""Models in and out: any causal language model, its tokenizer, adapters, precision.

Nothing comes from a pickle, and code that a model brings along runs only when it is asked for.
"""

import copy
import importlib.util
import warnings
from contextlib import contextmanager, nullcontext
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

from lab import CourseError
from lab.agreement import eval_mode  # noqa: F401
from lab.errors import loading
from lab.plain_path import cache_argument
from lab.tokens import FRAME, encoder, in_template, stops_of

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


# --------------------------------------------------------------------------------------------------
# Loading


def pick_device(cfg):
    """The first GPU or the CPU for "auto"; otherwise what was asked for, if it is there."""
    return find_device(cfg.device)


def find_device(name):
    """A torch device, which from now on is the current GPU; "auto": the first GPU, else the CPU.

    Everything that a stage loads goes there, and nothing moves it later.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
        torch.zeros(1, device=device).item()  # there is a device without numbers, "meta"
        if device.type == "cuda":  # kernels of other packages start on the current one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError):  # torch has one for each backend
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        known = ", ".join(["auto", "cpu", *gpus])
        raise CourseError(f"device = {name!r} is not there: this machine has {known}.") from None


def load_tokenizer(path, cfg=None):
    """A tokenizer that can pad, stop, and frame a dialogue; what it lacks it gets."""
    trusted = cfg is not None and cfg.trust_remote_code
    with opening(path, "its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CourseError(f"The tokenizer in {path} knows no words: its files are missing.")
    if tokenizer.eos_token_id is None:  # no answer could end
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    if tokenizer.pad_token_id is None:  # masks tell padding from an eos
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FRAME
    if "1 + 1?" not in in_template(tokenizer, [{"role": "user", "content": "1 + 1?"}]):
        raise CourseError(f"The chat template in {path} leaves out the message of the user: fix it.")
    return tokenizer


@contextmanager
def opening(path, part=""):
    """`loading`, and one thing more that is to be done where a model brings code of its own."""
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
            f"{path} does not load: trust_remote_code = True runs the code that the model brings "
            "along; read it first."
        ) from None


def load(kind, path, cfg, may_lack="", **extra):
    """A model with all its weights: one that is not in the file would be random, without a word.

    In float32, as half precision would lose small updates; autocast may compute in half.
    """
    safe = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=cfg.trust_remote_code)
    # Misfits are let through here only to be named below.
    told = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with opening(path):
        model, found = kind.from_pretrained(path, **safe, **told, **extra)
    lost = [name for name in found["missing_keys"] if name.split(".")[0] != may_lack]
    if lost:
        raise CourseError(f"{path} does not load: it lacks {len(lost)} weights, like {lost[0]}.")
    for name, there, wanted in found["mismatched_keys"]:
        shapes = f"the shape {tuple(there)}, not {tuple(wanted)}"
        raise CourseError(f"{path} does not load: {name} has {shapes}.")
    return (model if "device_map" in extra else model.to(pick_device(cfg))).eval()


def load_actor(path, cfg, **extra):
    """A causal language model in float32."""
    return load(AutoModelForCausalLM, path, cfg, **extra)


def load_scorer(path, cfg, **extra):
    """A model with one number per token on top: reward model and value model alike.

    A language model gets its new head set to zero, so that every score starts out equal.
    """
    shape = shape_of(path, cfg)
    fresh = not any("SequenceClassification" in name for name in shape.architectures or [])
    kind, head = AutoModelForSequenceClassification, "score" if fresh else ""
    model = load(kind, path, cfg, may_lack=head, num_labels=1, **extra)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


def shape_of(path, cfg):
    with opening(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)


def load_both(cfg, source, name, **extra):
    """Tokenizer and language model, after checking that they fit each other and the parameters."""
    model, tokenizer = load_actor(source, cfg, **extra), load_tokenizer(source, cfg)
    if cache_argument(model) is None:
        raise CourseError(f"{name} will not do: its forward has no past_key_values to go on from.")
    embedded = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > embedded:
        problem = f"The tokenizer in {name} knows {tokenizer.vocab_size} tokens, its model only"
        raise CourseError(f"{problem} {embedded}: they do not belong together.")
    if len(tokenizer) > embedded:  # tokens were added to it; those of Qwen are fewer than rows
        with torch.random.fork_rng(devices=[]):  # new rows lie close to the mean of the old ones
            torch.manual_seed(cfg.seed)
            model.resize_token_embeddings(len(tokenizer))
    longest = cfg.max_prompt + cfg.max_new_tokens
    room = getattr(model.config, "max_position_embeddings", None) or longest
    if longest > room:
        problem = f"max_prompt + max_new_tokens = {longest}, but {name} reads"
        raise CourseError(f"{problem} {room} tokens at most.")
    return tokenizer, model


class Base(NamedTuple):
    """What 0_download takes, why, and (tokenizer, model) where they are loaded already."""

    source: str  # "tiny", a hub name or a local folder
    why: str  # one sentence
    loaded: tuple | None = None


def choose_base(cfg):
    """The base model that the parameters ask for, loaded; `tiny` where there is none."""
    made = "the embedded tiny model is made here, from random weights."
    if cfg.base_model == "tiny":
        return Base("tiny", f"As asked, {made}")
    if cfg.base_model == "auto" and pick_device(cfg).type == "cpu":
        return Base("tiny", f"There is no GPU here, so {made}")
    name = "facebook/opt-125m" if cfg.base_model == "auto" else cfg.base_model
    try:
        return Base(name, f"The base model is {name}.", load_both(cfg, name, name))
    except CourseError as error:
        if not cfg.fallback:
            raise CourseError(f"{error} Choose another base_model, or fallback = True.") from None
        return Base("tiny", f"{error} So {made}")


# --------------------------------------------------------------------------------------------------
# Less memory, less time


def in_4_bits(cfg):
    """How to load frozen weights for QLoRA; nothing where it was not asked for."""
    if not cfg.load_in_4bit:
        return {}
    device = pick_device(cfg)
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise CourseError(
            "load_in_4bit = True needs a GPU and the package bitsandbytes (pip install "
            "bitsandbytes): set it to False, lora_rank alone saves most of the memory."
        )
    from transformers import BitsAndBytesConfig

    how = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=HALF.get(precision(cfg)))
    return {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **how),
        "device_map": {"": device},
    }


def trainable(model, cfg, *, drop=True):
    """The model as it will be trained: with adapters, or whole; recomputing activations or not.

    Without `drop` its dropout is off for good: what it says must be what it said when it wrote.
    """
    if not drop:
        silence(model)
    if cfg.gradient_checkpointing:  # acts in train mode only, and `generate` works in eval mode
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    if not cfg.lora_rank:
        return model
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
    with warnings.catch_warnings():  # peft talks of names that change, and of GPT-2's layers
        warnings.simplefilter("ignore")
        return get_peft_model(model, shape).train(model.training)


def silence(model):
    """Dropout 0 everywhere, also where a layer keeps its share as a number."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save(model, tokenizer, folder):
    """What `from_pretrained` of plain transformers wants; adapters merged, and once more beside."""
    if hasattr(model, "merge_and_unload"):
        model = merged(model, Path(folder) / "adapter")
    acquaint(model, tokenizer)
    kinds = (model, auto_class(model)), (model.config, "AutoConfig"), (tokenizer, "AutoTokenizer")
    for part, kind in kinds:
        if type(part).__module__.startswith("transformers_modules"):  # its own code goes along
            type(part).register_for_auto_class(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def acquaint(model, tokenizer):
    """The model's settings tell plain transformers how its tokenizer pads, and where to stop."""
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
    except ValueError:  # some settings contradict each other: they load, but cannot be saved
        ids = {name: getattr(writing, name) for name in ("pad_token_id", "eos_token_id")}
        model.generation_config = GenerationConfig(bos_token_id=writing.bos_token_id, **ids)
    if hasattr(model, "score") and pad in (eos, encoder(tokenizer).end):
        # A plain scorer looks for the last token that is no pad: it would miss the eos. Without a
        # pad it takes the very last one, and refuses rows of unequal length.
        config.pad_token_id = None


def merged(model, folder):
    """The adapter is saved, and then added to the weights it belongs to; to those in float32."""
    model.save_pretrained(folder)
    if not getattr(model, "is_loaded_in_4bit", False):
        return model.merge_and_unload()
    from peft import PeftModel

    shape = copy.deepcopy(model.config)  # with its labels, and the scale of a reward model
    del shape.quantization_config
    whole = type(model.get_base_model()).from_pretrained(
        shape.name_or_path, config=shape, dtype=torch.float32, use_safetensors=True
    )
    return PeftModel.from_pretrained(whole, folder).merge_and_unload()


def without_adapter(model):
    """`with without_adapter(policy) as model:` the weights below, as they were before."""

    @contextmanager
    def below():
        with model.disable_adapter():
            yield model

    return below()


def auto_class(model):
    scorer = hasattr(model, "score")
    return "AutoModelForSequenceClassification" if scorer else "AutoModelForCausalLM"


def precision(cfg):
    """What matrices multiply in: float32, bf16 or fp16.

    "auto" is bf16 on GPUs that are made for it, fp16 on those that know nothing better (T4, V100),
    and float32 elsewhere: on most processors half precision saves no time.
    """
    if cfg.precision != "auto":
        return cfg.precision
    device = pick_device(cfg)
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"


def autocast(cfg, model):
    """Matrix products in half precision where the parameters ask for it."""
    if (name := precision(cfg)) == "float32":
        return nullcontext()
    return torch.autocast(model.device.type, HALF[name])


def frozen(model, cfg):
    """A model that never learns: on a GPU its matrices lie in the precision they multiply in.

    Under `autocast` the results are the same bits, for half of the memory. A matrix that is also
    the embedding stays in float32, as the embedding does.
    """
    model.requires_grad_(False)
    if model.device.type == "cpu" or precision(cfg) == "float32":
        return model
    shared = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in shared:
            module.to(HALF[precision(cfg)])
    return model


def finest_dtype(device):
    """float64 where the device has it: MPS has not."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
