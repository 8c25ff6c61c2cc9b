"""The experiment of more/overoptimisation.ipynb: many policies, trained on many reward models.

The *proxy* is a reward model, the *gold* the embedded world's judge. Every proxy and every policy
has a folder of its own below model/overoptimisation, with the prompts, base model and actor of the
course. Each is a normal artifact of the course: a finished one with the same parameters is used
again, an interrupted one is resumed. Delete a folder to repeat its run.

`lab/overoptimisation.py` holds the estimates, fits and figures.
"""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from transformers.utils import logging

import util
from lab import CourseError, models, report, world
from lab.config import ALGORITHMS
from lab.overoptimisation import (
    average,
    best_of,
    best_of_kl,
    cheat,
    describe,
    gain_per_nat,
    verdict,
)
from lab.rewards import Ensemble
from lab.runs import MAY_CHANGE, artifact, read_record

FOLDER = Path("model") / "overoptimisation"


class Proxy(NamedTuple):
    """A reward model: how many pairs it learns from, and how well it can learn from them."""

    seed: int
    pairs: int = 0  # 0: all of the preference share
    noise: float = 0.0  # share of labels turned round, on top of the tenth that is wrong already
    layers: int = 0  # of the actor's body; 0: all
    members: int = 1  # of an ensemble, each with its own order of the pairs

    @property
    def name(self):
        size = f"{self.pairs or 'all'}-pairs-{self.noise:g}-noise-{self.layers or 'all'}-layers"
        return f"proxy-{size}-{self.members}-members-seed-{self.seed}"


class Run(NamedTuple):
    """A policy: its algorithm, the proxy that it trusts, and the parameters that differ."""

    curve: str  # runs of several seeds share a curve
    proxy: Proxy
    algorithm: str
    values: tuple = ()  # pairs (name, value) of parameters

    @property
    def name(self):
        return f"{self.curve.replace(' ', '-')}-{self.proxy.name}"


# --------------------------------------------------------------------------------------------------
# Folders


def workspace(cfg, name, parts=("base", "actor"), **values):
    """A root of its own for one run, with models of the course and the prompts of RLHF.

    Reading a small file of prompts again and again is faster than reading all the data.
    """
    home = Path(cfg.root) / FOLDER / name
    for part in parts:
        share(artifact(cfg.root, part), home / "model" / part)
    write_lines(home / "prompts.jsonl", prompts_of(cfg))
    values = {"data": "prompts.jsonl", "prompt_data": "prompts.jsonl", "eval_share": 0.0} | values
    values = {
        "tracker": "none",
        "kl_limit": 0.0,
        "watchdog": 0.0,
        "eval_data": "",
        "reader": "",
    } | values
    return cfg.changed(root=str(home), **values)


@cache
def prompts_of(cfg):
    return [{"prompt": row["prompt"]} for row in util.load_rows(cfg, "prompt")]


