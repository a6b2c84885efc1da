"""What a call needs to know of its weights: which contexts are alive where, in buffers that stay.

On a GPU the tokens of a row are sorted by the set of contexts alive on them, cut into tiles, and every tile has the
list of its contexts. Elsewhere every context has the list of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weaver_kernels import tuning
from weaver_kernels.checks import gradient_reasons, require
from weaver_kernels.context_attention.lists import live_lists
from weaver_kernels.devices import kernel_arch

__all__ = ["ContextPlan", "merge_equal"]

_INTEGERS = (torch.int32, torch.int64)


class ContextPlan:
    """The live contexts of one `weights`, in buffers that keep their addresses.

    Built once a resolution and handed to `context_attention` with its own `weights` and `context_index`. `update`
    writes another selection of contexts into the same buffers, so that a CUDA graph captured with the plan replays
    with other masks and another number of contexts. On a GPU neither waits for the device. Inference only.

    Rows B, contexts S of a row, tokens T.

    Parameters
    ----------
    weights : [B, S, T] floating-point; a context is alive on a token where its weight is not zero
    context_index : [B, S] integers into the contexts of the keys; None takes context s for s
    capacity : room for that many contexts; None is S. The buffers have it for their S, the rest is dead
    same_as : [S'] integers, for each context of the keys the first one equal to it in text and weights; None, or past
        its end, differs from all others
    merge : sum the weights of a row's equal contexts and compute them once, exact when they share their queries. With
        a query for each context it must be False
    tile_sizes : tiles of these sizes, for a launch of one's own; None is what `context_attention` takes on the device

    Attributes
    ----------
    weights, context_index : [B, capacity, T], float32 or wider, and [B, capacity], to be handed on
    lists, tile_sizes : the buffer of `context_attention.lists`, and of which tiles

    Raises
    ------
    ValueError with every reason, when shapes, dtypes or devices do not fit or gradients are asked for.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        context_index: torch.Tensor | None = None,
        *,
        capacity: int | None = None,
        same_as: torch.Tensor | None = None,
        merge: bool = True,
        tile_sizes: Sequence[int] | None = None,
    ):
        if weights.ndim != 3 or not weights.is_floating_point():
            got = f"{tuple(weights.shape)} {weights.dtype}"
            raise ValueError(f"ContextPlan: weights must be [B, S, T] floating-point, got {got}")
        rows, n_contexts, tokens = weights.shape
        capacity = n_contexts if capacity is None else capacity
        reasons = [f"capacity must be 0 or more, got {capacity}"] if capacity < 0 else []
        if tile_sizes is not None and any(size < 1 for size in tile_sizes):
            reasons.append(f"tile_sizes must be 1 or more, got {list(tile_sizes)}")
        require("ContextPlan", reasons)
        self.merged = merge
        self.for_launch = tile_sizes is not None
        if tile_sizes is None:
            tile_sizes = tuning.tile_sizes("context_attention") if kernel_arch(weights.device) else ()
        self.tile_sizes = tuple(tile_sizes)
        dtype = torch.promote_types(weights.dtype, torch.float32)  # of 16 bits, a merged sum would lose small weights
        self.weights = weights.new_zeros(rows, capacity, tokens, dtype=dtype)
        self.context_index = torch.zeros(rows, capacity, dtype=torch.int32, device=weights.device)
        self.lists: torch.Tensor | None = None
        self.update(weights, context_index, same_as)

    def update(
        self, weights: torch.Tensor, context_index: torch.Tensor | None = None, same_as: torch.Tensor | None = None
    ) -> None:
        """Take other weights [B, S, T], S up to the capacity, and another index [B, S], in place."""
        require("ContextPlan", self._reasons(weights, context_index, same_as))
        with torch.no_grad():
            self._write(weights, context_index, same_as)

    def _write(self, weights, context_index, same_as) -> None:
        rows, n_contexts, _ = weights.shape
        if context_index is None:
            context_index = torch.arange(n_contexts, device=weights.device).expand(rows, n_contexts)
        if self.merged:
            weights = merge_equal(weights.to(self.weights.dtype), context_index, same_as)
        else:
            weights = weights.clone()  # they may be the buffer's own
        self.weights.zero_()[:, :n_contexts] = weights
        in_type = context_index.clamp(-1, torch.iinfo(torch.int32).max)  # a number out of range must stay out of it
        self.context_index.zero_()[:, :n_contexts] = in_type
        lists = live_lists(self.weights != 0, self.tile_sizes, self.context_index)
        self.lists = lists if self.lists is None else self.lists.copy_(lists)

    def _reasons(self, weights, context_index, same_as) -> list[str]:
        rows, capacity, tokens = self.weights.shape
        n_contexts = weights.shape[1] if weights.ndim == 3 else 0
        reasons = gradient_reasons(weights=weights)
        if weights.ndim != 3 or (weights.shape[0], weights.shape[2]) != (rows, tokens) or n_contexts > capacity:
            reasons.append(f"weights must be [{rows}, S <= {capacity}, {tokens}], got {tuple(weights.shape)}")
        if not weights.is_floating_point():
            reasons.append(f"weights must be floating-point, got {weights.dtype}")
        if context_index is not None:
            got = f"{tuple(context_index.shape)} {context_index.dtype}"
            if tuple(context_index.shape) != (rows, n_contexts) or context_index.dtype not in _INTEGERS:
                reasons.append(f"context_index must be {(rows, n_contexts)} integers, got {got}")
        if same_as is not None:
            got = f"{tuple(same_as.shape)} {same_as.dtype}"
            if same_as.ndim != 1 or same_as.dtype not in _INTEGERS:
                reasons.append(f"same_as must be [S'] integers, got {got}")
            elif context_index is None and len(same_as) < n_contexts:
                reasons.append(f"same_as must have a number for each of {n_contexts} contexts, got {got}")
        others = {x.device for x in (weights, context_index, same_as) if x is not None} | {self.weights.device}
        if len(others) > 1:
            reasons.append(f"tensors are on several devices: {', '.join(sorted(map(str, others)))}")
        return reasons


def merge_equal(
    weights: torch.Tensor, context_index: torch.Tensor, same_as: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights [B, S, T] in which the first of a row's equal contexts has the sum of their weights, the others zero.

    Equal are contexts of one number in `context_index` [B, S], or of one number in `same_as` [S'], past whose ends a
    context is equal to none.
    """
    if same_as is not None and len(same_as):
        inside = (context_index >= 0) & (context_index < len(same_as))
        context_index = torch.where(inside, same_as[context_index.clamp(0, len(same_as) - 1).long()], context_index)
    equal = context_index[:, :, None] == context_index[:, None, :]  # [B, S, S]
    first = equal.to(torch.uint8).argmax(-1)  # [B, S]
    return torch.zeros_like(weights).scatter_add_(1, first[:, :, None].expand_as(weights), weights)
