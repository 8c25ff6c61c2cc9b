"""python -m lab.record: the last headless run becomes what the repository shows.

The notebooks of the run, with their outputs, become the committed ones. The tables and pictures of
README.md, README.zh-CN.md and docs/ are written anew from model/report and the JSON files in docs/,
those of the optional lesson in more/ from model/overoptimisation, if it has run.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import mean, median

import nbformat
import pandas as pd

from lab import drawing, report
from lab.address import between_markers
from lab.runs import NOTEBOOKS, read_record

HOME = Path(__file__).resolve().parent.parent
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
LEFT_OUT = [
    "questions",
    "reward",
    "length (tokens)",
    "distinct-2",
    "ended",
]  # of the READMEs' table
WORDS = {  # of README.zh-CN.md
    "model": "模型",
    "its most likely answer": "最可能的回答",
    "judge": "裁判",
    "judge, sampled": "裁判(采样)",
    "judge, greedy": "裁判(贪心)",
    "helpful": "有用",
    "harmless": "无害",
    "honest": "诚实",
    "empathetic": "共情",
    "beats the actor (judge)": "胜过 actor(裁判)",
    "KL (nats)": "KL(nat)",
    "seconds": "秒",
}


def cleaned(book):
    """The notebook without the traces of its run: papermill's notes and injected parameters."""
    cells = []
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else None
            if "metadata" in output:
                output.metadata = {}
        cells.append(cell)
    book.cells, book.metadata = cells, {**KEPT, "language_info": {"name": "python"}}
    count = 0
    for cell in book.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return book


# --------------------------------------------------------------------------------------------------
# Text between markers


def fill(path, name, text):
    """Writes text between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    page = path.read_text(encoding="utf-8")
    path.write_text(between_markers(path, page, name, text), encoding="utf-8")


def table(columns, rows, words):
    lines = [columns, ["---"] * len(columns), *rows]
    lines[0] = [words.get(column, column) for column in columns]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def answers(rows, words):
    """The first question about feelings, and each model's greedy answer to it."""
    greedy = [row for row in rows if row["temperature"] == 0 and row["kind"] == "feelings"]
    prompt = greedy[0]["prompt"]
    question = prompt.removeprefix("Human: ").removesuffix(" Assistant:")
    found = [row for row in greedy if row["prompt"] == prompt]
    cells = [(row["model"], row["response"] or "…", f"{row['judge']:.2f}") for row in found]
    return f"> {question}\n\n" + table(["model", "its most likely answer", "judge"], cells, words)


def result(summary, accuracy, words):
    """The judge's columns of the table of 4_test, and the KL."""
    frame = report.result_table(summary).drop(columns=LEFT_OUT, errors="ignore")
    rows = [[name, *row] for name, row in zip(frame.index, frame.to_numpy().tolist())]
    return table(["model", *frame.columns], rows, words) + accuracy


def algorithms(runs, words, chosen=None):
    """The judge's score of every algorithm over its seeds."""
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name and (chosen is None or name in chosen)]
        if own:
            sampled = ", ".join(f"{run['judge']:.3f}" for run in own)
            greedy = ", ".join(f"{run['greedy']:.3f}" for run in own if "greedy" in run) or "-"
            spent = median(run["seconds"] for run in own)
            seconds = f"{spent:.0f}" if spent else "-"
            rows.append([name, sampled, greedy, f"{mean(run['KL'] for run in own):.2f}", seconds])
    return table(["", "judge, sampled", "judge, greedy", "KL (nats)", "seconds"], rows, words)


def evaluation(runs):
    """The figures of bench/evaluate.py: a column for each model, and a table of the reward models.
    Means over the seeds, in brackets the lowest and the highest."""
    models = {name: [run["models"][name] for run in runs] for name in runs[0]["models"]}
    critics = {name: [run["critics"][name] for run in runs] for name in runs[0]["critics"]}
    rows = [[title, *(spread(of, x) for x in models.values())] for title, of in FIGURES.items()]
    right = [[name, *(spread(of, x) for of in OF_CRITICS.values())] for name, x in critics.items()]
    both = table(["", *models], rows, {}), table(["on pairs", *OF_CRITICS], right, {})
    return "\n".join(both)


def spread(figure, found):
    """The mean of a figure over the seeds with its lowest and highest value; a dash if there is
    none."""
    try:
        values = [figure(one) for one in found]
        low, high = min(values), max(values)
    except (KeyError, TypeError):
        return "-"
    more = f" ({report.digits(low, high)} to {report.digits(high)})" if low < high else ""
    return report.digits(mean(values), high) + more


