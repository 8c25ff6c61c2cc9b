"""What the benches share: models, lengths, timing in turns, memory, arithmetic, tables."""

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


def shape_of(name, **changes):
    """The config of a shape; dropout is 0 unless asked for, ffn is four times the width."""
    values = SHAPES[name] | changes
    width = values["hidden_size"]
    more = dict(ffn_dim=4 * width, word_embed_proj_dim=width, dropout=0.0)
    special = dict(pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
    return OPTConfig(**(more | special | values))


def language_model(name, **changes):
    """Random weights, under which neither eos nor padding is ever sampled."""
    torch.manual_seed(0)
    model = OPTForCausalLM(shape_of(name, **changes)).eval()
    with torch.no_grad():  # one feature is always on, and these two tokens are against it
        model.model.decoder.final_layer_norm.bias[0] = 10
        rows = model.get_input_embeddings().weight
        rows[[PAD, EOS]] = 0
        rows[[PAD, EOS], 0] = -5
    return model


def scorer(name, **changes):
    """The same body under a head that gives one number."""
    torch.manual_seed(1)
    return OPTForSequenceClassification(shape_of(name, num_labels=1, **changes)).eval()


def number_tokenizer(vocabulary):
    """Each word is a number, and the number is its id: texts of any wanted length."""
    words = {"<pad>": PAD, "</s>": EOS} | {str(i): i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", bos_token="</s>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def skewed(rng, low, mean, high):
    """A length between low and high with a long tail, as the lengths of texts have."""
    return min(high, low + round(rng.gammavariate(2, (mean - low) / 2)))


def prompt_length(rng):
    """Of text-to-SQL prompts: 25 to 125 tokens, 48 on average."""
    return skewed(rng, 25, 48, 125)


def answer_length(rng):
    """Of their answers: 5 to 125 tokens, 24 on average."""
    return skewed(rng, 5, 24, 125)


def text(rng, length, vocabulary):
    return " ".join(str(rng.randrange(2, vocabulary)) for _ in range(length))


def written(seed, count, vocabulary):
    """Rows with prompt, response, chosen, rejected, of the lengths above."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        row = {"prompt": text(rng, prompt_length(rng), vocabulary)}
        for name in ("response", "chosen", "rejected"):
            row[name] = text(rng, answer_length(rng), vocabulary)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------
# Time and memory


def in_turns(contenders, rounds, warm=1):
    """{name: seconds of each round}. A round runs each once, every other round in reverse order."""
    seconds = {name: [] for name in contenders}
    for i in range(warm + rounds):
        for name in list(contenders)[:: 1 if i % 2 else -1]:
            gc.collect()
            start = time.perf_counter()
            contenders[name]()
            if i >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(above, below):
    """Round by round, so that what slows a whole round cancels out."""
    return [a / b for a, b in zip(above, below)]


class Peak:
    """Resident memory while something runs, looked at by a thread: `whole` and `over`, in MB.

    `over` is what came on top of what was there before.
    """

    def __init__(self, every=0.002):
        self.every, self.process = every, psutil.Process()

    def now(self):
        return self.process.memory_info().rss / 1e6

    def watch(self):
        while not self.done.wait(self.every):
            self.whole = max(self.whole, self.now())

    def start(self):
        gc.collect()
        self.done = threading.Event()
        self.before = self.whole = self.now()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        self.done.set()
        self.thread.join()
        self.over = self.whole - self.before


# ------------------------------------------------------------------------------------------------
# Arithmetic


def forward_flops(shape, rows, head=True):
    """The least arithmetic of one forward pass over (prompt, answer) lengths, cached or not.

    Two for each weight of a matrix and each real token; attention to what stands before; the LM
    head only where an answer's token is to be foreseen.
    """
    width, layers = shape.hidden_size, shape.num_hidden_layers
    weights, total = layers * (4 * width**2 + 2 * width * shape.ffn_dim), 0
    for prompt, answer in rows:
        tokens = prompt + answer - 1
        total += 2 * weights * tokens + layers * 2 * width * tokens * (tokens + 1)
        total += 2 * width * shape.vocab_size * answer * head
    return total


def parameters(shape):
    """Weights of the matrices, the token embedding counted once."""
    width = shape.hidden_size
    layer = 4 * width**2 + 2 * width * shape.ffn_dim
    return shape.num_hidden_layers * layer + shape.vocab_size * width


# ------------------------------------------------------------------------------------------------
# Words and tables


def machine():
    """The machine and the versions, in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{os.cpu_count()} cores ({name}), {memory:.0f} GB, {torch.get_num_threads()} threads, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def number(x):
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" if abs(x) >= 1 else f"{x:.2g}"


def shown(value):
    """A list of measurements as its median and range; anything else as itself."""
    if isinstance(value, list) and value:
        median, low, high = map(number, (statistics.median(value), min(value), max(value)))
        return f"{median} ({low}..{high})" if len(value) > 1 else median
    return number(value) if isinstance(value, float) else str(value)


class Report:
    """Tables as markdown on the screen, and every single measurement as JSON in a file."""

    def __init__(self, out=None):
        self.out, self.tables = out, {"machine": machine()}
        print(self.tables["machine"])

    def table(self, title, rows):
        """`rows`: dicts of the same keys; lists are repeated measurements."""
        lines = [list(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        print(f"\n### {title}\n")
        for line in lines:
            print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |")
        print(flush=True)
        self.tables[title] = rows
        if self.out:
            self.out.write_text(json.dumps(self.tables, indent=1) + "\n")


def exponent(xs, ys):
    """The slope of log y over log x, by least squares."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(xs, ys).slope


def arguments(doc, rounds):
    """The parser with what every bench understands."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, help=f"after a warm-up; otherwise {rounds}")
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    return parser
