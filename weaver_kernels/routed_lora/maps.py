"""An adapter of a convolution on the part of the map where it is alive, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Box", "add_on_map", "boxes", "is_linear"]


class Box(NamedTuple):
    """A part of a map: rows `top` to `bottom`, columns `left` to `right`, the ends not in it."""

    top: int
    bottom: int
    left: int
    right: int


def boxes(alive: torch.Tensor, spare: int) -> list[Box]:
    """Boxes around all that is alive on a map [h, w], from top to bottom, and around little else.

    A row joins the box above it where that takes at most `spare` dead cells more, which a box of its own costs.
    """
    width = alive.shape[1]
    firsts, from_ends = (side.to(torch.uint8).argmax(1).tolist() for side in (alive, alive.flip(1)))
    found: list[Box] = []
    top = bottom = left = right = 0  # of the box that may still grow, empty at first
    for row in alive.any(1).nonzero()[:, 0].tolist():
        first, end = firsts[row], width - from_ends[row]
        least, most = min(left, first), max(right, end)
        if bottom and (row + 1 - top) * (most - least) <= (bottom - top) * (right - left) + end - first + spare:
            bottom, left, right = row + 1, least, most
            continue
        if bottom:
            found.append(Box(top, bottom, left, right))
        top, bottom, left, right = row, row + 1, first, end
    return [*found, Box(top, bottom, left, right)] if bottom else []


def is_linear(y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, stride: int, padding: int) -> bool:
    """Whether a convolution y [B, O, h, w] of x [B, C, H, W] is a Linear on tokens that lie one after another."""
    if down.ndim != 4 or down.shape[2:] != (1, 1) or stride != 1 or padding:
        return False
    return all(one.is_contiguous(memory_format=torch.channels_last) for one in (y, x))


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
        if down.shape[2:] == (1, 1) and stride == 1 and not any(pads):
            inner = torch.mm(down.flatten(1), part.flatten(1)).view(-1, *part.shape[1:])  # [r, h, w]
        else:
            inner = F.conv2d(F.pad(part, pads) if any(pads) else part, down, None, stride, 0, dilation)
        within = slice(box.top, box.bottom), slice(box.left, box.right)
        inner = (inner * weight[within].to(down.dtype)).flatten(1)
        if y.stride(0) == 1:  # channels last
            change = torch.mm(inner.T, up).view(*weight[within].shape, -1).permute(2, 0, 1)
        else:
            change = torch.mm(up.T, inner).view(-1, *weight[within].shape)
        y[:, *within].add_(change)


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
