"""`context_attention` on the CPU against its rivals, over the cross-attention of one U-Net forward.

``python benchmarks/context_attention_cpu.py [--model sd21] [--concepts 1 3 8] [--threads 2]``

Every provider computes the fused row and the negative row of each layer, on the same random numbers and blob masks,
reduced by area from the latents' size as a fusion does. Providers take turns, so that other work on the machine falls
on all; the median over the rounds counts. Results are checked against float64 before anything is timed, and only
ratios are told: seconds are the machine's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F

from weaver_kernels import ContextPlan, context_attention, context_attention_reference

TEXT, SUPPRESSION = 77, 0.5
# Side of the latents; (side, heads, head dimension, how many cross-attentions) of each map, as the models' configs say.
MODELS = {
    "sd15": (64, ((64, 8, 40, 5), (32, 8, 80, 5), (16, 8, 160, 5), (8, 8, 160, 1))),
    "sd21": (96, ((96, 5, 64, 5), (48, 10, 64, 5), (24, 20, 64, 5), (12, 20, 64, 1))),
    "sdxl": (128, ((64, 10, 64, 10), (32, 20, 64, 60))),
}


@dataclass(frozen=True)
class Layer:
    """One cross-attention: its inputs and what the rivals need made beforehand, outside of the time."""

    q: torch.Tensor  # [2, T, H, D]
    keys: torch.Tensor  # [S', L, H, D], the negative prompt last
    values: torch.Tensor
    plan: ContextPlan
    segments: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # of each fused context its live tokens and their weights

    @property
    def weights(self) -> torch.Tensor:
        """[S, T], the fused row's."""
        return self.plan.weights[0, :-1]


def blob_masks(n_concepts: int, side: int) -> torch.Tensor:
    """[N + 1, side, side]: round regions next to each other, and the background last; they sum to one."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, side),) * 2, indexing="ij")
    columns = -(-n_concepts // 2) if n_concepts > 3 else n_concepts
    rows = -(-n_concepts // columns)
    taken, masks = torch.zeros(side, side), []
    for i in range(n_concepts):
        cx, cy = (i % columns + 0.5) / columns, (i // columns + 0.5) / rows
        inside = ((x - cx) * columns) ** 2 + ((y - cy) * rows) ** 2 < 0.2 + 0.05 * torch.sin(9 * x + 7 * y + i)
        masks.append(inside * (1 - taken))
        taken = taken + masks[-1]
    return torch.stack([*masks, 1 - taken])


def make_layer(masks: torch.Tensor, side: int, heads: int, dim: int, rng: torch.Generator) -> Layer:
    """Contexts: the concepts, the background and the base; the second row attends to the negative prompt."""
    reduced = F.adaptive_avg_pool2d(masks[None], side)[0].flatten(1)
    fused = torch.cat([(1 + SUPPRESSION) * reduced, torch.full_like(reduced[:1], -SUPPRESSION)])
    weights = torch.zeros(2, len(fused) + 1, side * side)
    weights[0, :-1], weights[1, -1] = fused, 1
    q = torch.randn(2, side * side, heads, dim, generator=rng)
    keys, values = (torch.randn(len(fused) + 1, TEXT, heads, dim, generator=rng) for _ in range(2))
    live = [w.nonzero()[:, 0] for w in fused]
    segments = tuple((tokens, w[tokens][:, None, None]) for tokens, w in zip(live, fused, strict=True))
    return Layer(q, keys, values, ContextPlan(weights), segments)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of [n, H, D] queries to [L, H, D] keys."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def ours(layer: Layer) -> torch.Tensor:
    plan = layer.plan
    return context_attention(layer.q, layer.keys, layer.values, plan.weights, plan.context_index, plan=plan)


def eager(layer: Layer) -> torch.Tensor:
    """A loop over contexts: an attention, a product with the mask, a sum."""
    fused = torch.zeros_like(layer.q[0])
    for s, w in enumerate(layer.weights):
        fused = fused + w[:, None, None] * attend(layer.q[0], layer.keys[s], layer.values[s])
    return torch.stack([fused, attend(layer.q[1], layer.keys[-1], layer.values[-1])])


def batched(layer: Layer) -> torch.Tensor:
    """All contexts in one attention, then one sum over them."""
    q = layer.q[0].transpose(0, 1).expand(len(layer.weights), -1, -1, -1)
    parts = F.scaled_dot_product_attention(q, layer.keys[:-1].transpose(1, 2), layer.values[:-1].transpose(1, 2))
    fused = torch.einsum("st,shtd->thd", layer.weights, parts)
    return torch.stack([fused, attend(layer.q[1], layer.keys[-1], layer.values[-1])])


def sorted_varlen(layer: Layer) -> torch.Tensor:
    """Tokens gathered by context, one attention a segment, added back: packed attention as far as a CPU has it."""
    fused = torch.zeros_like(layer.q[0])
    for s, (tokens, w) in enumerate(layer.segments):
        fused.index_add_(0, tokens, w * attend(layer.q[0][tokens], layer.keys[s], layer.values[s]))
    return torch.stack([fused, attend(layer.q[1], layer.keys[-1], layer.values[-1])])


PROVIDERS: dict[str, Callable[[Layer], torch.Tensor]] = {
    "ours": ours,
    "eager": eager,
    "sdpa + einsum": batched,
    "sorted varlen": sorted_varlen,
}


def check(layer: Layer) -> None:
    """Every provider is right, within the rounding of float32; else nothing is timed."""
    doubles = (x.double() for x in (layer.q, layer.keys, layer.values, layer.plan.weights))
    true = context_attention_reference(*doubles)
    for name, provider in PROVIDERS.items():
        error = float((provider(layer) - true).abs().max())
        if not error < 1e-5:
            raise SystemExit(f"{name} is wrong by {error:.1e}: nothing is measured")


def measure(model: str, n_concepts: int, rounds: int) -> dict[str, float]:
    """Median seconds of one U-Net forward's cross-attentions, by provider."""
    side, maps = MODELS[model]
    masks, rng = blob_masks(n_concepts, side), torch.Generator().manual_seed(0)
    found = dict.fromkeys(PROVIDERS, 0.0)
    for map_side, heads, dim, count in maps:
        layer = make_layer(masks, map_side, heads, dim, rng)
        check(layer)
        times = {name: [] for name in PROVIDERS}
        for _ in range(rounds):
            for name, provider in PROVIDERS.items():
                start = time.perf_counter()
                provider(layer)
                times[name].append(time.perf_counter() - start)
        live = float((layer.weights != 0).sum(0).float().mean())
        print(f"  {map_side} x {map_side}: {live:.2f} live contexts a token of {len(layer.weights)}", flush=True)
        for name in PROVIDERS:
            found[name] += count * median(times[name])
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd21")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first = None
    for n_concepts in args.concepts:
        print(f"{args.model}, N = {n_concepts}, float32, {args.threads} threads, torch {torch.__version__}")
        found = measure(args.model, n_concepts, args.rounds)
        first = first or found["ours"]
        ratios = "  ".join(f"{name} {found[name] / found['ours']:.2f}" for name in PROVIDERS)
        print(f"  time over ours: {ratios}  |  ours over ours at N = {args.concepts[0]}: {found['ours'] / first:.2f}")


if __name__ == "__main__":
    main()
