"""Passes without gradients: in eval mode, in the precision asked for, in parts that fit."""

import torch

from lab import memory, models
from lab.trouble import in_pieces


def in_parts(work, rows, cfg, model, generator=None, learning=(), say=print):
    """work(rows) of one part of the rows after the other; `model` is the one that does the work.

    A part has `eval_batch` rows or as many as fit. Where memory runs out all the same it halves,
    and `generator` starts it again with the same random numbers: the results stay the same.
    """
    row = memory.of_reading(model, cfg.max_prompt + cfg.max_new_tokens)
    size = memory.at_once(cfg.eval_batch, row, memory.room(cfg.memory, [model], learning))
    state, done = {"rows": size}, 0
    while done < len(rows):
        before = generator.get_state() if generator else None

        def attempt(size, start=done, before=before):
            if generator:
                generator.set_state(before)
            part = rows[start : start + size]
            with torch.no_grad(), models.eval_mode(model), models.autocast(cfg, model):
                return len(part), work(part)

        count, result = in_pieces(attempt, state, "rows", say)
        yield result
        done += count
