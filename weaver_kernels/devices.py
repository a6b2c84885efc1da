"""On which devices the Triton kernels run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from weaver_kernels.tuning import config_table

__all__ = ["kernel_arch", "on_its_device", "triton_version"]

_TRITON = find_spec("triton") is not None and torch.version.hip is None
_LEAST = config_table("devices")["least_arch"]  # read here, because a compiled caller can't open files


@torch.compiler.assume_constant_result
def kernel_arch(device: torch.device) -> int:
    """Compute capability (90 is 9.0) of an NVIDIA GPU that kernels run on; 0 for any other device, and without Triton.

    GPUs older than `least_arch` of `configs/devices.json` have what other devices have: Triton does not support them.
    """
    return _arch(device) if _TRITON and device.type == "cuda" else 0


@cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    return arch if arch >= _LEAST else 0


def on_its_device(launch: Callable, tensor: torch.Tensor, *arguments):
    """What `launch(tensor, *arguments)` gives on the tensor's GPU: Triton launches on the current one."""
    if tensor.device.index in (None, torch.cuda.current_device() if tensor.is_cuda else None):
        return launch(tensor, *arguments)
    with torch.cuda.device(tensor.device):
        return launch(tensor, *arguments)


def triton_version() -> str:
    """Of the Triton that is installed, by whatever name its package has."""
    import triton

    return triton.__version__