def write_lines(path, rows):
    """Writes a file unless it is there: another process may be reading it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def share(source, target):
    """Fills a folder with links to the files of another one; with copies where links fail."""
    target.mkdir(parents=True, exist_ok=True)
    for path in filter(Path.is_file, source.iterdir()):
        place = target / path.name
        if place.exists() and (place.samefile(path) or path.read_bytes() == place.read_bytes()):
            continue
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(path, place)


def finished(stage):
    """Whether the artifact of a stage was made with the same parameters, inputs and data."""
    try:
        record = read_record(stage.root, stage.name)
        artifact(stage.root, stage.name)
    except CourseError:
        return False
    config = {name: x for name, x in record["config"].items() if name not in MAY_CHANGE}
    plan = [stage.plan()[kind] for kind in ("parameter", "input", "file")]
    return [config, record["inputs"], record["data"]] == plan


# --------------------------------------------------------------------------------------------------
# Reward models


def train_proxy(cfg, proxy):
    """Trains a reward model in a folder of its own; yields the metrics of its steps."""
    home = proxy_config(cfg, proxy)
    write_pairs(cfg, proxy, Path(home.root) / home.preference_data)
    if proxy.layers:
        shorten_actor(cfg, home, proxy.layers)
    if not finished(util.open_stage(home, "critic", ["actor"], pairs=True)):
        yield from util.train_critic(home)
    load_proxies(cfg, proxy)  # measures the scale


def proxy_config(cfg, proxy):
    values = {"seed": cfg.seed + proxy.seed, "ensemble": proxy.members, "feedback_weight": 0}
    if proxy.pairs:  # few pairs are read several times, up to 8
        values["critic_epochs"] = min(8, max(1, 2_400 // proxy.pairs))
    parts = ["base"] + ["actor"] * (not proxy.layers)
    return workspace(cfg, proxy.name, parts, preference_data="pairs.jsonl", **values)


def write_pairs(cfg, proxy, path):
    """The pairs of a proxy: some of the preference share, with some labels turned round."""
    rows = util.preference_rows(cfg.changed(feedback_weight=0), say=lambda _: None)
    rng = util.rng_for(cfg, "overoptimisation", proxy.seed)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=rng)[: proxy.pairs or None]]
    turned = torch.rand(len(rows), generator=rng) < proxy.noise
    pairs = []
    for row, wrong in zip(rows, turned.tolist()):
        chosen, rejected = ("rejected", "chosen") if wrong else ("chosen", "rejected")
        pair = {"chosen": row[chosen], "rejected": row[rejected]}
        pairs.append({"prompt": row["prompt"]} | pair)
    write_lines(path, pairs)


def shorten_actor(cfg, home, layers):
    """Puts an actor with fewer layers in the place of the actor: the body of a smaller proxy."""
    actor = read_record(cfg.root, "actor")["id"]
    stage = util.open_stage(home, "actor", ["base"], code={"layers": layers, "actor": actor})
    if finished(stage):
        return
    with stage:
        tokenizer, model = util.load_pair(cfg, "actor", num_hidden_layers=layers)
        models.save(model, tokenizer, stage.folder)


def load_proxies(cfg, proxy):
    """The trained members of a proxy, with scores in standard deviations above the actor.

    The scale is measured with the answers of the course's actor, also for a proxy that is smaller.
    """
    home = proxy_config(cfg, proxy)
    members, path = util.load_critics(home), Path(home.root) / "scale.json"
    made = read_record(home.root, "critic")["id"]
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if made not in known:
        known = {made: [util.score_scale(member.model, cfg) for member in members]}
        path.write_text(json.dumps(known), encoding="utf-8")
    for member, (mean, std) in zip(members, known[made]):
        member.mean, member.std = mean, std
    return members


# --------------------------------------------------------------------------------------------------
# Policies


def train_policy(cfg, run, rows, times=8):
    """Trains a policy like `util.train_rlhf`, and judges it at the start and `times` on the way.

    curve.jsonl has a line for each time: KL, proxy, gold and length of the answers to `rows`;
    answers.jsonl has the last answers. A resumed run judges what is left.
    """
    home, rule = policy_config(cfg, run)
    critic = read_record(proxy_config(cfg, run.proxy).root, "critic")["id"]
    code = {"proxy": critic, "rule": rule, "judged": times, "rows": fingerprint(rows)}
    stage = util.open_stage(home, "rlhf", ["actor"], code=code, pairs=run.algorithm == "dpo")
    if finished(stage):
        return
    with stage:
        proxy = combined(load_proxies(cfg, run.proxy), rule)
        crew = util.load_crew(home, proxy)
        judge = partial(judged, replace(crew, reward=proxy, value_model=None), rows, home, stage)
        yield from stage.past
        if not stage.past:
            judge(0)
        loss, inputs = util.LOSSES.get(run.algorithm), (crew, home, stage)
        steps = util.rlhf_loop(*inputs, loss) if loss else util.dpo_loop(*inputs)
        for metrics in steps:
            step, last = metrics["step"], metrics["step"] == metrics["steps"]
            metrics = stage.log(metrics)
            if step in marks(metrics["steps"], times):
                judge(step, keep=last)
            yield metrics
        models.save(crew.policy, crew.tokenizer, stage.folder)


def policy_config(cfg, run):
    """(the config of a run in its own root, the rule of its ensemble)."""
    values = dict(run.values)
    rule = values.pop("rule", "mean")
    fixed = {"seed": cfg.seed + run.proxy.seed, "value_init": "actor", "lr_floor": 1.0}
    fixed |= {"algorithm": run.algorithm, "sample_every": 10_000}
    home = workspace(cfg, run.name, **fixed | ALGORITHMS.get(run.algorithm, {}) | values)
    if run.algorithm == "dpo":  # it learns from the pairs of the proxy
        pairs = Path(proxy_config(cfg, run.proxy).root) / "pairs.jsonl"
        write_lines(Path(home.root) / pairs.name, read_lines(pairs))
        home = home.changed(preference_data=pairs.name, feedback_weight=0)
    return home, rule


def marks(steps, times):
    """The steps after which a policy is judged: closer at the start, where most changes."""
    return {max(1, round(steps * (i / times) ** 2)) for i in range(1, times + 1)}


def combined(members, rule):
    """One reward from the members of a proxy."""
    return Ensemble(members, rule, 1.0) if members[1:] else members[0]


def judged(crew, rows, cfg, stage, step, keep=False):
    """Writes what one sampled answer to each row is worth; `keep` writes the answers as well."""
    answers = util.evaluate(crew, rows, cfg, util.rng_for(cfg, "judged", step))
    names = {"kl": "kl", "proxy": "reward", "gold": "judge", "length": "length"}
    line = {ours: [round(a[name], 4) for a in answers] for ours, name in names.items()}
    stage.append("curve.jsonl", [{"step": step} | line])
    if keep:
        kept = [
            {"row": i, "response": a["response"], "eos": a["eos"], "gold": a["judge"]}
            | {"proxy": round(a["reward"], 4)}
            for i, a in enumerate(answers)
        ]
        stage.append("answers.jsonl", kept)


def lines_of(cfg, run, name="curve.jsonl"):
    """The lines of a finished run's curve.jsonl or answers.jsonl."""
    return read_lines(artifact(policy_config(cfg, run)[0].root, "rlhf") / name)


