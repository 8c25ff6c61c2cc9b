"""Freed memory stays with the process, until it is asked to give it back."""

import subprocess
import sys

import pytest

from lab import memory, notebook
from lab.trouble import Sturdy
from util import Config

# Pages that the system had to lend while 64 MB were filled anew, twenty times; then what is held.
WORK = """
import gc, resource, sys
import psutil, torch
from lab import memory

if sys.argv[1] == "keep":
    memory.keep()

def held():
    return psutil.Process().memory_info().rss / 2**20

def fill():
    return torch.ones(2**24).sum().item()

fill()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
used = held()
memory.give_back()
print(used - held())
"""


def pages_and_returned(how):
    done = subprocess.run(
        [sys.executable, "-c", WORK, how], capture_output=True, text=True, check=True
    )
    return map(float, done.stdout.split())


@pytest.mark.skipif(memory.c_library("mallopt") is None, reason="another C library than glibc")
def test_the_same_block_is_not_asked_for_again_and_comes_back_on_demand():
    pages, returned = pages_and_returned("keep")
    assert returned > 60
    usual, nothing = pages_and_returned("as it comes")
    assert usual > 300_000 and nothing < 4  # else nothing would be gained
    assert pages < usual / 2


def test_other_systems_have_no_such_function(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.c_library("mallopt") is None
    memory.keep()
    memory.give_back()


def test_who_trains_keeps_and_a_notebook_that_has_trained_gives_back(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "keep", lambda: calls.append("keep"))
    monkeypatch.setattr(memory, "give_back", lambda: calls.append("give back"))
    monkeypatch.setattr(notebook, "redraw", lambda *_: None)

    def steps():
        Sturdy(Config("smoke"), [], (), print)
        yield {"step": 1}
        calls.append("trained")

    notebook.watch(steps(), {}, "training")
    assert calls == ["keep", "trained", "give back"]
