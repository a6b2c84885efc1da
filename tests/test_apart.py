"""No worker outlives the process that waits for it, even where that is killed outright."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
