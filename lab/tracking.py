"""What is worth noting down of a rollout and of the updates that follow it."""

import time


def timed(metrics, start, **done):
    """The metrics of a step with its seconds, and how many `tokens` or `rows` it did in one."""
    seconds = time.perf_counter() - start
    speed = {f"{what}_per_second": count / seconds for what, count in done.items()}
    return metrics | {"seconds": seconds} | speed


def mean_of(updates):
    """The mean of each figure; of ratio errors the first, which ought to be 0."""
    means = {name: sum(d[name] for d in updates) / len(updates) for name in updates[0]}
    means |= {"skipped": updates[-1]["skipped"], "updates": len(updates)}
    return means | {name: x for name, x in updates[0].items() if name.startswith("ratio_error")}


def rollout_metrics(rollout, cfg):
    metrics = {
        "reward": rollout.scores.mean().item(),
        "kl": rollout.kl.mean().item(),
        "length": rollout.mask.sum(1).float().mean().item(),
        "eos": rollout.ended.float().mean().item(),
        "empty": sum(not text for text in rollout.responses) / len(rollout.responses),
    }
    metrics |= {f"seconds_{name}": spent for name, spent in rollout.seconds.items()}
    metrics["tokens_per_second"] = rollout.mask.sum().item() / rollout.seconds["generate"]
    metrics |= {f"reward_{name}": mean for name, mean in rollout.parts.items()}
    if cfg.answers > 1:  # a group whose answers are all worth the same teaches nothing
        groups = rollout.scores.view(-1, cfg.answers)
        metrics["zero_deviation"] = (groups.std(1) < 1e-6).float().mean().item()
    return metrics
