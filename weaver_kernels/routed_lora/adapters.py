"""The factors of several LoRAs for one layer, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from weaver_kernels.checks import require
from weaver_kernels.project_contexts.reference import LowRank

__all__ = ["AdapterStack"]


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """What S' adapters change of one layer, each a product `up_c^T down_c` of its own rank; R is the sum of the ranks.

    Parameters
    ----------
    down : [R, C] of a Linear, [R, C, kh, kw] of a convolution
    up : [R, O]
    starts : S' + 1 numbers; adapter c has the rows `starts[c]` to `starts[c + 1]` of both, none where it has rank 0
    """

    down: torch.Tensor
    up: torch.Tensor
    starts: tuple[int, ...]

    @classmethod
    def of(cls, factors: Sequence[LowRank | None], scales: Sequence[float] | None = None) -> AdapterStack:
        """From down [r, C] or [r, C, kh, kw] and up [O, r] or [O, r, 1, 1] of each adapter; None is one of rank 0.

        scales : what each product is multiplied by; None is 1.

        Raises `ValueError` with every reason, where there are no factors or they do not go together.
        """
        found = [(c, pair) for c, pair in enumerate(factors) if pair is not None]
        reasons = [] if found else ["there are no factors, of an adapter at least"]
        if scales is not None and len(scales) != len(factors):
            reasons.append(f"scales must be {len(factors)} numbers, got {len(scales)}")
        for c, (down, up) in found:
            if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[2:].numel() > 1 or up.shape[1] != len(down):
                reasons.append(f"factors of adapter {c} must be [r, C] and [O, r], got {_shapes(down, up)}")
            elif down.shape[1:] != found[0][1].down.shape[1:] or len(up) != len(found[0][1].up):
                reasons.append(f"adapter {c} has factors {_shapes(down, up)}, the first {_shapes(*found[0][1])}")
        require("AdapterStack", reasons)
        ups = [up.flatten(1).T * (1.0 if scales is None else scales[c]) for c, (_, up) in found]
        ranks = [0 if pair is None else len(pair.down) for pair in factors]
        down = torch.cat([pair.down for _, pair in found])
        return cls(down, torch.cat(ups), tuple(accumulate(ranks, initial=0)))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> AdapterStack:
        """The same on a device and in a type."""
        return AdapterStack(self.down.to(device, dtype), self.up.to(device, dtype), self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1


def _shapes(down: torch.Tensor, up: torch.Tensor) -> str:
    return f"{tuple(down.shape)} and {tuple(up.shape)}"
