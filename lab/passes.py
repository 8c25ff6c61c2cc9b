"""Passes without gradients: in eval mode, in the chosen precision, in parts that fit."""

import torch

from lab import memory, models


def in_parts(
    work, rows, cfg, model, generator=None, learning=(), state=None, name="rows", leave=None,
    say=print,
):  # fmt: skip
    """Yields work(part) for one part of the rows after the other; `model` does the work.

    A part has `eval_batch` rows, or as many as fit; state[name] holds that number where the caller
    keeps one. When memory runs out, a part halves and `generator` is reset, so that the results
    stay the same.
    """
    if state is None:
        row = memory.of_reading(model, cfg.max_prompt + cfg.max_new_tokens)
        room = memory.room(cfg.memory, [model], learning)
        state = {name: memory.at_once(cfg.eval_batch, row, room)}
    done = 0
    while done < len(rows):
        before = generator.get_state() if generator else None

        def attempt(size, start=done, before=before):
            if generator:
                generator.set_state(before)
            part = rows[start : start + size]
            with torch.no_grad(), models.eval_mode(model), models.autocast(cfg, model):
                return len(part), work(part)

        count, result = memory.halving(attempt, state, name, say, leave)
        yield result
        done += count
