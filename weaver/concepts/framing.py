"""What part of a photograph a training picture is: SDXL is told its size and the crop's corner.

Sizes are (height, width) in pixels. SDXL was trained with the size that a picture had before it was resized, and with
how far from its upper left corner it was cut afterwards (arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Framing"]


class Framing(NamedTuple):
    """A picture as a photograph, resized and cut.

    Parameters
    ----------
    height, width : of the photograph
    top, left, bottom, right : pixels that were cut away at each side, in the size that it was resized to
    """

    height: int
    width: int
    top: float = 0.0
    left: float = 0.0
    bottom: float = 0.0
    right: float = 0.0

    def fitted(self, now: tuple[int, int], size: tuple[int, int]) -> Framing:
        """As `weaver.pictures.fit` brings a picture of size `now` to `size`: resized to cover it, cut about its centre.

        That the cut comes first there is the same.
        """
        factor = max(wanted / side for side, wanted in zip(now, size, strict=True))
        down, across = ((side * factor - wanted) / 2 for side, wanted in zip(now, size, strict=True))
        top, left, bottom, right = (factor * cut for cut in self[2:])
        return self._replace(top=top + down, left=left + across, bottom=bottom + down, right=right + across)

    def mirrored(self) -> Framing:
        """Of the picture with left and right exchanged."""
        return self._replace(left=self.right, right=self.left)

    def closer(self, size: tuple[int, int], scale: float, corner: tuple[int, int]) -> Framing:
        """Of a picture of `size`, enlarged by `scale`, of which as much is seen with its corner (y, x) <= 0."""
        top, left, bottom, right = (scale * cut for cut in self[2:])
        down, across = ((scale - 1) * side + start for side, start in zip(size, corner, strict=True))
        return self._replace(top=top - corner[0], left=left - corner[1], bottom=bottom + down, right=right + across)

    def smaller(self, size: tuple[int, int], scale: float) -> Framing:
        """Of a canvas of `size` on which a picture of that size stands in its part `scale`.

        It is a whole photograph, as large as it would be around the picture with all its pixels.
        """
        factor = scale * (self.top + size[0] + self.bottom) / self.height
        return Framing(*(round(side / factor) for side in size))

    def time_ids(self, size: tuple[int, int]) -> tuple[int, ...]:
        """SDXL's six numbers for the picture at `size`: the photograph's size, top and left of the cut, the size."""
        return (self.height, self.width, round(self.top), round(self.left), *size)
