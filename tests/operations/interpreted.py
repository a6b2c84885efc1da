"""The Triton kernel under Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import torch

from weaver_kernels import ContextPlan
from weaver_kernels.tuning import KernelConfig


def run_interpreted(case: dict, tile: int = 16) -> torch.Tensor:
    """The kernel's result for a case, written over NaN in every other token and head of a wider tensor.

    Tokens beside the result must still be NaN afterwards.
    """
    from weaver_kernels.context_attention.kernel import launch  # needs Triton, so not before a test asks for it

    q, k, v, weights = (case[name] for name in ("q", "k", "v", "weights"))
    index = case.get("context_index")
    plan = ContextPlan(weights, index, merge=False, tile_sizes=(tile,))
    b, _, t = weights.shape
    h, d = q.shape[-2:]
    wide = torch.full((b, t + 1, h + 1, d + 8), torch.nan, dtype=q.dtype)
    out = wide[:, :t, :h, :d]
    launch(
        q,
        k,
        v,
        plan.weights,
        None if index is None else plan.context_index,
        case.get("key_lengths"),
        case.get("scale", d**-0.5),
        *plan.lists,
        KernelConfig(tile, warps=4, stages=1),
        out,
    )
    assert wide.isnan().sum() == wide.numel() - out.numel(), "written outside, or not written"
    return out
