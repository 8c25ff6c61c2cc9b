"""Which rows belong to which stage, in which order: the same for the same seed."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from lab import CourseError
from lab.data import check_no_overlap, read_rows
from lab.rewards import named


def rng_for(cfg, *purpose):
    """A random generator for one purpose, e.g. ("rollout", 7): no state from step to step."""
    name = hashlib.md5(repr((cfg.seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(name[:15], 16))


def load_rows(cfg, share, needs=("prompt",)):
    """The rows of train.json that belong to one stage: "sft", "preference" or "prompt"."""
    rows = read_dataset(cfg, "train.json", needs)
    order = torch.randperm(len(rows), generator=rng_for(cfg, "shares")).tolist()
    first = {"sft": 0, "preference": cfg.sft_share}
    start = first.get(share, cfg.sft_share + cfg.preference_share)
    stop = start + getattr(cfg, f"{share}_share")
    chosen = order[round(start * len(rows)) : round(stop * len(rows))]
    if not chosen:
        raise CourseError(
            f"{share}_share = {stop - start:g} of {len(rows)} rows is none: raise it."
        )
    return [rows[i] for i in chosen]


def load_eval_rows(cfg):
    """The first rows of eval.json, after making sure that no training has seen one of them."""
    rows = read_dataset(cfg, "eval.json")
    if (Path(cfg.root) / "dataset" / "train.json").exists():
        check_no_overlap(read_dataset(cfg, "train.json"), rows, "eval.json")
    return rows[: cfg.test_rows]


def batches(count, size, generator):
    """One epoch of index lists, in random order; every row once."""
    return [part.tolist() for part in torch.randperm(count, generator=generator).split(size)]


def epochs(cfg, purpose, count, size, laps):
    """The index lists of a whole training, one a step."""
    return [
        index for lap in range(laps) for index in batches(count, size, rng_for(cfg, purpose, lap))
    ]


def read_dataset(cfg, name, needs=("prompt",)):
    """A file of dataset/ as rows, through a reader of one's own where there is one."""
    reader = named("reader", cfg.reader, {}) if cfg.reader else None
    return read_rows(Path(cfg.root) / "dataset" / name, needs, reader)


def prompt_batch(cfg, prompts, step):
    """The prompts of one step, each `answers` times in a row; a new order each time round."""
    batch, count = [], cfg.rollout // cfg.answers
    for i in range(step * count, (step + 1) * count):
        lap, place = divmod(i, len(prompts))
        if place == 0 or not batch:
            order = torch.randperm(len(prompts), generator=rng_for(cfg, "prompts", lap)).tolist()
        batch += [prompts[order[place]]] * cfg.answers
    return batch


def stack(pieces):
    """Pieces of a batch below each other, (b, R) with R of their own or (b,): zeros right."""
    if pieces[0].dim() == 1:
        return torch.cat(pieces)
    R = max(piece.shape[1] for piece in pieces)
    return torch.cat([F.pad(piece, (0, R - piece.shape[1])) for piece in pieces])
