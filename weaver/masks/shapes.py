"""Masks as sets of pixels: grown, cleared of specks, filled, parted, and their edges softened."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["connected_components", "dilate", "drop_specks", "fill_holes", "soften"]


def dilate(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow boolean masks [N, h, w] by a disc of `radius` pixels."""
    if radius == 0 or not len(masks):
        return masks
    height, width = masks.shape[1:]
    radius = min(radius, height + width)  # which reaches all of it already
    # counts[..., i] is how many cells of the row lie before i: a run holds one where its two ends differ.
    counts = F.pad(F.pad(masks.int(), (radius,) * 4).cumsum(-1, dtype=torch.int32), (1, 0))
    grown = torch.zeros_like(masks)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)  # of this row of the disc
        rows = counts[:, radius + dy : radius + dy + height]
        first, last = radius - half, radius + half + 1
        grown |= rows[..., last : last + width] != rows[..., first : first + width]
    return grown


def drop_specks(mask: torch.Tensor, least: float) -> torch.Tensor:
    """Mask [h, w] bool without those of its parts that have fewer than `least` pixels."""
    parts = connected_components(mask)
    areas = np.bincount(parts.ravel())[1:]
    return torch.from_numpy(np.isin(parts, 1 + np.flatnonzero(areas >= least)))


def fill_holes(mask: torch.Tensor) -> torch.Tensor:
    """Mask [h, w] bool with all that it encloses; what touches the border is not enclosed."""
    outside = connected_components(np.pad(~np.asarray(mask, dtype=bool), 1, constant_values=True))[1:-1, 1:-1]
    return torch.from_numpy(outside != 1)  # part 1 holds the corner, and so the whole surroundings


def soften(masks: torch.Tensor, width: int) -> torch.Tensor:
    """Masks [M, h, w] whose straight edges rise from 0 to 1 over `width` pixels, half of them on either side.

    Averaging over a Hann window (a raised cosine) is linear, so masks that sum to one do so afterwards; at the border
    the window is what lies inside. Pixels more than ``width // 2`` away from any edge keep their values.

    Returns [M, h, w] float32 on the CPU.
    """
    rows, columns = (_hann_matrix(side, width) for side in masks.shape[1:])
    return (rows @ masks.cpu().double() @ columns.T).clamp(0, 1).float()


def connected_components(mask: torch.Tensor | np.ndarray) -> np.ndarray:
    """Number the 4-connected parts of mask [h, w] from 1, in reading order; 0 is outside. Returns [h, w] int64."""
    mask = np.asarray(mask, dtype=bool)
    parent = [0]
    labels = np.zeros(mask.shape, dtype=np.int64)

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
        runs = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            touching = {root(label) for first, last, label in above if first < stop and start < last}
            label = min(touching, default=len(parent))
            if not touching:
                parent.append(label)
            for other in touching:
                parent[other] = label
            labels[y, start:stop] = label
            runs.append((start, stop, label))
        above = runs
    roots = np.array([root(label) for label in range(len(parent))])
    compact = np.searchsorted(np.unique(roots), roots)  # 0 is a root of its own, so it stays 0
    return compact[labels]


def _hann_matrix(size: int, width: int) -> torch.Tensor:
    """The weight of every source cell in every cell, [size, size] float64; rows sum to one."""
    away = torch.arange(size, dtype=torch.float64)
    away = (away[:, None] - away[None]).abs()
    window = torch.where(2 * away < width + 1, 1 + torch.cos(2 * math.pi * away / (width + 1)), 0)
    return window / window.sum(1, keepdim=True)
