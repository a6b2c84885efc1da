"""Inputs on which configurations of the kernel of `routed_lora` are timed: layers of U-Nets with three concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from weaver_kernels.context_attention import ContextPlan
from weaver_kernels.project_contexts import LowRank
from weaver_kernels.routed_lora import AdapterStack, routed_lora_reference
from weaver_kernels.tuning import LoraConfig
from weaver_kernels.unets import UNETS, Layer, linears

__all__ = ["LoraInputs", "make_lora_inputs", "timed_layers"]

CONCEPTS = 3
CONVOLVED = UNETS["sd15"]  # whose projections are convolutions, and maps are not channels last unless asked for


@dataclass(frozen=True)
class LoraInputs:
    """One set of buffers; `out` is written by `launch`."""

    y: torch.Tensor  # [B, T, O] or [B, O, h, w], the layer's own result
    x: torch.Tensor
    adapters: AdapterStack
    plan: ContextPlan
    out: torch.Tensor

    def reset(self) -> None:
        """To the layer's own result, which is added to."""
        self.out.copy_(self.y)

    def launch(self, config: LoraConfig) -> torch.Tensor:
        """The kernel as the operation launches it, with this configuration."""
        from weaver_kernels.routed_lora.launch import launch

        adapters, plan = self.adapters, self.plan
        tables = adapters.down, adapters.up, adapters.offsets, plan.weights, plan.lists, plan.tile_sizes
        launch(self.out, self.x, *tables, adapters.most, config, padding=self._padding)
        return self.out

    def again(self) -> LoraInputs:
        """Other buffers with other numbers, and the same plan and adapters."""
        return replace(self, x=torch.randn_like(self.x), out=torch.zeros_like(self.out))

    def truth(self) -> torch.Tensor:
        """The reference in float64."""
        tensors = self.y.double(), self.x.double(), self.adapters.to(dtype=torch.float64), self.plan.weights.double()
        return routed_lora_reference(*tensors, self.plan.context_index, padding=self._padding)

    def eager(self) -> torch.Tensor:
        """Two layers for each adapter, on every token, weighted and added, in the type of the inputs."""
        out, weights = self.y.clone(), self.plan.weights.to(self.y.dtype)
        for s in range(len(self.adapters)):
            rank = slice(*self.adapters.starts[s : s + 2])
            down, up, weight = self.adapters.down[rank], self.adapters.up[rank].T, weights[:, s]
            if down.ndim == 2:
                out += weight[:, :, None] * F.linear(F.linear(self.x, down), up)
            else:
                inner = F.conv2d(self.x, down, padding=self._padding)
                out += weight.view(-1, 1, *inner.shape[2:]) * F.conv2d(inner, up[:, :, None, None])
        return out

    @property
    def _padding(self) -> int:
        return self.adapters.down.shape[-1] // 2 if self.adapters.down.ndim == 4 else 0

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.x, self.out))


def make_lora_inputs(
    layer: Layer, dtype: torch.dtype, *, rank: int, tile_sizes: Sequence[int], taps: int = 0, device: str = "cuda"
) -> LoraInputs:
    """A fused row, whose concepts and background stand side by side, and a negative row without adapters.

    taps : of a convolution of so many along both axes; 0 is a Linear
    """
    label = torch.arange(layer.tokens, device=device) % layer.side * (CONCEPTS + 1) // layer.side
    weights = torch.zeros(2, CONCEPTS, layer.tokens, device=device)
    weights[0] = label == torch.arange(CONCEPTS, device=device)[:, None]
    kernel = (taps, taps) if taps else ()

    def draw(*shape: int, fan: int = 1) -> torch.Tensor:
        return (torch.randn(shape, device=device) / fan**0.5).to(dtype)

    fan = layer.inputs * max(taps, 1) ** 2
    down = [draw(rank, layer.inputs, *kernel, fan=fan) for _ in range(CONCEPTS)]
    adapters = AdapterStack.of([LowRank(one, draw(layer.outputs, rank, fan=rank)) for one in down]).to(dtype=dtype)
    if taps:
        y, x = (draw(2, channels, layer.side, layer.side) for channels in (layer.outputs, layer.inputs))
    else:
        y, x = (draw(2, layer.tokens, channels) for channels in (layer.outputs, layer.inputs))
    return LoraInputs(y, x, adapters, ContextPlan(weights, tile_sizes=tile_sizes), torch.empty_like(y))


def timed_layers(
    rank: int, dtype: torch.dtype, spread: bool, device: str = "cuda"
) -> list[tuple[int, Callable[..., LoraInputs]]]:
    """How often a layer is counted, and what makes its inputs: the Linears of SD 2.1, or, where channels do not lie
    side by side, a 1x1 and a 3x3 convolution of each map of SD 1.5."""
    make = partial(make_lora_inputs, dtype=dtype, rank=rank, device=device)
    if not spread:
        return [(layer.count, partial(make, layer)) for layer in linears(UNETS["sd21"])]
    sizes = [(one.side, one.width) for one in CONVOLVED.layers]
    return [(1, partial(make, Layer(side, width, width, 1), taps=taps)) for side, width in sizes for taps in (1, 3)]
