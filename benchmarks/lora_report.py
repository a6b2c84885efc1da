"""What N whole LoRAs add to the Linears of a forward, and to all of one, by `routed_lora.csv` and `whole_lora.csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.lora_providers import LORA_PROVIDERS
from benchmarks.shapes import MODELS
from benchmarks.sums import settings
from benchmarks.tables import MISSING, table
from weaver_kernels.unets import linears

__all__ = ["added", "forward_ms", "lora", "whole_lora"]

Sums = Mapping[tuple[str, int], float]
SHOWN = (1, 2, 4, 8)


def forward_ms(found: Sequence[Mapping], model: str) -> dict[tuple[str, int], float]:
    """Milliseconds of all Linears of a forward by (provider, N); none where a layer is not measured."""
    layers = {str(layer): layer.count for layer in linears(MODELS[model])}
    times = {(row["provider"], int(row["N"]), row["layer"]): float(row["p50_us"]) for row in found}
    sums = {}
    for provider, n in dict.fromkeys((provider, n) for provider, n, _ in times):
        parts = [times.get((provider, n, layer)) for layer in layers]
        if None not in parts:
            sums[provider, n] = sum(one * count for one, count in zip(parts, layers.values(), strict=True)) / 1000
    return sums


def added(sums: Sums, name: str, n: int) -> str:
    """How much more than the layers alone, as ` (+7 %)`; nothing where these are not measured."""
    base = sums.get(("base", n))
    return f" ({sums[name, n] / base - 1:+.0%})" if base and name != "base" else ""


def lora(found: Sequence[Mapping]) -> list[str]:
    """A section of the report: a table for each device, type and model."""
    parts = [
        "## LoRAs in their regions",
        "The Linears on a U-Net's tokens in one forward of two rows, with N LoRAs of rank 16 on disjoint blobs of one "
        "of them: milliseconds (on a CPU of the process's time), and how much that is more than the Linears alone. "
        "Attention and convolutions, which a step has besides, are not in it.",
    ]
    for setting, of_one in settings(found).items():
        sums, lines = forward_ms(of_one, setting.model), []
        for name in LORA_PROVIDERS:
            cells = [f"{sums[name, n]:.4g}{added(sums, name, n)}" if (name, n) in sums else MISSING for n in SHOWN]
            lines.append((name, *cells))
        head = f"{MODELS[setting.model].title}, {setting.dtype}, {setting.device}"
        parts.append(table((head, *(f"N = {n}" for n in SHOWN)), lines))
    return parts if len(parts) > 2 else [parts[0], MISSING]


def whole_lora(found: Sequence[Mapping]) -> list[str]:
    """The section's end: forwards as a whole, a table for each device, model and size."""
    if not found:
        return []
    parts = [
        "A whole forward of two rows, with N LoRAs over all Linears of attention and feed-forward in the fused one, "
        "beside concepts that change keys and values, the model alone, and a forward for each LoRA that PEFT switches "
        "between: milliseconds (on a CPU of the process's time), and how many times the model alone. On a GPU in a "
        "CUDA graph, not compiled."
    ]
    tables: dict[tuple, dict[tuple[str, int], Mapping]] = {}
    for row in found:
        setting = tuple(row[name] for name in ("model", "cells", "dtype", "device", "rank"))
        tables.setdefault(setting, {})[row["form"], int(row["N"])] = row
    for (model, cells, dtype, device, rank), of_one in tables.items():
        counts = sorted({n for _, n in of_one})
        lines = []
        for form in dict.fromkeys(form for form, _ in of_one):
            shown = [of_one.get((form, n)) for n in counts]
            lines.append((form, *(f"{row['p50_ms']} ({row['of_plain']})" if row else MISSING for row in shown)))
        head = f"{model}, {cells} x {cells} latents, {dtype}, rank {rank}, {device}"
        parts.append(table((head, *(f"N = {n}" for n in counts)), lines))
    return parts
