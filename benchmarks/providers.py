"""Ways to compute N cross-attentions that are weighted by token: ours, and what one would write without it.

Each is in its library's recommended form. What depends on masks alone is made once in `__init__`, what depends on texts
alone in `keep`: a fusion has both before its first step. `__call__` is what is timed; it returns [2, T, H, D] for q of
that shape, the fused row and the negative one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.shapes import Texts
from weaver_kernels import ContextPlan, context_attention

__all__ = ["PROVIDERS", "SLOW_TO_COMPILE", "NotSupported"]

FLEX_BLOCK = 128  # keys of a block of FlexAttention's masks; each context begins at one


class NotSupported(Exception):
    """Why a provider is not measured here."""


class Ours:
    """`context_attention` with its plan."""

    def __init__(self, plan: ContextPlan, dtype: torch.dtype):
        self.plan = plan

    def keep(self, texts: Texts) -> tuple[torch.Tensor, ...]:
        return texts.k, texts.v

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return context_attention(q, k, v, self.plan.weights, self.plan.context_index, plan=self.plan)


class Eager(Ours):
    """A loop over contexts: an attention, a product with the mask, a sum."""

    def __init__(self, plan: ContextPlan, dtype: torch.dtype):
        self.weights = plan.weights[0, :-1].to(dtype)  # [S, T]

    def __call__(self, q, k, v):
        fused = torch.zeros_like(q[0])
        for s, w in enumerate(self.weights):
            fused = fused + w[:, None, None] * attend(q[0], k[s], v[s])
        return torch.stack([fused, attend(q[1], k[-1], v[-1])])


class Batched(Eager):
    """All contexts in one attention, then one sum over them."""

    def __call__(self, q, k, v):
        return batched(q, k, v, self.weights)


class BatchedCompiled(Eager):
    """The same, compiled."""

    def __call__(self, q, k, v):
        return compiled(batched)(q, k, v, self.weights)


class Flex(Eager):
    """FlexAttention over all contexts side by side: a token has a row of queries for each context alive on it.

    So hard masks and soft ones are exact, and the block mask skips what is dead.
    """

    def __init__(self, plan: ContextPlan, dtype: torch.dtype):
        from torch.nn.attention.flex_attention import create_block_mask

        super().__init__(plan, dtype)
        slots, self.slot_weights = live_slots(self.weights)
        self.length = None  # of the texts, known when they are
        self.make_mask = lambda length: create_block_mask(
            lambda b, h, i, j: (slots[b, i] == j // FLEX_BLOCK) & (j % FLEX_BLOCK < length),
            *(len(slots), None, slots.shape[1], len(self.weights) * FLEX_BLOCK),
            device=slots.device,
        )

    def keep(self, texts):
        if self.length != texts.k.shape[1]:
            self.length = texts.k.shape[1]
            self.mask = self.make_mask(self.length)

        def side_by_side(x: torch.Tensor) -> torch.Tensor:
            padded = F.pad(x[:-1], (0, 0, 0, 0, 0, FLEX_BLOCK - self.length))  # [S, block, H, D]
            return padded.flatten(0, 1).transpose(0, 1).contiguous()[None]  # [1, H, S * block, D]

        return *(side_by_side(x) for x in (texts.k, texts.v)), texts.k[-1], texts.v[-1]

    def __call__(self, q, k, v, negative_k, negative_v):
        return compiled(flex)(q, k, v, negative_k, negative_v, self.mask, self.slot_weights)


class SortedVarlen(Eager):
    """Tokens gathered by context into one packed batch, attention without padding, a weighted sum of each token's."""

    def __init__(self, plan: ContextPlan, dtype: torch.dtype):
        super().__init__(plan, dtype)
        if self.weights.device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
            raise NotSupported(f"varlen_attn takes 16-bit types, not {dtype}")
        alive = self.weights != 0
        self.tokens = [w.nonzero()[:, 0] for w in alive]
        self.segment_weights = [w[t][:, None, None] for w, t in zip(self.weights, self.tokens, strict=True)]
        n_tokens = alive.shape[1]
        everyone = torch.arange(n_tokens, 2 * n_tokens, device=alive.device)  # the negative row's
        self.gathered = torch.cat([*self.tokens, everyone])
        self.counts = [*map(len, self.tokens), n_tokens]
        # Where in the packed batch the results of a token are, one for each context alive on it.
        place = (alive.flatten().cumsum(0) - 1).view_as(alive)
        slots, self.slot_weights = live_slots(self.weights)
        self.places = place.gather(0, slots.clamp(min=0))

    def keep(self, texts):
        self.ends_q, self.ends_k = (
            torch.tensor([0, *counts], device=texts.k.device).cumsum(0, dtype=torch.int32)
            for counts in (self.counts, [texts.k.shape[1]] * len(texts.k))
        )
        return texts.k, texts.v

    def __call__(self, q, k, v):
        return self.packed(q, k, v) if q.device.type == "cuda" else self.by_segment(q, k, v)

    def packed(self, q, k, v):
        """All segments in one attention."""
        packed = self.attend_packed(q.flatten(0, 1)[self.gathered], k.flatten(0, 1), v.flatten(0, 1))
        return compiled(unpack)(packed, self.places, self.slot_weights)

    def attend_packed(self, q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        longest_k = len(k) // len(self.counts)
        return varlen_attn(q, k, v, self.ends_q, self.ends_k, max(self.counts), longest_k)

    def by_segment(self, q, k, v):
        """As far as other devices have it: an attention for each context's tokens, added back."""
        fused = torch.zeros_like(q[0])
        for s, (tokens, w) in enumerate(zip(self.tokens, self.segment_weights, strict=True)):
            fused.index_add_(0, tokens, w * attend(q[0][tokens], k[s], v[s]))
        return torch.stack([fused, attend(q[1], k[-1], v[-1])])


class Xformers(SortedVarlen):
    """The same packed batch with xformers' block-diagonal mask."""

    def __init__(self, plan: ContextPlan, dtype: torch.dtype):
        if find_spec("xformers") is None:
            raise NotSupported("xformers is not installed")
        if plan.weights.device.type != "cuda":
            raise NotSupported("xformers has this attention on GPUs only")
        super().__init__(plan, dtype)

    def keep(self, texts):
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        lengths = [texts.k.shape[1]] * len(texts.k)
        self.mask = BlockDiagonalMask.from_seqlens(self.counts, lengths, device=texts.k.device)
        return texts.k, texts.v

    def attend_packed(self, q, k, v):
        from xformers.ops import memory_efficient_attention_forward

        return memory_efficient_attention_forward(q[None], k[None], v[None], attn_bias=self.mask)[0]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of [n, H, D] queries to [L, H, D] keys."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    queries = q[0].transpose(0, 1).expand(len(weights), -1, -1, -1)
    parts = F.scaled_dot_product_attention(queries, k[:-1].transpose(1, 2), v[:-1].transpose(1, 2))
    fused = torch.einsum("st,shtd->thd", weights, parts)
    return torch.stack([fused, attend(q[1], k[-1], v[-1])])


def flex(q, k, v, negative_k, negative_v, mask, slot_weights) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    queries, k, v = (x.expand(len(slot_weights), -1, -1, -1) for x in (q[0].transpose(0, 1), k, v))
    parts = flex_attention(queries, k, v, block_mask=mask)  # [J, H, T, D]
    fused = (slot_weights[:, None, :, None] * parts).sum(0).transpose(0, 1)
    return torch.stack([fused, attend(q[1], negative_k, negative_v)])


def unpack(packed: torch.Tensor, places: torch.Tensor, slot_weights: torch.Tensor) -> torch.Tensor:
    """[n, H, D] of all segments to [2, T, H, D]."""
    fused = (packed[places] * slot_weights[:, :, None, None]).sum(0)
    return torch.stack([fused, packed[-places.shape[1] :]])


def live_slots(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of weights [S, T] the contexts alive on each token, [J, T] with -1 for none, and their weights [J, T]."""
    alive = weights != 0
    most = int(alive.sum(0).max())
    slots = (~alive).to(torch.uint8).argsort(dim=0, stable=True)[:most]
    slot_weights = weights.gather(0, slots)
    return torch.where(slot_weights != 0, slots, -1), slot_weights


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


PROVIDERS: dict[str, type[Ours]] = {
    "ours": Ours,
    "eager": Eager,
    "sdpa + einsum": Batched,
    "sdpa + einsum, compiled": BatchedCompiled,
    "flex": Flex,
    "sorted varlen": SortedVarlen,
    "xformers": Xformers,
}
SLOW_TO_COMPILE = ("sdpa + einsum, compiled", "flex")
