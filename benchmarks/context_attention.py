"""`context_attention` against what one would write without it, over the cross-attentions of a U-Net forward.

``python -m benchmarks.context_attention [--quick] [--device auto|cpu|cuda] [--minutes M] [--out FOLDER]``

Every provider computes the fused and the negative row of a layer from the same random numbers and masks. Each is
checked against float64 first, and a wrong one is not recorded. All providers and numbers of concepts of a layer take
turns. Rows go to `context_attention.csv` in the folder, one for each provider, layer, N, masks, type and device; then
tables and pictures are made of them (`python -m benchmarks.report`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import report, rows
from benchmarks.floors import Rates, attention_work, empty_kernel_seconds, floor, measure_rates
from benchmarks.harness import Candidate, Measured, measure, tell
from benchmarks.machine import device_name, versions
from benchmarks.options import add_operation_options, chosen, make_parser, results_folder
from benchmarks.providers import PROVIDERS, SLOW_TO_COMPILE
from benchmarks.shapes import MASKS, MODELS, Geometry, blob_masks, make_plan, make_texts
from benchmarks.timing import buffer_sets
from weaver_kernels import context_attention_reference
from weaver_kernels.devices import kernel_arch
from weaver_kernels.tune import UNFINISHED
from weaver_kernels.tune_attention import kernel_hash
from weaver_kernels.tuning import KernelConfig, kernel_config, source_hash

OP = "context_attention"
CONCEPTS = (1, 2, 3, 5, 8)
OF_TARGETS = (1, 3, 8)  # measured first


class Group(NamedTuple):
    """What is measured in turn, and recorded or left to another time as a whole."""

    model: str
    geometry: Geometry
    masks: str
    concepts: tuple[int, ...]


def groups(models: Sequence[str], concepts: Sequence[int], masks: Sequence[str]) -> Iterator[Group]:
    """In order of importance, for when time is short: hard masks and the targets' N over all models come first."""
    parts = [tuple(n for n in concepts if n in OF_TARGETS), tuple(n for n in concepts if n not in OF_TARGETS)]
    for part in filter(None, parts):
        for kind in masks:
            for model in models:
                for geometry in MODELS[model].layers:
                    yield Group(model, geometry, kind, part)


def candidates(group: Group, providers: Sequence[str], dtype, device, rates: Rates, known: dict) -> Iterator[Candidate]:
    """Every provider at every N, with queries, keys and values in as many sets as the device's cache asks for."""
    geometry, rng = group.geometry, torch.Generator(device).manual_seed(0)
    for n in group.concepts:
        plan = make_plan(blob_masks(n, MODELS[group.model].latents, group.masks), geometry, device)
        draw = partial(make_texts, geometry, n + 3, dtype, device, rng)  # with background, base and negative
        sets = [draw()]
        n_bytes = sum(x.numel() * x.element_size() for x in vars(sets[0]).values())
        sets += [draw() for _ in range(buffer_sets(n_bytes, device) - 1)]
        arguments = (*vars(sets[0]).values(), plan.weights)
        true = context_attention_reference(*(x.double() for x in arguments))
        least = floor(
            attention_work(sets[0].q, sets[0].k, plan.weights), rates, _launch_seconds(geometry, dtype, device)
        )
        live = float((plan.weights[0] != 0).sum(0).float().mean())
        print(f"    N = {n}: {live:.2f} live contexts a token of {n + 2}", flush=True)
        about = {
            "op": OP,
            "model": group.model,
            "layer": str(geometry),
            "masks": group.masks,
            "N": n,
            "count": geometry.count,
            "live": f"{live:.3f}",
            "dtype": str(dtype).removeprefix("torch."),
            **known,
        }
        for name in providers:
            make = partial(_calls, name, plan, dtype, sets)
            ours = {"implementation": implementation(geometry, dtype, device)} if name == "ours" else {}
            yield Candidate({**about, "provider": name, **ours}, make, true, dtype, least)


def _calls(name: str, plan, dtype, sets) -> list:
    provider = PROVIDERS[name](plan, dtype)
    return [partial(provider, texts.q, *provider.keep(texts)) for texts in sets]


