"""The one error class that a user is meant to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["WeaverError", "differences", "printable", "raise_if", "told"]

_LONGEST = 60  # characters of a value that an error tells


class WeaverError(ValueError):
    """Bad input, told in words a user can act on. The command line prints it as one line."""


def raise_if(reasons: Iterable[str], what: str) -> None:
    """Raise one `WeaverError` that lists every reason, or do nothing when there is none.

    Parameters
    ----------
    reasons : each one complaint, naming the value and the fix
    what : what could not be done, "Cannot build the fusion plan"
    """
    reasons = list(reasons)
    if reasons:
        raise WeaverError(f"{what}: " + "; ".join(reasons))


def told(value: object) -> str:
    """A value as an error names it: in one line, cut where it is long."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def printable(value: object, longest: int = 200) -> str:
    """A value of somebody's file as it may be printed: in one line, without signs that steer a terminal, cut."""
    text = str(value)
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def differences(kept: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """Which of the values `asked` for are others than those `kept` under their names: "seed: kept 0, asked 7"."""
    return [
        f"{name}: kept {told(kept[name]) if name in kept else 'nothing'}, asked {told(value)}"
        for name, value in asked.items()
        if name not in kept or kept[name] != value
    ]
