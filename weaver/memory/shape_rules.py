"""Results of operations on meta tensors, worked out once for each kind of call.

PyTorch works out a result's shape in Python, a quarter of a millisecond each time; a model repeats the same few hundred
kinds of calls thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["ShapeRules"]


class ShapeRules:
    """Remembers what operations return by what the shapes of their arguments are."""

    def __init__(self):
        self._known: dict[tuple, Callable | None] = {}

    def __call__(self, func, args: tuple, kwargs: dict):
        """The result of `func(*args, **kwargs)`: new meta tensors, where all of its results are such."""
        if func.is_view:
            return func(*args, **kwargs)
        try:
            key = (func, _kind(args), _kind(tuple(sorted(kwargs.items()))))
            make = self._known.get(key)
        except TypeError:  # an argument that can't be told apart from others
            return func(*args, **kwargs)
        if make is not None:
            return make(args)
        result = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _maker(func, args, kwargs, result)
        return result


def _kind(value):
    """What of an argument decides about the result."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(_kind(item) for item in value)
    return type(value), value  # 1, 1.0 and True are equal, and give different types


def _maker(func, args, kwargs, result) -> Callable | None:
    """A function of the arguments that makes the result again; None where that takes the operation itself."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if func._schema.is_mutable:
        in_place = func._schema.name.endswith("_") and result is args[0] and args[0].device.type == "meta"
        return (lambda given: given[0]) if in_place else None
    items = [result] if isinstance(result, torch.Tensor) else result
    if not isinstance(items, (list, tuple)) or not all(_is_meta(item) for item in items if item is not None):
        return None
    before = {tensor.untyped_storage()._cdata for tensor in inputs}
    if any(item is not None and item.untyped_storage()._cdata in before for item in items):
        return None  # a view that does not call itself one
    forms = [_form(item) for item in items]  # no tensor is kept alive
    if isinstance(result, torch.Tensor):
        return lambda _: _new(forms[0])
    kind = type(result)
    return lambda _: kind(_new(form) for form in forms)


def _is_meta(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _form(tensor: torch.Tensor | None):
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _new(form) -> torch.Tensor | None:
    return None if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
