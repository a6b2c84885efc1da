"""The drawings of the embedded world: which vendor draws which animal, and where the rendered sprites lie.

Sprites are 160-pixel RGBA pictures cropped to the drawing, one file each in ``sprites/<vendor>/<animal>.png``. Line
drawings are black, and every field that their lines enclose has a white of its own: 255, 254, and so on.
They ship with the package, so only :mod:`weaver.embedded.render_sprites` (``make sprites``) needs npm.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

__all__ = [
    "ANIMALS",
    "DRAWINGS",
    "HELD_OUT_VENDORS",
    "HELPER_VENDORS",
    "LINE_DRAWINGS",
    "SPRITE_DIR",
    "TRAINING_VENDORS",
    "load_sprite",
    "vendors_of",
]

ANIMALS = ("dog", "cat", "fox", "panda", "frog", "pig")

_PLAIN = {"dog": "dog-face", "cat": "cat-face", "fox": "fox", "panda": "panda", "frog": "frog", "pig": "pig-face"}

# Icon names inside the Iconify set of the same name; fxemoji draws no fox from the front.
DRAWINGS: dict[str, dict[str, str]] = {
    "noto": _PLAIN,
    "noto-v1": _PLAIN,
    "twemoji": _PLAIN,
    "fxemoji": {"dog": "dog", "cat": "cat", "panda": "pandaface", "frog": "frog", "pig": "pig"},
    "streamline-emojis": {
        "dog": "dog-face",
        "cat": "cat-face",
        "fox": "fox-face-2",
        "panda": "panda-face",
        "frog": "frog-face",
        "pig": "pig-face",
    },
    "emojione": _PLAIN,
    "fluent-emoji-flat": _PLAIN,
}
# Drawn in one line, to be painted (`training/vary.py`): more shapes for the segmenter to know an animal by.
LINE_DRAWINGS: dict[str, dict[str, str]] = {
    "boxicons": {"dog": "dog", "cat": "cat"},
    "griddy-icons": {"dog": "dog", "cat": "cat", "panda": "panda", "pig": "pig"},
    "hugeicons": {"panda": "panda"},
    "icon-park-outline": {"dog": "dog", "frog": "frog", "panda": "panda", "pig": "pig"},
    "lucide": {"dog": "dog", "cat": "cat", "panda": "panda"},
    "lucide-lab": {"frog": "frog-face", "pig": "pig-head"},
    "mdi": {"dog": "dog", "cat": "cat", "panda": "panda", "pig": "pig"},
    "ph": {"dog": "dog", "cat": "cat"},
    "streamline-flex": {"dog": "dog-1", "cat": "cat-2"},
    "tabler": {"dog": "dog", "cat": "cat"},
}
TRAINING_VENDORS = ("noto", "noto-v1", "twemoji")  # what the model itself learns
HELPER_VENDORS = (*TRAINING_VENDORS, "fxemoji", "streamline-emojis")  # what segmenter and classifier learn as well
HELD_OUT_VENDORS = ("emojione", "fluent-emoji-flat")

SPRITE_DIR = Path(__file__).parent / "sprites"


def vendors_of(animal: str, vendors: tuple[str, ...] = TRAINING_VENDORS) -> tuple[str, ...]:
    """The vendors among `vendors` that draw `animal`."""
    known = DRAWINGS | LINE_DRAWINGS
    return tuple(vendor for vendor in vendors if animal in known[vendor])


@cache
def load_sprite(vendor: str, animal: str) -> Image.Image:
    """The drawing of `animal` by `vendor` as an RGBA picture cropped to its outline; do not modify it in place."""
    path = SPRITE_DIR / vendor / f"{animal}.png"
    if not path.exists():
        raise FileNotFoundError(f"no sprite at {path}: run `make sprites` to render the drawings again")
    with Image.open(path) as image:
        return image.convert("RGBA")
