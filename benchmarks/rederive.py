"""All that follows from the embedded model's weights, made anew in order: ``make rederive``

Each step is a command, told before it runs. One that was done for the weights, concepts and defaults there are is
skipped, so that the same command goes on where it stopped; what each took is kept in ``outputs/rederive/done.json``.
Two steps want a person: ``defaults`` stops where the sweep chose other settings than ``weaver/defaults.py`` has, and
what sentences of the README and docs say of a figure is written by hand (its tables are not). ``--list`` runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weaver.defaults import embedded_defaults
from weaver.embedded import CONCEPTS, concept_hashes, model_hash
from weaver.evaluation.arms import CHOSEN_FILE

__all__ = ["STEPS", "Step", "main"]

ROOT = Path(__file__).parents[1]
DONE = ROOT / "outputs" / "rederive" / "done.json"
_TABLE = "tests/test_evaluation_recorded.py"
_RECORDS = " ".join(
    f"tests/test_{name}.py"
    for name in (
        "benchmarks_embedded_demo",
        "benchmarks_embedded_methods",
        "benchmarks_embedded_rival",
        "benchmarks_embedded_sites",
        "masks_edges",
    )
)


@dataclass(frozen=True)
class Step:
    """One command of Python's, and what it makes.

    Parameters
    ----------
    command : arguments of the interpreter
    after : what it follows from: "model", "concepts" too, or "defaults" too, which the sweep chooses
    """

    name: str
    command: str
    makes: str
    after: str = "defaults"


STEPS = (
    Step("derive", "-m weaver.embedded.training derive", "helpers, concept files, gates, samples, model card", "model"),
    Step(
        "sweep",
        "-m benchmarks.embedded_evaluation --sweep --record",
        "embedded_sweep.json, chosen.json, docs/sweep.svg",
        "concepts",
    ),
    Step("defaults", f"-m pytest {_TABLE} -k defaults", "whether weaver/defaults.py has what the sweep chose"),
    Step("sites", "-m benchmarks.embedded_sites --record", "embedded_sites.json"),
    Step(
        "evaluate",
        "-m benchmarks.embedded_evaluation --record",
        "embedded_evaluation.json, docs/failures.png, tables of README and docs/evaluation.md",
    ),
    Step("rival", "-m benchmarks.embedded_rival --record", "embedded_rival.json, docs/evaluation.md's second table"),
    Step("seeds", "-m benchmarks.embedded_seeds --record", "embedded_seeds.json, docs/seeds.png"),
    Step("lora", "-m benchmarks.embedded_lora --record", "embedded_lora.json, docs/whole_loras.png"),
    Step(
        "methods",
        "-m benchmarks.embedded_methods --record",
        "embedded_methods.json, docs/methods.png, docs/concepts.md's table",
    ),
    Step("masks", "-m benchmarks.mask_sources --record", "mask_sources.json, docs/masks.md's table"),
    Step("demo", "-m weaver demo --cache off --out outputs/demo", "outputs/demo"),
    Step("sheet", "-m benchmarks.embedded_demo outputs/demo", "docs/demo.png, embedded_demo.json"),
    Step("hashes", f"-m pytest tests/test_embedded_model.py {_TABLE} {_RECORDS}", "whether all is of these weights"),
)


def made_of(step: Step) -> str:
    """SHA-256 of what a step follows from, as it is now."""
    parts: list[object] = [model_hash()]
    if step.after != "model":
        parts.append(concept_hashes(CONCEPTS))
    if step.after == "defaults":
        parts += [CHOSEN_FILE.read_text(encoding="utf-8"), repr(embedded_defaults())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_done(step: Step, done: Mapping[str, Mapping]) -> bool:
    """Whether a step's last end was of what it would now be made of."""
    return done.get(step.name, {}).get("of") == made_of(step)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; the exit status of the step that failed, if one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--list", action="store_true", help="tell the steps, and which are done")
    parser.add_argument("--after", choices=names, help="only what comes after this step, which was just done by itself")
    parser.add_argument("--again", action="store_true", help="forget what was done")
    args = parser.parse_args(argv)
    done = json.loads(DONE.read_text(encoding="utf-8")) if DONE.exists() and not args.again else {}
    first = names.index(args.after) + 1 if args.after else 0
    if first and not args.list:
        _keep(done | {step.name: {"of": made_of(step)} for step in STEPS[:first]})
        done = json.loads(DONE.read_text(encoding="utf-8"))
    steps = STEPS[first:]
    for number, step in enumerate(steps, 1):
        skipped = is_done(step, done)
        print(f"[{number}/{len(steps)}] {step.name}: {step.makes}{' (done before)' * skipped}", flush=True)
        if skipped or args.list:
            continue
        started = time.monotonic()
        if code := subprocess.run([sys.executable, *shlex.split(step.command)], cwd=ROOT).returncode:
            print(f"{step.name} ended with {code}; `make rederive` goes on from it", file=sys.stderr)
            return code
        done[step.name] = {"of": made_of(step), "seconds": round(time.monotonic() - started)}
        _keep(done)
    return 0


def _keep(done: Mapping[str, Mapping]) -> None:
    DONE.parent.mkdir(parents=True, exist_ok=True)
    DONE.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
