"""Masks from picture files of every common kind, size and shape."""

import numpy as np
import pytest
import torch
from PIL import Image

from weaver.masks.compose import MaskError
from weaver.masks.files import load_mask
from weaver.pictures import PictureError

SHAPE = np.zeros((6, 8), dtype=bool)
SHAPE[1:4, 2:7] = True


def grey(levels, mode="L"):
    return Image.fromarray(levels.astype({"L": np.uint8, "I;16": np.uint16}[mode]))


def colour(inside, outside=(0, 0, 0)):
    return Image.fromarray(np.where(SHAPE[..., None], inside, outside).astype(np.uint8))


def palette(colours):
    image = Image.fromarray(SHAPE.astype(np.uint8)).convert("P")
    image.putpalette(sum(colours, []))
    return image


def cut_out():
    image = colour((10, 20, 5), (250, 250, 250)).convert("RGBA")
    image.putalpha(grey(SHAPE * 255))
    return image


KINDS = {
    "grey": grey(SHAPE * 255),
    "dim grey": grey(SHAPE * 130 + 20),
    "zero and one": grey(SHAPE * 1),
    "one bit": Image.fromarray(SHAPE),
    "sixteen bits": grey(SHAPE * 60000, "I;16"),
    "white on black": colour((255, 255, 255)),
    "green on black": colour((0, 200, 0)),
    "opaque alpha": colour((255, 255, 255)).convert("RGBA"),
    "dark cut-out": cut_out(),
    "grey and alpha": Image.merge("LA", [grey(SHAPE * 0 + 128), grey(SHAPE * 255)]),
    "grey palette": palette([[0, 0, 0], [255, 255, 255]]),
    "label map": palette([[0, 0, 0], [64, 0, 0]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind, tmp_path):
    path = tmp_path / "mask.png"
    KINDS[kind].save(path)
    mask = load_mask(path, SHAPE.shape)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), SHAPE)


def two_colours(inside, outside, mode="RGBA"):
    picture = colour(inside, outside)
    return picture.quantize(2) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P"])
def test_an_opaque_picture_is_read_by_what_is_dark_in_it(mode, tmp_path):
    """Alpha that is the same everywhere says nothing. Without any dark pixel nothing tells what is outside."""
    path = tmp_path / "mask.png"
    two_colours((230, 159, 0), (0, 0, 0), mode).save(path)
    assert np.array_equal(load_mask(path, SHAPE.shape).numpy(), SHAPE)
    two_colours((230, 159, 0), (230, 159, 0), mode).save(path)
    assert load_mask(path, SHAPE.shape).all()
    two_colours((230, 159, 0), (255, 255, 255), mode).save(path)
    with pytest.raises(MaskError, match=r"mask\.png: no pixel is transparent or dark, .*: save it with its transp"):
        load_mask(path, SHAPE.shape)
    assert np.array_equal(load_mask(path, SHAPE.shape, label="#e69f00").numpy(), SHAPE)


