"""The process stage by stage, cold and warm from the cache, and the parts of one fused step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.cases import Case
from benchmarks.draws import Marks
from benchmarks.samplers import Ours
from benchmarks.shapes import blob_masks
from benchmarks.timing import quantiles
from benchmarks.work import KINDS, autoencoder_flops, kind_of, unet_flops
from weaver import weave
from weaver.cache import Cache
from weaver.concepts.concept import Concept
from weaver.embedded import concept_path
from weaver.graphs import CUDAGraphs
from weaver.template import template_picture

__all__ = ["STAGES", "parts_of_a_step", "process"]

STAGES = ("template", "inversion", "masks", "fusion", "whole")
SHIPPED = ("tuxedo-cat", "blue-panda")
PROMPT, SEED = "a cat and a panda, mountain background", 1  # a template in which the segmenter finds both


def process(
    case: Case, model: str, template_pipe, steps: int, rounds: int, matrix: float, provider: str = "ours"
) -> list[dict]:
    """`weave` by wall clock: cold, warm, and warm with other masks, and with these and another concept.

    The embedded model draws its shipped concepts and finds their words; the others have N random concepts and are told
    where they stand. The template comes from `template_pipe`, by itself where that is not the case's. On a GPU forwards
    are captured before anything is timed, and those of the case's own model compiled before that, which takes minutes,
    unless `provider` is "ours, captured".
    """
    pipe, side, apart = case.pipe, case.plan.pixels[0], template_pipe is not case.pipe
    on_gpu, compiled = pipe.device.type == "cuda", provider == "ours"
    graphs, of_template = (CUDAGraphs(compiled=own) if on_gpu else None for own in (compiled, compiled and not apart))
    if model == "embedded":
        prompt, given = PROMPT, {}
        concepts = [Concept.load(concept_path(name)) for name in SHIPPED]
        others = [concepts[0], Concept.load(concept_path("emerald-frog"))]
        changed_prompt = PROMPT.replace("panda", "frog")
    else:
        *uses, _ = case.uses
        prompt = changed_prompt = case.plan.prompts[1]
        concepts, others = [use.concept for use in uses], [use.concept for use in reversed(uses)]
        given = {"masks": blob_masks(len(uses), side)}
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(-1 if on_gpu else 0, rounds):
        with TemporaryDirectory() as folder:
            cache = Cache(Path(folder), features=not on_gpu)  # from the disk they take longer than a GPU draws them
            template, seconds = _template(template_pipe, of_template, prompt, (side, side), steps)
            shared = {"template": template, "size": (side, side), "steps": steps, "cache": cache, "seed": SEED}
            shared["graphs"] = False if graphs is None else graphs
            runs = {"cold": {}, "warm": {}}
            moved = {"masks": blob_masks(len(concepts), side).roll(side // 16, -1)}
            runs["warm, changed mask"] = moved
            exchanged = {"concepts": others, "prompt": changed_prompt, "source_prompt": prompt}
            runs["warm, changed concept"] = exchanged | moved
            for state, changed in runs.items():
                arguments = {"prompt": prompt, "concepts": concepts, **given, **shared, **changed}
                start = time.perf_counter()
                result = weave(pipe, **arguments)
                whole = time.perf_counter() - start
                stages = {"template": seconds if state == "cold" else 0.0, **result.seconds}
                stages["whole"] = whole + stages["template"]
                for stage in STAGES if number >= 0 else ():
                    found.setdefault((stage, state), []).append(stages.get(stage, 0.0))
    work = _work(pipe, template_pipe, case.features.sites, steps)
    rows = []
    for (stage, state), samples in found.items():
        spread = dict(zip(("p20_s", "p50_s", "p80_s"), (f"{x:.4g}" for x in quantiles(samples)), strict=True))
        row = {"part": stage, "provider": provider, "state": state, "N": len(concepts), "variants": 1, "steps": steps}
        row |= {"pixels": side, **spread, "samples": len(samples), "clock": "wall"}
        if state == "cold" and stage in work:
            row |= share(work[stage], quantiles(samples)[1], matrix)
        note = f"template by {'SDXL' if apart else 'the same model'}" if stage in ("template", "whole") else ""
        rows.append(row | {"note": note})
    return rows


def _template(pipe, graphs: CUDAGraphs | None, prompt: str, size: tuple[int, int], steps: int):
    start = time.perf_counter()
    image = template_picture(pipe, prompt, size=size, seed=SEED, steps=steps, graphs=graphs)
    return image, time.perf_counter() - start


def _work(pipe, template_pipe, sites, steps: int) -> Mapping[str, float]:
    """Floating-point operations of the stages of a cold run: U-Net rows and the autoencoder's passes."""
    row, (encode, decode) = unet_flops(pipe).total(), autoencoder_flops(pipe)
    own = template_pipe is pipe
    of_template = row if own else unet_flops(template_pipe).total()
    last = decode if own else autoencoder_flops(template_pipe)[1]
    found = {"template": 2 * steps * of_template + last}
    found["inversion"] = 2 * steps * row + encode + 2 * decode  # there and back, and two pictures compared
    found["fusion"] = 2 * steps * row + decode
    return found | {"whole": sum(found.values())}


def share(flops: float, seconds: float, matrix: float) -> dict[str, str]:
    """Columns of the work and of its share of a matrix product's rate."""
    return {
        "tflop": f"{flops / 1e12:.4g}",
        "share": f"{flops / seconds / matrix:.3f}",
        "matrix_tflops": f"{matrix / 1e12:.4g}",
    }


@torch.no_grad()
def parts_of_a_step(case: Case, device: torch.device, rounds: int, matrix: float) -> dict[str, tuple[float, dict]]:
    """Seconds of each kind of module in a fused step of two rows, on average over the run, and its share of the peak.

    Called module by module: what a graph or a compiler would join is apart here. Work is that of a plain guided step.
    """
    draw = Ours(case)
    unet = draw.unet
    draw()
    found = []
    for _ in range(rounds):
        spans, total = [], Marks(device)

        def before(module, args, kind, spans=spans):
            spans.append((kind, Marks(device)))
            spans[-1][1].mark()

        def after(module, args, output, spans=spans):
            spans[-1][1].mark()

        with ExitStack() as hooks:
            for path, module in unet.named_modules():
                if kind := kind_of(path, module):
                    first = module.register_forward_pre_hook(lambda m, a, kind=kind, before=before: before(m, a, kind))
                    hooks.callback(first.remove)
                    hooks.callback(module.register_forward_hook(after).remove)
            total.mark()
            draw()
            total.mark()
        seconds = Counter()
        for kind, marks in spans:
            seconds[kind] += marks.seconds()[0]
        seconds["other"] = total.seconds()[0] - seconds.total()
        found.append({kind: seconds[kind] / case.plan.steps for kind in KINDS})
    flops = unet_flops(case.pipe)
    medians = {kind: quantiles([of_round[kind] for of_round in found])[1] for kind in KINDS}
    return {kind: (seconds, share(2 * flops[kind], seconds, matrix)) for kind, seconds in medians.items()}
