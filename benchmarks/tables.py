"""Tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weaver.errors import WeaverError
from weaver.folder import whole_file

__all__ = ["DOCS", "MISSING", "README", "between", "into_page", "is_gpu", "table"]

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"

MISSING = "not yet measured"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *lines))


def is_gpu(rows: Sequence[Mapping]) -> bool:
    """Whether any of these rows is of a GPU, as `benchmarks.machine.device_name` names it."""
    return any("(sm_" in row["device"] for row in rows)


def between(text: str, marks: tuple[str, str], found: str) -> str:
    """A text with what was found between two comments that mark its place; a `WeaverError` where they are missing."""
    before, start, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (start and end):
        raise WeaverError(f"there is no place for the table: put {marks[0]} and {marks[1]} around it")
    return f"{before}{start}\n{found}\n{end}{after}"


def into_page(page: Path, marks: tuple[str, str], found: str) -> None:
    """Write into a page what was found, between the two comments that mark its place."""
    text = between(page.read_text(encoding="utf-8"), marks, found)
    with whole_file(page) as partial:
        partial.write_text(text, encoding="utf-8")
