"""Bad input is one `ValueError` that lists every reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["gradient_reasons", "require"]


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
