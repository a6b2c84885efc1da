"""The training command of the embedded model."""

from pathlib import Path

from weaver.embedded.training import __main__ as command


def test_processes_of_a_training_start_no_others():
    """A child that started children of its own would do so without end."""
    given = ["diffusion", "--model", "here", "--batch", "7", "--compile", "--processes", "3", "--scenes", "500"]
    args = command._parser().parse_args(given)
    line = command._command("diffusion", args)
    assert line[line.index("--nproc-per-node") + 1] == "3"
    child = command._parser().parse_args(line[line.index("weaver.embedded.training") + 1 :])
    assert child.processes == 1
    assert {**vars(child), "processes": 3} == vars(args) and child.model == Path("here") and child.compile
