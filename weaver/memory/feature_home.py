"""Where a template's features are kept: on the GPU where they fit, or else in the host's memory, pinned."""

from __future__ import annotations

import logging

import torch

from weaver.sizes import format_bytes

__all__ = ["free_bytes", "home_for", "kept_in"]

_log = logging.getLogger(__name__)
_SHARE = 0.5  # of the free memory: the rest is for what fusion and the autoencoder compute


def free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU; None for other devices, where it makes no difference or is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def home_for(nbytes: int, device: torch.device) -> torch.device | str:
    """The device itself, or "cpu" where features of that many bytes would take over half of what is free; that is told.

    What PyTorch keeps of memory that nothing uses is free too, and given back where it matters.
    """
    free = free_bytes(device)
    if free is not None and nbytes > _SHARE * free:
        torch.cuda.empty_cache()
        free = free_bytes(device)
    if free is None or nbytes <= _SHARE * free:
        return device
    _log.warning(
        "the template's features (%s) would take more than half of the %s that are free on %s: "
        "they are kept in the host's memory, and brought to the device a step ahead",
        *(format_bytes(nbytes), format_bytes(free), device),
    )
    return "cpu"


def kept_in(home: torch.device | str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in a home; what a GPU reads from the host's memory is pinned, and may still be on its way there."""
    if torch.device(home).type == "cpu" and device.type == "cuda":
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(home)