# --------------------------------------------------------------------------------------------------
# Best-of-n: one pool of answers for all proxies


def sample_pool(cfg, rows, size):
    """The actor answers every row `size` times, and the judge grades the answers: answers.jsonl."""
    home = workspace(cfg, "pool")
    code = {"rows": fingerprint(rows), "size": size}
    stage = util.open_stage(home, "report", ["actor"], code=code)
    if finished(stage):
        return
    with stage:
        tokenizer, actor = util.load_pair(home, "actor")
        stops, grade = util.stops_of(actor, tokenizer), cache(partial(judged_answer, rows))
        places = [i for i in range(len(rows)) for _ in range(size)]
        prompts = [rows[i]["prompt"] for i in places]
        rng = util.rng_for(cfg, "pool")
        for part in util.generate_answers(actor, tokenizer, prompts, home, rng):
            texts, ends = util.decode(tokenizer, *part[2:]), util.ended(*part[2:], stops).tolist()
            here, places = places[: len(texts)], places[len(texts) :]
            answers = [
                {"row": i, "response": text, "eos": eos, "gold": grade(i, text, eos)}
                for i, text, eos in zip(here, texts, ends)
            ]
            stage.append("answers.jsonl", answers)
            yield {"step": len(rows) * size - len(places), "steps": len(rows) * size}


def judged_answer(rows, i, text, ended):
    return world.judge(rows[i], text, ended)


def fingerprint(rows):
    """A short hash of the questions, so that other questions give other runs."""
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]


def read_pool(cfg):
    """(the id of the pool, its answers)."""
    folder = artifact(Path(cfg.root) / FOLDER / "pool", "report")
    pool = read_record(folder.parents[1], "report")["id"]
    return pool, read_lines(folder / "answers.jsonl")


