"""Photos as templates: read as they were meant to be seen, whatever a camera or a program wrote, or refused."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from weaver import Concept, ConceptUse
from weaver.background import laid_over
from weaver.embedded import concept_path, load_pipeline
from weaver.job import MaskSpec
from weaver.layers import InjectionSites
from weaver.masks import compose_masks, load_mask
from weaver.pictures import PictureError, open_rgb
from weaver.pipeline import weave
from weaver.template import load_template, shown_size

CARRIED = Path(__file__).parent / "photos"
MORE = Path(os.environ.get("WEAVER_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))


def deep_png(path: Path, levels: np.ndarray) -> Path:
    """Write [height, width, 3] uint16 as a PNG of 16 bits a channel, which Pillow reads and does not write."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, part in (*parts, (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(data)
    return path


def test_a_photo_stored_on_its_side_is_upright():
    path = CARRIED / "cat.jpg"
    stored = Image.open(path)
    upright = stored.rotate(-90, expand=True)
    assert shown_size(path) == (upright.height, upright.width) == (stored.width, stored.height)
    assert load_template(path, shown_size(path)).tobytes() == upright.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (40, 96), (96, 40)])
@pytest.mark.parametrize("name", ["cat", "coffee"])
def test_a_photo_and_a_mask_drawn_on_it_are_cut_alike(name, size):
    """What the mask holds has the colours that it has in the whole photo."""
    path = CARRIED / f"{name}.jpg"
    picture = np.asarray(load_template(path, size), dtype=float)
    mask = load_mask(path.with_suffix(".mask.png"), size, source_size=shown_size(path)).numpy()
    assert picture.shape == (*size, 3) and mask.shape == size
    whole = load_mask(path.with_suffix(".mask.png"), shown_size(path)).numpy()
    inside = np.asarray(open_rgb(path), dtype=float)[whole].mean(0)
    assert abs(picture[mask].mean(0) - inside).max() < 25


@pytest.mark.parametrize("name", ["cat", "coffee"])
def test_a_photo_is_woven_and_its_background_kept(tiny_pipe, concepts, name):
    path = CARRIED / f"{name}.jpg"
    places = [MaskSpec(file=path.with_suffix(".mask.png"))]
    arguments = {"steps": 2, "guidance": 2.0, "dilation": 0, "feather": 2, "keep_background": True, "size": (32, 48)}
    woven = weave(tiny_pipe, "a photo of a dog", concepts[:1], template=path, places=places, **arguments)
    ground = (woven.masks[-1] == 1).numpy()
    template, image = np.asarray(load_template(path, (32, 48))), np.asarray(woven.image)
    assert 0.1 < ground.mean() < 0.9
    assert (image[ground] == template[ground]).all() and (image[~ground] != template[~ground]).any()


def steps_along(image: Image.Image, ground: np.ndarray) -> float:
    """The mean step in brightness from pixels of the background to neighbours that are none."""
    grey = np.asarray(image, dtype=float).mean(-1)
    found = [np.abs(np.diff(grey, axis=axis))[np.diff(ground, axis=axis)] for axis in (0, 1)]
    return np.concatenate(found).mean()


@pytest.mark.parametrize("name", ["cat", "coffee"])
def test_what_is_drawn_goes_over_into_a_photo_without_an_edge(name):
    """By a model that knows no photos: its drawing, laid over the photo as it is, has a border that tells."""
    path = CARRIED / f"{name}.jpg"
    everywhere = InjectionSites("all", tuple(range(3, 12)), tuple(range(4, 12)), 1.0, 1.0)
    arguments = {"places": [MaskSpec(file=path.with_suffix(".mask.png"))], "template": path, "source_prompt": ""}
    arguments |= {"steps": 12, "guidance": 1.0, "suppression": 0.0, "eta": 0.0, "sites": everywhere, "dilation": 1}
    concepts = [ConceptUse(Concept.load(concept_path("pug")), strength=0.0)]
    kept, drawn = (weave(load_pipeline(), "a dog", concepts, keep_background=k, **arguments) for k in (True, False))
    ground = kept.masks[-1].numpy() == 1
    pasted = laid_over(kept.template, drawn.image, kept.masks, 0)
    before, seam, border = (steps_along(image, ground) for image in (kept.template, kept.image, pasted))
    assert seam - before < 0.6 * (border - before) and border > 1.3 * before


