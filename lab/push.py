"""Uploads the model of a stage to the hub, with a model card made from its stage.json."""

import json
from dataclasses import fields
from pathlib import Path

from lab import CourseError
from lab.compare import NOT_COMPARED
from lab.config import Config
from lab.data import entries
from lab.gguf import SMOLLM2
from lab.hub import reason_of
from lab.runs import artifact, digest, has_record, read_record
from lab.tokens import FRAME
from lab.world import knows

KINDS = {  # stage: (title, what it is)
    "base": ("Base model", "A language model that has been pretrained and not yet been taught to "
             "answer."),
    "actor": ("Actor", "A language model after supervised fine-tuning (SFT) on answers."),
    "critic": ("Reward model", "**This is a reward model. It writes no text**: it gives a score to "
               "an answer, and answers that people prefer should score higher."),
    "rlhf": ("Policy", "A language model after reinforcement learning from human feedback (RLHF) "
             "with the algorithm {algorithm}."),
}  # fmt: skip
SHARES = {"actor": "sft", "critic": "preference", "rlhf": "prompt"}
UPLOADED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".py"}


def push(root, stage, name, *, send=False, say=print):
    """Prints the model card and the files of a stage; with `send` it uploads them to the hub."""
    import huggingface_hub as hub

    if not is_name(name):
        raise CourseError(
            f"{name!r} is not a name on the hub: write your account, a slash and a name of "
            "letters, digits, - and _, for example ada/tiny-rlhf."
        )
    folder, record = artifact(root, stage), read_record(root, stage)
    card = str(hub.ModelCard(card_of(root, stage, name, record), ignore_metadata_errors=False))
    files = {file: size for file, size in record["files"].items() if is_uploaded(file)}
    if not send:
        say(card)
        say("\nFiles:")
        for file, size in {"README.md": len(card.encode()), **files}.items():
            say(f"{size:>13,} bytes  {file}")
        if "\nlicense:" not in card:
            say(
                "\nThe card names no licence: add one on the hub, so that others may use the model."
            )
        say(f"\nNothing has been sent. --yes uploads this to {name}, where everybody can see it.")
        return None
    if hub.get_token() is None:
        raise CourseError(
            "You are not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token "
            "that may write. Nothing has been sent."
        )
    try:
        api = hub.HfApi()
        address = api.create_repo(name, exist_ok=True)  # a private one stays private
        parts = {"README.md": card.encode(), **{file: folder / file for file in files}}
        adds = [hub.CommitOperationAdd(file, part) for file, part in parts.items()]
        title = f"Upload model/{stage}"  # one commit: all files arrive, or none
        api.create_commit(address.repo_id, adds, commit_message=title)
    except Exception as error:  # the hub's client and its network library have many types
        raise CourseError(f"{name} was not uploaded: {refusal(error, name)}.") from None
    say(f"Uploaded: {address}")
    return address


def is_name(text):
    """Returns whether a text can be the name of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
        return True
    except HFValidationError:
        return False


def is_uploaded(file):
    """Returns whether a file belongs to the model: no logs, no samples, no separate adapters."""
    path = Path(file)  # the weights contain the adapters; adapter_config.json names local folders
    return path.suffix in UPLOADED and "adapter" not in path.parts


def refusal(error, name):
    """Returns why the hub did not take an upload, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the hub does not accept your token. Log in again with `hf auth login`, or set "
        "HF_TOKEN to a valid token",
        403: f"your token may not write to {name}. Use a token with the permission to write, or "
        "the name of your own account",
        404: f"the hub does not find {name}. The part before the slash must be your account, or "
        "an organisation that you belong to",
    }
    if status in known:
        return known[status]
    network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    if status is None and network:
        return f"the hub cannot be reached ({reason_of(error)}). Check your connection"
    return reason_of(error)


# --------------------------------------------------------------------------------------------------
# The card


