"""Which GPUs have the kernels, told without any."""

from __future__ import annotations

import pytest
import torch

from weaver_kernels import devices


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), 0), ((8, 0), 80), ((8, 6), 86), ((12, 0), 120)], ids=str)
def test_gpus_that_triton_does_not_support_have_what_other_devices_have(capability, arch, monkeypatch):
    monkeypatch.setattr(devices, "_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(devices, "_arch", devices._arch.__wrapped__)
    assert devices.kernel_arch(torch.device("cuda", 0)) == arch
    assert devices.kernel_arch(torch.device("cpu")) == 0


def test_without_triton_no_gpu_has_them(monkeypatch):
    monkeypatch.setattr(devices, "_TRITON", False)
    assert devices.kernel_arch(torch.device("cuda", 0)) == 0


def test_a_compiled_caller_has_it_as_a_constant():
    compiled = torch.compile(lambda x: x + devices.kernel_arch(x.device), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3)), torch.zeros(3))
