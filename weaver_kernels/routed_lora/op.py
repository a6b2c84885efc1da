"""`routed_lora` as a PyTorch operation: checks, the choice of the implementation, and the function to call."""

from __future__ import annotations

from functools import cache

import torch

from weaver_kernels import tuning
from weaver_kernels.checks import gradient_reasons, require
from weaver_kernels.context_attention import ContextPlan
from weaver_kernels.context_attention.lists import live_lists, split_live_tokens
from weaver_kernels.devices import kernel_arch, on_its_device
from weaver_kernels.routed_lora.adapters import MOST_RANK, AdapterStack
from weaver_kernels.routed_lora.checks import shape_reasons
from weaver_kernels.routed_lora.live import live_routed_lora, stacked_routed_lora
from weaver_kernels.routed_lora.maps import is_linear

__all__ = ["routed_lora"]

_OP = "routed_lora"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def routed_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: AdapterStack,
    weights: torch.Tensor,
    adapter_index: torch.Tensor | None = None,
    *,
    plan: ContextPlan | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """Add low-rank changes of a layer to its result, each on the tokens of its own region, in place:

    `y[b,t] += sum_s W[b,s,t] up_c^T (down_c x)[b,t]` with `c = adapter_index[b,s]`.

    Masks, strengths and the choice of a row's adapters are all in `weights`: a soft edge is a sum of weights times
    changes, and a token without any keeps what `y` has. The cost of a token follows the adapters whose weight on it is
    not zero, and the memory is that of the factors, elsewhere than on a GPU with a float32 row of y besides where y is
    in half precision (after S-LoRA, arXiv 2311.03285, and Punica, arXiv 2310.18547, which
    do so by request). Rows B, tokens T, contexts S of a row out of S' adapters in all, channels C to O. Inference only.

    Parameters
    ----------
    y : [B, T, O] of a Linear, or [B, O, h, w] of a convolution, contiguous or channels last; written to
    x : [B, T, C] or [B, C, H, W], what the layer was given; any strides, and no memory of y's
    adapters : in the dtype of both. On a GPU those of a rank above 128 are computed on all tokens, and all others then
    weights : [B, S, T], any sign; of a convolution T = h * w, the map of its output row by row. An adapter may or may
        not be computed on tokens where its weight is zero
    adapter_index : [B, S] integers into S'; None takes adapter s for s (then S' = S). On the CPU a number outside is an
        error. On a GPU, where reading it would wait for the device, it makes the tokens it is alive on NaN, or adds
        nothing where there is no kernel for the case (a rank above 128, float64, a GPU before sm_80)
    plan : whose own `plan.weights` and `plan.context_index` these weights and this index are; None makes the lists anew
        on each call
    stride, padding, dilation : of the convolution, the same along both axes

    Returns
    -------
    y, with products in float32 (float64 for float64), rounded for each adapter by the kernel and once elsewhere

    Raises
    ------
    ValueError with every reason, when shapes, dtypes, devices or indices do not fit or gradients are asked for.
    """
    reasons = shape_reasons(y, x, adapters, weights, adapter_index, stride, padding, dilation)
    if plan is not None:
        if weights is not plan.weights or adapter_index is not plan.context_index:
            reasons.append("plan is of other weights or of another index: pass plan.weights and plan.context_index")
        if plan.for_launch:
            reasons.append(f"plan has tiles of {list(plan.tile_sizes)} of its own: make it without tile_sizes")
    require(_OP, reasons)
    require(_OP, gradient_reasons(y=y, x=x, down=adapters.down, up=adapters.up, weights=weights))
    lists = None if plan is None else plan.lists
    tables = adapters.down, adapters.up, adapters.offsets
    _operation(y, x, *tables, weights, adapter_index, lists, adapters.most, stride, padding, dilation)
    return y


def _live(y, x, down, up, offsets, weights, adapter_index, lists, most, stride, padding, dilation):
    tokens = (None, None) if lists is None else split_live_tokens(lists, weights.shape)
    around = stride, padding, dilation
    if is_linear(y, x, down, stride, padding):
        y, x, down = y.flatten(2).mT, x.flatten(2).mT, down.flatten(1)
    live_routed_lora(y, x, down, up, offsets.tolist(), weights, adapter_index, *tokens, around)


def _cuda(y, x, down, up, offsets, weights, adapter_index, lists, most, stride, padding, dilation):
    if not weights.numel() or not y.numel() or not most:
        return
    arch, around = kernel_arch(y.device), (stride, padding, dilation)
    if not arch or y.dtype not in _KERNEL_DTYPES or most > MOST_RANK:
        stacked_routed_lora(y, x, down, up, offsets, weights, adapter_index, *around)
        return
    config = tuning.lora_config(most, 8 * y.element_size(), arch, spread=x.stride(2 if x.ndim == 3 else 1) != 1)
    tile_sizes = tuning.tile_sizes("context_attention")  # those of a plan
    if lists is None:
        tile_sizes = (config.tile,)
        lists = live_lists(weights != 0, tile_sizes, adapter_index)
    on_its_device(_launch(), y, x, down, up, offsets, weights, lists, tile_sizes, most, config, *around)


@cache
def _launch():
    """Imported where it runs: Triton decides at that moment whether its interpreter takes the kernel."""
    from weaver_kernels.routed_lora.launch import launch

    return launch


def _fake(y, x, down, up, offsets, weights, adapter_index, lists, most, stride, padding, dilation):
    return None


_LIBRARY = torch.library.Library("weaver_kernels", "FRAGMENT")
_LIBRARY.define(
    f"{_OP}(Tensor(a!) y, Tensor x, Tensor down, Tensor up, Tensor offsets, Tensor weights, Tensor? adapter_index, "
    "Tensor? lists, int most, int stride, int padding, int dilation) -> ()"
)
_LIBRARY.impl(_OP, _live, "CompositeExplicitAutograd")  # every device that has no implementation of its own
_LIBRARY.impl(_OP, _cuda, "CUDA")
torch.library.register_fake(f"weaver_kernels::{_OP}", _fake, lib=_LIBRARY)
_operation = torch.ops.weaver_kernels.routed_lora.default
