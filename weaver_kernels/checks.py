"""Bad input is one `ValueError` that lists every reason; what a caller's autocast would round is kept from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch

__all__ = ["gradient_reasons", "own_precision", "require"]


def require(op: str, reasons: Sequence[str]) -> None:
    """Raise `ValueError` with all reasons, or do nothing when there is none."""
    if reasons:
        raise ValueError(f"{op}: " + "; ".join(reasons))


def gradient_reasons(**tensors: torch.Tensor | None) -> list[str]:
    """Why gradients can't be had; empty when nobody asks for them."""
    if not torch.is_grad_enabled():
        return []
    asking = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    return [f"inference only, and {', '.join(asking)} requires grad: call under torch.no_grad()"] if asking else []


def own_precision(function: Callable) -> Callable:
    """A function of tensors of one device, without autocast: that would take its float32 products in 16 bits."""

    @wraps(function)
    def call(*args, **kwargs):
        kind = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), "cpu")
        # torch 2.11's compiler can't trace the question whether a device has autocast; what it compiles for does.
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
        if not has_autocast or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return call
