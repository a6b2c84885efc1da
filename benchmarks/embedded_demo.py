"""Take the demonstration's sheet into the README: ``make demo``, then ``python -m benchmarks.embedded_demo [FOLDER]``

Its model, prompt, seed, steps, amounts and concepts must be the demonstration's, the concepts trained in that run and
the shipped ones, number by number, and nothing taken from the cache (`make demo ARGS='--cache off'` after a first
one). The sheet becomes `docs/demo.png`, and what it was made with goes to `benchmarks/results/embedded_demo.json`, with
the seconds that its `report.json` tells and the name of this machine: take it on the one that ran it. A training that
was interrupted has taken more than is told.
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

from benchmarks.machine import device_name
from weaver.defaults import embedded_defaults
from weaver.demo import demo_job
from weaver.embedded import concept_hashes, concept_path, model_hash

ROOT = Path(__file__).parents[1]
PICTURE, RECORD = ROOT / "docs" / "demo.png", ROOT / "benchmarks" / "results" / "embedded_demo.json"


def unlike_the_demo(folder: Path) -> list[str]:
    """Why what lies in a folder is not the whole demonstration's result; empty when it is."""
    missing = [name for name in ("sheet.png", "manifest.json", "report.json") if not (folder / name).exists()]
    if missing:
        return [f"holds no {name}" for name in missing]
    try:
        found, demo = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["job"], demo_job()
        fusion, defaults = found["fusion"], embedded_defaults()
        wanted = {"model": demo.model, "prompt": demo.prompt, "seed": demo.seed, "steps": demo.steps}
        pairs = [(key, found[key], value) for key, value in wanted.items()]
        wanted = {"lambda": defaults.suppression, "guidance": defaults.guidance, "eta": defaults.eta}
        pairs += [(key, fusion[key], value) for key, value in wanted.items()]
        reasons = [f"{key} is {was!r}, the demonstration's is {value!r}" for key, was, value in pairs if was != value]
        drawn = {entry["name"]: entry for entry in (*found["concepts"], *filter(None, [found.get("background")]))}
        names = [spec.name for spec in demo.everyone]
        if list(drawn) != names:
            reasons.append(f"its concepts are {', '.join(drawn)}, the demonstration's are {', '.join(names)}")
        untrained = [name for name, entry in drawn.items() if not entry.get("train")]
        untrained += [name for name in names if not (folder / "concepts" / f"{name}.safetensors").exists()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json is none of a run ({type(error).__name__}: {error})"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if cached := report.get("cached"):
        reasons.append(f"{' and '.join(cached)} taken from the cache (--cache off computes them)")
    if untrained:
        reasons.append(f"not trained in this run: {', '.join(dict.fromkeys(untrained))}")
    return reasons


def differing(folder: Path) -> list[str]:
    """Names of the demonstration's concepts that are not the shipped ones."""
    found = []
    for spec in demo_job().everyone:
        ours, shipped = load_file(folder / "concepts" / f"{spec.name}.safetensors"), load_file(concept_path(spec.name))
        same = ours.keys() == shipped.keys() and all(torch.equal(ours[name], shipped[name]) for name in ours)
        found += [] if same else [spec.name]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """1 where it is no whole demonstration, or a concept another than the shipped one; nothing is taken then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/demo"))
    folder = parser.parse_args(argv).folder
    if reasons := unlike_the_demo(folder):
        print(f"{folder}: {'; '.join(reasons)}: run make demo first, as it is", file=sys.stderr)
        return 1
    if others := differing(folder):
        print(f"trained otherwise than shipped: {', '.join(others)}", file=sys.stderr)
        return 1
    shutil.copyfile(folder / "sheet.png", PICTURE)
    digest = hashlib.sha256(PICTURE.read_bytes()).hexdigest()
    names = [spec.name for spec in demo_job().everyone]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    ran_on = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["job"]["device"]
    told = {"model": model_hash(), "concepts": concept_hashes(names), "docs/demo.png": digest}
    told |= {"machine": device_name(torch.device(ran_on))}
    told |= {key: report[key] for key in ("stages", "total_seconds")}
    RECORD.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
