"""Take the demonstration's sheet into the README: ``make demo``, then ``python -m benchmarks.embedded_demo [FOLDER]``

The concepts that it trained must be the shipped ones, number by number. The sheet becomes `docs/demo.png`, and what it
was made with goes to `benchmarks/results/embedded_demo.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from weaver.embedded import concept_hashes, concept_path, model_hash

ROOT = Path(__file__).parents[1]
PICTURE, RECORD = ROOT / "docs" / "demo.png", ROOT / "benchmarks" / "results" / "embedded_demo.json"


def differing(folder: Path) -> list[str]:
    """Names of a run's concepts that are not the shipped ones."""
    found = []
    for path in sorted((folder / "concepts").glob("*.safetensors")):
        ours, shipped = load_file(path), load_file(concept_path(path.stem))
        same = ours.keys() == shipped.keys() and all(torch.equal(ours[name], shipped[name]) for name in ours)
        found += [] if same else [path.stem]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a concept is another than the shipped one; nothing is taken then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/demo"))
    folder = parser.parse_args(argv).folder
    if not (folder / "sheet.png").exists():
        print(f"{folder} holds no sheet.png: run make demo first", file=sys.stderr)
        return 1
    if others := differing(folder):
        print(f"trained otherwise than shipped: {', '.join(others)}", file=sys.stderr)
        return 1
    shutil.copyfile(folder / "sheet.png", PICTURE)
    digest = hashlib.sha256(PICTURE.read_bytes()).hexdigest()
    names = sorted(path.stem for path in (folder / "concepts").glob("*.safetensors"))
    told = {"model": model_hash(), "concepts": concept_hashes(names), "docs/demo.png": digest}
    RECORD.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
