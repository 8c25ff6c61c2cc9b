"""Forward passes without gradients: in eval mode and in parts that fit into memory."""

import torch

from lab import memory, models, processes, sharding


def in_parts(
    work, rows, cfg, model, generator=None, learning=(), state=None, name="rows", leave=None,
    say=print,
):  # fmt: skip
    """Yields work(part) for each part of the rows, with `model` in eval mode and autocast.

    A part has `eval_batch` rows, or fewer if memory is short. state[name] holds this number if you
    pass a `state`. When memory runs out, the part is halved and `generator` is reset, so the
    results stay the same. Several processes share the rows, and all yield all results.
    """
    start, stop = processes.part_of(len(rows))
    how = rows[:1], cfg, model, generator, learning, state, name, leave, say

    def share():
        skip(generator, start, cfg.max_new_tokens)
        mine = list(own_parts(work, rows[start:stop], *how))
        skip(generator, len(rows) - stop, cfg.max_new_tokens)
        return mine

    if processes.count() == 1:  # part by part, so that nobody has to keep all of them
        yield from own_parts(work, rows, *how)
    else:
        for mine in processes.together(share):
            yield from processes.moved(mine, model.device)


def skip(generator, rows, length):
    """Draws the random numbers that other processes draw for their rows: see util.draw_uniforms."""
    if generator and rows:
        torch.rand(rows, length, generator=generator, dtype=torch.float64)


def own_parts(work, rows, spare, cfg, model, generator, learning, state, name, leave, say):
    """Yields work(part) for the rows of this process. `spare` is a row for processes without."""

    def run(part):
        with torch.no_grad(), models.eval_mode(model), models.autocast(cfg, model):
            return work(part)

    if state is None:
        row = memory.of_reading(model, cfg.max_prompt + cfg.max_new_tokens)
        room = memory.room(cfg.memory, [model], learning)
        state = {name: memory.at_once(cfg.eval_batch, row, room)}
    if sharding.wanted(cfg):  # every process makes as many passes
        for part, real in sharding.pieces(rows, state[name], spare):
            before = generator.get_state() if generator and not real else None
            result = run(part)
            if real:
                yield result
            elif generator:
                generator.set_state(before)
        return
    done = 0
    while done < len(rows):
        before = generator.get_state() if generator else None

        def attempt(size, start=done, before=before):
            if generator:
                generator.set_state(before)
            part = rows[start : start + size]
            return len(part), run(part)

        count, result = memory.halving(attempt, state, name, say, leave)
        yield result
        done += count
