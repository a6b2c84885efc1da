"""Kinds of plain values, as checks of what callers give ask for them."""

from __future__ import annotations

import math
from numbers import Real

__all__ = ["is_number", "is_whole"]


def is_number(value: object) -> bool:
    """Whether a value is a finite number, which truth values are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of a whole number past the largest float
        return False


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether a value is a whole number, `least` or more; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
