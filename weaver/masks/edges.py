"""Maps drawn along the edges of a picture: what is coarse follows the outlines of what is seen."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

__all__ = ["follow_edges"]

_ENOUGH = 8  # pixels of a window's radius; a larger one is looked at in a picture made smaller


def follow_edges(maps: torch.Tensor, picture: Image.Image, radius: int, softness: float = 1e-3) -> torch.Tensor:
    """Smooth maps [N, h, w] where a picture is even, and part them where it has edges (guided filter, He et al., 2010).

    In every window a map becomes an affine function of the picture's colours; a pixel gets the mean of all windows that
    it lies in. Large windows find their functions in a smaller picture (the fast guided filter, arXiv 1505.00996).

    Parameters
    ----------
    picture : of the maps' size, RGB
    radius : of the square windows, in pixels, 1 or more
    softness : variance of colours, which are in 0..1, above which they count as an edge

    Returns [N, h, w] float64 on the CPU.
    """
    picture, maps, size = picture.convert("RGB"), maps.cpu().double(), maps.shape[-2:]
    factor = max(1, radius // _ENOUGH)
    small = picture.reduce(factor)
    radius //= factor
    colours = _colours(small)
    maps = F.interpolate(maps[None], size=colours.shape[1:], mode="area")[0] if factor > 1 else maps
    mean, mean_maps = _windows(colours, radius), _windows(maps, radius)
    squares = _windows((colours[:, None] * colours[None]).flatten(0, 1), radius).unflatten(0, (3, 3))
    spread = (squares - mean[:, None] * mean[None]).permute(2, 3, 0, 1) + softness * torch.eye(3, dtype=torch.float64)
    mixed = _windows((colours[:, None] * maps[None]).flatten(0, 1), radius).unflatten(0, (3, len(maps)))
    shared = (mixed - mean[:, None] * mean_maps[None]).permute(2, 3, 0, 1)  # [h, w, 3, N]
    slope = torch.linalg.solve(spread, shared).permute(2, 3, 0, 1)  # [3, N, h, w]
    offset = mean_maps - (slope * mean[:, None]).sum(0)
    found = _windows(torch.cat([slope.flatten(0, 1), offset]), radius)  # [3 * N + N, h, w]
    if factor > 1:
        found = F.interpolate(found[None], size=size, mode="bilinear", align_corners=False)[0]
    slope, offset = found[: 3 * len(maps)].unflatten(0, (3, len(maps))), found[3 * len(maps) :]
    return (slope * _colours(picture)[:, None]).sum(0) + offset


def _colours(picture: Image.Image) -> torch.Tensor:
    """[3, h, w] float64 in 0..1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255


def _windows(values: torch.Tensor, radius: int) -> torch.Tensor:
    """The mean of values [M, h, w] over the window about each pixel, as far as it lies inside."""
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        padding = tuple(side // 2 for side in kernel)
        values = F.avg_pool2d(values[None], kernel, stride=1, padding=padding, count_include_pad=False)[0]
    return values
