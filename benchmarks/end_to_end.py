"""The whole: what a fusion takes from template to picture, step by step, beside what one would write without it.

``make bench-whole``, or ``python -m benchmarks.end_to_end [--quick] [--models embedded ...] [--out FOLDER]``

On a GPU the models have their true sizes and random weights, 16-bit; on a CPU it is the embedded model, and shrunken
ones if they are named. Nothing is timed unless the paper's algorithm, written out, gives ours to rounding. Rows go into
`end_to_end.csv`, and `benchmarks.report` makes tables of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import report, rows
from benchmarks.cases import Case, make_case, with_concepts
from benchmarks.draws import CLOCKS, Refused
from benchmarks.floors import measure_rates
from benchmarks.machine import choose_device, device_name, versions
from benchmarks.models import MODELS, load
from benchmarks.options import QUICK_RESULTS, RESULTS, results_folder
from benchmarks.process import parts_of_a_step, process
from benchmarks.whole import FIELDS, KEY, AtBest, changes, steps, timed_row, variants

N = 3
PARTS = ("steps", "variants", "changes", "process", "parts")
PAPER = {
    "device": "NVIDIA GeForce RTX 3090 (24 GB)", "model": "sd21", "dtype": "not stated", "part": "whole",
    "provider": "paper", "state": "not stated", "N": "not stated", "variants": 1, "steps": "not stated", "pixels": 768,
    "p50_s": 60, "clock": "not stated", "date": "2024",
    "note": "arXiv 2404.03913: about 60 s for the whole process, SDXL template of 50 steps at 1024, fusion on SD 2.1 "
    "at 768; steps of inversion and fusion are not stated",
}  # fmt: skip


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where results that should be the same were not."""
    args = _parse(argv)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("float16" if on_gpu else "float32"))
    path, refused = args.out / "end_to_end.csv", 0
    rows.upsert(path, [PAPER], KEY, FIELDS)
    matrix = measure_rates(device, dtype, args.quick or not on_gpu).matrix
    print(f"{device_name(device)}; {versions(device)}; {dtype}; {matrix / 1e12:.3f} TFLOP/s", flush=True)
    for model in args.models or (["sd21", "sdxl", "sd15"] if on_gpu else ["embedded"]):
        known = {"device": device_name(device), "model": model, "dtype": str(dtype).removeprefix("torch.")}
        known |= {"versions": versions(device)}
        pipe = load(model, device, dtype)
        try:
            for found in measure(args, pipe, model, device, dtype, matrix):
                now = {"load": f"{os.getloadavg()[0]:.2f}", "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
                rows.upsert(path, [known | now | row for row in found], KEY, FIELDS)
                _print(model, found)
        except Refused as error:
            print(f"{model}: {error}", file=sys.stderr, flush=True)
            refused += 1
    report.write(args.out)
    return min(refused, 1)


def measure(args, pipe, model: str, device, dtype, matrix: float) -> Iterator[list[dict]]:
    """Rows of each part, in turn."""
    case = make_case(pipe, 0, args.steps)
    few = max(args.rounds // 5, 1)
    plain, case = case, with_concepts(case, N)
    best = AtBest(case, device) if {"steps", "changes", "variants"}.intersection(args.parts) else None
    if "steps" in args.parts:
        for n in args.concepts:
            yield steps(with_concepts(plain, n), best, device, args.rounds)
    if "parts" in args.parts:
        found = parts_of_a_step(case, device, few, matrix)
        yield [_part_row(case, kind, seconds, shares, device) for kind, (seconds, shares) in found.items()]
    if "changes" in args.parts:
        yield changes(case, best, device, few)
    if "variants" in args.parts:
        yield variants(case, best, args.variants, device, few)
    if "process" in args.parts:
        template = load("sdxl", device, dtype) if model == "sd21" else pipe
        for provider in ("ours, captured", "ours") if device.type == "cuda" else ("ours",):
            yield process(case, model, template, args.process_steps, few, matrix, provider)


def _part_row(case: Case, kind: str, seconds: float, shares: dict, device: torch.device) -> dict:
    row = timed_row(case, kind, "ours", [seconds], device)
    return row | shares | {"state": "part of a step", "clock": CLOCKS[device.type]}


def _print(model: str, found: Sequence[dict]) -> None:
    for row in found:
        ratio = f"  {row['of_ours']} x ours" if row.get("of_ours") else ""
        about = f"N = {row['N']}, {row['part']}, {row['provider']}, {row['state']}, {row['variants']} variants"
        print(f"  {model}, {about}, {row['steps']} steps: {row['p50_s']} s{ratio}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 3, few steps, one round")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="float16 on a GPU, else float32")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="true sizes on a GPU, else the embedded one")
    parser.add_argument("--concepts", nargs="+", type=int, choices=range(9), metavar="N", help="0 to 8")
    parser.add_argument("--variants", nargs="+", type=int, metavar="N", help="pictures of one template")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of all but the process (50 on a GPU, else 10)")
    parser.add_argument("--process-steps", type=int, help="of template, inversion and fusion (50)")
    parser.add_argument("--rounds", type=int, help="of the steps (15); a fifth of them for the rest")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help=f"folder of results ({RESULTS}; {QUICK_RESULTS} for --quick)")
    args = parser.parse_args(argv)
    on_gpu = choose_device(args.device).type == "cuda"
    args.concepts = args.concepts or ([N] if args.quick else [0, 1, 2, 3, 5, 8])
    args.variants = sorted({1, *(args.variants or ([2] if args.quick else [2, 4, 8, 16]))})
    args.steps = args.steps or (4 if args.quick else 50 if on_gpu else 10)
    args.process_steps = args.process_steps or (4 if args.quick else 50)
    args.rounds = args.rounds or (1 if args.quick else 15)
    args.out = results_folder(args)
    return args


if __name__ == "__main__":
    sys.exit(main())
