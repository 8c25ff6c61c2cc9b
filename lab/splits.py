"""Splits the rows between the stages and orders them; the same seed gives the same result."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from lab import CourseError
from lab.data import check_no_overlap, read_rows, reading
from lab.rewards import named


def rng_for(cfg, *purpose):
    """Returns a torch.Generator for one purpose, e.g. ("rollout", 7).

    Its seed depends on cfg.seed and the purpose only, so no step depends on the steps before it.
    """
    name = hashlib.md5(repr((cfg.seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(name[:15], 16))


def load_rows(cfg, share, needs=("prompt",)):
    """Returns the rows of one split of train.json: "sft", "preference" or "prompt"."""
    rows = read_dataset(cfg, "train.json", needs)
    order = torch.randperm(len(rows), generator=rng_for(cfg, "shares")).tolist()
    first = {"sft": 0, "preference": cfg.sft_share}
    start = first.get(share, cfg.sft_share + cfg.preference_share)
    stop = start + getattr(cfg, f"{share}_share")
    chosen = order[round(start * len(rows)) : round(stop * len(rows))]
    if not chosen:
        raise CourseError(
            f"{share}_share = {stop - start:g} of {len(rows)} rows gives no row: raise it."
        )
    return [rows[i] for i in chosen]


def load_eval_rows(cfg):
    """Returns the first rows of eval.json; raises if one of them is also in train.json."""
    rows = read_dataset(cfg, "eval.json")
    if (Path(cfg.root) / "dataset" / "train.json").exists():
        check_no_overlap(read_dataset(cfg, "train.json"), rows, "eval.json")
    return rows[: cfg.test_rows]


def load_plain_text(cfg):
    """Returns the text of cfg.plain_text, a file in root or in the folder of the notebooks."""
    places = [Path(folder) / cfg.plain_text for folder in (cfg.root, Path(__file__).parents[1])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        lost = " and no file ".join(dict.fromkeys(map(str, places)))
        raise CourseError(f"plain_text cannot be read: there is no file {lost}. Check its name.")
    with reading(path):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise CourseError(f"{path} is not UTF-8 text: save the file as UTF-8.") from None


def batches(count, size, generator):
    """Returns the row indices of one epoch as a list per batch, in random order."""
    return [part.tolist() for part in torch.randperm(count, generator=generator).split(size)]


def epochs(cfg, purpose, count, size, laps):
    """Returns one list of row indices per step, for `laps` passes over the rows."""
    return [
        index for lap in range(laps) for index in batches(count, size, rng_for(cfg, purpose, lap))
    ]


def read_dataset(cfg, name, needs=("prompt",)):
    """Returns the rows of a file in dataset/, read by cfg.reader if you have set one."""
    reader = named("reader", cfg.reader, {}) if cfg.reader else None
    return read_rows(Path(cfg.root) / "dataset" / name, needs, reader)


def prompt_batch(cfg, prompts, step):
    """Returns the prompts of one step, each repeated `answers` times.

    Every pass over the prompts has a new random order.
    """
    batch, count = [], cfg.rollout // cfg.answers
    for i in range(step * count, (step + 1) * count):
        lap, place = divmod(i, len(prompts))
        if place == 0 or not batch:
            order = torch.randperm(len(prompts), generator=rng_for(cfg, "prompts", lap)).tolist()
        batch += [prompts[order[place]]] * cfg.answers
    return batch


def stack(pieces):
    """Concatenates pieces of a batch, (b,) or (b, R). Shorter rows get zeros on the right."""
    if pieces[0].dim() == 1:
        return torch.cat(pieces)
    R = max(piece.shape[1] for piece in pieces)
    return torch.cat([F.pad(piece, (0, R - piece.shape[1])) for piece in pieces])
