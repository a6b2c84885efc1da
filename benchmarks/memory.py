"""What `weaver estimate` says beside what a run took: PyTorch's record of its allocations on the CPU, stage by stage.

``python -m benchmarks.memory [--sizes 64 128 192] [--concepts 1 2 4] [--steps 10] [--record]``

Jobs of the embedded model with concepts that ship. The peak of a stage is told without the weights of models and
concepts, of which there is nothing to estimate. `--record` writes the rows into `benchmarks/results/memory.csv`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import device_name, versions
from weaver.embedded import CONCEPTS, MODEL_DIR
from weaver.job import Job
from weaver.job.parse import job_from_mapping
from weaver.memory.estimate import Estimate, estimate_job
from weaver.memory.ledger import WEIGHTS
from weaver.memory.stages import CONCEPT_WEIGHTS
from weaver.models import quiet_libraries
from weaver.progress import Stages
from weaver.run import run_job

__all__ = ["estimated", "make_job", "measured"]

FIELDS = ("device", "model", "size", "N", "steps", "stage", "estimate_mb", "measured_mb", "ratio", "versions", "date")
KEY = FIELDS[:6]
# Stages of a run as its report has them, and those of an estimate that they hold.
COVERS = {
    "bank": ("class pictures", "training"),
    "template": ("template",),
    "masks": ("masks",),
    "inversion": ("inversion", "features", "reconstruction"),
    "fusion": ("fusion", "decoding"),
}
_MARK = "stage of a run: "


def estimated(job: Job, estimate: Estimate) -> dict[str, int]:
    """Bytes of each stage of a run at its highest, without weights and concept files."""
    files = sum(spec.file is not None for spec in job.everyone) / len(job.everyone)
    found = {}
    for stage, parts in COVERS.items():
        if peaks := [estimate.stages[part] for part in parts if part in estimate.stages]:
            found[stage] = max(
                p.total - p.parts[WEIGHTS] - round(files * p.parts.get(CONCEPT_WEIGHTS, 0)) for p in peaks
            )
    return found


def measured(job: Job) -> dict[str, int]:
    """The same of a run of the job, by the allocator's record, from what was held once its models were loaded.

    The embedded model's file, which is mapped whenever a model is compared with it, is left out: that takes no memory.
    """
    gc.collect()  # what died before does not count
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run_job(job, Path(folder) / "out", stages=_MarkedStages())
    events = profiler.profiler.kineto_results.events()
    marks = [event for event in events if event.name().startswith(_MARK)]
    spans = [(event.name().removeprefix(_MARK), event.start_ns(), event.end_ns()) for event in marks]
    loaded = max(end for stage, _, end in spans if stage == "loading")
    held, before, found = 0, 0, {}
    mapped = (MODEL_DIR / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        at = event.start_ns()
        if abs(event.nbytes()) == mapped:
            continue
        held += event.nbytes()
        if at <= loaded:
            before = held
        for stage, start, end in spans:
            if start <= at <= end and at > loaded:
                found[stage] = max(found.get(stage, 0), held - before)
    return found


class _MarkedStages(Stages):
    """Stages that leave a mark of their beginning and end in the profiler's record."""

    def __init__(self):
        super().__init__(bars=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with record_function(f"{_MARK}{name}"), super().stage(name):
            yield

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        loads = label.startswith("loading")
        with record_function(f"{_MARK}loading") if loads else nullcontext(), super().step(label):
            yield
            if loads:
                gc.collect()  # what loading left behind


def make_job(side: int, concepts: int, steps: int) -> Job:
    """A job of the embedded model: concepts that ship side by side, in a picture of `side` pixels."""
    cards = [card for card in CONCEPTS.values() if card.kind == "animal"][:concepts]
    boxes = [[i / concepts, 0.2, (i + 0.9) / concepts, 0.9] for i in range(concepts)]
    mapping = {
        "prompt": ", ".join(f"a {card.word}" for card in cards),
        "steps": steps,
        "size": [side, side],
        "template": {"steps": 2},
        "concepts": [
            {"file": f"embedded:{card.name}", "mask": {"box": box}} for card, box in zip(cards, boxes, strict=True)
        ],
    }
    return job_from_mapping(mapping, folder=Path.cwd())


def _upsert(path: Path, rows: list[Mapping]) -> None:
    table = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            table = {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}
    table |= {tuple(str(row[name]) for name in KEY): row for row in rows}
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 192], help="sides in pixels")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write rows into benchmarks/results/memory.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    cpu, rows = torch.device("cpu"), []
    about = {"device": device_name(cpu), "model": "embedded", "steps": args.steps, "versions": versions(cpu)}
    for side in args.sizes:
        for concepts in args.concepts:
            job = make_job(side, concepts, args.steps)
            told, taken = estimated(job, estimate_job(job)), measured(job)
            for stage in told:
                ratio = told[stage] / taken[stage]
                print(f"{side:4} px, N = {concepts}, {stage:9} {told[stage] / 1e6:9.2f} MB estimated, "
                      f"{taken[stage] / 1e6:9.2f} MB measured, {ratio:.3f}", flush=True)  # fmt: skip
                amounts = {"estimate_mb": f"{told[stage] / 1e6:.4g}", "measured_mb": f"{taken[stage] / 1e6:.4g}"}
                row = {**about, **amounts, "size": side, "N": concepts, "stage": stage, "ratio": f"{ratio:.3f}"}
                rows.append(row | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"})
    if args.record:
        _upsert(Path("benchmarks/results/memory.csv"), rows)


if __name__ == "__main__":
    main()
