"""Tables and pictures of the rows of a folder: ``python -m benchmarks.report [FOLDER]``

Writes `README.md` and an SVG for each device and model beside the CSV files. What has no row is "not yet measured".
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.lora_report import lora, whole_lora
from benchmarks.plots import lines_svg, slug
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import MODELS
from benchmarks.sums import Setting, settings, unet_ms
from benchmarks.tables import MISSING, is_gpu, table
from benchmarks.targets import CPU, GPU, targets
from benchmarks.whole_report import whole

__all__ = ["main", "write"]

SHOWN = (1, 2, 3, 5, 8)


def write(folder: Path) -> None:
    """Write the report of a folder's rows into the folder."""
    by_setting = settings(rows.read(folder / "context_attention.csv"))
    parts = ["# Results", "Made of the CSV files here by `python -m benchmarks.report`; do not edit."]
    devices = list(dict.fromkeys(setting.device for setting in by_setting))
    for device in devices:
        parts += _device(folder, device, {key: found for key, found in by_setting.items() if key.device == device})
    if not any(is_gpu(found) for found in by_setting.values()):
        parts += ["## NVIDIA GPU", table(("target", "measured"), [(name, MISSING) for name in GPU])]
    parts += _host(rows.read(folder / "host_overhead.csv"))
    parts += lora(rows.read(folder / "routed_lora.csv")) + whole_lora(rows.read(folder / "whole_lora.csv"))
    parts += whole(rows.read(folder / "end_to_end.csv"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _device(folder: Path, device: str, by_setting: Mapping[Setting, list]) -> list[str]:
    every = [row for found in by_setting.values() for row in found]
    dates = sorted(row["date"] for row in every)
    parts = [f"## {device}", f"{dates[0]} to {dates[-1]} UTC. {'. '.join(sorted({row['versions'] for row in every}))}."]
    for dtype in dict.fromkeys(setting.dtype for setting in by_setting):
        found = targets(by_setting, GPU if is_gpu(every) else CPU, dtype)
        lines = [(name, value or MISSING) for name, value in found.items()]
        parts.append(table((f"target, {dtype}", "measured"), lines))
    for model in dict.fromkeys(setting.model for setting in by_setting):
        of_model = {key: found for key, found in by_setting.items() if key.model == model}
        parts += [f"### {MODELS[model].title}", *(_unet(key, found) for key, found in of_model.items())]
        name = f"context_attention-{slug(device)}-{model}.svg"
        panels = {f"{key.masks} masks, {key.dtype}": unet_ms(found, model) for key, found in of_model.items()}
        (folder / name).write_text(lines_svg(f"{MODELS[model].title}: cross-attention", panels), encoding="utf-8")
        parts += [f"![milliseconds over N]({name})", _layers(of_model)]
    return parts


def _unet(setting: Setting, found: Sequence[Mapping]) -> str:
    """A provider's milliseconds for a whole forward, and how many times ours that is."""
    sums, floors = unet_ms(found, setting.model), unet_ms(found, setting.model, "floor_us")
    lines = []
    for name in PROVIDERS:
        cells = []
        for n in SHOWN:
            of_ours = f" ({sums[name, n] / sums['ours', n]:.2f})" if {("ours", n), (name, n)} <= sums.keys() else ""
            cells.append(f"{sums[name, n]:.3g}{of_ours}" if (name, n) in sums else MISSING)
        lines.append((name, *cells))
    lines.append(("floor", *(f"{floors['ours', n]:.3g}" if ("ours", n) in floors else MISSING for n in SHOWN)))
    head = f"{setting.masks} masks, {setting.dtype}: ms a forward (times ours)"
    return table((head, *(f"N = {n}" for n in SHOWN)), lines)


def _layers(of_model: Mapping[Setting, Sequence[Mapping]]) -> str:
    """Live contexts of a token, our time, its share of the floor and how many times that the best other takes."""
    lines = []
    for setting, found in of_model.items():
        times: dict[tuple[str, int], dict[str, Mapping]] = {}
        for row in found:
            times.setdefault((row["layer"], int(row["N"])), {})[row["provider"]] = row
        for geometry in MODELS[setting.model].layers:
            cells = [_layer(times.get((str(geometry), n), {})) for n in SHOWN]
            lines.append((f"{geometry.side} x {geometry.side}, {setting.masks}", *cells))
    head = "a layer: live contexts a token, us, share of the floor (the best other, times ours)"
    return table((head, *(f"N = {n}" for n in SHOWN)), lines)


def _layer(by_provider: Mapping[str, Mapping]) -> str:
    ours, others = by_provider.get("ours"), [row for name, row in by_provider.items() if name != "ours"]
    if ours is None:
        return MISSING
    took = float(ours["p50_us"])
    best = f" ({min(float(row['p50_us']) for row in others) / took:.2f})" if others else ""
    return f"{ours['live']}, {took:.4g}, {float(ours['share']):.0%}{best}"


def _host(found: Sequence[Mapping]) -> list[str]:
    lines = [(f"{row['device']}, {row['versions']}", row["provider"], row["p50_us"]) for row in found]
    measured = table(("machine", "host time of one call", "us"), lines) if lines else MISSING
    return ["## Host overhead of a call", "Triton's own launcher not counted; the target is less than 20 us.", measured]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("benchmarks/results"))
    write(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
