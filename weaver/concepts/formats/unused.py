"""What a concept changes that a fusion makes no use of: how much it is, and telling it."""

from __future__ import annotations

import warnings

from weaver.choices import ON_UNUSED
from weaver.concepts.changes import norm_of
from weaver.concepts.concept import Concept, ConceptError
from weaver.layers import has_region

__all__ = ["UnusedPartsWarning", "tell_unused", "unused_reason"]


class UnusedPartsWarning(UserWarning):
    """A concept has changes that a fusion does not use."""


def tell_unused(concept: Concept, on_unused: str = "warn", what: str | None = None) -> None:
    """Warn of what a fusion does not use of a concept, or raise `ConceptError` for it; `what` begins the message."""
    if on_unused not in ON_UNUSED:
        raise ConceptError(f"on_unused is {on_unused!r}, expected one of {', '.join(ON_UNUSED)}")
    if (reason := unused_reason(concept)) is None:
        return
    message = f"{what or f'concept {concept.name!r}'}: {reason}"
    if on_unused == "refuse":
        raise ConceptError(message)
    warnings.warn(message, UnusedPartsWarning, stacklevel=3)


def unused_reason(concept: Concept) -> str | None:
    """How much of a concept a fusion does not use, in words; None where it uses all."""
    if not (unused := {path: change for path, change in concept.outside.items() if not has_region(path)}):
        return None
    groups = (concept.deltas, concept.text_deltas, concept.outside)
    total = norm_of(change for group in groups for change in group.values())
    share = (norm_of(unused.values()) / total) ** 2 if total else 0.0
    return (
        f"{len(unused)} of its changes, {next(iter(unused))} among them, act on the whole picture at once and in no "
        f"region, {share:.0%} of it by the squared norm: they are kept and not used"
    )