def score_pool(cfg, proxy, rows):
    """Every member of a proxy scores the whole pool: scores.jsonl, a line for each member.

    An answer that the pool holds several times is scored once.
    """
    home, (pool, answers) = proxy_config(cfg, proxy), read_pool(cfg)
    code = {"pool": pool, "rows": fingerprint(rows)}
    stage = util.open_stage(home, "report", ["actor", "critic"], code=code)
    if finished(stage):
        return
    with stage:
        pairs = [(rows[answer["row"]]["prompt"], answer["response"]) for answer in answers]
        several = list(dict.fromkeys(pairs))
        for i, member in enumerate(load_proxies(cfg, proxy)):
            score = dict(zip(several, member(*zip(*several))))
            stage.append("scores.jsonl", [[round(score[pair], 4) for pair in pairs]])
            yield {"step": i + 1, "steps": proxy.members}


def pool_of(cfg, proxy, size, rule="mean"):
    """(scores, gold) of a pool, (prompts, size) each, with the rule of the ensemble."""
    lines = read_lines(artifact(proxy_config(cfg, proxy).root, "report") / "scores.jsonl")
    scores = combined([lambda *_, line=line: line for line in lines], rule)([], [])
    gold = [answer["gold"] for answer in read_pool(cfg)[1]]
    return np.reshape(scores, (-1, size)), np.reshape(gold, (-1, size))


# --------------------------------------------------------------------------------------------------
# The plan


class Plan(NamedTuple):
    """Everything that the lesson trains and measures."""

    seeds: int
    questions: int  # that every policy answers each time
    prompts: int  # of the pool
    size: int  # answers to each of them
    strong: Proxy
    weak: Proxy
    runs: list  # of one seed; the other seeds are alike
    grid: list  # proxies whose best-of-n shows what moves the coefficients

    @staticmethod
    def of_seed(thing, seed):
        """The same run or proxy with another seed."""
        if isinstance(thing, Run):
            return thing._replace(proxy=thing.proxy._replace(seed=seed))
        return thing._replace(seed=seed)

    def every(self, things):
        return [Plan.of_seed(thing, seed) for thing in things for seed in range(self.seeds)]

    @property
    def sizes(self):
        """The n of best-of-n."""
        return [2**i for i in range(self.size.bit_length())]