def card_of(root, stage, name, record):
    """Returns the model card as markdown with YAML metadata."""
    config, source = record["config"], base_of(root)
    title, what = KINDS[stage]
    embedded, data = data_of(root, stage, record, source)
    algorithm = config.get("algorithm", "ppo") if stage == "rlhf" else None
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"{title}, made by `{stage}` of the course Simple RLHF Tiny. "
        f"{what.format(algorithm=algorithm)}",
        "It started from random weights." if source == "tiny" else f"It started from {source}.",
        f"## Data\n\n{data}",
        f"## Parameters\n\n{parameters_of(root, stage, record)}",
        f"## Scores\n\n{scores_of(root, stage, record)}",
        f"## Limits\n\n{limits_of(source, embedded)}",
        f"## How to load it\n\n```python\n{code_of(root, stage, name, config)}\n```",
    ]
    if members := sorted({file.split("/")[0] for file in record["files"] if "member-" in file}):
        parts.append(
            f"The ensemble has {len(members) + 1} reward models; the other ones are in the folders "
            f"{', '.join(members)} (`subfolder=` of `from_pretrained`)."
        )
    if any(file.startswith("watchdog/") for file in record["files"]):
        parts.append(
            "The folder watchdog has a second reward model, which learned from other pairs. It "
            "watches over the training of a policy; no reward contains it."
        )
    return metadata(stage, source, embedded, algorithm) + "\n\n".join(parts) + "\n"


def base_of(root):
    """Returns where the base model came from: "tiny", a name on the hub, or "a local model"."""
    record = read_record(root, "base")
    if record["metrics"].get("preset") == "tiny":
        return "tiny"
    source = record["config"].get("base_model", "auto")
    source = {"auto": "facebook/opt-125m", "smollm2": SMOLLM2}.get(source, source)
    return source if is_name(source) and not Path(source).exists() else "a local model"


def metadata(stage, source, embedded, algorithm):
    """Returns the YAML that the hub reads: kind of model, base model, licence."""
    from huggingface_hub import ModelCardData

    tags = {"base": [], "actor": ["sft"], "critic": ["reward-model"]}.get(stage, [algorithm])
    known = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if stage == "critic" else "text-generation",
        "tags": ["rlhf", *tags],
    }
    if embedded:
        known["language"] = "en"
    if source not in ("tiny", "a local model"):
        known |= {
            "base_model": source, "license": "other", "license_name": "license-of-the-base-model",
            "license_link": f"https://huggingface.co/{source}",
        }  # fmt: skip
    elif source == "tiny" and embedded:
        known["license"] = "mit"
    return f"---\n{ModelCardData(**known).to_yaml()}\n---\n\n"


def data_of(root, stage, record, source):
    """Returns whether the data is the embedded one, and a paragraph about it."""
    if stage == "base":
        if source != "tiny":
            return False, "None: this is a copy of the model that it started from."
        count = record["config"].get("pretrain_documents", 0)
        return True, f"{count:,} documents about an invented world, written by a program."
    path, config = Path(root) / "dataset" / "train.json", record["config"]
    share = "preference" if config.get("algorithm") == "dpo" and stage == "rlhf" else SHARES[stage]
    used = f"This stage used the share {config.get(f'{share}_share')} of its rows."
    if given := config.get(f"{share}_data") or config.get("data"):
        return False, f"`{Path(given).name if Path(given).exists() else given}`. {used}"
    if config.get("reader") or not path.exists() or digest(path) != record["data"]["train.json"]:
        return False, f"`train.json` of the course that made it. {used}"
    rows = [row for _, row in entries(path)]
    if len(rows) and isinstance(rows[0], dict) and knows(rows[0]):
        about = "questions and answers about an invented world, written by a program"
        return True, f"`train.json`: {len(rows):,} rows, {about}. {used}"
    return False, f"`train.json`: {len(rows):,} rows. {used}"


def parameters_of(root, stage, record):
    """Returns a table of the parameters of the stage that differ from its preset."""
    preset = record["config"].get("preset", "auto")
    if preset == "auto":
        preset = read_record(root, "base")["metrics"].get("preset", "tiny")
    plain = Config(preset)
    lines = []
    for f in fields(Config):
        value, usual = record["config"].get(f.name), getattr(plain, f.name)
        private = f.name in {*NOT_COMPARED, "preset", "base_model"}
        if value not in (None, usual) and not private and {"all", stage} & {*f.metadata["stages"]}:
            lines.append(f"| {f.name} | {cell(value)} | {cell(usual)} |")
    if not lines:
        return f"Those of the preset `{preset}`."
    head = ["", "| parameter | value | preset |", "|---|---|---|"]
    return "\n".join([f"Those of the preset `{preset}`, except:", *head, *lines])


