"""Where each context is alive: what lets the cost of a token follow the contexts it has, however many there are.

On a GPU the tokens of a row are sorted by the set of contexts alive on them, cut into tiles, and every tile has the
list of its contexts. Elsewhere every context has the list of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from weaver_kernels import tuning

__all__ = ["ContextPlan", "has_kernel", "live_order", "live_tokens", "merge_equal", "tile_lists"]

_BITS = 62  # of a sort key: int64 without its sign, and one to spare
_TRITON = find_spec("triton") is not None and torch.version.hip is None


def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel runs there: an NVIDIA GPU, with Triton installed."""
    return _TRITON and device.type == "cuda"


class ContextPlan:
    """The live contexts of one `weights`, in buffers that keep their addresses.

    Built once a resolution and handed to `context_attention` with its own `weights` and `context_index`. `update`
    writes another selection of contexts into the same buffers, so that a CUDA graph captured with the plan replays
    with other masks and another number of contexts. On a GPU neither waits for the device.

    Rows B, contexts S of a row, tokens T.

    Parameters
    ----------
    weights : [B, S, T]; a context is alive on a token where its weight is not zero
    context_index : [B, S] integers into the contexts of the keys; None takes context s for s
    capacity : room for that many contexts; None is S. The buffers have it for their S, the rest is dead
    same_as : [S'] integers, for each context the first one equal to it in text and weights; None if all differ
    merge : sum the weights of a row's equal contexts and compute them once, exact when they share their queries. With
        a query for each context it must be False
    tile_sizes : make tiles of these sizes; None makes what the device needs

    Attributes
    ----------
    weights, context_index : [B, capacity, T] and [B, capacity], to be handed on
    lists, tile_sizes : what the operation takes; with tiles `live_order` and the `tile_lists` of each size, else
        `live_tokens`

    Raises
    ------
    ValueError with every reason, when shapes do not fit.
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
        if weights.ndim != 3:
            raise ValueError(f"ContextPlan: weights must be [B, S, T], got {tuple(weights.shape)}")
        rows, n_contexts, tokens = weights.shape
        capacity = n_contexts if capacity is None else capacity
        if tile_sizes is None:
            tile_sizes = tuning.tile_sizes("context_attention") if has_kernel(weights.device) else ()
        self.merged = merge
        self.tile_sizes = tuple(tile_sizes)
        self.weights = weights.new_zeros(rows, capacity, tokens)
        self.context_index = torch.zeros(rows, capacity, dtype=torch.int32, device=weights.device)
        self.lists = self._lists()
        self.update(weights, context_index, same_as)

    @torch.no_grad()
    def update(
        self, weights: torch.Tensor, context_index: torch.Tensor | None = None, same_as: torch.Tensor | None = None
    ) -> None:
        """Take other weights [B, S, T], S up to the capacity, and another index [B, S], in place."""
        rows, capacity, tokens = self.weights.shape
        n_contexts = weights.shape[1] if weights.ndim == 3 else 0
        reasons = []
        if weights.ndim != 3 or (weights.shape[0], weights.shape[2]) != (rows, tokens) or n_contexts > capacity:
            reasons.append(f"weights must be [{rows}, S <= {capacity}, {tokens}], got {tuple(weights.shape)}")
        if context_index is not None and tuple(context_index.shape) != (rows, n_contexts):
            reasons.append(f"context_index must be {(rows, n_contexts)}, got {tuple(context_index.shape)}")
        if reasons:
            raise ValueError("ContextPlan: " + "; ".join(reasons))
        if context_index is None:
            context_index = torch.arange(n_contexts, device=weights.device).expand(rows, n_contexts)
        if self.merged:
            weights = merge_equal(weights, context_index, same_as)
        self.weights.zero_()[:, :n_contexts] = weights
        in_type = context_index.clamp(-1, torch.iinfo(torch.int32).max)  # a number out of range must stay out of it
        self.context_index.zero_()[:, :n_contexts] = in_type
        for buffer, new in zip(self.lists, self._lists(), strict=True):
            buffer.copy_(new)

    def _lists(self) -> tuple[torch.Tensor, ...]:
        alive = self.weights != 0
        if not self.tile_sizes:
            return live_tokens(alive)
        order = live_order(alive)
        return (order, *(part for size in self.tile_sizes for part in tile_lists(alive, order, size)))


def merge_equal(
    weights: torch.Tensor, context_index: torch.Tensor, same_as: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights [B, S, T] in which the first of a row's equal contexts has the sum of their weights, the others zero.

    Equal are contexts of one number in `context_index` [B, S], or of one number in `same_as` [S'].
    """
    if same_as is not None:
        context_index = same_as[context_index.long()]
    equal = context_index[:, :, None] == context_index[:, None, :]  # [B, S, S]
    first = equal.to(torch.uint8).argmax(-1)  # [B, S]
    return torch.zeros_like(weights).scatter_add_(1, first[:, :, None].expand_as(weights), weights)


def live_order(alive: torch.Tensor) -> torch.Tensor:
    """The tokens of each row, those with the same live contexts next to each other: [B, T] int32.

    alive : [B, S, T] bool. Tokens of one set keep their order, so that rows of memory stay close.
    """
    rows, n_contexts, tokens = alive.shape
    order = torch.arange(tokens, device=alive.device).expand(rows, tokens)
    for start in range(0, n_contexts, _BITS):  # sorting is stable: one pass for every 62 contexts
        word = alive[:, start : start + _BITS]
        bits = 1 << torch.arange(word.shape[1], device=alive.device)
        key = (word * bits[None, :, None]).sum(1)  # [B, T]
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order.to(torch.int32)


def tile_lists(alive: torch.Tensor, order: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The contexts alive on each tile of `size` tokens in `order`.

    alive : [B, S, T] bool, order : [B, T]. Returns how many, [B, tiles] int32, and which, [B, tiles, S] int32 with
    the live ones first and ascending. Shapes do not depend on what is alive.
    """
    rows, n_contexts, tokens = alive.shape
    sorted_alive = alive.gather(2, order.long()[:, None].expand_as(alive))
    tiles = -(-tokens // size)
    padded = F.pad(sorted_alive, (0, tiles * size - tokens))
    on_tile = padded.view(rows, n_contexts, tiles, size).any(-1).transpose(1, 2)  # [B, tiles, S]
    contexts = (~on_tile).to(torch.uint8).argsort(dim=-1, stable=True)
    return on_tile.sum(-1, dtype=torch.int32), contexts.to(torch.int32).contiguous()


def live_tokens(alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens on which each context of each row is alive.

    alive : [B, S, T] bool. Returns which, [B, S, T] int32 with the live ones first and ascending, and how many,
    [B, S] int32.
    """
    tokens = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)
    return tokens.to(torch.int32), alive.sum(-1, dtype=torch.int32)
