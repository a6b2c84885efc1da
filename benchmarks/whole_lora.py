"""What LoRAs used whole add to a step: ``python -m benchmarks.whole_lora``

One forward of the U-Net on two rows, as a guided step has it: of the model alone ("plain guided"), with N concepts that
change keys and values ("keys and values"), and with N LoRAs over all Linears of attention and feed-forward, each in its
own region ("whole LoRAs"). Weights are random, of the model's true sizes; regions are disjoint blobs before a
background that is the base model's. Forms take turns. Rows go to ``benchmarks/results/whole_lora.csv`` with
``--record``.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import torch

from benchmarks.cases import WORDS
from benchmarks.machine import choose_device, device_name, versions
from benchmarks.models import MODELS, load
from benchmarks.rows import upsert
from benchmarks.shapes import blob_masks
from benchmarks.timing import interleave, quantiles, timed
from weaver import Concept, ConceptUse, FusionPlan
from weaver.concepts.concept import attn2_hash
from weaver.conditioning import make_time_ids, unet_arguments
from weaver.fusion.attach import installed
from weaver.fusion.state import FusionState
from weaver.layers import transformer_linears
from weaver_kernels import LowRank

RESULTS = Path(__file__).parent / "results" / "whole_lora.csv"
KEY = ("device", "model", "cells", "dtype", "N", "rank", "form")
FIELDS = (*KEY, "p20_ms", "p50_ms", "p80_ms", "of_plain", "samples", "versions", "date")
PLAIN, TEXTS, WHOLE = "plain guided", "keys and values", "whole LoRAs"


def make_lora(pipe, number: int, word: str, rank: int, base_hash: str) -> Concept:
    """Random factors for every Linear of attention and feed-forward, a hundredth of the base's weights in size."""
    rng, found = torch.Generator().manual_seed(number), {}
    for path, linear in transformer_linears(pipe.unet).items():
        outputs, inputs = linear.weight.shape
        down = torch.randn(rank, inputs, generator=rng) / inputs**0.5
        found[path] = LowRank(down.half(), (0.01 * torch.randn(outputs, rank, generator=rng)).half())
    return Concept(
        name=f"lora {number}",
        token="",
        word=word,
        base_hash=base_hash,
        deltas={path: x for path, x in found.items() if ".attn2." in path},
        outside={path: x for path, x in found.items() if ".attn2." not in path},
    )


@torch.no_grad()
def measure(pipe, name: str, counts: list[int], rank: int, cells: int, rounds: int, device: torch.device) -> list[dict]:
    """Rows of every form and N."""
    unet, base_hash = pipe.unet, attn2_hash(pipe.unet)
    z = torch.randn(2, unet.config.in_channels, cells, cells, generator=torch.Generator().manual_seed(0))
    z, timesteps = z.to(device, unet.dtype), torch.tensor([500], device=device)
    concepts = [make_lora(pipe, number, word, rank, base_hash) for number, word in enumerate(WORDS[: max(counts)])]
    ready, pixels = {}, 8 * cells if MODELS[name] else 4 * cells
    for n in counts:
        prompt = ", ".join([*(f"a {word}" for word in WORDS[:n]), "mountain background"])
        for form, parts in ((PLAIN, None), (TEXTS, "cross-attention"), (WHOLE, "whole")):
            uses = [ConceptUse(concept, parts=parts or "whole", prompt=prompt) for concept in concepts[:n]]
            if form == TEXTS:
                uses = [ConceptUse(texts_alone(use.concept), prompt=prompt) for use in uses]
            plan = FusionPlan.build(
                pipe, uses, blob_masks(n, cells)[:n], prompt=prompt, height=pixels, width=pixels, base_hash=base_hash
            )
            pooled = None if plan.pooled is None else plan.pooled[:1].expand(2, -1)
            time_ids = make_time_ids(pipe, plan.pixels, plan.text)
            arguments = unet_arguments(
                plan.text[:1].expand(2, -1, -1), pooled, None if time_ids is None else time_ids.expand(2, -1)
            )
            state = None
            if form != PLAIN:
                state = FusionState(plan, rows=["negative", "fused"])
                state.lead(None, held=False)
                state.settle(unet, 0, timesteps)
            ready[n, form] = timed([Step(unet, z, timesteps, arguments, state)], device)
    samples = interleave(ready, rounds)
    rows = []
    for (n, form), found in samples.items():
        p20, p50, p80 = quantiles(found)
        of_plain = p50 / quantiles(samples[n, PLAIN])[1]
        row = {"device": device_name(device), "model": name, "cells": cells, "rank": rank, "N": n, "form": form}
        row |= {"dtype": str(unet.dtype).removeprefix("torch."), "samples": len(found), "of_plain": f"{of_plain:.3f}"}
        row |= {"p20_ms": f"{1e3 * p20:.2f}", "p50_ms": f"{1e3 * p50:.2f}", "p80_ms": f"{1e3 * p80:.2f}"}
        rows.append(row | {"versions": versions(device), "date": date.today().isoformat()})
    return rows


def texts_alone(concept: Concept) -> Concept:
    """What a LoRA changes of keys and values."""
    deltas = {path: x for path, x in concept.deltas.items() if path.endswith((".to_k", ".to_v"))}
    return Concept(concept.name, concept.token, concept.word, concept.base_hash, deltas=deltas)


class Step:
    """One forward of two rows, with what a state puts onto the U-Net."""

    def __init__(self, unet, z, timesteps, arguments, state: FusionState | None):
        self.unet, self.z, self.timesteps, self.arguments, self.state = unet, z, timesteps, arguments, state

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        if self.state is None:
            return self.unet(self.z, self.timesteps[0], **self.arguments).sample
        with installed(self.unet, self.state):
            return self.unet(self.z, self.timesteps[0], **self.arguments).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="sd21")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cells", type=int, help="side of the latents; the model's own on a GPU, 32 on a CPU")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--record", action="store_true", help=f"keep the figures in {RESULTS.name}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    pipe = load(args.model, device, torch.float16 if device.type == "cuda" else torch.float32)
    own = pipe.unet.config.sample_size
    cells = args.cells or (own if device.type == "cuda" else min(own, 32))
    rows = measure(pipe, args.model, args.concepts, args.rank, cells, args.rounds, device)
    for row in rows:
        print(f"N={row['N']:<2} {row['form']:16} {row['p50_ms']:>10} ms   {row['of_plain']} x plain")
    if args.record:
        upsert(RESULTS, rows, KEY, FIELDS)


if __name__ == "__main__":
    main()