def cell(value):
    return str(value).replace("|", "\\|")


def scores_of(root, stage, record):
    """Returns what 4_test measured, if it measured this version of the model."""
    missing = "Not measured: `4_test` has not tested this version of the model."
    if not has_record(root, "report"):
        return missing
    if read_record(root, "report")["inputs"].get(stage) != record["id"]:
        return missing
    try:
        path = Path(root) / "model" / "report" / "report.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report["critic"] if stage == "critic" else report["models"][stage]
    except (OSError, ValueError, KeyError, TypeError):
        return missing
    if stage == "critic":
        if not found:
            return missing
        lines = [("held-out pairs ranked right", f"{found['accuracy']:.1%}")]
        lines += [(f"of the kind {kind}", f"{x:.1%}") for kind, x in found["kinds"].items()]
    else:
        lines = [("questions", f"{found['questions']:,}")]
        for key, what in (("judge", "sampled"), ("judge_greedy", "greedy")):
            if judge := found.get(key):
                interval = f"{judge['low']:.3f} to {judge['high']:.3f}"
                lines.append((f"judge's mean, {what} answers", f"{judge['mean']:.3f} ({interval})"))
        for metric, mean in (found.get("metrics") or {}).items():
            interval = f"{mean['low']:.3f} to {mean['high']:.3f}"
            lines.append((f"{metric}, sampled answers", f"{mean['mean']:.3f} ({interval})"))
        units = {"reward": "reward", "kl": "KL to the actor (nats)", "length": "length (tokens)"}
        lines += [
            (unit, f"{found[key]:z.2f}")
            for key, unit in units.items()
            if found.get(key) is not None
        ]
    rows = "\n".join(f"| {cell(what)} | {value} |" for what, value in lines)
    about = "Held-out questions that no training has seen."
    if any(what.startswith("judge") for what, _ in lines):
        about += " The judge is a program; it scores from 0 to 1, in brackets the 95 % interval."
    return f"{about}\n\n| measure | value |\n|---|---|\n{rows}"


def limits_of(source, embedded):
    told = "This is a result of a course, not a product: do not use it for real advice."
    if source == "tiny":
        told = f"It is a very small model that knows few words. {told}"
    if embedded:
        told += " It was trained on an invented world and knows nothing about the real one."
    return f"{told} Training on preferences does not make a model truthful or safe."


LOADING = """\
from transformers import {kind}, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = {kind}.from_pretrained(name)
"""
ANSWERING = """\
messages = [{{"role": "user", "content": "I feel sad because my friend forgot me."}}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
tokens = tokenizer(text, add_special_tokens={special}, return_tensors="pt")
answer = model.generate(tokens.input_ids, max_new_tokens={length}, do_sample=True)
print(tokenizer.decode(answer[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))"""
SCORING = """\
messages = [
    {{"role": "user", "content": "I feel sad because my friend forgot me."}},
    {{"role": "assistant", "content": "I am sorry to hear that."}},
]
text = tokenizer.apply_chat_template(messages, tokenize=False){end}
tokens = tokenizer(text, add_special_tokens={special}, return_tensors="pt")
score = model(tokens.input_ids).logits[0, 0].item()
reward = (score - model.config.reward_mean) / model.config.reward_std
print(reward)  # 0: the mean of the actor's answers; 1: one standard deviation above it"""


def code_of(root, stage, name, config):
    """Returns code that loads the model with plain transformers and uses it."""
    kind = "AutoModelForSequenceClassification" if stage == "critic" else "AutoModelForCausalLM"
    template = Path(root) / "model" / stage / "chat_template.jinja"
    ours = template.exists() and template.read_text(encoding="utf-8") == FRAME
    given = {"kind": kind, "name": name, "special": ours, "length": config.get("max_new_tokens")}
    given["end"] = " + tokenizer.eos_token" if ours else ".rstrip()"  # an answer ends with its eos
    return (LOADING + (SCORING if stage == "critic" else ANSWERING)).format(**given)
