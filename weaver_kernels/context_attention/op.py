"""`context_attention` as a PyTorch operation: checks, the choice of the implementation, and the function to call."""

from __future__ import annotations

from functools import cache

import torch

from weaver_kernels.checks import gradient_reasons, require
from weaver_kernels.context_attention.checks import shape_reasons
from weaver_kernels.context_attention.live import live_context_attention
from weaver_kernels.context_attention.plan import ContextPlan, has_kernel, live_order, tile_lists
from weaver_kernels.tuning import kernel_config

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
    weights : [B, S, T], any sign; in float16 as large as the type. A context may or may not be computed on tokens
        where its weight is zero
    context_index : [B, S] integers into S'; None takes context s for s (then S' = S). On the CPU a number outside is
        an error. On a GPU, where reading it would wait for the device, it makes the tokens it is alive on NaN and no
        other memory is read; with TRITON_DEBUG=1 the kernel stops there and names it. So do `key_lengths`
    scale : positive; None is `1 / sqrt(D)`
    key_lengths : [S'] integers, how many of the L keys of a context count; None is all; a context of length 0 adds
        nothing. Padding is never trimmed otherwise: Stable Diffusion attends to it
    plan : of these weights and this index, which it keeps as `plan.weights` and `plan.context_index`; None makes the
        lists anew on each call

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
        own = plan.weights
        if own is not weights and (own.shape != weights.shape or own.device != weights.device):
            reasons.append(
                f"plan is for weights {tuple(own.shape)} on {own.device}, "
                f"got {tuple(weights.shape)} on {weights.device}: pass plan.weights and plan.context_index"
            )
        if plan.merged and q.ndim == 5:
            reasons.append("plan merges equal contexts, q has one query for each: make it with merge=False")
    require(_OP, reasons)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lists, tile_sizes = ((), ()) if plan is None else (plan.lists, plan.tile_sizes)
    return torch.ops.weaver_kernels.context_attention(
        q, k, v, weights, context_index, key_lengths, lists, tile_sizes, scale
    )


def _live(q, k, v, weights, context_index, key_lengths, lists, tile_sizes, scale):
    tokens, counts = lists if lists and not tile_sizes else (None, None)
    return live_context_attention(q, k, v, weights, context_index, key_lengths, scale, tokens, counts)


def _cuda(q, k, v, weights, context_index, key_lengths, lists, tile_sizes, scale):
    dim = q.shape[-1]
    if not has_kernel(q.device) or q.dtype not in _KERNEL_DTYPES or dim > _KERNEL_DIM:
        return _live(q, k, v, weights, context_index, key_lengths, lists, tile_sizes, scale)
    if not weights.numel() or not k.numel():
        return q.new_zeros(weights.shape[0], weights.shape[2], *q.shape[-2:])
    config = kernel_config(_OP, dim, 8 * q.element_size(), _arch(q.device.index), q_each=q.ndim == 5)
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == weights.stride(-1) == 1:
        q, k, v, weights = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, weights))
    if tile_sizes:
        if config.tile not in tile_sizes:
            raise ValueError(f"{_OP}: plan has tiles of {list(tile_sizes)}, this device takes {config.tile}")
        first = 1 + 2 * tile_sizes.index(config.tile)
        order, (counts, contexts) = lists[0], lists[first : first + 2]
    else:
        alive = weights != 0
        order = live_order(alive)
        counts, contexts = tile_lists(alive, order, config.tile)
    return _launch()(q, k, v, weights, context_index, key_lengths, scale, order, counts, contexts, config)


@cache
def _launch():
    """Imported where it runs: Triton decides at that moment whether its interpreter takes the kernel."""
    from weaver_kernels.context_attention.kernel import launch

    return launch


@cache
def _arch(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def _fake(q, k, v, weights, context_index, key_lengths, lists, tile_sizes, scale):
    return q.new_empty(weights.shape[0], weights.shape[2], *q.shape[-2:])


# define/impl rather than custom_op, whose wrapping of every call costs more than all checks here.
_LIBRARY = torch.library.Library("weaver_kernels", "FRAGMENT")
_LIBRARY.define(
    f"{_OP}(Tensor q, Tensor k, Tensor v, Tensor weights, Tensor? context_index, Tensor? key_lengths, "
    "Tensor[] lists, int[] tile_sizes, float scale) -> Tensor"
)
for _device in ("CPU", "MPS", "XPU"):
    _LIBRARY.impl(_OP, _live, _device)
_LIBRARY.impl(_OP, _cuda, "CUDA")
torch.library.register_fake(f"weaver_kernels::{_OP}", _fake, lib=_LIBRARY)
