"""The cross-attentions of one U-Net forward, with masks as a fusion has them.

Two rows: the fused one, with its concepts, the background and the base, and the negative one with its own prompt. The
masks are blobs at the latents' size, reduced by area to each map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from weaver_kernels import ContextPlan
from weaver_kernels.unets import TEXT, UNETS, Geometry, UNet

__all__ = ["MASKS", "MODELS", "TEXT", "Geometry", "Texts", "UNet", "blob_masks", "make_plan", "make_texts"]

MODELS, SUPPRESSION = UNETS, 0.5
MASKS = ("hard", "soft")
LEAST_WEIGHT = 1e-3  # of a soft mask: less is rounded away, or nothing could be skipped


@dataclass(frozen=True)
class Texts:
    """Random queries of both rows and the contexts' keys and values, the negative prompt's last."""

    q: torch.Tensor  # [2, T, H, D]
    k: torch.Tensor  # [S', L, H, D]
    v: torch.Tensor


def blob_masks(n_concepts: int, side: int, kind: str = "hard") -> torch.Tensor:
    """[N + 1, side, side]: uneven blobs next to each other, the background last; they sum to one.

    `hard` is 0 or 1. `soft` has edges of a sixteenth of the side, and zeros that are zero beyond them.
    """
    y, x = torch.meshgrid(*(torch.linspace(0, 1, side),) * 2, indexing="ij")
    columns = -(-n_concepts // 2) if n_concepts > 3 else n_concepts
    rows = -(-n_concepts // columns)
    taken, masks = torch.zeros(side, side), []
    for i in range(n_concepts):
        cx, cy = (i % columns + 0.5) / columns, (i // columns + 0.5) / rows
        inside = ((x - cx) * columns) ** 2 + ((y - cy) * rows) ** 2 < 0.2 + 0.05 * torch.sin(9 * x + 7 * y + i)
        masks.append(inside * (1 - taken))
        taken = taken + masks[-1]
    stacked = torch.stack([*masks, 1 - taken])
    if kind == "hard":
        return stacked
    reach = max(side // 32, 1)
    for _ in range(2):  # a box twice is a tent, which ends
        padded = F.pad(stacked[None], (reach,) * 4, mode="replicate")
        stacked = F.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]
    stacked = torch.where(stacked < LEAST_WEIGHT, 0, stacked)
    return stacked / stacked.sum(0)


def make_plan(masks: torch.Tensor, geometry: Geometry, device: torch.device) -> ContextPlan:
    """Weights [2, S, T] of `(1 + lambda) [sum_i h_i M_i + h_bg M_bg] - lambda h_base`, and of the negative row."""
    reduced = F.adaptive_avg_pool2d(masks[None], geometry.side)[0].flatten(1)
    fused = torch.cat([(1 + SUPPRESSION) * reduced, torch.full_like(reduced[:1], -SUPPRESSION)])
    weights = torch.zeros(2, len(fused) + 1, geometry.tokens)
    weights[0, :-1], weights[1, -1] = fused, 1
    return ContextPlan(weights.to(device))


def make_texts(
    geometry: Geometry, n_contexts: int, dtype: torch.dtype, device: torch.device, rng: torch.Generator
) -> Texts:
    """Random numbers, drawn where `rng` is and the same for every provider."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, geometry.heads, geometry.dim, generator=rng, device=rng.device).to(device, dtype)

    return Texts(draw(2, geometry.tokens), draw(n_contexts, TEXT), draw(n_contexts, TEXT))
