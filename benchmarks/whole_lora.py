"""What LoRAs used whole add to a step: ``python -m benchmarks.whole_lora``

One forward of the U-Net on two rows, as a guided step has it: of the model alone ("plain guided"), with N concepts that
change keys and values ("keys and values"), and with N LoRAs over all Linears of attention and feed-forward, each in its
own region ("whole LoRAs"); and beside them a forward for each of N LoRAs, which PEFT switches between. Weights are
random, of the model's true sizes; regions are disjoint blobs before a background that is the base model's. Forms take
turns, and on a CPU times are the process's, so that other work on the machine falls on none. Rows go to
``benchmarks/results/whole_lora.csv`` with ``--record``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from benchmarks.cases import WORDS
from benchmarks.machine import device_name, versions
from benchmarks.models import MODELS, load
from benchmarks.options import chosen, make_parser
from benchmarks.rows import upsert
from benchmarks.samplers import twin
from benchmarks.shapes import blob_masks
from benchmarks.timing import interleave, quantiles, timed
from weaver import Concept, ConceptUse, FusionPlan
from weaver.concepts.concept import attn2_hash
from weaver.conditioning import make_time_ids, unet_arguments
from weaver.fusion.attach import installed
from weaver.fusion.state import FusionState
from weaver.latents import vae_scale_factor
from weaver.layers import transformer_linears
from weaver_kernels import LowRank

RESULTS = Path(__file__).parent / "results" / "whole_lora.csv"
KEY = ("device", "model", "cells", "dtype", "N", "rank", "form")
FIELDS = (*KEY, "p20_ms", "p50_ms", "p80_ms", "of_plain", "samples", "versions", "date")


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


def keys_and_values(concept: Concept) -> Concept:
    """What a LoRA changes of keys and values."""
    deltas = {path: x for path, x in concept.deltas.items() if path.endswith((".to_k", ".to_v"))}
    return Concept(concept.name, concept.token, concept.word, concept.base_hash, deltas=deltas)


PLAIN, WHOLE, SWITCHED = "plain guided", "whole LoRAs", "PEFT, a pass for each"
FORMS: dict[str, Callable[[Concept], Concept] | None] = {
    PLAIN: None,
    "keys and values": keys_and_values,
    WHOLE: lambda concept: concept,
    SWITCHED: None,
}
"""What of each LoRA a fusion uses; None: there is none."""


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


class Switched:
    """The same by PEFT, as one would write it: a forward of the negative row, and one for each concept with its adapter
    switched on, whose outputs are added where the masks [N, h, w] are."""

    def __init__(self, unet, z, timesteps, arguments, loras: Sequence[Concept], masks: torch.Tensor):
        from peft import LoraConfig

        self.unet, self.z, self.timesteps, self.masks = twin(unet), z, timesteps, masks.to(z)
        self.arguments = tree_map_only(torch.Tensor, lambda x: x[:1], arguments)
        self.names = [f"lora{number}" for number in range(len(loras))]
        for name, lora in zip(self.names, loras, strict=True):
            changes = lora.deltas | lora.outside
            rank = len(next(iter(changes.values())).down)
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(changes)), name)
            for path, (down, up) in changes.items():
                module = self.unet.get_submodule(path)
                module.lora_A[name].weight.data.copy_(down)
                module.lora_B[name].weight.data.copy_(up)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        negative, fused = self.z.split(1)
        self.unet.disable_adapters()
        outputs = [self.unet(negative, self.timesteps[0], **self.arguments).sample]
        self.unet.enable_adapters()
        drawn = torch.zeros_like(fused)
        for name, mask in zip(self.names, self.masks, strict=True):
            self.unet.set_adapter(name)
            drawn += mask * self.unet(fused, self.timesteps[0], **self.arguments).sample
        return torch.cat([*outputs, drawn])


def make_step(
    pipe, loras: Sequence[Concept], form: str, cells: int, z: torch.Tensor, base_hash: str
) -> Step | Switched:
    """A guided step [2, C, cells, cells] with these LoRAs in a form, the concepts in blobs of their own."""
    used = FORMS[form] or FORMS[WHOLE]  # without a fusion too: the plan has texts and masks
    prompt = ", ".join([*(f"a {lora.word}" for lora in loras), "mountain background"])
    uses = [ConceptUse(used(lora), prompt=prompt) for lora in loras]
    masks = blob_masks(len(uses), cells)[: len(uses)]
    pixels = cells * vae_scale_factor(pipe.vae)
    plan = FusionPlan.build(
        pipe,
        uses,
        masks,
        prompt=prompt,
        height=pixels,
        width=pixels,
        base_hash=base_hash,
    )
    pooled = None if plan.pooled is None else plan.pooled[:1].expand(2, -1)
    time_ids = make_time_ids(pipe, plan.pixels, plan.text)
    time_ids = None if time_ids is None else time_ids.expand(2, -1)
    arguments = unet_arguments(plan.text[:1].expand(2, -1, -1), pooled, time_ids)
    timesteps, state = torch.tensor([500], device=z.device), None
    if form == SWITCHED:
        return Switched(pipe.unet, z, timesteps, arguments, loras, masks)
    if FORMS[form]:
        state = FusionState(plan, rows=["negative", "fused"])
        state.lead(None, held=False)
        state.settle(pipe.unet, 0, timesteps)
    return Step(pipe.unet, z, timesteps, arguments, state)


@torch.no_grad()
def measure(pipe, name: str, counts: Sequence[int], rank: int, cells: int, rounds: int) -> list[dict]:
    """Rows of every form and N; `name` is the model's in them."""
    unet, device, base_hash = pipe.unet, pipe.unet.device, attn2_hash(pipe.unet)
    z = torch.randn(2, unet.config.in_channels, cells, cells, generator=torch.Generator().manual_seed(0))
    z = z.to(device, unet.dtype)
    loras = [make_lora(pipe, number, word, rank, base_hash) for number, word in enumerate(WORDS[: max(counts)])]
    steps = {(n, form): make_step(pipe, loras[:n], form, cells, z, base_hash) for n in counts for form in FORMS}
    samples = interleave({key: timed([step], device, time.process_time) for key, step in steps.items()}, rounds)
    rows = []
    for (n, form), found in samples.items():
        p20, p50, p80 = (1e3 * seconds for seconds in quantiles(found))
        rows.append(
            {
                "device": device_name(device),
                "model": name,
                "cells": cells,
                "dtype": str(unet.dtype).removeprefix("torch."),
                "N": n,
                "rank": rank,
                "form": form,
                "p20_ms": f"{p20:.2f}",
                "p50_ms": f"{p50:.2f}",
                "p80_ms": f"{p80:.2f}",
                "of_plain": f"{p50 / (1e3 * quantiles(samples[n, PLAIN])[1]):.3f}",
                "samples": len(found),
                "versions": versions(device),
                "date": date.today().isoformat(),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="sd21")
    parser.add_argument("--cells", type=int, help="side of the latents; the model's own on a GPU, 32 on a CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--record", action="store_true", help=f"keep the figures in {RESULTS.name}")
    parser.set_defaults(concepts=[1, 2, 4, 8], rounds=10)
    args = parser.parse_args(argv)
    device, dtype = chosen(args)
    pipe = load(args.model, device, dtype)
    own = pipe.unet.config.sample_size
    cells = args.cells or (own if device.type == "cuda" else min(own, 32))
    rows = measure(pipe, args.model, args.concepts, args.rank, cells, args.rounds)
    for row in rows:
        print(f"N={row['N']:<2} {row['form']:21} {row['p50_ms']:>10} ms   {row['of_plain']} x plain")
    if args.record:
        upsert(RESULTS, rows, KEY, FIELDS)


if __name__ == "__main__":
    main()
