"""What fusion takes beside its rivals: steps, numbers of concepts, variants, and what a change costs. As rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

from benchmarks.cases import Case, make_concept, with_concepts
from benchmarks.draws import CLOCKS, Marks, agree, in_turn, kinds_of, of_ours, rounding, seconds_of
from benchmarks.eager import OnePass, ScoreMix
from benchmarks.samplers import Captured, Guided, Ours
from benchmarks.timing import quantiles
from weaver.fusion import ConceptUse, stack_plans
from weaver.graphs import CUDAGraphs
from weaver.latents import decode_latents, tensor_to_images

__all__ = ["CHANGES", "AtBest", "FIELDS", "KEY", "PROVIDERS", "changes", "steps", "timed_row", "variants"]

KEY = ("device", "model", "dtype", "part", "provider", "state", "N", "variants", "steps")
FIELDS = (
    *KEY,
    "pixels",  # side of the picture
    "contexts",  # of the fused row: base, concepts, background
    "suppression",
    "p20_s",
    "p50_s",
    "p80_s",
    "samples",
    "clock",
    "of_ours",  # median of the rounds' ratios to ours
    "error",  # distance to what it must equal
    "made",  # compilations and captures meanwhile
    "tflop",  # of the U-Net passes and the autoencoder, as the library would compute them
    "share",  # of the rate of a matrix product, measured in the same run
    "matrix_tflops",
    "load",  # of the machine, when measuring began
    "versions",
    "note",
    "date",
)
PROVIDERS = (
    "ours",
    "ours, captured",
    "one pass, eager",
    "one pass, captured",
    "score mix",
    "guided",
    "guided, captured",
    "guided, compiled and captured",
)
CHANGES = ("changed mask", "changed concept")


class AtBest:
    """Ours and the model without concepts as fast as they are on a device: compiled and captured on a GPU; as they are
    on a CPU, where neither helps. Made once, for any number of concepts.
    """

    def __init__(self, case: Case, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.ours = Ours(case, graphs=self.graphs())
        self._plain = Captured(Guided(case, compiled=True)) if self.on_gpu else None
        self._case, self._error = case, None

    def graphs(self) -> CUDAGraphs | bool:
        return CUDAGraphs(compiled=True) if self.on_gpu else False

    def plain(self) -> tuple[Captured, float]:
        """Guided sampling, and its distance to the same as it is written; `Refused` where it is too large."""
        if self._error is None:
            written = Guided(self._case)
            self._error = agree(self._plain(None), written(None), rounding(written, self._case.z.dtype))
        return self._plain, self._error


def steps(case: Case, best: AtBest, device: torch.device, rounds: int) -> list[dict]:
    """All providers in turn, from the same noise; what must equal another result is checked before."""
    draws, errors = {"ours": partial(best.ours, plan=case.plan), "one pass, eager": OnePass(case)}, {}
    allowed = rounding(draws["one pass, eager"], case.z.dtype)
    draws["score mix"], draws["guided"] = ScoreMix(case), Guided(case)
    expected = draws["one pass, eager"](None)
    errors["ours"] = agree(draws["ours"](None), expected, allowed)
    if best.on_gpu:
        draws["ours, captured"] = Ours(case, graphs=True)
        draws["one pass, captured"] = Captured(OnePass(case))
        draws["guided, captured"] = Captured(draws["guided"])
        for name in ("ours, captured", "one pass, captured", "guided, captured"):
            same = draws["guided"](None) if name.startswith("guided") else expected
            errors[name] = agree(draws[name](None), same, allowed)
        name = "guided, compiled and captured"
        draws[name], errors[name] = best.plain()
    for draw in draws.values():
        draw(None)
    with counted() as made:
        times = in_turn(draws, device, rounds)
    found = []
    for kind, which in kinds_of(case.features.sites, case.plan.steps).items():
        seconds = {name: seconds_of(of_one, kind, which) for name, of_one in times.items()}
        for name, samples in seconds.items():
            row = timed_row(case, kind, name, samples, device)
            row |= {"of_ours": f"{of_ours(samples, seconds['ours']):.3f}", "made": made[0]}
            found.append(row | ({"error": f"{errors[name]:.1e}"} if name in errors else {}))
    return found


def variants(case: Case, best: AtBest, counts: Sequence[int], device: torch.device, rounds: int) -> list[dict]:
    """So many pictures of other concepts on one template, from its features in memory to latents."""
    plans = [with_concepts(case, case.n_concepts, seed=seed).plan for seed in range(max(counts))]
    draws = {str(n): Ours(case, stack_plans(plans[:n]), graphs=best.graphs()) for n in counts if n > 1}
    draws["1"] = partial(best.ours, plan=plans[0])
    for draw in draws.values():
        draw(None)
    found = []
    for name, of_one in in_turn(draws, device, rounds).items():
        samples = [sum(of_round) for of_round in of_one]
        found.append(timed_row(case, "variants", "ours", samples, device) | {"variants": int(name)})
    return found


def changes(case: Case, best: AtBest, device: torch.device, rounds: int) -> list[dict]:
    """Another mask or another concept on the template's features in memory: plan, fusion and picture."""
    moved = {"masks": case.masks.roll(1, -1)}
    base_hash = case.uses[0].concept.base_hash
    other = ConceptUse(make_concept(case.pipe, 0, case.uses[0].concept.word, seed=99, base_hash=base_hash))
    found = []
    draw_changed(best.ours, case, {})
    for part, changed in zip(CHANGES, (moved, {"uses": (other, *case.uses[1:])}), strict=True):
        samples = []
        with counted() as made:
            for _ in range(rounds):
                marks = Marks(device)
                marks.mark()
                draw_changed(best.ours, case, changed)
                marks.mark()
                samples += marks.seconds()
        found.append(timed_row(case, part, "ours", samples, device) | {"made": made[0]})
    return found


def draw_changed(draw: Ours, case: Case, changed: dict):
    """The picture of a case with other `uses` or `masks`."""
    latents = draw(plan=case.make_plan(**changed))
    return tensor_to_images(decode_latents(case.pipe.vae, latents))[0]


def timed_row(case: Case, part: str, provider: str, samples: Sequence[float], device: torch.device) -> dict:
    """A row without the columns of its run."""
    factor = case.plan.pixels[0] // case.plan.size[0]
    row = {"part": part, "provider": provider, "state": "warm", "N": case.n_concepts, "variants": 1}
    row |= {"steps": case.plan.steps, "pixels": case.plan.size[0] * factor, "contexts": 1 + len(case.uses)}
    row |= dict(zip(("p20_s", "p50_s", "p80_s"), (f"{x:.4g}" for x in quantiles(samples)), strict=True))
    return row | {"samples": len(samples), "clock": CLOCKS[device.type]}


@contextmanager
def counted() -> Iterator[list[int]]:
    """In its one number, how often something is compiled or captured within."""
    from torch._dynamo.utils import counters

    before, captures = counters["stats"]["unique_graphs"], []
    made = [0]
    begin = torch.cuda.CUDAGraph.capture_begin

    def capture_begin(self, *args, **kwargs):
        captures.append(self)
        return begin(self, *args, **kwargs)

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", capture_begin):
        yield made
    made[0] = len(captures) + counters["stats"]["unique_graphs"] - before
