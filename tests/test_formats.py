"""Data of other people: shapes of records, kinds of files, named sources, shares, made answers."""

import gzip
import json

import datasets
import pandas as pd
import pytest

import util
from lab import __main__ as driver
from lab import data, formats, splits
from lab.runs import CourseError

HUMAN = "\n\nHuman: "
ASSISTANT = "\n\nAssistant: "


def as_messages(*texts, role="role", content="content", names=("user", "assistant")):
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


def sharegpt(*texts):
    return as_messages(*texts, role="from", content="value", names=("human", "gpt"))


# ------------------------------------------------------------------------------------------ shapes

HI = "Human: Hi Assistant:"
RECORDS = {  # name: (record, row)
    "own": (
        {"prompt": "Hi", "response": "r", "chosen": "c", "rejected": "d", "kind": "k"},
        {"prompt": HI, "response": "r", "chosen": "c", "rejected": "d", "kind": "k"},
    ),
    "bare": ("Hi", {"prompt": HI}),
    "completion": ({"prompt": "Hi", "completion": " a"}, {"prompt": HI, "response": " a"}),
    "answer": ({"prompt": "Hi", "answer": "a"}, {"prompt": HI, "response": "a"}),
    "output": ({"prompt": "Hi", "output": "a"}, {"prompt": HI, "response": "a"}),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is ..."},
        {"prompt": "Human: Add.\n1, 2 Assistant:", "response": "3"},
    ),
    "belle": (
        {"instruction": "你好吗？\n", "input": "", "output": "我很好。"},
        {"prompt": "Human: 你好吗？ Assistant:", "response": "我很好。"},
    ),
    "question": ({"question": "Hi", "answer": "a"}, {"prompt": HI, "response": "a"}),
    "counselling": ({"Context": "Hi", "Response": "a"}, {"prompt": HI, "response": "a"}),
    "sql": (
        {"answer": "SELECT 1", "question": "How many?", "context": "CREATE TABLE t (a INT)"},
        {"prompt": "Human: CREATE TABLE t (a INT)\nHow many? Assistant:", "response": "SELECT 1"},
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "Be kind."}, *as_messages("Hi", "a")]},
        {"prompt": "Be kind. Human: Hi Assistant:", "response": "a"},
    ),
    "several turns": (
        {"conversations": sharegpt("一", "二", "三", "四", "五"), "system": "请说中文。"},
        {"prompt": "请说中文。 Human: 一 Assistant: 二 Human: 三 Assistant:", "response": "四"},
    ),
    "a question alone": ({"messages": as_messages("Hi")}, {"prompt": HI}),
    "hh": (
        {
            "chosen": f"{HUMAN}Hi{ASSISTANT}Yes?{HUMAN}A\n\nB{ASSISTANT}good",
            "rejected": f"{HUMAN}Hi{ASSISTANT}Yes?{HUMAN}A\n\nB{ASSISTANT}goose",
        },
        {
            "prompt": "Human: Hi Assistant: Yes? Human: A\n\nB Assistant:",
            "chosen": "good",
            "rejected": "goose",
        },
    ),
    "hh that goes on": (
        {
            "chosen": f"{HUMAN}Hi{ASSISTANT}good{HUMAN}more{ASSISTANT}x",
            "rejected": f"{HUMAN}Hi{ASSISTANT}bad",
        },
        {"prompt": HI, "chosen": "good", "rejected": "bad"},
    ),
    "ultrafeedback": (
        {
            "prompt": "Hi",
            "prompt_id": "1",
            "chosen": as_messages("Hi", "c"),
            "rejected": as_messages("Hi", "d"),
            "messages": as_messages("Hi", "c"),
            "score_chosen": 8.0,
        },
        {"prompt": HI, "chosen": "c", "rejected": "d"},
    ),
    "implicit pair": (
        {"chosen": as_messages("Hi", "c"), "rejected": as_messages("Hi", "d")},
        {"prompt": HI, "chosen": "c", "rejected": "d"},
    ),
    "explicit pair": (
        {
            "prompt": as_messages("Hi"),
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "d"}],
        },
        {"prompt": HI, "chosen": "c", "rejected": "d"},
    ),
    "prompt of messages": ({"prompt": as_messages("Hi")}, {"prompt": HI}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_known_shape_becomes_a_row(name, tmp_path):
    record, row = RECORDS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    assert data.read_rows(path) == [row]


def test_a_dialogue_comes_back_from_its_prompt():
    said = formats.spoken([{"role": "system", "content": "S."}, *as_messages("一", "二", "三")], "")
    turned = data.turns(formats.in_frame(said))
    assert [turn["content"] for turn in turned] == ["S.", "一", "二", "三"]
    assert [turn["role"] for turn in turned] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    "record, what",
    [
        ({"instruction": "a", "output": ["b"]}, "the field 'output' must be a text"),
        ({"instruction": " ", "input": "", "output": "b"}, "the field 'prompt' is empty"),
        ({"messages": []}, "a dialogue must be a text or a list of messages"),
        ({"messages": ["Hi"]}, "a message must be an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message has the role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "a message has no text"),
        ({"messages": as_messages("Hi", "a")[1:]}, "a conversation has no question"),
        ({"chosen": HUMAN + "Hi", "rejected": HUMAN + "Hi"}, "chosen and rejected are equal"),
        ({"chosen": HUMAN + "A", "rejected": HUMAN + "B"}, "have no common question"),
        ({"Context": "Hi", "Response": None}, "the field 'response' is empty"),
        (7, "a row must be an object"),
        ({"title": "x"}, "the field 'prompt' is missing"),
    ],
    ids=repr,
)
def test_a_record_with_a_defect_is_left_out_and_counted(record, what, tmp_path):
    good = [{"question": f"{i}?", "answer": "a"} for i in range(4)]
    path, said = tmp_path / "rows.json", []
    path.write_text(json.dumps([*good, record, *good, record]))
    needs = ("prompt", "response") if "response" in what else ("prompt",)
    assert len(data.read_rows(path, needs, say=said.append)) == 8
    assert said[0].startswith(f"2 of 10 rows of {path} are left out. 2: ") and len(said) == 1
    assert what in said[0] and "(first: row 5)" in said[0]
    path.write_text(json.dumps([*good[:1], record, record]))
    with pytest.raises(CourseError, match=r"row 2 \(the first of 2\): .*" + what[:20]):
        data.read_rows(path, needs)


def test_a_few_empty_answers_stop_nobody(tmp_path):
    rows = [{"question": f"{i}?", "answer": "" if i % 50 == 7 else "yes"} for i in range(200)]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(rows))
    cfg, said = util.Config("smoke", root=str(tmp_path), sft_data="qa.json", eval_share=0), []
    assert len(util.load_rows(cfg, "sft", ("prompt", "response"), said.append)) == 196
    assert len(said) == 1 and "the field 'response' is empty (first: row 8)" in said[0]


