"""What learning a concept takes of a GPU's memory, by the estimate: ``python -m benchmarks.training_memory [--record]``

Stable Diffusion 2.1 at 512 pixels and SDXL at 1024, in float16, from configurations alone: every module, gradient and
optimiser's state is counted on tensors without numbers, as `weaver estimate` does. The driver's own few hundred MB and
what cuDNN takes for itself are not in it. `--record` writes `benchmarks/results/training_memory.csv`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image

from benchmarks import rows
from benchmarks.machine import versions
from benchmarks.model_shapes import write_model
from weaver.job.parse import job_from_mapping
from weaver.memory.ledger import Ledger
from weaver.memory.plans import MemoryPlan
from weaver.memory.shapes import load_shapes
from weaver.memory.training import training_peaks
from weaver.models import quiet_libraries

__all__ = ["peak"]

KEY = ("model", "size", "method", "batch", "checkpointing")
FIELDS = (*KEY, "class_pictures_gb", "training_gb", "one_at_once_gb", "versions", "date")
SIZES = {"sd21": 512, "sdxl": 1024}
PICTURES = 5
_CELL = 8  # pixels of a latent's cell
METHODS = {"Custom Diffusion": {}, "LoRA of rank 16": {"rank": 16}}


def peak(model: str, size: int, **settings) -> dict[str, float]:
    """GB of each stage of a training at its highest, weights included; settings are those of `TrainSettings`.

    "one_at_once_gb" is the training's where pictures are encoded one by one (`at_once=1`), not by eight.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(model, Path(place) / model)
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size // _CELL}))
        pictures = Path(place) / "pictures"
        pictures.mkdir()
        for number in range(PICTURES):
            Image.new("RGB", (size, size)).save(pictures / f"{number}.png")
        train = {"images": str(pictures), "token": "<v1>", **settings}
        concept = {"word": "dog", "train": train, "mask": {"box": [0.1, 0.1, 0.9, 0.9]}}
        template = {"image": str(pictures / "0.png")}
        mapping = {"model": str(folder), "prompt": "a dog", "steps": 2, "template": template, "concepts": [concept]}
        job = job_from_mapping(mapping, folder=Path(place))
        shapes = load_shapes(str(folder), device="cuda", fuses=False)
        usual, small = (training_peaks(job, shapes, MemoryPlan(at_once=n), Ledger("cuda")) for n in (None, 1))
        found = {"class_pictures": usual["class pictures"], "training": usual["training"]}
        return {f"{name}_gb": peak.total / 1e9 for name, peak in (found | {"one_at_once": small["training"]}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    table = []
    for model in args.models:
        for method, changes in METHODS.items():
            for batch, checkpointing in ((2, False), (2, True), (8, False), (8, True)):
                given = {"batch": batch, "prior_batch": batch, "checkpointing": checkpointing}
                found = peak(model, SIZES[model], **given, **changes)
                row = dict(zip(KEY, (model, SIZES[model], method, f"{batch}+{batch}", checkpointing), strict=True))
                row |= {name: f"{gb:.2f}" for name, gb in found.items()}
                table.append(
                    row | {"versions": versions(torch.device("cpu")), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
                )
                print("  ".join(str(table[-1][name]) for name in FIELDS[:-2]), flush=True)
    if args.record:
        rows.upsert(Path(__file__).parent / "results" / "training_memory.csv", table, KEY, FIELDS)


if __name__ == "__main__":
    main()
