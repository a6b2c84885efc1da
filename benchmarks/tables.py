"""Tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["MISSING", "is_gpu", "table"]

MISSING = "not yet measured"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *lines))


def is_gpu(rows: Sequence[Mapping]) -> bool:
    """Whether any of these rows is of a GPU, as `benchmarks.machine.device_name` names it."""
    return any("(sm_" in row["device"] for row in rows)
