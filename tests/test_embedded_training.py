"""The training command of the embedded model."""

from pathlib import Path

import pytest
import torch

from weaver.embedded.training import __main__ as command
from weaver.embedded.training import loop


def test_processes_of_a_training_start_no_others():
    """A child that started children of its own would do so without end."""
    given = ["diffusion", "--model", "here", "--batch", "7", "--compile", "--processes", "3", "--scenes", "500"]
    args = command._parser().parse_args(given)
    line = command._command("diffusion", args)
    assert line[line.index("--nproc-per-node") + 1] == "3"
    child = command._parser().parse_args(line[line.index("weaver.embedded.training") + 1 :])
    assert child.processes == 1
    assert {**vars(child), "processes": 3} == vars(args) and child.model == Path("here") and child.compile


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32-only"])
def test_muon_is_used_where_bfloat16_is(monkeypatch, bfloat16):
    """Muon works in bfloat16, which a CPU without it takes 15 times as long for."""
    used, muon = [], torch.optim.Muon
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(torch.optim, "Muon", lambda *args, **kwargs: used.append(1) or muon(*args, **kwargs))
    assert torch.is_autocast_enabled("cpu") is False
    with loop.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is bfloat16
    matrix, before, bias = torch.nn.Parameter(torch.eye(4)), torch.eye(4), torch.nn.Parameter(torch.ones(4))
    settings = loop.LoopSettings(minutes=1e-3, learning_rate=0.1, batch=1)

    def loss_of(step: int) -> torch.Tensor:
        return (matrix + bias).square().sum()

    steps = loop.train([matrix, bias], loss_of, settings, save=lambda: None, matrices=[matrix])
    assert bool(used) is bfloat16 and steps >= 1
    assert not torch.equal(matrix.detach(), before)
