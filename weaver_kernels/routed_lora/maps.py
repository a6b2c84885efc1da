"""An adapter of a convolution on the part of the map where it is alive, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Box", "add_on_map", "boxes"]


class Box(NamedTuple):
    """A part of a map: rows `top` to `bottom`, columns `left` to `right`, the ends not in it."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def around(self, other: Box) -> Box:
        """The least box that both are in."""
        least, most = map(min, zip(self, other, strict=True)), map(max, zip(self, other, strict=True))
        (top, _, left, _), (_, bottom, _, right) = least, most
        return Box(top, bottom, left, right)


def boxes(alive: torch.Tensor, spare: int) -> list[Box]:
    """Boxes around all that is alive on a map [h, w], from top to bottom, and around little else.

    A row joins the box above it where that takes at most `spare` dead cells more, which a box of its own costs.
    """
    width = alive.shape[1]
    first, from_end = (side.to(torch.uint8).argmax(1).tolist() for side in (alive, alive.flip(1)))
    found: list[Box] = []
    for top in alive.any(1).nonzero()[:, 0].tolist():
        box = Box(top, top + 1, first[top], width - from_end[top])
        both = found[-1].around(box) if found else None
        if both is not None and both.area <= found[-1].area + box.area + spare:
            found[-1] = both
        else:
            found.append(box)
    return found


def add_on_map(y, x, down, up, weight, count, settings, stride, padding, dilation) -> None:
    """Add one adapter to y [O, h, w]: x [C, H, W], down [r, C, kh, kw], up [r, O], weight [h * w].

    count : tokens it is alive on
    """
    height, width = y.shape[1:]
    weight = weight.view(height, width)
    parts = [Box(0, height, 0, width)]
    if height * width > settings["dense_tokens"] and count < settings["dense_share"] * height * width:
        parts = boxes(weight != 0, settings["spare"])
    for box in parts:
        read, pads = _input_of(box, x.shape[1:], down.shape[2:], stride, padding, dilation)
        part = x[:, read.top : read.bottom, read.left : read.right].to(down.dtype)
        inner = F.conv2d(F.pad(part, pads) if any(pads) else part, down, None, stride, 0, dilation)  # [r, h, w]
        within = slice(box.top, box.bottom), slice(box.left, box.right)
        inner = (inner * weight[within].to(down.dtype)).flatten(1)
        if y.stride(0) == 1:  # channels last
            change = torch.mm(inner.T, up).view(*weight[within].shape, -1).permute(2, 0, 1)
        else:
            change = torch.mm(up.T, inner).view(-1, *weight[within].shape)
        y[:, *within] += change.to(y.dtype)


def _input_of(box: Box, size, taps, stride: int, padding: int, dilation: int) -> tuple[Box, list[int]]:
    """The part of the input that a box of the output is made of, and the zeros beside it: left, right, top, bottom."""
    read, pads = [], []
    for (first, end), length, n_taps in zip((box[:2], box[2:]), size, taps, strict=True):
        first, end = first * stride - padding, (end - 1) * stride - padding + dilation * (n_taps - 1) + 1
        start = min(max(first, 0), length)
        stop = max(min(end, length), start)
        before = min(max(-first, 0), end - first)
        read += [start, stop]
        pads = [before, end - first - (stop - start) - before, *pads]
    return Box(*read), pads
