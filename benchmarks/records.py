"""What recorded figures of the embedded model say of how they were made, and their pictures at a page's size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from benchmarks.tables import DOCS
from weaver.defaults import embedded_defaults
from weaver.embedded import concept_hashes, model_hash
from weaver.hashing import file_hash

RESULTS = Path(__file__).parent / "results"


def made_with(concepts: Iterable[str]) -> dict:
    """The hashes of the model and of the concepts that ship under these names, and the defaults of a fusion."""
    return {"model": model_hash(), "concepts": concept_hashes(concepts), "defaults": defaults()}


def defaults() -> dict[str, float | str]:
    """The embedded model's defaults: numbers, and injection sites as they are written."""
    return {
        name: value if isinstance(value, float) else str(value) for name, value in vars(embedded_defaults()).items()
    }


def picture_for_docs(name: str, sheet: Image.Image, side: int) -> dict[str, str]:
    """Keep a sheet, of cells `side` pixels wide, in docs: at 96 pixels a cell, in 256 colours. Returns its hash by its
    path, which a record tells.
    """
    small = sheet.resize((sheet.width * 96 // side, sheet.height * 96 // side), Image.Resampling.LANCZOS)
    small.quantize(256).save(DOCS / name, optimize=True)
    return {f"docs/{name}": file_hash(DOCS / name)}


def write_record(folder: Path, name: str, told: Mapping) -> None:
    """Write figures as `NAME.json`."""
    (folder / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
