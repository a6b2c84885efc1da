"""The attentions of Stable Diffusion's U-Nets at their own sizes of picture, and the Linears around them: what is tuned
and measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEXT", "UNETS", "Geometry", "Layer", "UNet", "layers_of", "linears"]

TEXT = 77  # CLIP's length


@dataclass(frozen=True)
class Geometry:
    """Cross-attentions of one size: side of the map, heads, head dimension, how many a forward has of them, and how
    many of these follow each other between one pair of projections."""

    side: int
    heads: int
    dim: int
    count: int
    depth: int = 1

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def width(self) -> int:
        return self.heads * self.dim

    def __str__(self) -> str:
        return f"{self.side}x{self.side} {self.heads}x{self.dim}"


@dataclass(frozen=True)
class Layer:
    """Linears of one size: side of the map, inputs and outputs, and how many a forward has of them."""

    side: int
    inputs: int
    outputs: int
    count: int

    @property
    def tokens(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        return f"{self.side}x{self.side} {self.inputs}-{self.outputs}"


@dataclass(frozen=True)
class UNet:
    """A model at one size of picture: side of its latents and its layers, as its configuration says."""

    title: str
    latents: int
    layers: tuple[Geometry, ...]


UNETS = {
    "sd21": UNet(
        "SD 2.1 at 768",
        96,
        (Geometry(96, 5, 64, 5), Geometry(48, 10, 64, 5), Geometry(24, 20, 64, 5), Geometry(12, 20, 64, 1)),
    ),
    "sdxl": UNet("SDXL at 1024", 128, (Geometry(64, 10, 64, 10, 2), Geometry(32, 20, 64, 60, 10))),
    "sd15": UNet(
        "SD 1.5 at 512",
        64,
        (Geometry(64, 8, 40, 5), Geometry(32, 8, 80, 5), Geometry(16, 8, 160, 5), Geometry(8, 8, 160, 1)),
    ),
}


def layers_of(dim: int) -> tuple[Geometry, ...]:
    """The layers of all models with heads of `dim`, the largest map first."""
    found = [layer for unet in UNETS.values() for layer in unet.layers if layer.dim == dim]
    return tuple(sorted(found, key=lambda layer: -layer.tokens))


def linears(unet: UNet) -> list[Layer]:
    """The Linears on a map's tokens in one forward: queries, keys, values and output of self-attention, queries and
    output of cross-attention, both of the feed-forward, and the projections before and after."""
    found = []
    for one in unet.layers:
        square = 6 * one.count + 2 * one.count // one.depth
        found.append(Layer(one.side, one.width, one.width, square))
        found.append(Layer(one.side, one.width, 8 * one.width, one.count))  # gated: two halves of four times the width
        found.append(Layer(one.side, 4 * one.width, one.width, one.count))
    return found
