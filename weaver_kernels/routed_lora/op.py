"""`routed_lora` as a PyTorch operation: checks, the choice of the implementation, and the function to call."""

from __future__ import annotations

import torch

from weaver_kernels.checks import gradient_reasons, require
from weaver_kernels.context_attention import ContextPlan
from weaver_kernels.context_attention.lists import split_live_tokens
from weaver_kernels.routed_lora.adapters import AdapterStack
from weaver_kernels.routed_lora.checks import shape_reasons
from weaver_kernels.routed_lora.live import live_routed_lora, stacked_routed_lora

__all__ = ["routed_lora"]

_OP = "routed_lora"


def routed_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: AdapterStack,
    weights: torch.Tensor,
    adapter_index: torch.Tensor | None = None,
    *,
    plan: ContextPlan | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> torch.Tensor:
    """Add low-rank changes of a layer to its output, each on the tokens of its own region:

    `y[b,t] += sum_s W[b,s,t] up_c^T down_c x[b,t]` with `c = adapter_index[b,s]`.

    Where weights of several are not zero their changes are summed, so a soft edge blends them; a row whose weights are
    all zero stays as it is and costs nothing. The cost of a token follows the adapters whose weight on it is not zero
    (anchors: Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, which route whole requests). Rows B, tokens T,
    contexts S of a row, adapters S' in all, ranks R of all together, inputs C, outputs O. Inference only.

    Parameters
    ----------
    y : [B, T, O], what the layer gives, written over; of a convolution [B, O, h, w]
    x : [B, T, C], what it reads; of a convolution [B, C, H, W]
    adapters : of the layer, in y's type and on its device
    weights : [B, S, T], any sign; of a convolution of its output's places in reading order, T = h w
    adapter_index : [B, S] integers into S'; None takes adapter s for s (then S' = S). On the CPU a number outside is an
        error, on a GPU it adds nothing
    plan : whose own `plan.weights` and `plan.context_index` these weights and this index are; None makes the lists
        anew on each call
    stride, padding, dilation : of a convolution, (vertical, horizontal) or one for both

    Returns
    -------
    y, with products accumulated in float32 (float64 for float64)

    Raises
    ------
    ValueError with every reason, when shapes, dtypes, devices or indices do not fit or gradients are asked for.
    """
    geometry = (*_both(stride), *_both(padding), *_both(dilation))
    reasons = shape_reasons(y, x, adapters, weights, adapter_index, geometry)
    reasons += gradient_reasons(y=y, x=x, down=adapters.down, up=adapters.up, weights=weights)
    if plan is not None and (weights is not plan.weights or adapter_index is not plan.context_index):
        reasons.append("plan is of other weights or of another index: pass plan.weights and plan.context_index")
    if plan is not None and plan.for_launch:
        reasons.append(f"plan has tiles of {list(plan.tile_sizes)} of its own: make it without tile_sizes")
    require(_OP, reasons)
    if weights.numel() and len(adapters.down):
        lists = None if plan is None else plan.lists
        _operation(y, x, adapters.down, adapters.up, list(adapters.starts), weights, adapter_index, lists, geometry)
    return y


def _both(n: int | tuple[int, int]) -> tuple[int, int]:
    return n if isinstance(n, tuple) else (n, n)


def _live(y, x, down, up, starts, weights, adapter_index, lists, geometry):
    tokens = (None, None) if lists is None else split_live_tokens(lists, weights.shape)
    live_routed_lora(y, x, down, up, starts, weights, adapter_index, geometry, *tokens)


def _cuda(y, x, down, up, starts, weights, adapter_index, lists, geometry):
    stacked_routed_lora(y, x, down, up, starts, weights, adapter_index, geometry)


def _fake(y, x, down, up, starts, weights, adapter_index, lists, geometry):
    return None


_LIBRARY = torch.library.Library("weaver_kernels", "FRAGMENT")
_LIBRARY.define(
    f"{_OP}(Tensor(a!) y, Tensor x, Tensor down, Tensor up, int[] starts, Tensor weights, Tensor? adapter_index, "
    "Tensor? lists, int[6] geometry) -> ()"
)
_LIBRARY.impl(_OP, _live, "CompositeExplicitAutograd")  # every device that has no implementation of its own
_LIBRARY.impl(_OP, _cuda, "CUDA")
torch.library.register_fake(f"weaver_kernels::{_OP}", _fake, lib=_LIBRARY)
_operation = torch.ops.weaver_kernels.routed_lora.default
