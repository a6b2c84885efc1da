"""The factors of all low-rank changes of one layer, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from weaver_kernels.checks import require
from weaver_kernels.project_contexts import LowRank

__all__ = ["MOST_RANK", "AdapterStack"]

MOST_RANK = 128  # of the kernel, which holds the products of a token with one adapter's factors in registers


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Low-rank changes of S' adapters of one layer, of ranks that may differ; R is the sum of the ranks.

    Adapter s has the rows `starts[s]` to `starts[s + 1]` of both factors; none where these are the same.

    Attributes
    ----------
    down : [R, C] of a Linear, [R, C, kh, kw] of a convolution, there with the numbers of a place side by side
    up : [R, O]
    starts : S' + 1 numbers
    offsets : the same, [S' + 1] int32 where the factors are
    most : the largest rank
    """

    down: torch.Tensor
    up: torch.Tensor
    starts: tuple[int, ...]
    offsets: torch.Tensor
    most: int

    @classmethod
    def of(cls, factors: Sequence[LowRank | None], scales: Sequence[float] | None = None) -> AdapterStack:
        """Stack factors, in float32 or wider: `down` [r, C] or [r, C, kh, kw] with `up` [O, r] or [O, r, 1, 1].

        None is an adapter that does not change this layer. `scales` go into `up`. Raises `ValueError` with every reason
        when shapes, devices or ranks do not fit.
        """
        require("AdapterStack", _reasons(factors, scales))
        scales = [1.0] * len(factors) if scales is None else scales
        there = [(pair.down, pair.up, scale) for pair, scale in zip(factors, scales, strict=True) if pair is not None]
        dtype = torch.float32
        for down, up, _ in there:
            dtype = torch.promote_types(dtype, torch.promote_types(down.dtype, up.dtype))
        down = torch.cat([down.detach().to(dtype) for down, _, _ in there])
        up = torch.cat([scale * up.detach().flatten(1).to(dtype).T for _, up, scale in there])
        if down.ndim == 4:
            down = down.contiguous(memory_format=torch.channels_last)
        starts = tuple(accumulate((0 if pair is None else len(pair.down) for pair in factors), initial=0))
        offsets = torch.tensor(starts, dtype=torch.int32, device=down.device)
        return cls(down, up.contiguous(), starts, offsets, max(len(down) for down, _, _ in there))

    @classmethod
    def joined(cls, stacks: Sequence[AdapterStack | int]) -> AdapterStack:
        """The adapters of several stacks of one layer, one stack after another; a number is as many that do not change
        it. Raises `ValueError` where none is a stack."""
        there = [stack for stack in stacks if isinstance(stack, AdapterStack)]
        require("AdapterStack", [] if there else ["there is no stack to join: all adapters change nothing"])
        starts = [0]
        for stack in stacks:
            own = (0,) * (stack + 1) if isinstance(stack, int) else stack.starts
            starts += [starts[-1] + end for end in own[1:]]
        down, up = torch.cat([stack.down for stack in there]), torch.cat([stack.up for stack in there])
        offsets = torch.tensor(starts, dtype=torch.int32, device=down.device)
        return cls(down, up, tuple(starts), offsets, max(stack.most for stack in there))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AdapterStack:
        """The same factors on another device or in another type."""
        return replace(
            self, down=self.down.to(device, dtype), up=self.up.to(device, dtype), offsets=self.offsets.to(device)
        )

    def __len__(self) -> int:
        return len(self.starts) - 1


def _reasons(factors, scales) -> list[str]:
    reasons = []
    if scales is not None and len(scales) != len(factors):
        reasons.append(f"there are {len(factors)} factors and {len(scales)} scales")
    there = {s: pair for s, pair in enumerate(factors) if pair is not None}
    if not there:
        reasons.append("at least one adapter must have factors, or the layer needs none of this")
    for s, (down, up) in there.items():
        rank = len(down) if down.ndim else 0
        shapes = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
        if down.ndim not in (2, 4) or up.ndim not in (2, 4) or tuple(up.shape[1:]) not in ((rank,), (rank, 1, 1)):
            reasons.append(f"adapter {s} must be [r, C(, kh, kw)] and [O, r(, 1, 1)], got {shapes}")
        elif not rank:
            reasons.append(f"adapter {s} has rank 0: None is one that changes nothing")
        if not down.is_floating_point() or not up.is_floating_point():
            reasons.append(f"adapter {s} must be floating-point, got {down.dtype} and {up.dtype}")
    if reasons:
        return reasons
    for s, (down, up) in there.items():
        first_down, first_up = next(iter(there.values()))
        if down.shape[1:] != first_down.shape[1:] or len(up) != len(first_up):
            of_first = f"{tuple(first_down.shape)} and {tuple(first_up.shape)}"
            reasons.append(
                f"adapter {s} is of another layer: {tuple(down.shape)} and {tuple(up.shape)} beside {of_first}"
            )
    if len(devices := {str(x.device) for pair in there.values() for x in pair}) > 1:
        reasons.append(f"factors are on several devices: {', '.join(sorted(devices))}")
    return reasons