FIGURES = {  # row of the table in docs/evaluation.md: where it stands in an entry of report.json
    "judge, sampled": lambda m: m["judge"]["mean"],
    "judge, greedy": lambda m: m["judge_greedy"]["mean"],
    "helpful": lambda m: m["categories"]["helpful"]["mean"],
    "harmless": lambda m: m["categories"]["harmless"]["mean"],
    "honest": lambda m: m["categories"]["honest"]["mean"],
    "empathetic": lambda m: m["categories"]["empathetic"]["mean"],
    "beats the actor (judge)": lambda m: m["wins"]["judge"]["mean"],
    "beats the actor (reward)": lambda m: m["wins"]["reward"]["mean"],
    "beats the actor (watchdog)": lambda m: m["wins"]["watchdog"]["mean"],
    "reward": lambda m: m["reward"],
    "KL (nats)": lambda m: m["kl"],
    "KL backwards (nats)": lambda m: m["kl_backwards"],
    "implicit reward: right pairs": lambda m: m["implicit_reward"]["accuracy"],
    "implicit reward: margin": lambda m: m["implicit_reward"]["margin"],
    "perplexity of the reference answers": lambda m: m["reference_perplexity"],
    "calibration error": lambda m: m["calibration"]["error"],
    "length (tokens)": lambda m: m["length"],
    "distinct-1": lambda m: m["distinct_1"],
    "distinct-2": lambda m: m["distinct_2"],
    "self-BLEU": lambda m: m["self_bleu"],
    "answers said before": lambda m: m["said_before"],
}
OF_CRITICS = {
    "right": lambda x: x["accuracy"],
    "margin": lambda x: x["margin"],
    "calibration error": lambda x: x["calibration_error"],
}


def real(runs, words):
    """The figures of bench/real.py: each metric over all seeds, and the means of the others."""
    metrics = list(runs[0]["models"]["actor"]["metrics"])
    means = {"kl": "KL (nats)", "length": "length (tokens)", "distinct_2": "distinct-2"}
    means["perplexity"] = "perplexity"
    rows = []
    for name in runs[0]["models"]:
        found = [run["models"][name] for run in runs]
        row = [", ".join(f"{x['metrics'][m]['mean']:.2f}" for x in found) for m in metrics]
        for key in means:
            known = [x[key] for x in found if key in x]
            row.append(report.digits(mean(known)) if known else "-")
        rows.append([name, *row])
    return table(["model", *metrics, *means.values()], rows, words)


def real_answers(run, words):
    """The first answers of a run of bench/real.py, before and after."""
    models = [name for name in run["models"] if name in run["answers"][0]]
    rows = []
    for row in run["answers"]:
        prompt = row["prompt"].removeprefix("Human: ").removesuffix(" Assistant:")
        rows.append([prompt, *(" ".join(row[name].split()) for name in models)])
    return table(["trouble", *models], rows, words)


def real_curves(run):
    """The curves of 3_rlhf in a run of bench/real.py."""
    history = pd.DataFrame(run["curves"]).dropna(axis=1, how="all")
    return report.svg(report.curves(history, report.panels("ppo")))


