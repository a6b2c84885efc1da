"""The benchmarks' timing on an NVIDIA GPU: `make test-gpu`. What it takes is not asserted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.floors import empty_kernel_seconds
from benchmarks.machine import device_name, watched
from benchmarks.timing import GraphCall, buffer_sets, interleave


@pytest.mark.gpu
def test_captured_calls_on_a_gpu():
    device = torch.device("cuda", 0)
    x = torch.randn(1000, device=device)
    call = GraphCall([lambda: x + 1, lambda: x + 2])
    torch.testing.assert_close(call.result, x + 1)
    assert 4000 <= call.peak <= 8192 and buffer_sets(4000, device) > 2
    with watched(device) as readings:
        samples = interleave({"sum": call}, rounds=20)["sum"]
    assert min(samples) > 0 and readings.notes.get("sm_mhz", 1) > 0 and "(sm_" in device_name(device)
    assert empty_kernel_seconds((5, 144, 2), device, 4) > 0
