"""Masks from picture files of every common kind, and from boxes."""

import numpy as np
import pytest
import torch
from PIL import Image

from weaver.masks.compose import MaskError
from weaver.masks.files import box_mask, load_mask
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


@pytest.mark.parametrize("size", [(64, 64), (12, 16), (3, 4)], ids=["another shape", "larger", "smaller"])
def test_another_size_is_refused(tmp_path, size):
    path = tmp_path / "mask.png"
    grey(SHAPE * 255).save(path)
    there = f"{size[1]}x{size[0]}"
    with pytest.raises(
        MaskError, match=rf"mask\.png: the mask is 8x6, expected the template's {there}; draw it on the template"
    ):
        load_mask(path, size)
    with pytest.raises(MaskError, match=rf"the template's {there} or 100x90;"):
        load_mask(path, size, source_size=(90, 100))


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


def test_boxes_in_pixels_and_in_parts():
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:7] = True
    assert torch.equal(box_mask((2, 1, 7, 4), (6, 8)), expected)
    assert torch.equal(box_mask((2 / 8, 1 / 6, 7 / 8, 4 / 6), (6, 8)), expected)
    assert box_mask((0, 0, 1, 1), (6, 8)).all()
    assert box_mask([0, 0, 8, 6], (6, 8)).all()


def test_a_box_takes_pixels_whose_centres_it_holds():
    assert box_mask((1.5, 0, 3.5, 6), (6, 8))[0].tolist() == [False, True, True, False, False, False, False, False]


def test_neighbouring_boxes_share_no_pixel():
    left, right = box_mask((0, 0, 0.37, 1), (5, 31)), box_mask((0.37, 0, 1, 1), (5, 31))
    assert not (left & right).any() and (left | right).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 1, 2, 4), "left < right <= 8"),
        ((0, 0, 9, 6), "left < right <= 8"),
        ((-1, 0, 4, 6), "left < right"),
        ((2, 2, 2, 5), "left < right"),
        ((1, 2, 3), "not four numbers"),
        ((0, 0, float("nan"), 1), "not four numbers"),
        ((0.51, 0.51, 0.52, 0.52), "covers no pixel of the 8x6 template"),
    ],
)
def test_impossible_boxes(box, message):
    with pytest.raises(MaskError, match=message):
        box_mask(box, (6, 8))
