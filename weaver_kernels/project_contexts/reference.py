"""The meaning of `project_contexts`: one context at a time, its weights written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from weaver_kernels.checks import own_precision

__all__ = ["LowRank", "ProjectionChange", "project_contexts_reference"]


class LowRank(NamedTuple):
    """A change `up @ down` of a projection: down [r, C], up [H * D, r], with any scale already in one of them."""

    down: torch.Tensor
    up: torch.Tensor


class ProjectionChange(NamedTuple):
    """What a context adds to the weights of `to_k` and `to_v`: a matrix [H * D, C], factors, or nothing."""

    k: torch.Tensor | LowRank | None = None
    v: torch.Tensor | LowRank | None = None


@own_precision
def project_contexts_reference(
    text: torch.Tensor,
    weight_k: torch.Tensor,
    weight_v: torch.Tensor,
    heads: int,
    changes: Mapping[int, ProjectionChange] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, both [S', L, H, D]; arguments of `project_contexts`."""
    pair = []
    for base, name in ((weight_k, "k"), (weight_v, "v")):
        projected = []
        for s in range(len(text)):
            weight = base.to(text.dtype)
            change = getattr((changes or {}).get(s, ProjectionChange()), name)
            if isinstance(change, LowRank):
                weight = weight + change.up.to(text.dtype) @ change.down.to(text.dtype)
            elif change is not None:
                weight = weight + change.to(text.dtype)
            projected.append(text[s] @ weight.T)
        pair.append(torch.stack(projected).unflatten(-1, (heads, -1)))
    return tuple(pair)