def test_noise_of_a_jpeg_is_no_colour_of_its_own(tmp_path):
    noise = np.random.default_rng(0).integers(240, 256, (*SHAPE.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "white.png")
    assert load_mask(tmp_path / "white.png", SHAPE.shape).all()


def test_one_label_of_several(tmp_path):
    path = tmp_path / "labels.png"
    levels = np.zeros((6, 8), dtype=np.uint8)
    levels[:, :3], levels[:, 5:] = 1, 2
    image = Image.fromarray(levels).convert("P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    image.save(path)
    assert np.array_equal(load_mask(path, (6, 8), label=2).numpy(), levels == 2)
    assert np.array_equal(load_mask(path, (6, 8)).numpy(), levels > 0)
    with pytest.raises(MaskError, match=r"labels\.png: label 30 is nowhere in it; it holds 0, 1, 2$"):
        load_mask(path, (6, 8), label=30)
    KINDS["white on black"].save(path)
    with pytest.raises(MaskError, match="label 1 needs a palette or grey picture, this one is RGB"):
        load_mask(path, (6, 8), label=1)


def test_exif_rotation(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    grey(np.rot90(SHAPE) * 255).save(path, exif=exif)
    assert np.array_equal(load_mask(path, SHAPE.shape).numpy(), SHAPE)


def test_a_mask_of_the_larger_template_file_is_averaged_over_areas(tmp_path):
    path = tmp_path / "large.png"
    grey(np.kron(SHAPE, np.ones((4, 4))) * 255).save(path)
    assert np.array_equal(load_mask(path, SHAPE.shape, source_size=(24, 32)).numpy(), SHAPE)


def test_a_mask_of_the_template_file_is_cut_as_the_template_is(tmp_path):
    photo = np.zeros((40, 100), dtype=bool)
    photo[10:30, 35:55] = True
    grey(photo * 255).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (20, 20), source_size=(40, 100))
    expected = np.zeros((20, 20), dtype=bool)
    expected[5:15, 3:13] = True  # the middle 40 columns, 30 to 70, at half size; edges at 2.5 and 12.5
    assert (mask.numpy() != expected).sum() <= 10
    assert mask[:, 12].any() and not mask[:, 13].any()


def test_another_shape_is_refused(tmp_path):
    path = tmp_path / "mask.png"
    grey(SHAPE * 255).save(path)
    with pytest.raises(
        MaskError, match=r"mask\.png: the mask is 8x6, expected the template's 64x64, or its shape at another size"
    ):
        load_mask(path, (64, 64))
    with pytest.raises(MaskError, match="the template's 64x64 or 100x90, or its"):
        load_mask(path, (64, 64), source_size=(90, 100))


@pytest.mark.parametrize("times", [1 / 4, 1 / 2, 1, 2.5, 8])
def test_a_mask_of_any_size_stands_where_it_was_drawn(tmp_path, times):
    """A disc, whose edge may be off by half a pixel of the coarser of the two."""

    def disc(height, width):
        y, x = np.mgrid[:height, :width] + 0.5
        return (x / width - 0.6) ** 2 + (y / height - 0.45) ** 2 * 0.64 < 0.09

    path, (height, width) = tmp_path / "mask.png", (48, 60)
    grey(disc(round(height * times), round(width * times)) * 255).save(path)
    wrong = load_mask(path, (height, width)).numpy() != disc(height, width)
    assert wrong.sum() <= 2 * np.pi * 0.3 * width / 2 * max(1, 1 / times)
    assert not wrong[:, :10].any()


def test_empty_and_unreadable_masks(tmp_path):
    path = tmp_path / "mask.png"
    grey(SHAPE * 0).save(path)
    with pytest.raises(MaskError, match="the mask is empty"):
        load_mask(path, SHAPE.shape)
    path.write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"mask\.png: not a readable picture"):
        load_mask(path, SHAPE.shape)
    with pytest.raises(PictureError, match="no such picture file"):
        load_mask(tmp_path / "none.png", SHAPE.shape)


def test_an_empty_mask_says_what_may_have_been_meant(tmp_path):
    path = tmp_path / "mask.png"
    levels = np.zeros(SHAPE.shape, np.uint8)
    levels[:2], levels[4:] = 1, 2
    for picture, told in (
        (Image.fromarray(levels), r"empty, nothing in it is bright; pick one of its levels 0, 1, 2 by label"),
        (colour((20, 30, 40), (0, 0, 0)), r"empty: nothing in it is as bright as half of white"),
        (Image.fromarray(np.dstack([np.full((*SHAPE.shape, 3), 200), 100 * SHAPE]).astype(np.uint8)), "paint it solid"),
    ):
        picture.save(path)
        with pytest.raises(MaskError, match=told):
            load_mask(path, SHAPE.shape)
    Image.fromarray(levels).save(path)
    assert np.array_equal(load_mask(path, SHAPE.shape, label=2).numpy(), levels == 2)
    small = np.zeros((96, 96), np.uint8)
    small[:2, :2] = 255
    Image.fromarray(small).save(path)
    for label in (None, 255):
        with pytest.raises(MaskError, match="empty: what is inside is cut off, or too small at the template's size"):
            load_mask(path, (12, 12), label=label)


def test_what_is_larger_is_averaged_over_areas(tmp_path):
    """Nine of a token's sixteen pixels are inside, none of its neighbours', which a smoother reduction would mix in."""
    fine = np.zeros((64, 64), np.uint8)
    fine[8:11, 20:23] = 255
    Image.fromarray(fine).save(tmp_path / "fine.png")
    expected = np.zeros((16, 16), bool)
    expected[2, 5] = True
    assert np.array_equal(load_mask(tmp_path / "fine.png", (16, 16)).numpy(), expected)
