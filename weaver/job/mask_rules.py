"""What a concept's place may say, wherever it is written: in a job file, or as a `MaskSpec` in the library."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import fields as dataclass_fields

from weaver.errors import told
from weaver.job.spec import MaskSpec
from weaver.values import is_number, is_whole

__all__ = ["FORMS", "mask_reasons"]

_KINDS = ("word", "file", "box", "polygon", "points")
_CHOICES = ("order", "rank", "at", "around")
_BOX = "[left, top, right, bottom] in pixels or in parts of 1"

# What the fields that hold numbers look like.
FORMS = {
    "at": "a point [x, y] in pixels or in parts of 1",
    "around": _BOX,
    "box": _BOX,
    "polygon": "three or more corners [[x, y], ...] in pixels or in parts of 1",
    "points": "a list of points [[x, y], ...] in pixels or in parts of 1",
}


def mask_reasons(spec: MaskSpec, given: Collection[str] | None = None) -> list[tuple[str | None, str]]:
    """What is wrong with a spec by itself: (field, or None for all of them together, reason); empty when nothing is.

    Whether a place lies in the template only the template's size tells, and what a file holds only the file.

    Parameters
    ----------
    given : the fields that were written, also where their value could not be read and is None in the spec; None for
        those that are not None
    """
    values = {field.name: getattr(spec, field.name) for field in dataclass_fields(spec)}
    values = {name: value for name, value in values.items() if value is not None}
    given = values if given is None else given
    reasons: list[tuple[str | None, str]] = []
    kinds, choices = ([name for name in names if name in given] for names in (_KINDS, _CHOICES))
    if len(kinds) > 1:
        reasons.append((None, f"give exactly one of {', '.join(_KINDS)} (found {' and '.join(kinds)})"))
    if choices and kinds not in ([], ["word"]):
        reasons.append((choices[0], "chooses among objects of a word; beside another mask it has no meaning"))
    if len(choices) > 1:
        reasons.append((None, f"give at most one of {', '.join(_CHOICES)} (found {' and '.join(choices)})"))
    if "label" in given and kinds != ["file"]:
        reasons.append(("label", "is of a mask's file; name the file too"))
    return reasons + [(name, reason) for name, value in values.items() if (reason := _fault(name, value))]


def _fault(name: str, value: object) -> str | None:
    """What is wrong with the value of one field."""
    if name == "word":
        fine, wanted = isinstance(value, str) and value.strip(), "a word or a phrase"
    elif name == "file":
        fine, wanted = isinstance(value, str | os.PathLike), "the path of a file"
    elif name == "label":
        fine, wanted = isinstance(value, str) or is_whole(value), "a number, a colour or a name"
    elif name in ("order", "rank"):
        fine, wanted = is_whole(value, 1), "a whole number, 1 or more"
    elif name in ("polygon", "points"):
        fine = _is_list(value) and len(value) >= (3 if name == "polygon" else 1)
        fine, wanted = fine and all(_is_row(pair, 2) for pair in value), FORMS[name]
    else:
        fine, wanted = _is_row(value, 2 if name == "at" else 4), FORMS[name]
    if not fine:
        return f"is {told(value)}, expected {wanted}"
    if name == "at" and min(value) < 0:
        return f"must not be negative, is {list(value)}"
    if name in ("box", "around") and not (0 <= value[0] < value[2] and 0 <= value[1] < value[3]):
        return f"must have 0 <= left < right and 0 <= top < bottom, is {list(value)}"
    return None


def _is_list(value: object) -> bool:
    """Whether a value is a list of any kind, an array too."""
    return hasattr(value, "__len__") and hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping)


def _is_row(value: object, count: int) -> bool:
    return _is_list(value) and len(value) == count and all(map(is_number, value))