@pytest.mark.skipif(not MORE.is_dir(), reason=f"no further photos in {MORE} (WEAVER_PHOTOS names another folder)")
@pytest.mark.parametrize("name", sorted(path.name for path in MORE.iterdir()) if MORE.is_dir() else ["none"])
def test_masks_of_objects_in_further_photos_fill_the_plane(name):
    folder = MORE / name
    size = shown_size(folder / "photo.jpg")
    dense = torch.stack([load_mask(path, size) for path in sorted(folder.glob("mask*.png"))])
    masks = compose_masks(dense, dilation=0.02, overlap="share", min_area=0.01, fill_holes=True, feather=9)
    torch.testing.assert_close(masks.sum(0), torch.ones(size))
    photo = load_template(folder / "photo.jpg", size)
    laid = np.asarray(laid_over(photo, Image.new("RGB", photo.size), masks, 0))
    ground = (masks[-1] == 1).numpy()
    assert (laid[ground] == np.asarray(photo)[ground]).all() and laid[~ground].mean() < np.asarray(photo)[
        ~ground
    ].mean()


def test_sixteen_bits_a_channel(tmp_path):
    levels = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "grey.tif")
    deep_png(tmp_path / "colour.png", np.stack([levels, levels[::-1], levels * 0], 2))
    for name in ("grey.png", "grey.tif"):
        assert abs(np.asarray(open_rgb(tmp_path / name)) - levels[..., None] / 257).max() <= 0.51
    colour = np.asarray(open_rgb(tmp_path / "colour.png"), dtype=float)
    assert abs(colour - np.stack([levels, levels[::-1], levels * 0], 2) / 257).max() <= 1


def test_colours_are_those_of_the_profile(tmp_path):
    """Of a profile whose red and blue are changed over; one that is broken is left alone, as viewers do."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"____", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"____", b"bXYZ", 1)
    for mode in ("RGB", "RGBA", "P"):
        for name, used, expected in (("same", profile, (200, 30, 40)), ("swapped", swapped, (40, 30, 200))):
            picture = Image.new("RGB", (8, 8), (200, 30, 40))
            picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
            picture.save(tmp_path / f"{name}.png", icc_profile=used)
            assert np.abs(np.subtract(open_rgb(tmp_path / f"{name}.png").getpixel((3, 3)), expected)).max() <= 1, mode
    Image.new("RGB", (8, 8), (200, 30, 40)).save(tmp_path / "broken.png", icc_profile=b"none")
    assert open_rgb(tmp_path / "broken.png").getpixel((3, 3)) == (200, 30, 40)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_become_light(tmp_path, suffix):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"red.{suffix}")
    red, green, blue = open_rgb(tmp_path / f"red.{suffix}").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


def test_a_huge_photo_is_read_without_a_word_or_refused_with_its_limit(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (3000, 1000), "orange").save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    assert load_template(tmp_path / "huge.png", (64, 64)).getpixel((0, 0)) == (255, 165, 0)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(PictureError, match=r"huge\.png: has more than 2 million pixels; save it smaller"):
        load_template(tmp_path / "huge.png", (64, 64))


@pytest.mark.parametrize(("size", "times"), [((1, 1), 64), ((1000, 4), 16), ((7, 300), 9)])
def test_a_photo_of_which_next_to_nothing_is_left_is_refused(tmp_path, size, times):
    Image.new("RGB", size).save(tmp_path / "dot.png")
    with pytest.raises(
        PictureError, match=rf"dot\.png: is {size[0]}x{size[1]}, .* enlarged {times} times; .* 8x8 at least"
    ):
        load_template(tmp_path / "dot.png", (64, 64))
    Image.new("RGB", (8, 900)).save(tmp_path / "strip.png")
    assert load_template(tmp_path / "strip.png", (64, 64)).size == (64, 64)


@pytest.mark.parametrize("kind", ["turned", "16 bits", "transparent", "larger"])
def test_a_picture_is_read_as_its_file_would_be(kind, tmp_path, tiny_pipe, concepts):
    rng = np.random.default_rng(0)
    picture, exif = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)), Image.Exif()
    exif[274] = 6
    if kind == "16 bits":
        picture = Image.fromarray(rng.integers(0, 65536, (48, 32), dtype=np.uint16))
    elif kind == "transparent":
        picture.putalpha(Image.fromarray(rng.integers(0, 256, (32, 48), dtype=np.uint8)))
    elif kind == "larger":
        picture = picture.resize((131, 90))
    path = tmp_path / "photo.png"
    picture.save(path, **({"exif": exif} if kind == "turned" else {}))
    size = (32, 48) if kind in ("larger", "transparent") else (48, 32)
    masks = np.zeros((1, *size))
    masks[:, :20] = 1
    opened = Image.open(path)
    assert shown_size(opened) == shown_size(path)
    options = {"masks": masks, "size": size, "steps": 1, "keep_background": True}
    first, again = (weave(tiny_pipe, "a dog", concepts[:1], template=one, **options) for one in (path, opened))
    assert first.template.tobytes() == again.template.tobytes() == load_template(path, size).tobytes()
    assert first.image.tobytes() == again.image.tobytes()