def implementation(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str:
    """What "ours" is on the device: its sources' hash, and a kernel's configuration. Others time another thing."""
    config = _config(geometry, dtype, device)
    return source_hash(f"{OP}.live") if config is None else f"{kernel_hash()} {'-'.join(map(str, config))}"


def _config(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> KernelConfig | None:
    arch = kernel_arch(device)
    return kernel_config(OP, geometry.dim, 8 * dtype.itemsize, arch) if arch else None


def _launch_seconds(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> float:
    config = _config(geometry, dtype, device)
    if config is None:
        return 0.0
    return empty_kernel_seconds((geometry.heads, -(-geometry.tokens // config.tile), 2), device, config.warps)


def measured_before(path: Path, group: Group, dtype: torch.dtype, device: torch.device, known: dict) -> bool:
    """Whether the group's own rows are there, of this device, these versions and what "ours" is today."""
    of_group = {
        "device": known["device"],
        "versions": known["versions"],
        "model": group.model,
        "layer": str(group.geometry),
        "masks": group.masks,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": "ours",
        "implementation": implementation(group.geometry, dtype, device),
    }
    there = {row["N"] for row in rows.read(path) if all(row[name] == value for name, value in of_group.items())}
    return there.issuperset(map(str, group.concepts))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was right, 1 when a provider was not (rows of the others are recorded then), 3 when time ran out."""
    args = _parse(argv)
    start, longest = time.monotonic(), 0.0
    device, dtype = chosen(args)
    known = {"device": device_name(device), "versions": versions(device)}
    path = args.out / f"{OP}.csv"
    print(f"{known['device']}; {known['versions']}; {dtype}", flush=True)
    rates = measure_rates(device, dtype, args.quick)
    print(f"copy {rates.copy / 1e9:.1f} GB/s, matrix product {rates.matrix / 1e12:.3f} TFLOP/s", flush=True)
    todo = list(groups(args.models, args.concepts, args.masks))
    if args.missing:
        todo = [group for group in todo if not measured_before(path, group, dtype, device, known)]
    wrong, spent = 0, 0
    for group in todo:
        began = time.monotonic()
        if args.minutes and spent and began - start + longest > args.minutes * 60:
            break
        print(f"{MODELS[group.model].title}, {group.geometry}, {group.masks} masks", flush=True)
        torch._dynamo.reset()  # its limit of variants is per function
        every = list(candidates(group, args.providers, dtype, device, rates, known))
        found = measure(every, device, rates, args.rounds)
        rows.upsert(path, found.rows)
        tell(found)
        _print(found)
        wrong, spent = wrong + len(found.wrong), spent + 1
        longest = max(longest, time.monotonic() - began)
    if todo[spent:]:
        print(f"no time for {len(todo) - spent} of {len(todo)} parts; --missing goes on with them")
    print(f"{path}: {time.monotonic() - start:.0f} s")
    report.write(args.out)
    return 1 if wrong else UNFINISHED if todo[spent:] else 0


def _print(found: Measured) -> None:
    ours = {row["N"]: float(row["p50_us"]) for row in found.rows if row["provider"] == "ours"}
    for row in found.rows:
        ratio = f"{float(row['p50_us']) / ours[row['N']]:6.2f} x ours" if row["N"] in ours else ""
        print(f"    N = {row['N']}  {row['provider']:24} {row['p50_us']:>8} us  {ratio}  {row['share']} of the floor")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    quick = "SD 2.1, N = 1, 3, 8, hard masks, what compiles at once"
    add_operation_options(parser, quick=quick, models=MODELS, providers=PROVIDERS)
    parser.add_argument("--masks", nargs="+", choices=MASKS)
    parser.add_argument("--minutes", type=float, help="begin no part that would end later")
    parser.add_argument("--missing", action="store_true", help="only what these versions have no row of here")
    args = parser.parse_args(argv)
    args.models = args.models or (["sd21"] if args.quick else list(MODELS))
    args.concepts = args.concepts or (OF_TARGETS if args.quick else CONCEPTS)
    args.masks = args.masks or (MASKS[:1] if args.quick else MASKS)
    args.providers = args.providers or [name for name in PROVIDERS if not (args.quick and name in SLOW_TO_COMPILE)]
    args.rounds = args.rounds or (5 if args.quick else 15)
    args.out = results_folder(args)
    return args


if __name__ == "__main__":
    sys.exit(main())
