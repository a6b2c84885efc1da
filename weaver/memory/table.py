"""An estimate as a table for a terminal."""

from __future__ import annotations

from weaver.memory.estimate import Estimate
from weaver.sizes import format_bytes

__all__ = ["table"]

_UNCOUNTED = "Not counted: what cuDNN takes for itself, and the driver's own few hundred MB."


def table(estimate: Estimate) -> str:
    """A line for each stage, a column for each part, and the peak marked."""
    names = list(dict.fromkeys(part for peak in estimate.stages.values() for part in peak.parts))
    rows = [["", *names, "all"]]
    for stage, peak in estimate.stages.items():
        cells = [format_bytes(peak.parts[name]) if peak.parts.get(name) else "-" for name in names]
        rows.append([stage, *cells, format_bytes(peak.total)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"on {estimate.device} in {estimate.dtype}, {estimate.way}:"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells) + ("  <- peak" if row[0] == estimate.worst else ""))
    return "\n".join(lines if estimate.device == "cpu" else [*lines, _UNCOUNTED])
