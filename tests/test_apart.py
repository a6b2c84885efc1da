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
from importlib.util import find_spec
from weaver.apart import call_apart, expect_calls

FILE = find_spec("wave").origin

def look(name, move):
    there = sys.modules.get(name)
    return there and there.__file__ == FILE, *map(os.environ.get, ("SAID_LATER", "TAKEN_AWAY"))

if __name__ == "__main__":
    os.environ["TAKEN_AWAY"] = "still there"
    expect_calls("wave", "no.such.module")
    os.environ["SAID_LATER"] = "yes"
    del os.environ["TAKEN_AWAY"]
    print(call_apart(look, [("wave",), ("sndhdr",)], [None, None], 2))
"""

INTERRUPTED = """
import os, signal, sys, time
from weaver.apart import expect_calls

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    expect_calls("slow")
    sys.stdin.readline()
    os.killpg(0, signal.SIGINT)
"""


def started(folder: Path, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
    """The script as a process, in a group of its own; what it leaves for a while is in the folder."""
    file = folder / "script.py"
    file.write_text(script)
    pipe, path = subprocess.PIPE, os.pathsep.join([str(ROOT), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder)} | environment
    options = {"text": True, "env": env, "cwd": cwd, "start_new_session": sys.platform != "win32"}
    return subprocess.Popen([sys.executable, file, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_ends_with_its_parent(tmp_path, method):
    with started(tmp_path, SCRIPT, method) as parent:
        assert parent.stdout.readline() == "working\n"
        out, errors = parent.communicate("kill\n", timeout=60)  # returns when the worker too has closed its output
    assert (out, errors, parent.returncode) == ("", "", -9)


@pytest.mark.skipif(sys.platform != "linux", reason="has no server of processes")
def test_workers_of_a_server_have_its_modules_and_the_environment_of_now(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "wave.py").write_text("raise SystemExit('a file of the folder that the command runs in')")
    with started(tmp_path, SERVED, cwd=here) as ran:
        out, errors = ran.communicate(timeout=60)
    assert (out, errors) == ("[(True, 'yes', None), (None, 'yes', None)]\n", "")


def test_without_a_server_processes_import_for_themselves(tmp_path):
    long = tmp_path / ("n" * 100)  # too long for a socket in it
    long.mkdir()
    with started(tmp_path, SERVED, TMPDIR=str(long)) as ran:
        out, errors = ran.communicate(timeout=60)
    assert (out, errors) == ("[(None, 'yes', None), (None, 'yes', None)]\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="has no server of processes")
def test_an_interrupt_while_the_server_imports_is_told_here_alone(tmp_path):
    (tmp_path / "slow.py").write_text("import time; print('importing', flush=True); time.sleep(1)")
    with started(tmp_path, INTERRUPTED) as ran:
        assert ran.stdout.readline() == "importing\n"
        _, errors = ran.communicate("now\n", timeout=60)
    assert errors.count("Traceback") == 1 and "forkserver" not in errors and ran.returncode != 0


def count_up(start: int, parts: int, move) -> int:
    for part in range(1, parts + 1):
        move(part, 99)  # what it gives as its total is not looked at
    return start + parts


@pytest.mark.parametrize("processes", [1, 2])
def test_the_bar_shows_what_all_calls_have_done(processes):
    seen = []
    found = call_all(count_up, [(10, 2), (20, 3)], lambda *of: seen.append(of), 5, processes)
    assert found == [12, 23] and seen == [(done, 5) for done in range(1, 6)]
