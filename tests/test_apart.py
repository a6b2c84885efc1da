"""Calls in processes of their own: one bar for all; no worker outlives the one that waits, even killed outright; those
of a server have its modules, and the environment of now."""

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
    worker = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    worker.start()
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


SERVED = """
import os, sys
from weaver.apart import call_apart, expect_calls

def look(name, move):
    return name in sys.modules, os.environ.get("SAID_LATER")

if __name__ == "__main__":
    expect_calls("wave", "no.such.module")
    os.environ["SAID_LATER"] = "yes"
    print(call_apart(look, [("wave",), ("sndhdr",)], [None, None], 2))
"""


def started(folder: Path, script: str, *arguments: str) -> subprocess.Popen:
    file = folder / "script.py"
    file.write_text(script)
    pipe, path = subprocess.PIPE, os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, file, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    )


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_ends_with_its_parent(tmp_path, method):
    with started(tmp_path, SCRIPT, method) as parent:
        assert parent.stdout.readline() == "working\n"
        out, _ = parent.communicate("kill\n", timeout=60)  # returns when the worker too has closed its output
    assert out == "" and parent.returncode == -9


@pytest.mark.skipif(sys.platform != "linux", reason="has no server of processes")
def test_workers_of_a_server_have_its_modules_and_the_environment_of_now(tmp_path):
    with started(tmp_path, SERVED) as ran:
        out, errors = ran.communicate(timeout=60)
    assert (out, errors) == ("[(True, 'yes'), (False, 'yes')]\n", "")


def count_up(start: int, parts: int, move) -> int:
    for part in range(1, parts + 1):
        move(part, 99)  # what it gives as its total is not looked at
    return start + parts


@pytest.mark.parametrize("processes", [1, 2])
def test_the_bar_shows_what_all_calls_have_done(processes):
    seen = []
    found = call_all(count_up, [(10, 2), (20, 3)], lambda *of: seen.append(of), 5, processes)
    assert found == [12, 23] and seen == [(done, 5) for done in range(1, 6)]
