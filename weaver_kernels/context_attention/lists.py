"""Where each context is alive: which tokens a context has, and which contexts a tile of tokens has.

All lists of a plan are in one buffer of int32, so that a call hands over one tensor. For tiles it holds the order of
the tokens [B, T], and then of each tile size what a tile has [B, tiles, 1 + 2 S]: how many contexts, and of each its
place in the row and in the keys, side by side so that one wait for memory brings them. A tile without any has one,
whose weights are zero there. Without tiles the buffer holds the tokens of each context [B, S, T] and how many there
are [B, S].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["TileLayout", "live_lists", "live_order", "live_tokens", "split_live_tokens", "tile_layout", "tile_list"]

_BITS = 62  # of a sort key: int64 without its sign, and one to spare


class TileLayout(NamedTuple):
    """Of one tile size: tiles of a row, and where in the buffer its list begins."""

    n_tiles: int
    at: int


@cache
def tile_layout(rows: int, n_contexts: int, tokens: int, tile_sizes: tuple[int, ...]) -> dict[int, TileLayout]:
    """Where the lists of each tile size are in the buffer."""
    found, at = {}, rows * tokens
    for size in tile_sizes:
        n_tiles = -(-tokens // size)
        found[size] = TileLayout(n_tiles, at)
        at += rows * n_tiles * (1 + 2 * n_contexts)
    return found


def live_lists(
    alive: torch.Tensor, tile_sizes: Sequence[int], context_index: torch.Tensor | None = None
) -> torch.Tensor:
    """All lists of `alive` [B, S, T] in one buffer: those of tiles, or of tokens where there are no tile sizes.

    context_index : [B, S] int32, the places in the keys; None is those in the row.
    """
    if tile_sizes:
        order = live_order(alive)
        parts = [order, *(tile_list(alive, order, size, context_index) for size in tile_sizes)]
    else:
        parts = live_tokens(alive)
    return torch.cat([part.flatten() for part in parts])


def split_live_tokens(lists: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two lists of `live_tokens`, out of the buffer; `shape` is that of the weights, [B, S, T]."""
    rows, n_contexts, tokens = shape
    which, how_many = lists.split([rows * n_contexts * tokens, rows * n_contexts])
    return which.view(shape), how_many.view(rows, n_contexts)


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


def tile_list(
    alive: torch.Tensor, order: torch.Tensor, size: int, context_index: torch.Tensor | None = None
) -> torch.Tensor:
    """The contexts alive on each tile of `size` tokens in `order`: [B, tiles, 1 + 2 S] int32.

    alive : [B, S, T] bool, order : [B, T]. How many there are, then place in the row and in the keys of each, ascending
    and the live ones first. The shape does not depend on what is alive.
    """
    rows, n_contexts, tokens = alive.shape
    sorted_alive = alive.gather(2, order.long()[:, None].expand_as(alive))
    tiles = -(-tokens // size)
    padded = F.pad(sorted_alive, (0, tiles * size - tokens))
    on_tile = padded.view(rows, n_contexts, tiles, size).any(-1).transpose(1, 2)  # [B, tiles, S]
    count = on_tile.sum(-1, keepdim=True)
    places = (~on_tile).to(torch.uint8).argsort(dim=-1, stable=True)
    in_keys = places if context_index is None else context_index.long()[:, None].expand_as(places).gather(2, places)
    in_keys = in_keys.clamp(-1, torch.iinfo(torch.int32).max)  # a number out of range must stay out of it
    in_keys = in_keys.where(count > 0, 0)  # the one that stands for none is one that there is
    pairs = torch.stack([places, in_keys], -1).flatten(-2)
    return torch.cat([count.clamp(min=1), pairs], -1).to(torch.int32)


def live_tokens(alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens on which each context of each row is alive.

    alive : [B, S, T] bool. Returns which, [B, S, T] int32 with the live ones first and ascending, and how many,
    [B, S] int32.
    """
    tokens = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)
    return tokens.to(torch.int32), alive.sum(-1, dtype=torch.int32)
