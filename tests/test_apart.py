"""Calls in processes of their own: one bar for all; no worker outlives the one that waits, even killed outright."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weaver.apart import call_all

ROOT = Path(__file__).parent.parent

# The worker holds standard output open for as long as it lives, and says when it has begun.
SCRIPT = """
import multiprocessing, os, signal, sys, time
from weaver.apart import end_with_parent

def work():
    end_with_parent()
    print("working", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipe, path = subprocess.PIPE, os.pathsep.join([str(ROOT), *sys.path])
    with subprocess.Popen(
        [sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as parent:
        assert parent.stdout.readline() == "working\n"
        out, _ = parent.communicate("kill\n", timeout=60)  # returns when the worker too has closed its output
    assert out == "" and parent.returncode == -9


def count_up(start: int, parts: int, move) -> int:
    for part in range(1, parts + 1):
        move(part, 99)  # what it gives as its total is not looked at
    return start + parts


@pytest.mark.parametrize("processes", [1, 2])
def test_the_bar_shows_what_all_calls_have_done(processes):
    seen = []
    found = call_all(count_up, [(10, 2), (20, 3)], lambda *of: seen.append(of), 5, processes)
    assert found == [12, 23] and seen == [(done, 5) for done in range(1, 6)]
