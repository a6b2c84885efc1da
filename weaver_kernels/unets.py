"""The cross-attentions of Stable Diffusion's U-Nets at their own sizes of picture: what is tuned and measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEXT", "UNETS", "Geometry", "UNet", "layers_of"]

TEXT = 77  # CLIP's length


@dataclass(frozen=True)
class Geometry:
    """Cross-attentions of one size: side of the map, heads, head dimension, and how many a forward has of them."""

    side: int
    heads: int
    dim: int
    count: int

    @property
    def tokens(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        return f"{self.side}x{self.side} {self.heads}x{self.dim}"


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
    "sdxl": UNet("SDXL at 1024", 128, (Geometry(64, 10, 64, 10), Geometry(32, 20, 64, 60))),
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
