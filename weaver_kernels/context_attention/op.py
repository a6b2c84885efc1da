"""`context_attention` as a PyTorch operation: checks, the choice of the implementation, and the function to call."""

from __future__ import annotations

from functools import cache

import torch

from weaver_kernels import tuning
from weaver_kernels.checks import gradient_reasons, require
from weaver_kernels.context_attention.checks import shape_reasons
from weaver_kernels.context_attention.lists import live_lists, split_live_tokens
from weaver_kernels.context_attention.live import live_context_attention
from weaver_kernels.context_attention.plan import ContextPlan
from weaver_kernels.devices import kernel_arch, on_its_device

__all__ = ["context_attention"]

_OP = "context_attention"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL_DIM = 256


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    context_index: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    plan: ContextPlan | None = None,
) -> torch.Tensor:
    """Cross-attention to several contexts at once, each weighted by token:

    `O[b,t,h] = sum_s W[b,s,t] softmax(scale q[b,t,h] . K[c,h]^T) V[c,h]` with `c = context_index[b,s]`.

    Masks, strengths, concept-free suppression and the choice of a row's contexts are all in `weights` (arXiv
    2404.03913, the equation of `h_fuse`, with its sums taken before the output projection). Rows B, tokens T,
    contexts S of a row out of S' in all, text length L, heads H, head dimension D. Inference only.

    The cost of a token follows the contexts whose weight on it is not zero. On an NVIDIA GPU with Triton one kernel
    serves all rows; elsewhere, and for float64 or D > 256, the tokens of each context are gathered in PyTorch.

    Parameters
    ----------
    q : [B, T, H, D] shared by the contexts of a row, or [B, S, T, H, D] with a query for each
    k, v : [S', L, H, D]; any strides, views of projections are read in place
    weights : [B, S, T], any sign; below 255 in size with float16 queries. A context may or may not be computed on
        tokens where its weight is zero
    context_index : [B, S] integers into S'; None takes context s for s (then S' = S). On the CPU a number outside is
        an error. On a GPU, where reading it would wait for the device, it makes NaN of the tokens it is alive on and
        of all others of their tiles, and no other memory is read; with TRITON_DEBUG=1 the kernel stops there and names
        it. So do `key_lengths`
    scale : positive; None is `1 / sqrt(D)`
    key_lengths : [S'] integers, how many of the L keys of a context count; None is all; a context of length 0 adds
        nothing. Padding is never trimmed otherwise: Stable Diffusion attends to it
    plan : whose own `plan.weights` and `plan.context_index` these weights and this index are; None makes the lists
        anew on each call

    Returns
    -------
    [B, T, H, D] contiguous, in q's dtype, with logits and sums in float32 (float64 for float64)

    Raises
    ------
    ValueError with every reason, when shapes, dtypes, devices or indices do not fit or gradients are asked for.
    """
    reasons = shape_reasons(q, k, v, weights, context_index, key_lengths, scale)
    reasons += gradient_reasons(q=q, k=k, v=v, weights=weights)
    if plan is not None:
        if weights is not plan.weights or context_index is not plan.context_index:
            reasons.append("plan is of other weights or of another index: pass plan.weights and plan.context_index")
        if plan.merged and q.ndim == 5:
            reasons.append("plan merges equal contexts, q has one query for each: make it with merge=False")
        if plan.for_launch:
            reasons.append(f"plan has tiles of {list(plan.tile_sizes)} of its own: make it without tile_sizes")
    require(_OP, reasons)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    lists = None if plan is None else plan.lists
    return _operation(q, k, v, weights, context_index, key_lengths, lists, scale)


def _live(q, k, v, weights, context_index, key_lengths, lists, scale):
    tokens = (None, None) if lists is None else split_live_tokens(lists, weights.shape)
    return live_context_attention(q, k, v, weights, context_index, key_lengths, scale, *tokens)


def _cuda(q, k, v, weights, context_index, key_lengths, lists, scale):
    arch, dim = kernel_arch(q.device), k.shape[3]
    if not arch:
        return _live(q, k, v, weights, context_index, key_lengths, lists, scale)
    if q.dtype not in _KERNEL_DTYPES or dim > _KERNEL_DIM:  # the plan's lists are those of tiles
        return _live(q, k, v, weights, context_index, key_lengths, None, scale)
    if not weights.numel() or not k.numel():
        return torch.zeros_like(_fake(q, k, v, weights, context_index, key_lengths, lists, scale))
    config = tuning.kernel_config(_OP, dim, 8 * q.element_size(), arch, q_each=q.ndim == 5)
    tile_sizes = tuning.tile_sizes(_OP)
    if lists is None:
        tile_sizes = (config.tile,)
        lists = live_lists(weights != 0, tile_sizes, context_index)
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    return on_its_device(_launch(), q, k, v, weights, key_lengths, scale, lists, tile_sizes, config)


@cache
def _launch():
    """Imported where it runs: Triton decides at that moment whether its interpreter takes the kernel."""
    from weaver_kernels.context_attention.launch import launch

    return launch


def _fake(q, k, v, weights, context_index, key_lengths, lists, scale):
    return q.new_empty(weights.shape[0], weights.shape[2], *q.shape[-2:])


# define/impl rather than custom_op, whose wrapping of every call costs more than all checks here. Few arguments, and no
# lists: each tensor of a list costs 0.3 us.
_LIBRARY = torch.library.Library("weaver_kernels", "FRAGMENT")
_LIBRARY.define(
    f"{_OP}(Tensor q, Tensor k, Tensor v, Tensor weights, Tensor? context_index, Tensor? key_lengths, Tensor? lists, "
    "float scale) -> Tensor"
)
_LIBRARY.impl(_OP, _live, "CompositeExplicitAutograd")  # every device that has no implementation of its own
_LIBRARY.impl(_OP, _cuda, "CUDA")
torch.library.register_fake(f"weaver_kernels::{_OP}", _fake, lib=_LIBRARY)
_operation = torch.ops.weaver_kernels.context_attention.default
