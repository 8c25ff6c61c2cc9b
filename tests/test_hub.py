"""Downloads from hubs that are down, silent, faulty or good: the message and the time it takes."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import util

HOME = Path(__file__).resolve().parent.parent
MAIN, BOT = "1" * 40, "2" * 40  # commits: of the branch main, and of the converter's pull request
STATUS = {"absent": 404, "private": 401, "gated": 403, "busy": 429, "broken": 500}
CODES = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}
PATIENCE = 0.5  # seconds to wait for a silent hub; the course's own limit is longer


class Hub(BaseHTTPRequestHandler):
    """Serves one model under many names. The part before the slash names the fault."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").removeprefix("api/models/").split("/")
        self.fault, self.asked = path[0], self.path.startswith("/api/")
        if self.fault == "silent":
            self.server.over.wait()
        elif self.fault == "slow":
            self.trickle()
        elif self.fault == "circle":
            self.reply(b"", 302, Location=self.path)
        elif self.fault in STATUS:
            status = STATUS[self.fault]
            self.reply(b"{}", status, **{"X-Error-Code": CODES.get(status, "")})
        elif self.fault == "portal":
            self.reply(b"<html>Log in to this network</html>")
        elif self.asked:
            self.answer("/".join(path[2:]))
        else:
            self.serve(path[3], "/".join(path[4:]))

    do_HEAD = do_POST = do_GET

    def trickle(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Nothing: ")
        while not self.server.over.wait(1):
            self.wfile.write(b"x")
            self.wfile.flush()

    def answer(self, question):
        """Sends a page of the hub's API about the model."""
        pages = {"": {"id": f"{self.fault}/net", "sha": MAIN, "private": False}}
        commits = [{"id": c, "title": "", "message": "", "date": DATE} for c in (BOT, MAIN)]
        pages["commits/main"] = [commit | {"authors": []} for commit in commits[1:]]
        pages["commits/refs%2Fpr%2F1"] = [commit | {"authors": []} for commit in commits]
        pages["discussions"] = {"count": 0, "start": 0, "discussions": []}
        if self.fault == "converted":
            pages["discussions"] |= {"count": 1, "discussions": [REQUEST]}
        pages["tree/main"] = [
            {"type": "file", "path": name, "size": len(data), "oid": MAIN}
            for name, data in self.server.files.items()
        ]
        known = question in pages
        self.reply(json.dumps(pages.get(question, {})).encode(), 200 if known else 404)

    def serve(self, revision, name):
        """Sends a file of the model."""
        commit = BOT if revision in (BOT, "refs%2Fpr%2F1") else MAIN
        data = self.server.files.get(name)
        if commit == MAIN and self.fault in ("pickle", "converted"):
            data = {"model.safetensors": None, "pytorch_model.bin": b"pickle"}.get(name, data)
        if name == "config.json":
            data = {"html": b"<html>Sorry!</html>", "nothing": b'{"a": 1}'}.get(self.fault, data)
        if data is None:
            return self.reply(
                b"", 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        about = {"X-Repo-Commit": commit, "ETag": f'"{abs(hash((self.fault, commit, name)))}"'}
        cut = 1000 if (self.fault, name) == ("short", "model.safetensors") else None
        self.reply(data, 200, cut, **about)

    def reply(self, data, status=200, cut=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args):
        pass


DATE = "2024-01-01T00:00:00.000Z"
REQUEST = {
    "title": "Adding `safetensors` variant of this model", "num": 1, "status": "open",
    "isPullRequest": True, "author": {"name": "SFconvertbot"}, "createdAt": DATE,
    "repo": {"name": "converted/net", "type": "model"},
}  # fmt: skip

ASK = """
import json, sys, time
from pathlib import Path

pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 500)  # between two tries
import util
from lab import hub

hub.PATIENCE = float(sys.argv[1])
for name in sys.argv[2:]:
    root = Path(name.split("/")[0])
    (root / "dataset").mkdir(parents=True)
    (root / "dataset" / "train.json").write_text('{"prompt": "Hi"}')
    given = dict(root=str(root), base_model=name, pretrain_documents=200, pretrain_steps=1)
    told, began = {"name": name, "error": "", "left": False}, time.perf_counter()
    try:
        list(util.train_base(util.Config("smoke", **given, fallback=False)))
    except util.CourseError as error:
        told |= {"error": str(error), "left": (root / "model").exists()}
    told["seconds"] = time.perf_counter() - began
    base = util.choose_base(util.Config("smoke", **given))
    told |= {"source": base.source, "why": base.why}
    list(util.train_base(util.Config("smoke", **given), base))
    print(json.dumps(told), flush=True)
"""


def ask(folder, endpoint, faults, patience=30):
    """Starts a process of its own, because the address of the hub is read at import."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in offline} | {
        "PYTHONPATH": os.pathsep.join([str(HOME / "tests" / "blocked"), str(HOME)]),
        "TRIED": str(folder / "tried.txt"),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    names = [f"{fault}/net" for fault in faults]
    call = [sys.executable, "-c", ASK, str(patience), *names]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(call, cwd=folder, env=env, text=True, **pipes)


SAID = {
    "refused": "couldn't connect to",
    "html": "config.json.*not a valid JSON",
    "portal": "couldn't connect to",
    "nothing": "should have a `model_type`",
    "absent": "not a local folder and is not a valid model",
    "private": "gated repo.*make sure to have access",
    "gated": "gated repo.*make sure to have access",
    "busy": "the hub answered with status 429: try again later",
    "broken": "the hub answered with status 500: try again later",
    "circle": "redirects",
    "short": r"received 1000 bytes, expected \d+|peer closed",
    "pickle": "safetensors-convert",  # the hub's converter, which is out of reach here
    "silent": "did not answer within 0.5 seconds: try again later",
    "slow": "did not answer within 0.5 seconds: try again later",
}
MUTE, GOOD = ("silent", "slow"), ("good", "converted")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A small GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = util.train_tokenizer(["one two three four"] * 4, 300)
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one course root for each fault."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def told(theirs, folder):
    """{fault: the outcome of the download}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.over = True, threading.Event()
    server.files = {path.name: path.read_bytes() for path in theirs.iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    here = f"http://127.0.0.1:{server.server_port}"
    talking = [fault for fault in SAID if fault not in ("refused", *MUTE)]
    processes = [
        ask(folder, f"http://127.0.0.1:{nobody}", ["refused"]),
        ask(folder, here, MUTE, PATIENCE),
        ask(folder, here, [*talking, *GOOD]),
    ]
    lines = []
    for process in processes:
        try:
            out, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        lines += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        print(errors)  # pytest shows this if a test fails
    server.over.set()
    server.shutdown()
    return {line["name"].split("/")[0]: line for line in lines}


@pytest.mark.parametrize("fault", SAID)
def test_one_line_names_the_model_and_what_is_wrong(fault, told):
    for said in (told[fault]["error"], told[fault]["why"]):
        assert f"{fault}/net does not load (" in said
        assert "\n" not in said and said.isprintable() and len(said) < 500
        assert re.search(SAID[fault], said, re.IGNORECASE), said


@pytest.mark.parametrize("fault", SAID)
def test_tiny_takes_its_place_and_nothing_of_it_is_left(fault, told, folder):
    assert told[fault]["source"] == "tiny" and "embedded tiny model" in told[fault]["why"]
    assert not told[fault]["left"], "without fallback model/ stays as it was"
    base = folder / fault / "model" / "base"
    assert json.loads((base / "config.json").read_text())["model_type"] == "opt"
    assert json.loads((base / "stage.json").read_text())["metrics"]["preset"] == "tiny"


@pytest.mark.parametrize("fault", SAID)
def test_nobody_waits_long(fault, told):
    """The limit allows for a busy machine. Without a timeout the course would wait for ever."""
    assert told[fault]["seconds"] < 20


@pytest.mark.parametrize("name", GOOD)
def test_a_model_of_a_good_hub_arrives_whole(name, told, theirs, folder):
    """`converted` has its safetensors only in the pull request of the hub's own converter."""
    assert told[name]["source"] == f"{name}/net" and not told[name]["error"]
    base = folder / name / "model" / "base"
    assert json.loads((base / "stage.json").read_text())["metrics"]["preset"] == "colab"
    expected, arrived = (load_file(path / "model.safetensors") for path in (theirs, base))
    assert expected.keys() == arrived.keys()
    assert all(torch.equal(expected[weight], arrived[weight]) for weight in expected)
    assert (base / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
