"""`routed_lora` against what one would write without it, over the Linears on a U-Net's tokens in one forward.

``python -m benchmarks.routed_lora [--quick] [--device auto|cpu|cuda] [--out FOLDER]``

N adapters of rank 16, each in a blob of its own; every provider computes the whole layer for the fused and the negative
row, and `base` is the layer alone, so that what N whole LoRAs add to it is a ratio of one run. Each is checked against
float64 first, and a wrong one is not recorded. All providers and numbers of adapters of a layer take turns; on a CPU
times are those of the process, so that other work on the machine falls on nobody. Rows go to `routed_lora.csv` in the
folder, one for each provider, layer, N, type and device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import report, rows
from benchmarks.floors import Rates, Work, floor, measure_rates
from benchmarks.harness import Candidate, measure, tell
from benchmarks.lora_providers import LORA_PROVIDERS, Linear
from benchmarks.lora_report import added, forward_ms
from benchmarks.machine import device_name, versions
from benchmarks.options import add_operation_options, chosen, make_parser, results_folder
from benchmarks.shapes import MODELS, blob_masks
from benchmarks.timing import buffer_sets
from weaver_kernels import AdapterStack, ContextPlan, LowRank, routed_lora_reference
from weaver_kernels.devices import kernel_arch
from weaver_kernels.tune_lora import lora_hash
from weaver_kernels.tuning import lora_config, source_hash
from weaver_kernels.unets import Layer, linears

OP = "routed_lora"
CONCEPTS, RANK = (1, 2, 4, 8), 16


def make_layer(size: Layer, masks: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Linear:
    """A random layer with as many adapters as there are masks [N, h, w], which are reduced by area to its map."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng) / shape[-1] ** 0.5

    pairs = [LowRank(draw(RANK, size.inputs), draw(size.outputs, RANK)) for _ in masks]
    weights = torch.zeros(2, len(masks), size.tokens)
    weights[0] = F.adaptive_avg_pool2d(masks[None], size.side)[0].flatten(1)
    base = draw(size.outputs, size.inputs), draw(size.outputs)
    adapters = AdapterStack.of(pairs).to(device, dtype)
    return Linear(*(one.to(device, dtype) for one in base), adapters, ContextPlan(weights.to(device)))


def truths(layer: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer alone and with its adapters in float64, both [2, T, 1, O]."""
    doubled, weights = x.double(), layer.plan.weights.double()
    y = F.linear(doubled, layer.weight.double(), layer.bias.double())
    adapters = layer.adapters.to(dtype=torch.float64)
    changed = routed_lora_reference(y, doubled, adapters, weights, layer.plan.context_index)
    return y[:, :, None], changed[:, :, None]


def work(layer: Linear, x: torch.Tensor, with_adapters: bool) -> Work:
    """Of the layer for both rows, and of the adapters where they are alive."""
    (outputs, inputs), (n_rows, tokens, _) = layer.weight.shape, x.shape
    n_bytes = (n_rows * tokens * (inputs + outputs) + layer.weight.numel()) * x.element_size()
    flops = 2 * n_rows * tokens * inputs * outputs
    live = int((layer.plan.weights != 0).sum()) if with_adapters else 0
    return Work(n_bytes, flops + 2 * live * RANK * (inputs + outputs))


def candidates(
    model: str, size: Layer, concepts: Sequence[int], providers: Sequence[str], dtype, device, rates: Rates, known: dict
) -> Iterator[Candidate]:
    """Every provider at every N, with inputs in as many sets as the device's cache asks for."""
    rng = torch.Generator().manual_seed(1)
    n_bytes = 2 * size.tokens * (size.inputs + size.outputs) * dtype.itemsize
    shape = (2, size.tokens, size.inputs)
    sets = [torch.randn(shape, generator=rng).to(device, dtype) for _ in range(buffer_sets(n_bytes, device))]
    for n in concepts:
        layer = make_layer(size, blob_masks(n, MODELS[model].latents)[:n], dtype, device)
        alone, changed = truths(layer, sets[0])
        about = {
            "op": OP,
            "model": model,
            "layer": str(size),
            "masks": "hard",
            "N": n,
            "count": size.count,
            "live": f"{float((layer.plan.weights[0] != 0).sum(0).float().mean()):.3f}",
            "dtype": str(dtype).removeprefix("torch."),
            **known,
        }
        for name in providers:
            ours = {"implementation": implementation(dtype, device)} if name == "ours" else {}
            true, least = changed if name != "base" else alone, floor(work(layer, sets[0], name != "base"), rates)
            yield Candidate({**about, "provider": name, **ours}, partial(_calls, name, layer, sets), true, dtype, least)


def _calls(name: str, layer: Linear, sets) -> list:
    provider = LORA_PROVIDERS[name](layer)
    return [partial(lambda x: provider(x)[:, :, None], x) for x in sets]


def implementation(dtype: torch.dtype, device: torch.device) -> str:
    """What "ours" is on the device: its sources' hash, and the kernel's configuration."""
    if not (arch := kernel_arch(device)):
        return source_hash(f"{OP}.live")
    return f"{lora_hash()} {'-'.join(map(str, lora_config(RANK, 8 * dtype.itemsize, arch)))}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was right, 1 when a provider was not; rows of the others are recorded then."""
    args = _parse(argv)
    start = time.monotonic()
    device, dtype = chosen(args)
    known = {"device": device_name(device), "versions": versions(device)}
    print(f"{known['device']}; {known['versions']}; {dtype}", flush=True)
    rates, path, wrong = measure_rates(device, dtype, args.quick), args.out / f"{OP}.csv", 0
    for model in args.models:
        of_model = []
        for size in linears(MODELS[model]):
            print(f"{MODELS[model].title}, {size.side} x {size.side}, {size.inputs} to {size.outputs}", flush=True)
            every = list(candidates(model, size, args.concepts, args.providers, dtype, device, rates, known))
            found = measure(every, device, rates, args.rounds, time.process_time)
            rows.upsert(path, found.rows)
            tell(found)
            of_model += found.rows
            wrong += len(found.wrong)
        _print(of_model, args.providers, args.concepts, model)
    print(f"{path}: {time.monotonic() - start:.0f} s")
    report.write(args.out)
    return int(wrong > 0)


def _print(found: Sequence[Mapping], providers: Sequence[str], concepts: Sequence[int], model: str) -> None:
    sums = forward_ms(found, model)
    for name in providers:
        cells = [f"N = {n}: {sums[name, n]:8.1f} ms{added(sums, name, n)}" for n in concepts if (name, n) in sums]
        print(f"  {name:20} " + "   ".join(cells), flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    quick = "SD 1.5, N = 1, 8, few samples"
    add_operation_options(parser, quick=quick, models=MODELS, providers=LORA_PROVIDERS)
    args = parser.parse_args(argv)
    args.models = args.models or (["sd15"] if args.quick else list(MODELS))
    args.concepts = args.concepts or (CONCEPTS[::3] if args.quick else CONCEPTS)
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.providers = args.providers or list(LORA_PROVIDERS)
    args.out = results_folder(args)
    return args


if __name__ == "__main__":
    sys.exit(main())
