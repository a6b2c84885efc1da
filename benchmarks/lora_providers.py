"""Ways to give a Linear N low-rank changes, each in its own region: ours, and what one would write without it.

`__call__` takes x [2, T, C], the fused row and the negative one, and returns [2, T, O]: the whole layer, so that what
changes add is seen beside the layer alone. What depends on masks and adapters alone is made once in `__init__`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from weaver_kernels import AdapterStack, ContextPlan, routed_lora

__all__ = ["LORA_PROVIDERS", "Linear"]


@dataclass(frozen=True)
class Linear:
    """A layer, its adapters and where they count."""

    weight: torch.Tensor  # [O, C]
    bias: torch.Tensor  # [O]
    adapters: AdapterStack
    plan: ContextPlan  # of weights [2, N, T], zero in the negative row


class Base:
    """The layer alone: what plain guidance pays."""

    def __init__(self, layer: Linear):
        self.layer = layer
        self.masks = layer.plan.weights[0].to(layer.weight.dtype)  # [N, T]
        downs, ups = (factor.split(_ranks(layer.adapters)) for factor in (layer.adapters.down, layer.adapters.up))
        self.pairs = [(down, up.T.contiguous()) for down, up in zip(downs, ups, strict=True)]  # [r, C], [O, r]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Ours(Base):
    """`routed_lora` with its plan."""

    def __call__(self, x):
        layer = self.layer
        plan = layer.plan
        return routed_lora(super().__call__(x), x, layer.adapters, plan.weights, plan.context_index, plan=plan)


class Masked(Base):
    """Every adapter on every token of the fused row, one after another, times its mask."""

    def __call__(self, x):
        y = super().__call__(x)
        for (down, up), mask in zip(self.pairs, self.masks, strict=True):
            y[0] += mask[:, None] * F.linear(F.linear(x[0], down), up)
        return y


class MaskedTogether(Base):
    """The same as one pair of products, the masks between them."""

    def __init__(self, layer: Linear):
        super().__init__(layer)
        ranks = torch.tensor(_ranks(layer.adapters), device=layer.weight.device)
        self.each = self.masks.T.repeat_interleave(ranks, 1)  # [T, R]

    def __call__(self, x):
        y = super().__call__(x)
        adapters = self.layer.adapters
        y[0] += (F.linear(x[0], adapters.down) * self.each) @ adapters.up
        return y


class Passes(Base):
    """The fused row once for each concept with its adapter switched on, once without, and the parts put together."""

    def __init__(self, layer: Linear):
        super().__init__(layer)
        self.rest = 1 - self.masks.sum(0)  # [T]

    def __call__(self, x):
        y = super().__call__(x)
        y[0] *= self.rest[:, None]
        for (down, up), mask in zip(self.pairs, self.masks, strict=True):
            y[0] += mask[:, None] * (super().__call__(x[0]) + F.linear(F.linear(x[0], down), up))
        return y


def _ranks(adapters: AdapterStack) -> list[int]:
    return adapters.offsets.diff().tolist()


LORA_PROVIDERS = {
    "base": Base,
    "ours": Ours,
    "masked, one by one": Masked,
    "masked, together": MaskedTogether,
    "a pass for each": Passes,
}
