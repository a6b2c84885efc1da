"""Tables of the rows of `end_to_end.csv`, for `benchmarks.report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.models import MODELS
from benchmarks.process import STAGES
from benchmarks.tables import MISSING, is_gpu, table
from benchmarks.whole import CHANGES, PROVIDERS
from benchmarks.whole_targets import WHOLE_CPU, WHOLE_GPU, index, verdicts
from benchmarks.work import KINDS

__all__ = ["whole"]

STEP_PARTS = ("injected step", "free step", "fusion stage")
WORDS = {True: "met", False: "missed"}
Rows = Sequence[Mapping[str, str]]


def whole(rows: Rows) -> list[str]:
    """The section of the whole: published times, then each device and type with its targets."""
    parts = ["## The whole", _about()]
    measured = [row for row in rows if row["provider"] != "paper"]
    parts += [_published([row for row in rows if row["provider"] == "paper"])]
    groups = dict.fromkeys((row["device"], row["dtype"]) for row in measured)
    for device, dtype in groups:
        parts += _device([row for row in measured if (row["device"], row["dtype"]) == (device, dtype)])
    for gpu, wanted in ((True, WHOLE_GPU), (False, WHOLE_CPU)):
        if not any(is_gpu([row]) == gpu for row in measured):
            title = f"### {'NVIDIA GPU' if gpu else 'CPU'}, the whole"
            parts += [title, table(("target", "measured"), [(name, MISSING) for name in wanted])]
    return parts


def _about() -> str:
    return (
        "Steps of the rivals are drawn in turn in one process; in brackets how many times ours a rival takes, the "
        "median of the rounds' ratios. `one pass` is the paper's algorithm written out, and its result is ours to "
        "rounding: three rows, the template's among them, a loop over contexts with keys and values projected in "
        "every step. `score mix` is one U-Net pass a concept, without features: another result. `guided` is the model "
        "without concepts. Models of random weights draw noise; their steps take what those of any weights do. When "
        "warm, the template is given as a picture, and inversion and reconstruction come from the cache on disk, and "
        "on a CPU features too. On a GPU `ours` is compiled and captured."
    )


def _published(rows: Rows) -> str:
    lines = [(row["device"], f"{float(row['p50_s']):g} s", row["note"]) for row in rows]
    return table(("published by others, not measured here", "whole process", "what is known of it"), lines)


def _device(rows: Rows) -> list[str]:
    device, dtype, on_gpu = rows[0]["device"], rows[0]["dtype"], is_gpu(rows)
    dates, loads = sorted(row["date"] for row in rows), sorted(float(row["load"]) for row in rows if row["load"])
    about = f"{dates[0]} to {dates[-1]} UTC. {'. '.join(sorted({row['versions'] for row in rows}))}."
    about += f" Load of the machine {loads[0]:g} to {loads[-1]:g}." if loads else ""
    clocks = " and ".join(sorted({row["clock"] for row in rows}))
    found = verdicts(rows, WHOLE_GPU if on_gpu else WHOLE_CPU)
    lines = [(name, *((value[0], WORDS[value[1]]) if value else (MISSING, ""))) for name, value in found.items()]
    parts = [f"### {device}, {dtype}, the whole", f"{about} Seconds are {clocks}."]
    parts.append(table(("target", "measured", ""), lines))
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        size = MODELS[model]
        parts.append(f"#### {size.title if size else 'The embedded model at 64'}")
        parts += filter(None, (_steps(of_model), _stages(of_model), _parts(of_model), _variants(of_model)))
    return parts


def _steps(rows: Rows) -> str:
    found = index(rows)
    counts = sorted({key[4] for key in found if key[1] in STEP_PARTS})
    lines = []
    for part in STEP_PARTS:
        for provider in PROVIDERS:
            cells = [found.get((rows[0]["model"], part, provider, "warm", n, 1)) for n in counts]
            if any(cells):
                shown = [f"{_ms(row)} ({float(row['of_ours']):.2f})" if row else MISSING for row in cells]
                lines.append((f"{part}, {provider}", *shown))
    steps = {row["steps"] for row in rows if row["part"] in STEP_PARTS}
    head = f"ms (times ours), {', '.join(sorted(steps, key=int))} steps"
    return table((head, *(f"N = {n}" for n in counts)), lines) if lines else ""


def _stages(rows: Rows) -> str:
    of_stages = [row for row in rows if row["part"] in STAGES]
    providers = dict.fromkeys(row["provider"] for row in of_stages)
    return "\n\n".join(_stages_of([row for row in of_stages if row["provider"] == one], one) for one in providers)


def _stages_of(rows: Rows, provider: str) -> str:
    found = {(row["part"], row["state"]): row for row in rows}
    states = list(dict.fromkeys(state for _, state in found))
    lines = []
    for stage in STAGES:
        cells = [f"{float(row['p50_s']):.3g}" if (row := found.get((stage, state))) else MISSING for state in states]
        cold = found.get((stage, "cold"))
        lines.append((stage, *cells, f"{cold['tflop']}, {float(cold['share']):.1%}" if cold and cold["tflop"] else ""))
    some = rows[0]
    head = f"{provider}: s, N = {some['N']}, {some['steps']} steps each way, {some['pixels']} pixels"
    return table((head, *states, "TFLOP when cold, share of the peak"), lines)


def _parts(rows: Rows) -> str:
    found = {row["part"]: row for row in rows if row["state"] == "part of a step"}
    whole = sum(float(row["p50_s"]) for row in found.values())
    lines = [
        (kind, _ms(row), f"{float(row['p50_s']) / whole:.0%}", f"{float(row['share']):.1%}")
        for kind in KINDS
        if (row := found.get(kind))
    ]
    head = f"of a fused step, N = {next(iter(found.values()))['N']}" if found else ""
    return table((head, "ms", "of the step", "share of the peak"), lines) if found else ""


def _variants(rows: Rows) -> str:
    of_variants = sorted((row for row in rows if row["part"] == "variants"), key=lambda row: int(row["variants"]))
    lines = [
        (f"{row['variants']} variants of one template, N = {row['N']}, {row['steps']} steps", row["p50_s"],
         f"{float(row['p50_s']) / int(row['variants']):.3g}")
        for row in of_variants
    ]  # fmt: skip
    lines += [
        (f"{row['part']}, N = {row['N']}, {row['steps']} steps, with its plan and picture", row["p50_s"], row["p50_s"])
        for row in rows
        if row["part"] in CHANGES
    ]
    return table(("from features in memory", "s", "s each"), lines) if lines else ""


def _ms(row: Mapping[str, str]) -> str:
    return f"{float(row['p50_s']) * 1000:.3g}"