def plan_of(quick=False):
    """The whole plan, or one that takes a fifth of its time."""
    rollout = 48 if quick else 64
    strong, weak = Proxy(0, 3_000 if quick else 0), Proxy(0, 300, 0.2, 1)
    team = weak._replace(members=4)
    common = {"kl_coef": 0.0, "rollout": rollout, "minibatch": rollout // 2}
    common |= {"steps": 24, "policy_lr": 4e-4}

    def run(curve, proxy, algorithm, **values):
        how = common
        if algorithm == "dpo":
            how = {"dpo_beta": 0.05, "dpo_lr": 2e-4, "dpo_epochs": 8 if proxy.layers else 1}
        return Run(curve, proxy, algorithm, tuple((how | values).items()))

    names = ("ppo", "rloo") if quick else ("ppo", "grpo", "rloo", "dpo")
    runs = [run(f"strong {name.upper()}", strong, name) for name in names]
    exploiting = ("rloo",) if quick else names
    runs += [run(f"weak {name.upper()}", weak, name) for name in exploiting]
    runs += [
        run("cure ensemble, minimum", team, "rloo", rule="min"),
        run("cure higher KL price", weak, "rloo", kl_coef=0.3),
    ]
    if not quick:
        runs += [
            run("cure ensemble, mean", team, "rloo"),
            run("cure ensemble, mean - deviation", team, "rloo", rule="cautious"),
            run("cure more pairs", weak._replace(pairs=3_000), "rloo"),
            run("cure length penalty", weak, "rloo", length_penalty=0.05),
            *(run(f"weak {x.upper()}, priced", weak, x, kl_coef=0.3) for x in ("ppo", "grpo")),
            run("weak DPO, priced", weak, "dpo", dpo_beta=0.3),
        ]
    pairs = (300, 3_000) if quick else (100, 300, 1_000, 3_000)
    noises = (0.0,) if quick else (0.0, 0.1, 0.3)
    cells = [(count, 0.2) for count in pairs] + [(300, noise) for noise in noises]
    grid = [Proxy(0, count, noise, layers) for count, noise in cells for layers in (1, 0)]
    if quick:
        return Plan(1, 96, 48, 64, strong, weak, runs, grid)
    return Plan(3, 128, 80, 128, strong, weak, runs, grid)


# --------------------------------------------------------------------------------------------------
# Running it


def questions(cfg, plan):
    """The held-out questions of the lesson; the judge must know their answers."""
    rows = util.load_eval_rows(cfg)[: plan.questions]
    if not all(map(world.knows, rows)):
        raise CourseError(
            "The overoptimisation lab needs a judge that knows the truth, and these rows have "
            "none: train base model and actor on the embedded world (data = '')."
        )
    return rows


def carry_out(cfg, plan, workers=2):
    """Trains and measures what is not there yet, in worker processes; yields how far it is.

    First the proxies and the pool, then what needs them. Every worker computes with one thread, so
    the numbers do not depend on their count.
    """
    rows = questions(cfg, plan)
    proxies = list(dict.fromkeys(proxies_of(plan)))
    slow_first = sorted(proxies, key=lambda p: -(p.pairs or 10**6) * p.members)
    first = [(train_proxy, proxy) for proxy in slow_first]
    first.insert(2, (sample_pool, rows[: plan.prompts], plan.size))
    second = [(train_policy, run, rows) for run in plan.every(plan.runs)]
    second += [(score_pool, proxy, rows[: plan.prompts]) for proxy in proxies]
    done, total = 0, len(first) + len(second)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # workers import from here
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for tasks in (first, second):
            futures = [pool.submit(in_worker, cfg, *task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    done += 1
                    yield {"step": done, "steps": total}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def proxies_of(plan):
    return plan.every([plan.strong, plan.weak, *plan.grid, *(run.proxy for run in plan.runs)])


def in_worker(cfg, work, *args):
    """Drains one of the generators above, with one thread and without its printed lines."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in work(cfg, *args):
            pass


def watch(cfg, steps):
    """Drains `carry_out` under a line that tells how far it is; returns the seconds.

    progress.jsonl tells the same to `python -m lab overoptimise`.
    """
    start, path = time.perf_counter(), Path(cfg.root) / FOLDER / "progress.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = display({"text/plain": "Trainings and measurements"}, raw=True, display_id=True)
    with open(path, "w", encoding="utf-8") as file:
        for at in steps:
            spent = time.perf_counter() - start
            text = f"{at['step']} of {at['steps']} trainings and measurements after {spent:.0f} s"
            line.update({"text/plain": text}, raw=True)
            file.write(json.dumps(at) + "\n")
            file.flush()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# What was found


def seeds_of(cfg, plan, run):
    """The curve of a run for every seed: {"kl", "gold", "proxy", "length"}, (steps, questions)."""
    found = []
    for one in plan.every([run]):
        lines = lines_of(cfg, one)
        found.append({x: np.array([line[x] for line in lines]) for x in lines[0] if x != "step"})
    return found


def best_of_seeds(cfg, plan, proxy, rule="mean"):
    """Best-of-n for every seed of a proxy, in the same form: (sizes, prompts)."""
    found = []
    for one in plan.every([proxy]):
        scores, gold = pool_of(cfg, one, plan.size, rule)
        columns = {"gold": gold, "proxy": scores}
        seed = {x: best_of(scores, values, plan.sizes).T for x, values in columns.items()}
        kl = [[best_of_kl(n)] for n in plan.sizes]
        found.append(seed | {"kl": np.broadcast_to(kl, seed["gold"].shape)})
    return found


def curves_of(cfg, plan, word):
    """{name: seeds} of all runs whose curve begins with `word`, best-of-n first; those that pay
    for KL have ", priced" in their names."""
    runs = [run for run in plan.runs if run.curve.startswith(word + " ")]
    found = {}
    if word in ("strong", "weak"):
        found["best-of-n"] = best_of_seeds(cfg, plan, getattr(plan, word))
    return found | {run.curve.removeprefix(word + " "): seeds_of(cfg, plan, run) for run in runs}


def free(curves):
    """The curves that cross a whole range of KL: those that do not pay for it."""
    return {name: seeds for name, seeds in curves.items() if "priced" not in name}


def fits_of(curves):
    """{name: Description} of the points of all seeds."""
    return {
        name: describe("best of n" if name == "best-of-n" else "rl", seeds)
        for name, seeds in curves.items()
    }


def grid_of(cfg, plan):
    """The coefficients of best-of-n for every proxy of the grid, over its seeds."""
    layers = util.load_pair(cfg, "actor")[1].config.num_hidden_layers
    table = []
    for proxy in plan.grid:
        found = describe("best of n", best_of_seeds(cfg, plan, proxy)).fit
        row = {"layers": proxy.layers or layers, "pairs": proxy.pairs, "noise": proxy.noise}
        table.append(row | {"fit": found})
    return table


BUDGETS = (0.5, 1, 2)  # nats


def gold_per_nat(curves):
    """A line for each curve: the gold gained per nat at each budget, with its interval; the best
    gold, the last, and the KL of both."""
    table = []
    for name, seeds in curves.items():
        columns = ([seed[x] for seed in seeds] for x in ("kl", "gold"))
        gains = zip(BUDGETS, gain_per_nat(*columns, BUDGETS))
        line = {"policy": name} | {f"gain per nat at {nats:g}": gain for nats, gain in gains}
        gold, kl = average(seeds, "gold"), average(seeds, "kl")
        best = int(gold.argmax())
        line |= {"best gold": gold[best], "at KL": kl[best]}
        table.append(line | {"last gold": gold[-1], "last KL": kl[-1]})
    return table


def shown(table):
    """The table of `gold_per_nat` with its intervals in words."""
    rows = [
        {x: interval_text(value) if isinstance(value, dict) else value for x, value in row.items()}
        for row in table
    ]
    return pd.DataFrame(rows)


def interval_text(found):
    return "-" if math.isnan(found["low"]) else report.with_interval(found)


def suspects(cfg, plan, rows, most=200):
    """The answers with the highest proxy among those that the judge finds wrong, and their cheats.

    They come from the pool and from the last answers of the policies that trusted the weak proxy.
    """
    scores, _ = pool_of(cfg, plan.weak, plan.size)
    _, answers = read_pool(cfg)
    found = [a | {"from": "actor", "proxy": s} for a, s in zip(answers, scores.ravel().tolist())]
    right = [a for a in answers if a["gold"] > 0.99]
    words = {kind: [] for kind in world.KINDS}
    for answer in right:
        words[rows[answer["row"]]["kind"]].append(len(answer["response"].split()))
    usual = {kind: float(np.median(counts)) if counts else 10.0 for kind, counts in words.items()}
    for run in plan.runs:
        if run.curve.startswith("weak "):
            own = lines_of(cfg, run, "answers.jsonl")
            found += [answer | {"from": run.curve.removeprefix("weak ")} for answer in own]
    several = {(a["row"], a["response"]): a for a in found if a["gold"] < 0.5}
    top = sorted(several.values(), key=lambda a: -a["proxy"])[:most]
    for answer in top:
        row = rows[answer["row"]]
        kind, text, eos = row["kind"], answer["response"], answer["eos"]
        answer |= {"prompt": row["prompt"], "cheat": cheat(kind, text, eos, usual[kind])}
        answer["reason"] = world.explain(row, text, eos)[1]
    return top


def by_cheat(top):
    """A line for each kind of cheat: its share among the suspects, and the worst of them."""
    table = []
    for name in dict.fromkeys(answer["cheat"] for answer in top):
        own = [answer for answer in top if answer["cheat"] == name]
        worst = {x: own[0][x] for x in ("from", "prompt", "response", "proxy", "reason")}
        table.append({"cheat": name, "share": f"{len(own) / len(top):.0%}"} | worst)
    return sorted(table, key=lambda line: -float(line["share"][:-1]))


@torch.no_grad()
def scores_along(member, prompt, answer):
    """(tokens of an answer, the proxy's score after each of them): the last one is its reward."""
    tokens = util.encode_pairs(
        member.tokenizer, [prompt], [answer], member.cfg, member.model.device
    )
    prompt_ids, prompt_mask, ids, mask = tokens
    whole = torch.cat([prompt_ids, ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    wanted = torch.cat([torch.zeros_like(prompt_mask), mask], dim=1)
    scores = util.fast_path.scores(member.model, *whole, wanted)
    words = [member.tokenizer.decode(token) for token in ids[mask]]
    return words, ((scores - member.mean) / member.std).tolist()


def strips(cfg, plan, table):
    """What `report.token_strip` draws: the score after each token of each line of `by_cheat`."""
    member, found = load_proxies(cfg, plan.weak)[0], {}
    for line in table:
        words, scores = scores_along(member, line["prompt"], line["response"])
        found[f"{line['cheat']}: {line['prompt']}"] = words, {"score so far": scores}
    return found


def results(cfg, plan, rows, seconds):
    """All figures of the lesson as plain numbers, for results.json and the pages of docs/."""
    groups = {word: curves_of(cfg, plan, word) for word in ("strong", "weak", "cure")}
    fits = {word: fits_of(free(groups[word])) for word in ("strong", "weak")}
    sentences = [
        verdict(f"{word} proxy, {name}", found)
        for word, of_word in fits.items()
        for name, found in of_word.items()
    ]
    top = suspects(cfg, plan, rows)
    found = {
        "seeds": plan.seeds,
        "questions": plan.questions,
        "prompts": plan.prompts,
        "pool": plan.size,
        "minutes": seconds / 60,
        "training minutes": trained_seconds(cfg, plan) / 60,
        "curves": {
            word: {name: [means(seed) for seed in seeds] for name, seeds in curves.items()}
            for word, curves in groups.items()
        },
        "fits": {
            word: {name: fit_numbers(found) for name, found in of_word.items()}
            for word, of_word in fits.items()
        },
        "grid": [row | {"fit": row["fit"]._asdict()} for row in grid_of(cfg, plan)],
        "gold per nat": {word: gold_per_nat(groups[word]) for word in groups},
        "cheats": [{x: line[x] for x in ("cheat", "share")} for line in by_cheat(top)],
        "sentences": sentences,
    }
    return plain(found)


def means(seed):
    return {column: values.mean(1).tolist() for column, values in seed.items()}


def fit_numbers(found):
    ahead = found.forecast and found.forecast._asdict()
    return found.fit._asdict() | {"forecast": ahead, "noise": found.noise}


def trained_seconds(cfg, plan):
    """What all trainings took, added up over the workers; those used again count as well."""
    roots = [(proxy_config(cfg, proxy).root, "critic") for proxy in {*proxies_of(plan)}]
    roots += [(policy_config(cfg, run)[0].root, "rlhf") for run in plan.every(plan.runs)]
    return sum(read_record(root, name)["seconds"] for root, name in roots)


def plain(value):
    """Numbers that JSON can hold: rounded to four digits, None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return round(float(value), 4) if math.isfinite(value) else None
    return value


def write_results(cfg, found, figure):
    """results.json and the first figure, from which `python -m lab.record` makes pages of docs/."""
    folder = Path(cfg.root) / FOLDER
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "overoptimisation.svg").write_text(report.svg(figure), encoding="utf-8")
