"""Inputs on which configurations of the kernel of `context_attention` are timed.

The layers are the cross-attentions of Stable Diffusion's U-Nets with three concepts, whose tokens have two live
contexts each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from weaver_kernels.child import Running
from weaver_kernels.context_attention import ContextPlan, context_attention_reference
from weaver_kernels.measure import time_each
from weaver_kernels.tuning import KernelConfig
from weaver_kernels.unets import TEXT, Geometry, layers_of

__all__ = ["LayerInputs", "make_inputs", "time_configs"]

CONCEPTS, SUPPRESSION = 3, 0.5


@dataclass(frozen=True)
class LayerInputs:
    """One set of buffers; `out` is written by `launch`."""

    q: torch.Tensor  # [B, T, H, D] or [B, S, T, H, D]
    k: torch.Tensor  # [S', L, H, D]
    v: torch.Tensor
    plan: ContextPlan
    out: torch.Tensor  # [B, T, H, D]

    def launch(self, config: KernelConfig) -> torch.Tensor:
        """The kernel as the operation launches it, with this configuration."""
        from weaver_kernels.context_attention.launch import launch

        plan = self.plan
        scale = self.q.shape[-1] ** -0.5
        contexts = (self.k, self.v, plan.weights, None)
        return launch(self.q, *contexts, scale, plan.lists, plan.tile_sizes, config, self.out)

    def reset(self) -> None:
        """To NaN, so that what is not written shows."""
        self.out.fill_(float("nan"))

    def truth(self) -> torch.Tensor:
        """The reference in float64, [B, T, H, D]."""
        tensors = (x.double() for x in (self.q, self.k, self.v, self.plan.weights))
        return context_attention_reference(*tensors, self.plan.context_index)

    def eager(self) -> torch.Tensor:
        """A loop over the contexts with PyTorch's attention, in the type of the inputs."""
        weights = self.plan.weights.to(self.q.dtype)
        out = torch.zeros_like(self.out)
        for s in range(weights.shape[1]):
            q = self.q if self.q.ndim == 4 else self.q[:, s]
            k, v = (x[s].expand(len(q), -1, -1, -1) for x in (self.k, self.v))
            attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
            out += weights[:, s, :, None, None] * attended
        return out

    def again(self) -> LayerInputs:
        """Other buffers with other numbers, and the same plan."""
        q, k, v = (torch.randn_like(x) for x in (self.q, self.k, self.v))
        return LayerInputs(q, k, v, self.plan, torch.empty_like(self.out))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v, self.out))


def make_inputs(
    layer: Geometry, dtype: torch.dtype, *, q_each: bool, tile_sizes: Sequence[int], device: str = "cuda"
) -> LayerInputs:
    """A fused row, whose concepts and background stand side by side over the base, and a negative row."""
    label = torch.arange(layer.tokens, device=device) % layer.side * (CONCEPTS + 1) // layer.side
    weights = torch.zeros(2, CONCEPTS + 3, layer.tokens, device=device)
    for s in range(CONCEPTS + 1):
        weights[0, s] = (label == s) * (1 + SUPPRESSION)
    weights[0, CONCEPTS + 1] = -SUPPRESSION
    weights[1, CONCEPTS + 2] = 1
    contexts = (weights.shape[1],) if q_each else ()
    q = torch.randn(2, *contexts, layer.tokens, layer.heads, layer.dim, device=device).to(dtype)
    k, v = torch.randn(2, weights.shape[1], TEXT, layer.heads, layer.dim, device=device).to(dtype)
    plan = ContextPlan(weights, merge=False, tile_sizes=tile_sizes)
    out = torch.empty(2, layer.tokens, layer.heads, layer.dim, dtype=dtype, device=device)
    return LayerInputs(q, k, v, plan, out)


def time_configs(
    head_dim: int,
    dtype: torch.dtype,
    q_each: bool,
    configs: Sequence[KernelConfig],
    tell: Callable[[str], None],
    running: Running = nullcontext,
    device: str = "cuda",
) -> dict[KernelConfig, float]:
    """`time_each` of the cross-attentions of a head dimension."""
    make = partial(make_inputs, dtype=dtype, q_each=q_each, device=device)
    layers = [(layer.count, partial(make, layer)) for layer in layers_of(head_dim)]
    return time_each(layers, configs, tell, running)
