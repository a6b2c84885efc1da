"""A change that is a matrix, as two factors of a rank; and how much that leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot

import torch
import torch.nn.functional as F

from weaver.concepts.changes import Delta, change_norm
from weaver_kernels import LowRank

__all__ = ["Losses", "factors_of"]


@dataclass
class Losses:
    """What factors of a `rank` leave out of changes, as parts of their Frobenius norms."""

    rank: int
    by_change: dict[str, tuple[float, float]] = field(default_factory=dict)

    def note(self, key: str, change: Delta, factors: LowRank | None) -> None:
        """Compare what was changed with what its factors, as they are written, multiply to; None: all of it is lost."""
        lost = change_norm(change) if factors is None else 0.0
        if change is not factors and factors is not None:
            up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
            lost = (change.double().flatten(1) - up @ down).norm().item()
        self.by_change[key] = (lost, change_norm(change))

    @property
    def overall(self) -> float:
        """The norm of all that is lost, over that of all changes."""
        lost, whole = (hypot(*norms) for norms in zip(*self.by_change.values(), strict=True))
        return lost / whole if whole else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The change of which most is lost, and how much."""
        parts = {key: lost / whole if whole else 0.0 for key, (lost, whole) in self.by_change.items()}
        return max(parts.items(), key=lambda entry: entry[1])


def factors_of(change: Delta, rank: int) -> LowRank:
    """A change as factors: those it has, or the best ones of `rank` (Eckart and Young), in float32.

    Beyond the rank of a matrix they are zeros, so that all of a file have one rank. Of a convolution [out, in, h, w]
    they are down [r, in, h, w] and up [out, r, 1, 1], as `LowRank` has them.
    """
    if isinstance(change, LowRank):
        return change
    u, s, v = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    root, lacking = s[:rank].sqrt(), max(0, rank - len(s))
    up = F.pad(u[:, :rank] * root, (0, lacking)).float()
    down = F.pad(root[:, None] * v[:rank], (0, 0, 0, lacking)).float()
    if change.ndim == 4:
        up, down = up[:, :, None, None], down.view(-1, *change.shape[1:])
    return LowRank(down.contiguous(), up.contiguous())