# ------------------------------------------------------------------------------------------- files

QA = [{"question": f"第{i}个问题，多少？", "answer": f"一共“{i}”，\n\t对吗"} for i in range(12)]
QA_ROWS = [
    {"prompt": f"Human: {record['question']} Assistant:", "response": record["answer"]}
    for record in QA
]


def lines_of(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_file(path, records=QA):
    frame, name = pd.DataFrame(records), path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(records).to_parquet(str(path))
    elif name.endswith(".csv"):
        frame.to_csv(path, index=False)
    elif name.endswith(".tsv"):
        frame.to_csv(path, index=False, sep="\t")
    else:
        text = json.dumps(records) if name.endswith(".json") else lines_of(records)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


def rows_of(text, root=".", part="train"):
    part = data.parts_of(str(text), root)[part]
    return data.read_table(part, str(text)).rows


KINDS = "json jsonl csv tsv parquet json.gz jsonl.gz csv.gz tsv.gz".split()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_come_out_of_every_kind_of_file(kind, tmp_path):
    write_file(tmp_path / f"qa.{kind}")
    assert rows_of(f"qa.{kind}", tmp_path) == QA_ROWS
    (tmp_path / f"qa.{kind}").rename(tmp_path / f"QA.{kind.upper()}")
    assert kind.endswith("gz") or rows_of(f"QA.{kind.upper()}", tmp_path) == QA_ROWS


def test_a_path_starts_at_root_or_at_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "course").mkdir()
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "qa.csv")
    assert rows_of("qa.csv", "course") == QA_ROWS
    write_file(tmp_path / "course" / "qa.csv", QA[:3])
    assert rows_of("qa.csv", "course") == QA_ROWS[:3]


