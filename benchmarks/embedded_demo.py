"""Take the demonstration's sheet into the README: ``make demo``, then ``python -m benchmarks.embedded_demo [FOLDER]``

Its job must be the demonstration's in every setting, but for the device and which of its templates was taken; the
concepts trained in that run, and nothing taken from the cache (`make demo ARGS='--cache off'` after a first one). The
sheet becomes `docs/demo.png`, and what it was made with goes to `benchmarks/results/embedded_demo.json`, with the
seconds that its `report.json` tells and the name of this machine: take it on the one that ran it. A training that was
interrupted has taken more than is told. Processors round differently, and so does code that adds in another order: such
a run trains other numbers than those that ship. Which concepts have other numbers is told and recorded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.machine import device_name
from benchmarks.records import made_with, write_record
from weaver.concepts.bank import resolve_prompts
from weaver.demo import DEMO_JOB, demo_job
from weaver.embedded import concept_path, load_pipeline
from weaver.errors import WeaverError
from weaver.hashing import file_hash
from weaver.job import Job
from weaver.job.choose import template_seeds
from weaver.job.file import job_to_mapping, read_job
from weaver.job.resolve import resolve_job

ROOT = Path(__file__).parents[1]
PICTURE, RECORD = ROOT / "docs" / "demo.png", ROOT / "benchmarks" / "results" / "embedded_demo.json"
MOST_TOLD = 4  # settings, of a job that is not the demonstration's


def unlike_the_demo(folder: Path) -> list[str]:
    """Why what lies in a folder is not the whole demonstration's result; empty when it is."""
    missing = [name for name in ("sheet.png", "manifest.json", "report.json") if not (folder / name).exists()]
    if missing:
        return [f"holds no {name}" for name in missing]
    try:
        found, _ = read_job(folder / "manifest.json")
    except WeaverError as error:
        return [str(error)]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    were, wanted = (dict(_settings(job_to_mapping(job, folder))) for job in (found, _demo_as_run(found)))
    reasons = [
        f"{name} is {were.get(name)!r}, the demonstration's is {wanted.get(name)!r}"
        for name in were | wanted
        if were.get(name) != wanted.get(name)
    ][:MOST_TOLD]
    if cached := report.get("cached"):
        reasons.append(f"{' and '.join(cached)} taken from the cache (--cache off computes them)")
    names = [spec.name for spec in demo_job().everyone]
    if untrained := [name for name in names if not (folder / "concepts" / f"{name}.safetensors").exists()]:
        reasons.append(f"not trained in this run: {', '.join(untrained)}")
    return reasons


def _demo_as_run(found: Job) -> Job:
    """The demonstration's job as a manifest has it: all defaults written out, on the device that was found, and with
    the template that was taken, one of those it tries.
    """
    job = demo_job()
    job = resolve_job(job, load_pipeline(), resolve_prompts(job, {}, DEMO_JOB.name))
    seeds = list(template_seeds(job.template))
    taken = found.template.seed if found.template.seed in seeds else seeds[0]
    return replace(job, device=found.device, template=replace(job.template, seed=taken, tries=1))


def _settings(mapping: Mapping | Sequence, place: str = "") -> Iterator[tuple[str, object]]:
    """Every setting of a job's mapping by its place, such as "concepts[0].train.steps"."""
    for key, value in mapping.items() if isinstance(mapping, Mapping) else enumerate(mapping):
        name = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".removeprefix(".")
        if isinstance(value, Mapping | list | tuple):
            yield from _settings(value, name)
        else:
            yield name, value


def differing(folder: Path) -> list[str]:
    """Names of the demonstration's concepts that are not the shipped ones."""
    found = []
    for spec in demo_job().everyone:
        ours, shipped = load_file(folder / "concepts" / f"{spec.name}.safetensors"), load_file(concept_path(spec.name))
        same = ours.keys() == shipped.keys() and all(torch.equal(ours[name], shipped[name]) for name in ours)
        found += [] if same else [spec.name]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """1 where it is no whole demonstration; nothing is taken then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/demo"))
    folder = parser.parse_args(argv).folder
    if reasons := unlike_the_demo(folder):
        print(f"{folder}: {'; '.join(reasons)}: run make demo first, as it is", file=sys.stderr)
        return 1
    if others := differing(folder):
        print(f"other numbers than those that ship: {', '.join(others)}")
    shutil.copyfile(folder / "sheet.png", PICTURE)
    names = [spec.name for spec in demo_job().everyone]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    ran_on = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["job"]["device"]
    told = {**made_with(names), f"docs/{PICTURE.name}": file_hash(PICTURE)}
    told |= {"machine": device_name(torch.device(ran_on)), "other_numbers": others}
    told |= {key: report[key] for key in ("stages", "total_seconds")}
    write_record(RECORD.parent, RECORD.stem, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
