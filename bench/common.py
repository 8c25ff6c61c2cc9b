"""Shared by all benchmarks: models, rows, interleaved timing, memory, arithmetic and tables."""

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import threading
import time
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, EOS = 0, 1
SHAPES = {
    "tiny": dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4),
    "opt125m": dict(
        vocab_size=50272, hidden_size=768, num_hidden_layers=12, num_attention_heads=12
    ),
}


# ------------------------------------------------------------------------------------------------
# Models and rows


def opt_config(name, **changes):
    """The OPT config of a shape, with dropout 0 by default and an FFN of four times the width."""
    values = SHAPES[name] | changes
    width = values["hidden_size"]
    more = dict(ffn_dim=4 * width, word_embed_proj_dim=width, dropout=0.0)
    special = dict(pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
    return OPTConfig(**(more | special | values))


def language_model(name, **changes):
    """A causal model with random weights that never samples eos or padding."""
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(name, **changes)).eval()
    with torch.no_grad():  # feature 0 is always on, and it makes the logits of both tokens very low
        model.model.decoder.final_layer_norm.bias[0] = 10
        rows = model.get_input_embeddings().weight
        rows[[PAD, EOS]] = 0
        rows[[PAD, EOS], 0] = -5
    return model


def scorer(name, **changes):
    """The same body with a head that gives one number: a reward model or a value model."""
    torch.manual_seed(1)
    return OPTForSequenceClassification(opt_config(name, num_labels=1, **changes)).eval()


def number_tokenizer(vocabulary):
    """A tokenizer whose words are the ids, so that a text can have any number of tokens."""
    words = {"<pad>": PAD, "</s>": EOS} | {str(i): i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", bos_token="</s>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def long_tailed_length(rng, low, mean, high):
    """A random length from low to high with a long tail, like the lengths of real texts."""
    return min(high, low + round(rng.gammavariate(2, (mean - low) / 2)))


def prompt_length(rng):
    """The length of a text-to-SQL prompt: 25 to 125 tokens, 48 on average."""
    return long_tailed_length(rng, 25, 48, 125)


def answer_length(rng):
    """The length of an answer to such a prompt: 5 to 125 tokens, 24 on average."""
    return long_tailed_length(rng, 5, 24, 125)


def random_text(rng, length, vocabulary):
    """A text of exactly `length` tokens for `number_tokenizer`."""
    return " ".join(str(rng.randrange(2, vocabulary)) for _ in range(length))


def random_rows(seed, count, vocabulary):
    """Rows with prompt, response, chosen and rejected, with the lengths above."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        row = {"prompt": random_text(rng, prompt_length(rng), vocabulary)}
        for name in ("response", "chosen", "rejected"):
            row[name] = random_text(rng, answer_length(rng), vocabulary)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------
# Time and memory


def time_interleaved(contenders, rounds, warmup=1):
    """Times functions against each other; returns {name: seconds of each round}.

    A round runs each function once; every other round runs in reverse order. The warm-up rounds are
    not counted.
    """
    seconds = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name in list(contenders)[:: 1 if i % 2 else -1]:
            gc.collect()
            start = time.perf_counter()
            contenders[name]()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(numerators, denominators):
    """Ratios round by round, so that anything that slows a whole round cancels out."""
    return [a / b for a, b in zip(numerators, denominators)]


class Peak:
    """Peak resident memory between `start` and `stop`, sampled by a thread, in MB.

    `peak_mb` is the total; `increase_mb` is the part above the memory held at `start`.
    """

    def __init__(self, interval=0.002):
        self.interval, self.process = interval, psutil.Process()

    def resident_mb(self):
        return self.process.memory_info().rss / 1e6

    def watch(self):
        while not self.done.wait(self.interval):
            self.peak_mb = max(self.peak_mb, self.resident_mb())

    def start(self):
        gc.collect()
        self.done = threading.Event()
        self.before_mb = self.peak_mb = self.resident_mb()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        self.done.set()
        self.thread.join()
        self.increase_mb = self.peak_mb - self.before_mb


# ------------------------------------------------------------------------------------------------
# Arithmetic


def forward_flops(config, rows, head=True):
    """The minimum FLOPs of one forward pass over rows of (prompt, answer) lengths, cached or not.

    It counts two operations per matrix weight and real token, causal attention, and the LM head
    only at positions that predict a token of the answer.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    weights, total = layers * layer_weights(config), 0
    for prompt, answer in rows:
        tokens = prompt + answer - 1
        total += 2 * weights * tokens + layers * 2 * width * tokens * (tokens + 1)
        total += 2 * width * config.vocab_size * answer * head
    return total


def layer_weights(config):
    """The number of weights in the matrices of a layer: of OPT, or with gates and shared keys."""
    width = config.hidden_size
    if hasattr(config, "ffn_dim"):
        return 4 * width**2 + 2 * width * config.ffn_dim
    keys = width * config.num_key_value_heads // config.num_attention_heads
    return 2 * width * (width + keys) + 3 * width * config.intermediate_size


def count_weights(config):
    """The number of weights in the matrices; the token embedding counts once."""
    layers = config.num_hidden_layers * layer_weights(config)
    return layers + config.vocab_size * config.hidden_size


# ------------------------------------------------------------------------------------------------
# Text and tables


def describe_machine():
    """The machine and the versions of its software, as one line of text."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    memory = psutil.virtual_memory().total / 1e9
    parts = [f"{os.cpu_count()} cores ({name})", f"{memory:.0f} GB"]
    parts += [f"{torch.get_num_threads()} threads", platform.system()]
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    gpus = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join(gpus + parts)


def format_number(x):
    """Whole numbers from 100 upwards, three significant digits from 1, two below 1."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" if abs(x) >= 1 else f"{x:.2g}"


def format_cell(value):
    """A list of measurements as its median and range; any other value as text."""
    if isinstance(value, list) and value:
        median, low, high = map(format_number, (statistics.median(value), min(value), max(value)))
        return f"{median} ({low}..{high})" if len(value) > 1 else median
    return format_number(value) if isinstance(value, float) else str(value)


class Report:
    """Prints tables as markdown, kept in `text`, and writes every single measurement to a file as
    JSON."""

    def __init__(self, out=None):
        self.out, self.tables, self.text = out, {"machine": describe_machine()}, ""
        self.say(self.tables["machine"])

    def say(self, line):
        self.text += line + "\n"
        print(line, flush=True)

    def table(self, title, rows):
        """Prints `rows`, dicts with the same keys; a list holds repeated measurements."""
        lines = [list(rows[0]), *([format_cell(v) for v in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        self.say(f"\n### {title}\n")
        for line in lines:
            self.say("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |")
        self.say("")
        self.tables[title] = rows
        if self.out:
            self.out.write_text(json.dumps(self.tables, indent=1) + "\n")


def loglog_slope(xs, ys):
    """The slope of log y over log x by least squares: the exponent of a power law."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(xs, ys).slope


def make_parser(doc, rounds):
    """A parser with the options that every benchmark shares."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--shape",
        nargs="+",
        default=list(SHAPES),
        choices=list(SHAPES),
        help="shapes of the models; default: all",
    )
    parser.add_argument("--rounds", type=int, help=f"rounds after the warm-up; default: {rounds}")
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    return parser