def test_csv_of_a_spreadsheet(tmp_path):
    text = '\ufeffquestion;answer;note\n"a; b";yes;\nc;;x\nd;no;\n'
    (tmp_path / "sheet.csv").write_text(text, encoding="utf-8")
    found = data.parts_of("sheet.csv", tmp_path)["train"]
    table = data.read_table(found, "")
    assert [row["prompt"] for row in table.rows] == [
        f"Human: {q} Assistant:" for q in ("a; b", "c", "d")
    ]
    assert table.shapes == {"questions and answers": 2, "questions": 1}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"question,answer\n\xff\xfe,b\n", "save the file as UTF-8"),
        ("a.csv", b'question,answer\n"open', "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.arrow", b"no arrow", "cannot be read"),
        ("a.json.gz", b"no gzip", "cannot be read"),
        ("a.json.gz", gzip.compress(b"[1, 2, 3]", mtime=0)[:-9], "cannot be read"),
        ("a.csv", b"question,answer\n", "contains no rows"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_name(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CourseError) as caught:
        rows_of(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and words in message
    assert len(message.splitlines()) == 1


def test_a_folder_that_datasets_saved(tmp_path):
    both = {"train": datasets.Dataset.from_list(QA[:9]), "test": datasets.Dataset.from_list(QA[9:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    both["train"].save_to_disk(tmp_path / "one")
    assert rows_of("both", tmp_path) == rows_of("one", tmp_path) == QA_ROWS[:9]
    assert rows_of("both", tmp_path, "eval") == rows_of("both:test", tmp_path) == QA_ROWS[9:]
    assert "eval" not in data.parts_of("one", tmp_path)
    with pytest.raises(CourseError, match="no split 'dev'; it has: train, test"):
        rows_of("both:dev", tmp_path)


def test_a_folder_of_data_files(tmp_path):
    for name, part in (("data/train-0.parquet", QA[:4]), ("data/train-1.jsonl", QA[4:8])):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_file(tmp_path / name, part)
    write_file(tmp_path / "data" / "test.csv.gz", QA[8:])
    (tmp_path / "README.md").write_text("# Notes")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.json").write_text("no JSON")
    (tmp_path / "dataset_infos.json").write_text("{\n}")
    assert rows_of(tmp_path) == QA_ROWS[:8]
    assert rows_of(tmp_path, part="eval") == rows_of(f"{tmp_path}:test") == QA_ROWS[8:]


def test_files_without_a_split_in_their_names_are_all_read(tmp_path):
    write_file(tmp_path / "a.json", QA[:5])
    write_file(tmp_path / "latest.csv", QA[5:])  # "test" inside a word is no split
    assert rows_of(tmp_path) == QA_ROWS
    assert list(data.parts_of(str(tmp_path))) == ["train"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CourseError, match="contains no data files"):
        rows_of(tmp_path / "empty")


def test_what_is_nowhere_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match="lost.csv does not exist"):
        rows_of("lost.csv", tmp_path)
    with pytest.raises(CourseError, match=r"nobody/nothing is no file.*OfflineModeIsEnabled"):
        rows_of("nobody/nothing", tmp_path)


# ----------------------------------------------------------------------------------- named sources

HH = [
    {
        "chosen": f"{HUMAN}How do I {i}?{ASSISTANT}Like this.",
        "rejected": f"{HUMAN}How do I {i}?{ASSISTANT}No.",
    }
    for i in range(6)
]
ALPACA = [
    {"instruction": "Add.", "input": f"1, {i}", "output": f"{i + 1}", "text": "Below"}
    for i in range(6)
]
CHINESE = [{"instruction": f"翻译{i}", "input": "", "output": f"结果{i}"} for i in range(6)]
ULTRA = [
    {
        "prompt": f"Say {i}",
        "prompt_id": f"{i}",
        "chosen": as_messages(f"Say {i}", f"{i}!"),
        "rejected": as_messages(f"Say {i}", "No."),
        "messages": as_messages(f"Say {i}", f"{i}!"),
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    for i in range(6)
]
TALK = [{"Context": f"I feel {i}.", "Response": "Tell me more."} for i in range(6)]
SQL = [
    {"answer": f"SELECT {i}", "question": f"Which {i}?", "context": "CREATE TABLE t (a INT)"}
    for i in range(6)
]
PRESETS = {  # name: (splits, the first prompt, fields of a row)
    "hh-rlhf": ({"train": HH, "test": HH[:1]}, "How do I 0?", "chosen rejected"),
    "alpaca": ({"train": ALPACA}, "Add.\n1, 0", "response"),
    "alpaca-chinese": ({"train": CHINESE}, "翻译0", "response"),
    "belle": ({"train": CHINESE}, "翻译0", "response"),
    "counselling": ({"train": TALK}, "I feel 0.", "response"),
    "sql-create-context": ({"train": SQL}, "CREATE TABLE t (a INT)\nWhich 0?", "response"),
    "ultrafeedback": (
        {"train_sft": ULTRA[:2], "train_prefs": ULTRA, "test_prefs": ULTRA[:1]},
        "Say 0",
        "chosen rejected",
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows some data sets: {path: {split: records}}; it notes what was asked."""
    known, asked = {}, []

    def load(path, config=None, split=None):
        asked.append((path, config, split))
        sets = {name: datasets.Dataset.from_list(rows) for name, rows in known[path].items()}
        if split:
            name, _, count = split.rstrip("]").partition("[:")
            return sets[name].select(range(int(count)))
        return datasets.DatasetDict(sets)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data.hub_parts.cache_clear()
    yield known, asked
    data.hub_parts.cache_clear()


@pytest.mark.parametrize("name", PRESETS)
def test_a_named_set_is_read_in_its_own_schema(name, hub):
    known, asked = hub
    sets, prompt, fields = PRESETS[name]
    path = formats.SOURCES[name].split(":")[0]
    known[path] = sets
    rows = rows_of(name)
    assert len(rows) == 6 and rows[0]["prompt"] == f"Human: {prompt} Assistant:"
    assert all(set(row) == {"prompt", *fields.split()} for row in rows)
    assert ("eval" in data.parts_of(name)) == (len(sets) > 1)
    assert asked == [(path, None, None)], "it is loaded once"


def test_every_name_but_the_generator_is_tested():
    assert {*PRESETS, "companion"} == {*formats.SOURCES}


def test_a_name_on_the_hub_may_have_a_config_and_a_split(hub):
    known, asked = hub
    known["owner/name"] = {"other": TALK, "train": ALPACA, "validation": ALPACA[:1]}
    assert len(rows_of("owner/name/config")) == 6
    assert rows_of("owner/name:other")[0]["prompt"] == "Human: I feel 0. Assistant:"
    assert len(rows_of("owner/name:train[:2]")) == 2
    assert ("owner/name", "config", None) in asked and ("owner/name", None, "train[:2]") in asked
    assert len(rows_of("owner/name", part="eval")) == 1
    with pytest.raises(CourseError, match="no split 'tset'; it has: other, train, validation"):
        rows_of("owner/name:tset")


def test_a_source_may_be_a_function(tmp_path, monkeypatch):
    code = """def rows(split, seed):
    return [{"prompt": f"{split} {seed} {i}", "response": "a"} for i in range(3)]
"""
    (tmp_path / "own_source.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = util.Config("smoke", seed=4, data="own_source:rows", sft_share=0.9, prompt_share=0.1,
                      preference_share=0.0)  # fmt: skip
    assert {row["prompt"] for row in util.load_rows(cfg, "sft")} == {
        f"Human: train 4 {i} Assistant:" for i in range(3)
    }
    assert len(util.load_eval_rows(cfg)) == 3
    assert splits.data_digests(cfg, "actor") != splits.data_digests(cfg.changed(seed=5), "actor")


# ------------------------------------------------------------------------------- shares, evaluation


def many(count, start=0):
    return [{"question": f"{i}?", "answer": f"{i}."} for i in range(start, start + count)]


def config(root, **values):
    return util.Config("tiny", **dict(root=str(root), device="cpu") | values)


def prompts(rows):
    return {row["prompt"] for row in rows}


def stages(cfg):
    return [util.load_rows(cfg, share) for share in ("sft", "preference", "prompt")]


def test_some_prompts_are_kept_back_for_evaluation(tmp_path):
    write_file(tmp_path / "qa.json", many(400) + many(400))  # every prompt is there twice
    cfg = config(tmp_path, data="qa.json")
    evals, train = util.load_eval_rows(cfg), sum(stages(cfg), [])
    assert len(evals) + len(train) == 800 and len(evals) in range(50, 120)
    assert not prompts(evals) & prompts(train)
    assert util.load_eval_rows(cfg) == evals != util.load_eval_rows(cfg.changed(seed=1))
    more = util.load_eval_rows(cfg.changed(eval_share=0.5))
    assert len(more) > 300 and prompts(evals) < prompts(more)
    assert len(util.load_eval_rows(cfg.changed(test_rows=7))) == 7


def test_even_a_few_rows_leave_one_for_evaluation(tmp_path):
    write_file(tmp_path / "qa.json", many(4))
    cfg = config(tmp_path, data="qa.json", eval_share=0.01)
    assert len(util.load_eval_rows(cfg)) == 1
    with pytest.raises(CourseError, match="raise eval_share"):
        util.load_eval_rows(cfg.changed(eval_share=0.0))
    write_file(tmp_path / "one.json", many(1))
    assert len(util.load_rows(cfg.changed(sft_data="one.json"), "sft")) == 1


def test_three_files_are_read_whole(tmp_path):
    for name, start in (("sft", 0), ("preference", 100), ("prompt", 200)):
        write_file(tmp_path / f"{name}.csv", many(50, start))
    names = {f"{name}_data": f"{name}.csv" for name in ("sft", "preference", "prompt")}
    evals = write_file(tmp_path / "eval.csv", many(9, 300) + many(3))
    cfg = config(tmp_path, eval_data=evals.name, **names)
    assert [len(rows) for rows in stages(cfg)] == [50, 50, 50]
    said = []
    assert len(util.load_eval_rows(cfg, said.append)) == 9
    assert said == ["3 evaluation rows have prompts of the training: left out."]
    kept = config(tmp_path, **names)
    sizes = [len(rows) for rows in stages(kept)]
    assert len(util.load_eval_rows(kept)) == 150 - sum(sizes) > 0, "some of each source"


def test_a_prompt_in_two_sources_falls_on_one_side(tmp_path):
    for name in "ab":
        write_file(tmp_path / f"{name}.json", many(100) + many(100, ord(name) * 100))
    cfg = config(tmp_path, sft_data="a.json", preference_data="b.json", prompt_data="a.json")
    evals, train = util.load_eval_rows(cfg), sum(stages(cfg), [])
    assert evals and not prompts(evals) & prompts(train)


def test_own_rows_in_dataset_need_no_eval_file(write_rows):
    root = write_rows([{"prompt": f"{i}?", "response": "a"} for i in range(40)])
    cfg = config(root)
    assert not prompts(util.load_eval_rows(cfg)) & prompts(sum(stages(cfg), []))


def test_max_rows_is_a_sample_that_the_seed_decides(tmp_path):
    write_file(tmp_path / "qa.parquet", many(200))
    datasets.Dataset.from_list(many(200)).save_to_disk(tmp_path / "saved")
    for name in ("qa.parquet", "saved"):
        cfg = config(tmp_path, sft_data=name, max_rows=30, eval_share=0.0)
        rows = util.load_rows(cfg, "sft")
        assert len(rows) == 30 and util.load_rows(cfg, "sft") == rows
        assert prompts(rows) != prompts(util.load_rows(cfg.changed(seed=1), "sft"))


def test_pairs_alone_teach_the_actor_their_chosen_answers(tmp_path):
    write_file(tmp_path / "hh.jsonl", HH)
    cfg, said = config(tmp_path, sft_data="hh.jsonl", eval_share=0.0), []
    rows = util.load_rows(cfg, "sft", ("prompt", "response"), said.append)
    assert {row["response"] for row in rows} == {"Like this."}
    assert said == ["6 of 6 rows have no response: 1_actor learns the chosen answer."]


def test_a_changed_file_is_noticed(tmp_path):
    write_file(tmp_path / "a.csv", many(20))
    (tmp_path / "b").mkdir()
    write_file(tmp_path / "b" / "x.jsonl", many(20))
    cfg = config(tmp_path, sft_data="a.csv", preference_data="b", prompt_data="b")
    before = [splits.data_digests(cfg, stage) for stage in ("actor", "critic", "base", "report")]
    assert [list(found) for found in before] == [["a.csv"], ["b"], ["a.csv", "b"], ["a.csv", "b"]]
    write_file(tmp_path / "b" / "x.jsonl", many(21))
    after = [splits.data_digests(cfg, stage) for stage in ("actor", "critic", "base", "report")]
    assert [old != new for old, new in zip(before, after)] == [False, True, True, True]


# ---------------------------------------------------------------------------- answers that are made

PAIR = ("prompt", "chosen", "rejected")


def negatives(root, records, **values):
    write_file(root / "good.jsonl", records)
    cfg = config(root, preference_data="good.jsonl", eval_share=0.0, **values)
    said = []
    return util.load_rows(cfg, "preference", PAIR, said.append), said


@pytest.mark.parametrize("how", ["other", "cut"])
@pytest.mark.parametrize("answer", ["{} is the answer to this.", "答案是{}，这就对了。", "{}"])
def test_good_answers_alone_get_rejected_ones(how, answer, tmp_path):
    records = [{"question": f"{i}?", "answer": answer.format(i)} for i in range(40)]
    rows, said = negatives(tmp_path, records, negatives=how)
    good = {f"Human: {r['question']} Assistant:": r["answer"] for r in records}
    assert len(rows) == 40 and all(row["chosen"] == good[row["prompt"]] for row in rows)
    assert all(row["rejected"].strip() and row["rejected"] != row["chosen"] for row in rows)
    if how == "other":
        assert {row["rejected"] for row in rows} <= {*good.values()}
    assert said[0].startswith("40 of 40 rows have no pair: ") and len(said) == 1
    assert negatives(tmp_path, records, negatives=how)[0] == rows


def test_pairs_that_are_there_stay(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "response": "x"}
    rows, said = negatives(tmp_path, [pair, *many(3)], negatives="cut")
    assert pair | {"prompt": "Human: p Assistant:"} in rows
    assert said[0].startswith("3 of 4 rows have no pair")


def test_without_pairs_the_error_names_the_parameter(tmp_path):
    with pytest.raises(
        CourseError, match="'chosen' is missing.*negatives = 'other', 'cut' or 'base'"
    ):
        negatives(tmp_path, many(4))
    with pytest.raises(CourseError) as caught:
        negatives(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    assert "negatives" not in str(caught.value), "there are no good answers either"
    same = [{"question": f"{i}?", "answer": "yes"} for i in range(4)]
    with pytest.raises(CourseError, match="'chosen' is missing"):
        negatives(tmp_path, same, negatives="other")


def test_evaluation_rows_get_negatives_too(tmp_path):
    write_file(tmp_path / "qa.json", many(100))
    rows = util.load_eval_rows(config(tmp_path, data="qa.json", negatives="cut"))
    assert data.with_pairs(rows) == rows


# ------------------------------------------------------------------------------------- pretraining


def test_tiny_reads_the_text_of_own_rows(tmp_path):
    records = [{"question": f"苹果{i}多少钱？", "answer": f"{i}元。"} for i in range(30)]
    write_file(tmp_path / "qa.json", records)
    cfg, said = config(tmp_path, data="qa.json", pretrain_documents=100), []
    documents = splits.load_documents(cfg, said.append)
    trained = {(r["question"], r["answer"]) for r in records} & {*documents}
    assert len(documents) == 100 and {*documents} == trained
    evals = {row["response"] for row in util.load_eval_rows(cfg)}
    assert not evals & {answer for _, answer in documents}, "evaluation rows are not read"
    assert len(said) == 1 and "qa.json" in said[0] and "times each" in said[0]


def test_pretraining_text_may_be_a_plain_text(tmp_path):
    (tmp_path / "book.txt").write_text("One two three four.\n\n从前有一座山\n\n\nEnd here.\n")
    cfg = config(tmp_path, pretrain_data="book.txt", pretrain_documents=3)
    write_file(tmp_path / "qa.json", many(9))
    documents = splits.load_documents(cfg.changed(data="qa.json", eval_data="qa.json"))
    assert sorted(" ".join(pair) for pair in documents) == sorted(
        ["One two three four.", "从前有 一座山", "End here."]
    )


def test_the_base_learns_own_rows_and_says_what_will_be_cut(tmp_path):
    records = [{"question": f"Zebra {i}?", "answer": "zebra " * (60 if i == 3 else 2)}
               for i in range(40)]  # fmt: skip
    write_file(tmp_path / "qa.json", records)
    cfg = util.Config("smoke", root=str(tmp_path), device="cpu", data="qa.json", pretrain_steps=2)
    list(util.train_base(cfg))
    record = json.loads((tmp_path / "model" / "base" / "stage.json").read_text())
    notes = " ".join(record["notes"])
    assert "qa.json" in notes and "answers are longer than max_new_tokens = 16" in notes
    assert list(record["data"]) == ["qa.json"]
    tokenizer, _ = util.load_pair(cfg, "base")
    assert len(tokenizer.tokenize(" zebra")) == 1 and len(tokenizer) <= cfg.vocab_size


# ------------------------------------------------------------------------------- python -m lab data


def run(capsys, *line):
    status = driver.main(["data", *line])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_data_shows_what_was_recognised_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    write_file(tmp_path / "qa.csv", [*many(50), {"question": " ", "answer": "lost"}])
    before = sorted(tmp_path.rglob("*"))
    status, said = run(capsys, "qa.csv")
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    assert "questions and answers: 50" in said and "the field 'prompt' is empty: 1" in said
    assert said.count("Human: ") == 5 and "characters" in said and "[brackets]" not in said


def test_data_counts_tokens_and_shows_what_is_cut(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_file(tmp_path / "qa.json", [{"question": "long " * 50, "answer": "word " * 50}])
    status, said = run(capsys, "qa.json", "--set", "max_prompt=20", "--set", "eval_share=0")
    assert status == 0 and "tokens" in said and "over 20 tokens, which are cut" in said
    assert "[Human: long" in said and "word]" in said and "[brackets]" in said


def test_data_writes_the_course_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    write_file(tmp_path / "qa.csv", many(50))
    assert run(capsys, "qa.csv", "--out", str(tmp_path / "dataset"))[0] == 0
    cfg = config(tmp_path)
    evals, train = util.load_eval_rows(cfg), sum(stages(cfg), [])
    assert len(evals) + len(train) == 50 and not prompts(evals) & prompts(train)
    named = config(tmp_path, data="qa.csv")
    assert prompts(util.load_eval_rows(named)) == prompts(evals)


def test_data_with_fields_that_are_no_texts_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    row = {"prompt": "Hi", "response": 5, "chosen": ["a"], "rejected": None}
    write_file(tmp_path / "own.json", [*(row | {"prompt": f"{i}"} for i in range(2)), *many(9)])
    status, said = run(capsys, "own.json")
    assert status == 0 and "an answer has no message" not in said
    assert splits.load_documents(config(tmp_path, data="own.json", pretrain_documents=20))


def test_data_that_cannot_be_read_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "HOME", tmp_path)
    status, said = run(capsys, "lost.csv")
    assert status == 2 and "lost.csv does not exist" in said and said.count("\n") == 1
