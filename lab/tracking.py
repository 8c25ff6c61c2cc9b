"""The metrics of a rollout and of the updates that follow it."""

import time


def timed(metrics, start, **done):
    """Adds the seconds since `start` to the metrics, and e.g. tokens_per_second for tokens=n."""
    seconds = time.perf_counter() - start
    speed = {f"{what}_per_second": count / seconds for what, count in done.items()}
    return metrics | {"seconds": seconds} | speed


def mean_of(updates):
    """Averages the stats of all updates. Ratio errors are those of the first update, where the
    ratio should be 1."""
    means = {name: sum(d[name] for d in updates) / len(updates) for name in updates[0]}
    means |= {"skipped": updates[-1]["skipped"], "updates": len(updates)}
    return means | {name: x for name, x in updates[0].items() if name.startswith("ratio_error")}


def rollout_metrics(rollout, cfg):
    """Returns the metrics of a rollout: reward, KL, lengths, endings and speed."""
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
    if cfg.answers > 1:  # a group whose scores are all equal has no gradient
        groups = rollout.scores.view(-1, cfg.answers)
        metrics["zero_deviation"] = (groups.std(1) < 1e-6).float().mean().item()
    return metrics
