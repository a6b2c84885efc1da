"""What each row of a batch is: negative or fused, and of which variant."""

from __future__ import annotations

from collections.abc import Sequence

from weaver.errors import WeaverError

__all__ = ["FUSED", "KINDS", "NEGATED", "Row", "picture_rows", "read_rows", "row_reasons"]

KINDS = ("negative", "fused")
NEGATED, FUSED = range(len(KINDS))

Row = tuple[int, int]
"""Number of the kind and of the variant: the place of a row in a plan's weights."""


def picture_rows(pictures: int, variants: int, guided: bool) -> tuple[Row, ...]:
    """The rows of a batch as pipelines lay it out: with guidance all negative rows, then the fused ones.

    Each of the V variants has as many pictures, one after the other. Raises `WeaverError` where that does not work out.
    """
    if pictures % variants:
        raise WeaverError(f"{pictures} pictures of {variants} variants: expected as many of each")
    of = [picture // (pictures // variants) for picture in range(pictures)]
    return tuple((kind, variant) for kind in ((NEGATED, FUSED) if guided else (FUSED,)) for variant in of)


def read_rows(rows: Sequence[str | tuple[str, int]]) -> tuple[Row, ...]:
    """Rows as `attach` is told them: "negative" or "fused", or one of them with the number of the variant."""
    named = [(row, 0) if isinstance(row, str) else tuple(row) for row in rows]
    return tuple((KINDS.index(kind), variant) for kind, variant in named)


def row_reasons(rows: Sequence[str | tuple[str, int]], variants: int) -> list[str]:
    """What is wrong with rows as `attach` is told them, for a plan of so many variants; empty when nothing is."""
    expected = " or ".join(map(repr, KINDS))
    if variants > 1:
        expected = f"({expected}, number of the variant from 0 to {variants - 1})"
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        return [f"rows is {rows!r}, expected what each row of the batch is, as ['negative', 'fused']"]
    odd = [row for row in rows if not _fits(row, variants)]
    return [f"rows has {', '.join(map(repr, dict.fromkeys(odd)))}, expected {expected}"] if odd else []


def _fits(row, variants: int) -> bool:
    if isinstance(row, str):
        return variants == 1 and row in KINDS
    if not isinstance(row, tuple) or len(row) != 2:
        return False
    kind, variant = row
    return kind in KINDS and isinstance(variant, int) and 0 <= variant < variants
