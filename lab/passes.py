"""Forward passes without gradients: in eval mode and in parts that fit into memory."""

import torch

from lab import memory, models


def in_parts(
    work, rows, cfg, model, generator=None, learning=(), state=None, name="rows", leave=None,
    say=print,
):  # fmt: skip
    """Yields work(part) for each part of the rows, with `model` in eval mode and autocast.

    A part has `eval_batch` rows, or fewer if memory is short. state[name] holds this number if you
    pass a `state`. When memory runs out, the part is halved and `generator` is reset, so the
    results stay the same.
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
