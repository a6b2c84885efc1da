"""Render the drawings to sprites: ``python -m weaver.embedded.render_sprites NODE_MODULES`` (``make sprites``).

`NODE_MODULES` holds the npm packages ``@iconify-json/<vendor>``; SVGs are rendered by ``resvg-py``.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from weaver.embedded.drawings import DRAWINGS, LINE_DRAWINGS, SPRITE_DIR
from weaver.masks.shapes import connected_components

SPRITE_SIZE = 160


def icon_svg(icons: dict, name: str) -> str:
    """The SVG document of one icon of an Iconify set."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def drop_shadow(image: Image.Image) -> Image.Image:
    """Cut what lies below the last row that the drawing itself touches: ground shadows are nearly transparent."""
    rows = np.flatnonzero((np.asarray(image)[..., 3] > 100).any(axis=1))
    return image.crop((0, 0, image.width, int(rows[-1]) + 2))


def render(svg: str, size: int = SPRITE_SIZE) -> Image.Image:
    """Render an SVG document into `size` pixels and crop it to the drawing."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = drop_shadow(Image.open(io.BytesIO(bytes(data))).convert("RGBA"))
    return image.crop(image.getbbox())


def fill_fields(lines: Image.Image) -> Image.Image:
    """A line drawing with its lines black, and the fields they enclose each in a white of its own."""
    free = np.pad(np.asarray(lines)[..., 3] <= 127, 1, constant_values=True)  # a frame, so that outside is one field
    fields = connected_components(free)
    areas = np.bincount(fields.ravel())
    areas[0] = 0  # the lines
    whites = np.zeros(len(areas), np.uint8)
    whites[np.argsort(-areas, kind="stable")] = 255 - np.arange(len(areas))
    pixels = np.zeros((*free.shape, 4), np.uint8)
    pixels[..., :3] = np.where(free, whites[fields], 0)[..., None]
    pixels[..., 3] = np.where(fields == fields[0, 0], 0, 255)
    return Image.fromarray(pixels[1:-1, 1:-1].copy(), "RGBA")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("node_modules", type=Path, help="folder with the npm packages @iconify-json/<vendor>")
    args = parser.parse_args(argv)
    for vendor, animals in (DRAWINGS | LINE_DRAWINGS).items():
        icons = json.loads((args.node_modules / "@iconify-json" / vendor / "icons.json").read_text(encoding="utf-8"))
        folder = SPRITE_DIR / vendor
        folder.mkdir(parents=True, exist_ok=True)
        for animal, name in animals.items():
            sprite = render(icon_svg(icons, name))
            sprite = fill_fields(sprite) if vendor in LINE_DRAWINGS else sprite
            sprite.save(folder / f"{animal}.png", optimize=True)
        print(f"{vendor}: {len(animals)} drawings")


if __name__ == "__main__":
    main()
