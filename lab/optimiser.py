"""The optimiser: AdamW with a schedule, in pieces that fit into memory, and safe from NaN.

A training loop calls `optimiser.step(rows, loss_of, progress)`. That is zero_grad, backward, clip
and step as in any PyTorch loop. The rest of this file keeps the same update working on machines
with little memory, with fp16, and across interruptions.
"""

import math
from functools import partial

import torch

from lab import CourseError, matmul, memory, models, processes, sharding
from lab.passes import in_parts


def text_length(row):
    """Characters of a row's texts, or of several rows side by side."""
    if isinstance(row, (tuple, list, dict)):
        return sum(map(text_length, row.values() if isinstance(row, dict) else row))
    return len(row) if isinstance(row, str) else 0


def chunks(rows, size):
    """A list, a tensor or a range, cut into slices of `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def listed(loss_of):
    """A loss function, or several, as a list."""
    return loss_of if isinstance(loss_of, list) else [loss_of]


def numbers(stats):
    """One-element tensors and numbers as floats. The tensors of a GPU are fetched all at once."""
    stats = list(stats)
    tensors = [x.detach().reshape(()) for x in stats if isinstance(x, torch.Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(fetched) if isinstance(x, torch.Tensor) else float(x) for x in stats]


class Optimiser:
    """AdamW with warm-up, decay and gradient clipping for one or more models.

    `state` holds the numbers that an interrupted run needs again, besides weights and moments.
    """

    length = staticmethod(text_length)  # the length of a row: the longest one needs most memory

    def __init__(self, cfg, rates, steps, *, batch, frozen=(), say=print):
        """`rates`: (model, peak learning rate) pairs; `batch`: rows of an update."""
        memory.keep()  # every step asks for the same blocks again
        self.cfg, self.frozen, self.say = cfg, frozen, say
        self.models, self.peaks = [model for model, _ in rates], [rate for _, rate in rates]
        self.parameters = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        self.sharded = any(map(sharding.is_sharded, self.models))
        self.steps = max(steps, 1)
        self.sizes = {"rollout_batch": cfg.rollout, "longest": -1}
        self.sizes |= {"micro_batch": cfg.micro_batch or batch}
        self.state = {"skipped": 0, "in_a_row": 0} | self.sizes
        fp16, device = models.precision(cfg) == "fp16", self.device.type
        # Losses are sums here, so torch's own scale of 2**16 would overflow fp16.
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=fp16)
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in self.parameters],
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def step(self, rows, loss_of, progress):
        """One update from the loss of `rows`, after `progress` steps.

        `loss_of(rows)` returns a mean loss, the number of tokens or rows in that mean, and stats.
        A list has one such function for each model that learns; their backward passes follow each
        other, and all of them count the same tokens. Several processes share the rows, and all of
        them make the same update.
        """
        if "scaler" in self.state:  # of fp16, as it was after the last step
            self.scaler.load_state_dict(self.state["scaler"])

        own = processes.own(rows)

        def work(_):
            if not (len(own) or self.sharded):  # more processes than rows
                return self.backward(own, loss_of, 1)
            with models.autocast(self.cfg, self.models[0]):
                size = self.update_size(own if len(own) else rows[:1], loss_of)
            return self.backward(own, loss_of, size, rows[:1])

        stats = self.combine(processes.together(lambda: self.fit(work, "micro_batch")))
        scale = self.schedule(progress)
        for group, peak in zip(self.adamw.param_groups, self.peaks):
            group["lr"] = peak * scale
        self.scaler.unscale_(self.adamw)
        clip = torch.nn.utils.clip_grad_norm_
        norms = [clip(group, self.cfg.grad_clip) for group in self.parameters]
        norms = numbers(map(sharding.gathered, norms))
        self.apply(all(map(math.isfinite, [stats["loss"], *norms])), int(progress) + 1)
        figures = {"grad_norm": norms[0], "lr": self.peaks[0] * scale}
        return stats | figures | {"skipped": self.state["skipped"]}

    @property
    def device(self):
        return next(self.models[0].parameters()).device

    def schedule(self, progress):
        """The learning rate as a share of its peak: linear warm-up, then a cosine to the floor."""
        warmup = min(1.0, (progress + 1) / max(1.0, self.cfg.warmup * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress / self.steps)))
        return warmup * (self.cfg.lr_floor + (1 - self.cfg.lr_floor) * cosine)

    def backward(self, rows, loss_of, size, spare=()):
        """Gradients of `rows`, `size` rows at once; returns (weight, stats) of each piece.

        If there are several pieces, the gradients are sums over the pieces, each times its weight.
        With sharded models each process takes as many pieces; `spare` is a row without weight.
        """
        self.adamw.zero_grad()
        if memory.large(self.models):
            memory.trim()  # free blocks between used ones add up
        parts, pieces = [], [(piece, True) for piece in chunks(rows, size)]
        if self.sharded:
            pieces = list(sharding.pieces(rows, size, spare))
        alone = len(pieces) == 1 and processes.joined() == 1
        for piece, real in pieces:
            total, told = 0, {}
            for loss_of_one in listed(loss_of):
                with matmul.fast_matmul(self.models[0]):
                    with memory.tidy(self.models), models.autocast(self.cfg, self.models[0]):
                        loss, weight, stats = loss_of_one(piece)
                    weight = 1 if alone else weight * real
                    with memory.tidy(self.models), sharding.in_step(self.models[0]):
                        self.scaler.scale(loss * weight).backward()
                total, told = total + loss.detach(), told | stats
                del loss  # the next graph needs its memory
            if real:
                parts.append((weight, told | {"loss": total}))
        return parts

    def combine(self, shares):
        """Turns the sums into the gradient of the whole batch, and returns the mean of all stats.

        `shares` are what `backward` returned in each process.
        """
        parts = [part for share in shares for part in share]
        total = sum(weight for weight, _ in parts)
        learning = [p for group in self.parameters for p in group]
        if shares[1:] and not self.sharded:
            learning = self.added(learning)
        scale = total / len(shares) if self.sharded else total  # FSDP has averaged the gradients
        for parameter in learning if shares[1:] or parts[1:] else []:
            if parameter.grad is not None:
                parameter.grad /= scale
        names = list(parts[0][1])
        columns = zip(*(numbers([stats[name] for name in names]) for _, stats in parts))
        figures = dict(zip(names, columns))
        means = {n: sum(w * x for (w, _), x in zip(parts, xs)) / total for n, xs in figures.items()}
        return means | {n: max(xs) for n, xs in figures.items() if n.endswith("_q99")}

    def added(self, parameters):
        """Adds up the gradients of all processes; returns the parameters that have one. A process
        without rows adds zeros."""
        has = processes.together(lambda: [p.grad is not None for p in parameters])
        used = [p for p, flags in zip(parameters, zip(*has)) if any(flags)]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        processes.add([parameter.grad for parameter in used])
        return used

    def apply(self, finite, step):
        """AdamW's step, unless the loss or a gradient is NaN or infinite."""
        if finite:
            self.scaler.step(self.adamw)
            self.state["in_a_row"] = 0
        elif self.scaler.get_scale() <= 1:  # else fp16 was scaled too high, and the scale falls
            self.skip(step)
        if self.scaler.is_enabled():
            self.scaler.update()
            self.state["scaler"] = self.scaler.state_dict()
        self.adamw.zero_grad()

    def skip(self, step):
        """Leaves the weights as they are: one NaN would spoil every one of them."""
        self.state["skipped"] += 1
        self.state["in_a_row"] += 1
        if self.state["in_a_row"] == 3:
            raise CourseError(
                f"Step {step}: the loss or a gradient is not finite, for the third time in a row. "
                "The last checkpoint is good. Lower the learning rate, check the data and the "
                "reward, then go on from the checkpoint with resume_changed = True."
            )
        self.say(f"step {step}: the loss or a gradient is not finite; this update was skipped.")

    # ---------------------------------------------------------------------------------------------
    # Memory

    def in_parts(self, work, rows, generator):
        """Results of `work(part)` without gradients, for parts of `rows` that fit into memory."""
        if memory.large(self.models):
            memory.trim()  # the last update has left free blocks between used ones
        row = memory.of_reading(self.models[0], self.cfg.max_prompt + self.cfg.max_new_tokens)
        self.state["rollout_batch"] = memory.at_once(self.state["rollout_batch"], row, self.room())
        how = {"state": self.state, "name": "rollout_batch", "leave": self.leave(), "say": self.say}
        return in_parts(work, rows, self.cfg, self.models[0], generator, **how)

    def fit(self, work, name):
        """work(size) with as many rows at once as memory holds, on the CPU as the last resort."""
        if self.sharded:  # the others could not follow
            return work(self.state[name])
        return memory.halving(work, self.state, name, self.say, self.leave())

    def room(self):
        """Bytes for one piece. Found once, so that a resumed run uses the same pieces."""
        asked = [self.cfg.memory, self.cfg.micro_batch, str(self.device)]
        if self.state.get("asked") != asked:
            every = (*self.models, *self.frozen)
            found = {"asked": asked, "room": memory.room(self.cfg.memory, every, self.models)}
            self.state |= self.sizes | found
        return self.state["room"]

    def update_size(self, rows, loss_of):
        """How many rows of an update go at once so that it stays within its memory.

        The longest row is measured, and again each longer one that comes along.
        """
        room, lengths = self.room(), [self.length(row) for row in rows]
        longest = max(lengths)
        longer = longest > self.state["longest"]
        if self.sharded:  # all processes measure if one does
            longer = any(processes.agreed(longer))
        if longer and not self.cfg.micro_batch:
            i, before = lengths.index(longest), self.state["micro_batch"]
            row, needed = rows[i : i + 1], partial(memory.of_update, models=self.models)
            found = [needed(partial(loss_of_one, row)) for loss_of_one in listed(loss_of)]
            once, each = map(max, zip(*found))  # one loss after the other
            size = memory.at_once(before, each, room - once)
            untouched = before == self.sizes["micro_batch"] and not self.sharded
            if untouched and self.fits_whole(found, before):
                size = before
            self.state |= {"longest": longest, "micro_batch": size}
            if size < before:
                self.say(f"updates take {size} rows at once, so that they fit into memory.")
            if self.cfg.memory and once + each > room:
                limit = self.cfg.memory
                need = f"{limit + (once + each - room) / 1e9:.1f} GB"
                self.say(f"memory = {limit:g} is too little: one row at a time takes {need}.")
        return self.state["micro_batch"]

    def fits_whole(self, found, rows):
        """Whether `rows` rows fit in one piece. `found`: what one row needs, for each loss.

        `room` is what a piece may use beside all gradients. The gradients of a single piece come
        while its graph goes, so two moments count for each loss. At first the whole graph stands
        beside the gradients of the losses before and that of the head, which comes first (at most
        the largest one). At the end there are all gradients, and hardly any graph.
        """
        sizes = [[p.nbytes for p in group] for group in self.parameters]
        sizes = sizes if found[1:] else [sum(sizes, [])]
        peaks, there = [], 0
        for (once, row), own in zip(found, sizes):
            peaks.append(there + max(own) + once + rows * row)
            there += sum(own)
            peaks.append(there + once + row)
        return max(peaks) <= self.room() + there

    def leave(self):
        """What to do when one row is too much for a GPU; None where that is an error."""
        gpu = self.device.type != "cpu" and processes.joined() == 1
        return self.leave_gpu if gpu and self.cfg.cpu_fallback else None

    def leave_gpu(self):
        for model in (*self.models, *self.frozen):
            model.to("cpu")
        self.adamw.load_state_dict(self.adamw.state_dict())  # moments follow their weights
        self.state |= self.sizes