def pages(root):
    """Writes the tables and pictures of README.md, README.zh-CN.md and docs/."""
    folder, docs = Path(root) / "model" / "report", HOME / "docs"
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    summary = found["models"] | {f"best of {found['best_of']['n']}": found["best_of"]}
    right, minutes = found["critic"]["accuracy"], sum(found["seconds"].values()) / 60
    peak = max(read_record(root, stage)["peak_memory_mb"] for stage in found["seconds"]) / 1000
    said = {
        "README.md": f"\n{found['rows']:,} held-out questions (best-of-n: "
        f"{found['best_of']['questions']:,}); the columns of single kinds are for sampled answers. "
        f"The reward model prefers the better answer in {right:.0%} of the held-out "
        f"pairs. Training took {minutes:.1f} minutes and {peak:.1f} GB on two cores without a "
        "GPU. The same seed on the same machine gives the same numbers.\n",
        "README.zh-CN.md": f"\n{found['rows']:,} 个留出问题(best-of-n:"
        f"{found['best_of']['questions']:,} 个);各类问题的列是采样回答的分数。"
        f"奖励模型在 {right:.0%} 的留出偏好对上选择了更好的回答。"
        f"训练在两个 CPU 核上用时 {minutes:.1f} 分钟,内存 {peak:.1f} GB。"
        "同一台机器上相同的种子得到相同的数字。\n",
    }
    runs = docs / "algorithms.json"
    runs = json.loads(runs.read_text(encoding="utf-8")) if runs.exists() else []
    main = ("actor", "ppo", "grpo", "rloo", "dpo", f"best of {found['best_of']['n']}")
    for name, text in said.items():
        words = WORDS if "zh" in name else {}
        fill(HOME / name, "answers", answers([json.loads(line) for line in lines], words))
        fill(HOME / name, "result", result(summary, text, words))
        fill(HOME / name, "algorithms", algorithms(runs, words, main))
    fill(docs / "algorithms.md", "algorithms", algorithms(runs, {}))
    if (docs / "evaluation.json").exists():
        runs = json.loads((docs / "evaluation.json").read_text(encoding="utf-8"))
        fill(docs / "evaluation.md", "evaluation", evaluation(runs))
    if (docs / "real.json").exists():
        runs = json.loads((docs / "real.json").read_text(encoding="utf-8"))
        for path, words in ((HOME / "README.md", {}), (HOME / "README.zh-CN.md", WORDS)):
            fill(path, "real", real(runs, words))
        fill(docs / "real.md", "real", real(runs, {}))
        fill(docs / "real.md", "real answers", real_answers(runs[0], {}))
        (docs / "real.svg").write_text(real_curves(runs[0]), encoding="utf-8")
    (docs / "judged.svg").write_text(report.svg(report.headline(found["models"])), encoding="utf-8")
    (docs / "four_models.svg").write_text(drawing.four_models(), encoding="utf-8")
    (docs / "course.svg").write_text(drawing.course(), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The optional lesson


def lesson(root):
    """more/overoptimisation.ipynb, and its page, figures and picture in docs/; False if it has not
    run to its end."""
    folder, docs = Path(root) / "model" / "overoptimisation", HOME / "docs"
    name, results = "overoptimisation.ipynb", folder / "results.json"
    if not results.exists():
        return False
    notebook(Path(root) / "model" / "notebooks" / name, HOME / "more" / name)
    shutil.copy(results, docs / "overoptimisation.json")
    shutil.copy(folder / "overoptimisation.svg", docs)
    found, page = json.loads(results.read_text(encoding="utf-8")), docs / "overoptimisation.md"
    fill(page, "size", size_of(found))
    fill(page, "fits", fits(found["fits"]))
    fill(page, "sentences", "".join(f"- {sentence}\n" for sentence in found["sentences"]))
    fill(page, "grid", grid(found["grid"]))
    fill(page, "cures", gains(found["gold per nat"]["cure"], found["gold per nat"]["weak"]))
    for proxy in ("strong", "weak"):
        fill(page, f"gold per nat, {proxy}", gains(found["gold per nat"][proxy]))
    cheats = [[line["cheat"], line["share"]] for line in found["cheats"]]
    fill(page, "cheats", table(["cheat", "share"], cheats, {}))
    return True


def size_of(found):
    pool = f"{found['pool']} answers to each of {found['prompts']} questions"
    return (
        f"Seeds: {found['seeds']}. Questions for every point of a curve: {found['questions']}. "
        f"Pool: {pool}. Everything together took {found['minutes']:.1f} minutes on two cores.\n"
    )


def with_error(value, error):
    return "-" if value is None else f"{value:.2f} ± {error:.2f}"


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def fits(groups):
    """a, b and the turn of every curve, and how well its first half foretells the second."""
    rows = []
    for proxy, curves in groups.items():
        for name, fit in curves.items():
            letters = [with_error(fit[x], fit[f"{x}_error"]) for x in ("a", "b", "turn")]
            ahead = fit["forecast"] or {"error": None, "naive": None}
            errors = fit["error"], fit["noise"], ahead["error"], ahead["naive"]
            errors = [number(x, 3) for x in errors]
            rows.append([proxy, name, *letters, *errors])
    head = ["proxy", "policy", "a", "b", "turn at d", "error", "noise", "foretold", "flat line"]
    return table(head, rows, {})


def grid(cells):
    """The coefficients of best-of-n by layers, pairs and noise of the proxy."""
    rows = [
        [cell["layers"], cell["pairs"], f"{cell['noise']:.0%}"]
        + [with_error(cell["fit"][x], cell["fit"][f"{x}_error"]) for x in ("a", "b", "turn")]
        for cell in cells
    ]
    return table(["layers", "pairs", "turned round", "a", "b", "turn at d"], rows, {})


def gains(lines, more=()):
    """Gold per nat with its intervals; the best gold and the last, each with its KL."""
    rows = []
    for line in [*(x for x in more if x["policy"] == "RLOO"), *lines]:
        name = line["policy"] if line in lines else "no cure"
        budgets = {x: found for x, found in line.items() if x.startswith("gain")}
        cells = [
            "-" if found["low"] is None else report.with_interval(found)
            for found in budgets.values()
        ]
        last = [number(line[x]) for x in ("best gold", "at KL", "last gold", "last KL")]
        rows.append([name, *cells, *last])
    return table(["policy", *budgets, "best gold", "at KL", "last gold", "last KL"], rows, {})


def notebook(source, target):
    """Copies an executed notebook without the traces of its run."""
    nbformat.write(cleaned(nbformat.read(source, as_version=4)), target)
    print("recorded", target.name)


def main(root=HOME):
    for name in NOTEBOOKS.values():
        notebook(Path(root) / "model" / "notebooks" / name, HOME / name)
    pages(root)
    lesson(root)
    print("recorded README.md, README.zh-CN.md and docs/")


if __name__ == "__main__":
    main(*sys.argv[1:])
