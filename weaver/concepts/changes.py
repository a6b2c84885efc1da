"""What a concept adds to a weight, as a matrix or as two factors: its shape, its size, and how it acts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import hypot

import torch
import torch.nn.functional as F
from torch import nn

from weaver_kernels import LowRank

__all__ = [
    "Delta",
    "added_to",
    "apply_change",
    "change_norm",
    "change_shape",
    "moved",
    "norm_of",
    "parts_of",
    "ranks_of",
    "scaled",
]

Delta = torch.Tensor | LowRank
"""A change of a weight [out, in]: a matrix, or factors down [r, in] and up [out, r].

Of a convolution it is [out, in, h, w], or down [r, in, h, w] and up [out, r, 1, 1]; of a bias it is [out].
"""


def parts_of(delta: Delta) -> dict[str, torch.Tensor]:
    """The tensors of a change by name: its factors, or the matrix itself under ""."""
    return delta._asdict() if isinstance(delta, LowRank) else {"": delta}


def change_shape(delta: Delta) -> tuple[int, ...]:
    """The shape of the weight that a change is added to."""
    if isinstance(delta, LowRank):
        return (len(delta.up), *delta.down.shape[1:])
    return tuple(delta.shape)


def base_layer(module: nn.Module | None) -> nn.Module | None:
    """The layer itself, where an adapter library wraps it."""
    return getattr(module, "base_layer", module)


def change_fits(module: nn.Module | None, delta: Delta) -> bool:
    """Whether a module is a Linear or an ungrouped convolution of the weight that a change is added to."""
    base, shape = base_layer(module), change_shape(delta)
    if not isinstance(base, nn.Linear | nn.Conv2d):
        return False
    shape += (1,) * (base.weight.ndim - len(shape))  # files flatten convolutions of one pixel
    return tuple(base.weight.shape) == shape and getattr(base, "groups", 1) == 1


def change_norm(delta: Delta) -> float:
    """The Frobenius norm of the matrix [out, in * h * w] that a change adds; factors are not multiplied out."""
    if not isinstance(delta, LowRank):
        return delta.double().norm().item()
    down, up = delta.down.double().flatten(1), delta.up.double().flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()  # |UD|^2 = <U^T U, D D^T>


def norm_of(changes: Iterable[Delta]) -> float:
    """The Frobenius norm of several changes together."""
    return hypot(*map(change_norm, changes))


def ranks_of(changes: Iterable[Delta]) -> list[int]:
    """The different ranks of those changes that are factors, the smallest first."""
    return sorted({len(change.down) for change in changes if isinstance(change, LowRank)})


def scaled(delta: Delta, factor: float, dtype: torch.dtype) -> Delta:
    """A change times `factor`, in `dtype` or wider where it has more bits itself."""

    def times(x: torch.Tensor, by: float) -> torch.Tensor:
        return by * x.to(torch.promote_types(x.dtype, dtype))

    if isinstance(delta, LowRank):
        return LowRank(times(delta.down, 1.0), times(delta.up, factor))
    return times(delta, factor)


def moved(delta: Delta, device: torch.device, dtype: torch.dtype) -> Delta:
    """A change on another device and in another dtype."""
    if isinstance(delta, LowRank):
        return LowRank(*(part.to(device, dtype) for part in delta))
    return delta.to(device, dtype)


def apply_change(delta: Delta, x: torch.Tensor) -> torch.Tensor:
    """What a change of a Linear adds to its output for inputs x [..., in]: [..., out] in x's dtype, on its device."""
    for part in parts_of(delta).values():  # down before up
        x = F.linear(x, part.to(x))
    return x


@contextmanager
def added_to(
    changes: Iterable[tuple[torch.nn.Module, Delta]],
    weights: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
    acts: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Within the block each Linear gives what it does with its change added, its weights untouched; differentiable.

    What is added for inputs x [..., in] is weighted by `weights(x)` [..., 1], where that is given and not None; nothing
    is whenever `acts` says no.
    """

    def adder(delta: Delta):
        def hook(module, args, output):
            if acts is not None and not acts():
                return None
            (x,) = args
            return _with_change(output, delta, x, None if weights is None else weights(x))

        return hook

    with ExitStack() as undo:
        for module, delta in changes:
            hook = module.register_forward_hook(adder(delta), prepend=True)  # others put another in its place
            undo.callback(hook.remove)
        yield


def _with_change(output: torch.Tensor, delta: Delta, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """output [..., out] and weight [..., 1] times what a change adds for x [..., in].

    The last product makes the sum itself, and the weight acts before that, where factors have few numbers: nothing else
    of an output's size is made. Ranks are rows of all products, here and in their gradients, which take their operands'
    layouts: with as few columns, CPUs' libraries are slower.
    """
    x = x.flatten(0, -2)
    if isinstance(delta, LowRank):
        x = (delta.down.to(x) @ x.T).T
        last = delta.up.to(x).T.contiguous()
    else:
        last = delta.to(x).T
    if weight is not None:
        x = x * weight.flatten(0, -2).to(x.dtype)
    return torch.addmm(output.flatten(0, -2), x.to(output.dtype), last.to(output.dtype)).view_as(output)
