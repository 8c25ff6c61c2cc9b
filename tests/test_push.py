"""Uploading a model: what is sent, what the card says, and what happens if the hub refuses."""

import json
import re
from dataclasses import asdict

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError

import util
from lab import __main__ as driver
from lab import push as push_module
from lab import world
from lab.data import framed
from lab.push import card_of, push
from lab.runs import CourseError, Stage, read_record

LICENCE = "license-of-the-base-model"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with four trained models, an ensemble and adapters among them."""
    root = tmp_path_factory.mktemp("course")
    world.write(world.World(rows=200, eval_rows=24), root / "dataset")
    shares = dict(sft_share=0.4, preference_share=0.4, prompt_share=0.1, validation_rows=4)
    small = shares | dict(pretrain_steps=2, pretrain_documents=200, steps=1)
    more = {"actor": dict(lora_rank=2), "critic": dict(ensemble=2), "rlhf": dict(kl_coef=0.07)}
    for stage in ("base", "actor", "critic", "rlhf"):
        cfg = util.Config("smoke", root=str(root), **small, **more.get(stage, {}))
        list(getattr(util, f"train_{stage}")(cfg))
    return root


class Hub:
    """Stands in for HfApi: keeps what it is told, and raises `error` if there is one."""

    def __init__(self, error=None):
        self.error, self.created, self.files = error, [], {}

    def create_repo(self, name, **how):
        self.created.append((name, how))
        if self.error:
            raise self.error
        return RepoUrl(f"https://huggingface.co/{name}")

    def create_commit(self, name, adds, commit_message):
        assert name == self.created[-1][0]
        for add in adds:
            with add.as_file() as file:
                self.files[add.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch):
    """A hub, and a token for it."""
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return stand_in


def card(root, stage, name="ada/tiny"):
    return card_of(root, stage, name, read_record(root, stage))


# -------------------------------------------------------------------------------------- the upload


def test_without_yes_it_shows_everything_and_sends_nothing(course, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert driver.main(["push", "ada/tiny", "rlhf", "--root", str(course)]) == 0
    out = capsys.readouterr().out
    size = (course / "model" / "rlhf" / "model.safetensors").stat().st_size
    assert "# tiny" in out and f"{size:,} bytes  model.safetensors" in out
    assert "Nothing has been sent. --yes uploads this to ada/tiny" in out
    assert not hub.created and not (course / "model" / "rlhf" / "README.md").exists()


@pytest.mark.parametrize("stage", ["base", "actor", "critic", "rlhf"])
def test_only_the_model_and_its_card_are_sent(stage, course, hub, capsys):
    folder = course / "model" / stage
    assert list(folder.glob("*tfevents*")) and (folder / "metrics.jsonl").exists()
    assert driver.main(["push", "ada/tiny", stage, "--root", str(course), "--yes"]) == 0
    assert "Uploaded: https://huggingface.co/ada/tiny" in capsys.readouterr().out
    sent = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    sent |= {"tokenizer_config.json", "chat_template.jinja"}
    sent |= {"generation_config.json"} if stage != "critic" else set()
    if stage == "critic":
        sent |= {f"member-1/{name}" for name in sent - {"README.md"}}
    assert set(hub.files) == sent
    for name in sent - {"README.md"}:
        assert hub.files[name] == (folder / name).read_bytes()
        assert str(course).encode() not in hub.files[name], "no path of this machine"
    assert hub.created == [("ada/tiny", {"exist_ok": True})]


def test_without_a_token_nothing_is_sent(course, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert driver.main(["push", "ada/tiny", "rlhf", "--root", str(course), "--yes"]) == 2
    assert "You are not logged in to the hub: run `hf auth login`" in capsys.readouterr().err
    assert not hub.created


def refused(status):
    import httpx

    asked = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError("no", response=httpx.Response(status, request=asked))


@pytest.mark.parametrize(
    "error, told",
    [
        (refused(401), "does not accept your token"),
        (refused(403), "may not write to ada/tiny"),
        (refused(404), "does not find ada/tiny"),
        (refused(503), "status 503: try again later"),
        (ConnectionError("Name or service not known"), r"be reached \(Name or .*\)\. Check your"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline mode is on"), "offline mode is on"),
    ],
)
def test_a_refusal_is_one_sentence(error, told, course, hub, capsys):
    hub.error = error
    assert driver.main(["push", "ada/tiny", "rlhf", "--root", str(course), "--yes"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("ada/tiny was not uploaded: ") and "\n" not in said
    assert re.search(told, said) and not hub.files


@pytest.mark.parametrize("name", ["", "ada/tiny/2", "a da", "ada/", "../x"])
def test_a_name_that_the_hub_does_not_allow(name, course, hub):
    with pytest.raises(CourseError, match="is not a name on the hub"):
        push(course, "rlhf", name, send=True)
    assert not hub.created


def test_a_stage_that_is_missing_or_damaged(course, hub, tmp_path):
    with pytest.raises(CourseError, match="run 3_rlhf.ipynb first"):
        push(tmp_path, "rlhf", "ada/tiny", send=True)
    (tmp_path / "model").mkdir()
    for name in ("base", "actor"):
        (tmp_path / "model" / name).symlink_to(course / "model" / name)
    copy = tmp_path / "model" / "base"
    copy.unlink()
    copy.mkdir()
    (copy / "stage.json").write_bytes((course / "model" / "base" / "stage.json").read_bytes())
    with pytest.raises(CourseError, match="is damaged"):
        push(tmp_path, "base", "ada/tiny", send=True)
    assert not hub.created


# ---------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("stage", ["base", "actor", "critic", "rlhf"])
def test_the_metadata_are_what_the_hub_reads(stage, course):
    data = ModelCard(card(course, stage), ignore_metadata_errors=False).data
    kind = "text-classification" if stage == "critic" else "text-generation"
    assert (data.library_name, data.pipeline_tag) == ("transformers", kind)
    assert (data.license, data.language, data.base_model) == ("mit", "en", None)
    tags = {"base": [], "actor": ["sft"], "critic": ["reward-model"], "rlhf": ["ppo"]}
    assert data.tags == ["rlhf", *tags[stage]]


def test_the_code_on_the_card_works(course):
    """Plain transformers gives the tokens and the reward that the course itself computes."""
    given, cfg = {}, util.Config("smoke", root=str(course))
    exec(code_on(card(course, "rlhf"), course / "model" / "rlhf"), given)
    prompt = given["messages"][0]["content"]
    ids = util.encode_prompt(given["tokenizer"], framed(prompt), 80)
    assert given["tokens"].input_ids[0].tolist() == ids
    exec(code_on(card(course, "critic"), course / "model" / "critic"), given)
    prompt, answer = (message["content"] for message in given["messages"])
    reward = util.RewardModel(course / "model" / "critic", cfg)
    expected = reward([framed(prompt)], [answer])
    assert given["reward"] == pytest.approx(expected[0], abs=1e-4)


def code_on(text, folder):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code.replace('"ada/tiny"', repr(str(folder)))


def test_it_says_what_the_model_is(course):
    assert "**This is a reward model. It writes no text**" in card(course, "critic")
    assert "2 reward models" in card(course, "critic") and "member-1" in card(course, "critic")
    assert "with the algorithm ppo" in card(course, "rlhf")
    for stage in ("base", "actor", "critic", "rlhf"):
        assert "do not use it for real advice" in card(course, stage)
        assert str(course) not in card(course, stage)


def test_it_names_the_parameters_that_differ_from_the_preset(course):
    assert "| kl_coef | 0.07 | 0.2 |" in card(course, "rlhf")
    assert "| lora_rank | 2 | 0 |" in card(course, "actor")
    assert "kl_coef" not in card(course, "actor"), "the actor does not read it"
    assert "checkpoint_minutes" not in card(course, "rlhf"), "it changes no result"


def test_it_says_which_data(course, tmp_path):
    told = "`train.json`: 200 rows, questions and answers about an invented world"
    assert told in card(course, "actor") and "the share 0.4" in card(course, "actor")
    assert "200 documents about an invented world" in card(course, "base")
    (tmp_path / "model").symlink_to(course / "model")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.json").write_text('{"prompt": "Hi"}\n')
    other = card(tmp_path, "actor")
    assert "rows," not in other and "invented" not in other, "the file has changed since"
    assert ModelCard(other).data.license is None, "somebody's data may have any licence"


def test_it_says_which_source_and_which_model(course, monkeypatch):
    record = read_record(course, "actor")
    record["config"] |= {"data": "belle", "sft_data": ""}
    assert "`belle`. This stage used the share 0.4" in card_of(course, "actor", "ada/tiny", record)
    read = {"metrics": {"preset": "colab"}, "config": {"base_model": "smollm2"}}
    monkeypatch.setattr(push_module, "read_record", lambda *_: read)
    assert push_module.base_of(course) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def with_report(course, root, version=None):
    """A copy of the course with a report about its models, or about another version of them."""
    judge = {"mean": 0.5, "low": 0.25, "high": 0.75, "kinds": {}}
    model = dict(questions=24, judge=judge, judge_greedy=None, reward=1.5, kl=2.0, length=3.0)
    (root / "model").mkdir()
    for path in [course / "dataset", *(course / "model").iterdir()]:
        (root / path.relative_to(course)).symlink_to(path)
    config = asdict(util.Config("smoke", root=str(root)))
    with Stage(root, "report", config, ["rlhf", "critic"]) as stage:
        critic = {"accuracy": 0.875, "kinds": {"sql": 1.0}}
        found = {"rows": 24, "models": {"rlhf": model}, "critic": critic}
        (stage.folder / "report.json").write_text(json.dumps(found))
        stage.inputs |= {"rlhf": version, "critic": version} if version else {}
    return root


def test_it_shows_the_scores_of_this_version_only(course, tmp_path):
    for name in ("now", "old"):
        (tmp_path / name).mkdir()
    now = with_report(course, tmp_path / "now")
    assert "| judge's mean, sampled answers | 0.500 (0.250 to 0.750) |" in card(now, "rlhf")
    assert "| held-out pairs ranked right | 87.5% |" in card(now, "critic")
    old = with_report(course, tmp_path / "old", version="0" * 32)
    for text in (card(old, "rlhf"), card(course, "rlhf"), card(now, "actor")):
        assert "Not measured" in text and "0.500" not in text


@pytest.mark.parametrize(
    "source, named",
    [("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("auto", "facebook/opt-125m"), ("/my/net", None)],
)
def test_a_base_model_of_the_hub_is_named_with_its_licence(source, named, course, tmp_path):
    base = tmp_path / "model" / "base"
    base.mkdir(parents=True)
    (tmp_path / "model" / "rlhf").symlink_to(course / "model" / "rlhf")
    record = read_record(course, "base")
    record["metrics"]["preset"], record["config"]["base_model"] = "colab", source
    (base / "stage.json").write_text(json.dumps(record))
    for stage in ("base", "rlhf"):
        text = card(tmp_path, stage)
        data = ModelCard(text, ignore_metadata_errors=False).data
        assert data.base_model == named and ("/my/net" not in text)
        assert data.license_name == (LICENCE if named else None)
        assert f"It started from {named or 'a local model'}." in text
