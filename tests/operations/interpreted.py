"""The Triton kernel under Triton's interpreter, on CPU tensors."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

import pytest
import torch

from weaver_kernels import ContextPlan
from weaver_kernels.devices import triton_version
from weaver_kernels.tuning import KernelConfig, LoraConfig


def interpreter_fault(triton: str | None = None, numpy: str | None = None) -> str:
    """Why kernels can't be interpreted with these versions, None for those that are installed; empty when they can."""
    if triton is None and find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = triton or triton_version(), numpy or metadata.version("numpy")
    parts = [[int(part) for part in version.split(".")[:2]] for version in (triton, numpy)]
    if parts[0] < [3, 8] and parts[1] >= [2, 4]:
        return f"Triton {triton} can't interpret loops with numpy {numpy}: it takes Triton 3.8 or numpy before 2.4"
    return ""


def needs_interpreter() -> None:
    """Skip a test where kernels can't be interpreted."""
    if fault := interpreter_fault():
        pytest.skip(fault)


def as_on_a_gpu(monkeypatch, op) -> None:
    """Have an operation's module, and plans, take CPU tensors for those of a GPU of compute capability 8.6."""
    from weaver_kernels.context_attention import plan

    needs_interpreter()
    for module in (op, plan):
        monkeypatch.setattr(module, "kernel_arch", lambda device: 86)


def with_wide_offsets(monkeypatch, launch, at: int) -> None:
    """Have a launcher take the variant for rows past 2**31 elements; `at` is where its arguments say which."""
    layout = launch._layout

    def wide(*arguments):
        grid, others, options = layout(*arguments)
        assert others[at] is False
        return grid, (*others[:at], True, *others[at + 1 :]), options

    monkeypatch.setattr(launch, "_layout", wide)


def run_interpreted(case: dict, tile: int = 16, reload: bool = False) -> torch.Tensor:
    """The kernel's result for a case, written over NaN in every token and head but the last of a wider tensor.

    What lies beside the result must still be NaN afterwards; what is not written is NaN in the result.
    """
    needs_interpreter()
    from weaver_kernels.context_attention.launch import launch  # needs Triton, so not before a test asks for it

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
        case.get("key_lengths"),
        case.get("scale", d**-0.5),
        plan.lists,
        plan.tile_sizes,
        KernelConfig(tile, warps=4, stages=1, reload=reload),
        out,
    )
    result = out.clone()
    out.zero_()
    assert wide.isnan().sum() == wide.numel() - out.numel(), "written outside"
    return result


def lora_interpreted(case: dict, tile: int = 16, **changed) -> torch.Tensor:
    """The kernel's result for a case of `routed_lora`; other fields of its configuration by name."""
    needs_interpreter()
    from weaver_kernels.routed_lora.launch import launch

    adapters = case["adapters"]
    plan = ContextPlan(case["weights"], case.get("adapter_index"), merge=False, tile_sizes=(tile,))
    config = LoraConfig(**{"inputs": 32, "outputs": 32, "warps": 4, "stages": 1, "programs": 4} | changed, tile=tile)
    around = [case[name] for name in ("stride", "padding", "dilation") if name in case]
    tables = adapters.down, adapters.up, adapters.offsets
    launch(
        case["y"], case["x"], *tables, plan.weights, plan.lists, plan.tile_sizes, adapters.most, config, *around
    )  # fmt: skip
    return case["y"]
