"""What is learned of a picture: the part that a mask shows, and the same at other sizes and places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_concept_train import ALONE, NAMES, equal, pictures

from weaver.concepts import objective
from weaver.concepts.examples import prepare
from weaver.concepts.images import TrainingSet, load_images
from weaver.concepts.picture_folder import picture_files
from weaver.concepts.train import train_concept
from weaver.concepts.views import with_views
from weaver.embedded import load_pipeline
from weaver.errors import WeaverError

CAPTION = "a <v1> cat"


def left_half(size=(32, 32)):
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_masks_lie_beside_their_pictures(tmp_path):
    for number, image in enumerate(pictures(2)):
        image.save(tmp_path / f"{number}.png")
    left_half().save(tmp_path / "1.mask.png")
    assert [path.name for path in picture_files(tmp_path)] == ["0.png", "1.png"]
    data = load_images(tmp_path, "<v1>", "cat")
    assert data.masks[0] is None and data.masks[1].tobytes() == left_half().tobytes()
    left_half((16, 32)).save(tmp_path / "1.mask.png")
    with pytest.raises(WeaverError, match=r"1\.png: its mask has 16 x 32 pixels, its picture 32 x 32"):
        load_images(tmp_path, "<v1>", "cat")
    Image.new("L", (32, 32)).save(tmp_path / "1.mask.png")
    with pytest.raises(WeaverError, match=r"1\.png: its mask is empty"):
        load_images(tmp_path, "<v1>", "cat")


def test_what_lies_outside_a_mask_is_not_learned(tiny_pipe):
    """Another background outside of it changes nothing but what the autoencoder and the U-Net see of it."""
    (image,) = pictures(1)
    masked = TrainingSet((image,), (CAPTION,), (left_half(),))
    examples = prepare(tiny_pipe, masked, "<v1>")
    assert examples.region.shape == (1, 1, 16, 16)
    assert torch.equal(examples.region[0, 0], (torch.arange(16) < 8).float().expand(16, 16))
    assert prepare(tiny_pipe, TrainingSet((image,), (CAPTION,)), "<v1>").region is None
    mirrored = prepare(tiny_pipe, masked, "<v1>", flip=True).region
    assert torch.equal(mirrored[1], mirrored[0].flip(2))
    whole = train_concept(tiny_pipe, [image], [CAPTION], **NAMES, settings=ALONE)
    full = TrainingSet((image,), (CAPTION,), (Image.new("L", (32, 32), 255),))
    half, same = (train_concept(tiny_pipe, data, **NAMES, settings=ALONE) for data in (masked, full))
    assert not equal(whole, half)
    close = [(whole.deltas[key] - value).abs().max().item() for key, value in same.deltas.items()]
    assert max(close) < 1e-5  # a mask of all is no mask


@pytest.mark.parametrize("mean", ["pictures", "cells"])
def test_the_loss_outside_a_mask_has_no_gradient(mean):
    error = torch.rand(2, 1, 4, 4, requires_grad=True)
    region = torch.zeros(3, 1, 4, 4)
    region[2, :, :2], region[0, :, 3] = 1, 0.5
    loss = getattr(objective, f"_mean_of_{mean}")(error, region, torch.tensor([2, 0]))
    loss.backward()
    first, second = error[0, :, :2].sum().item(), 0.5 * error[1, :, 3].sum().item()
    expected = {"pictures": (first / 8 + second / 2) / 2, "cells": (first + second) / 10}
    assert loss.item() == pytest.approx(expected[mean])
    assert (error.grad[0, 0, 2:] == 0).all() and (error.grad[1, 0, :3] == 0).all()


def test_views_show_the_picture_smaller_or_closer_and_say_so():
    image = Image.new("RGB", (64, 48), (250, 10, 10))
    data = with_views(TrainingSet((image,), (CAPTION,)), "<v1>", (32, 32), 40)
    assert len(data.images) == len(data.captions) == len(data.masks) == 41
    assert data.captions[0] == CAPTION and data.masks[0] is None
    told = set()
    for view, caption, mask in list(zip(data.images, data.captions, data.masks, strict=True))[1:]:
        inside = np.asarray(mask) > 0
        assert view.size == mask.size == (32, 32) and inside.any()
        assert (np.asarray(view)[inside] == (250, 10, 10)).all() and (np.asarray(view)[~inside] == 127).all()
        share = inside.mean()
        words = caption.removeprefix("a ").removesuffix(" <v1> cat") if caption != CAPTION else ""
        told.add(words)
        far, close = ("far away", "very small"), ("zoomed in", "close up")
        assert words in (close if share == 1 else far if share < 0.3 else ("",) if share > 0.42 else (*far, ""))
    assert len(told) == 5
    again = with_views(TrainingSet((image,), (CAPTION,)), "<v1>", (32, 32), 40)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(data.images, again.images, strict=True))


def test_a_mask_goes_with_its_view():
    image = Image.merge("RGB", [left_half()] * 3)
    data = with_views(TrainingSet((image,), (CAPTION,), (left_half(),)), "<v1>", (32, 32), 20)
    for view, mask in zip(data.images, data.masks, strict=True):
        bright, inside = np.asarray(view)[..., 0] > 200, np.asarray(mask) > 200
        assert (bright != inside).mean() < 0.06


def test_views_take_part_in_training(tiny_pipe):
    plain, more = (
        train_concept(tiny_pipe, pictures(1), **NAMES, settings=replace(ALONE, views=views)) for views in (0, 3)
    )
    assert not equal(plain, more) and more.settings["views"] == 3 and more.settings["pictures"] == 1


@pytest.mark.parametrize("size", [(512, 512), (32, 32)])
def test_every_view_shows_something_of_the_concept(size):
    """A closer view would leave out a mask at the edge."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 4, size[1] // 4))
    data = TrainingSet((Image.new("RGB", size, "red"),), ("a boy asks a sks dog",), (mask,))
    for seed in range(20):
        found = with_views(data, "sks", size, 6, seed)
        assert len(found.images) == 7 and all(one.getbbox() for one in found.masks)
        assert all(caption.startswith("a boy asks a ") for caption in found.captions)


def test_a_mask_of_which_no_cell_is_left_is_told():
    mask = Image.new("L", (1024, 1024), 0)
    mask.paste(255, (600, 600, 602, 602))
    both = Image.new("RGB", (64, 64)), Image.new("RGB", mask.size)
    data = TrainingSet(both, ("a <v1> dog",) * 2, (None, mask), names=("a.png", "b.png"))
    for flip in (False, True):
        with pytest.raises(WeaverError, match="b.png: its mask is too small: nothing of it is left in the 16 x 16"):
            prepare(load_pipeline(), data, "<v1>", flip=flip)


def test_a_mask_outside_of_what_is_cut_out_is_told(tiny_pipe):
    mask = Image.new("L", (256, 64), 0)
    mask.paste(255, (0, 0, 60, 64))
    data = TrainingSet((Image.new("RGB", (256, 64), "red"),), ("a <v1> cat",), (mask,))
    message = "nothing of its mask is left .* 32 x 32 pixels: cut the picture"
    with pytest.raises(WeaverError, match=f"^picture 1: {message}"):
        prepare(tiny_pipe, data, "<v1>")
    assert with_views(replace(data, masks=(), names=("rex/a.png",)), "<v1>", (32, 32), 1).names == ("rex/a.png",) * 2
    with pytest.raises(WeaverError, match=f"^rex/a.png: {message}"):
        prepare(tiny_pipe, replace(data, names=("rex/a.png",)), "<v1>")
