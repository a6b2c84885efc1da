"""A template's background that is kept: to the last bit outside of the seam, and while the picture is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from weaver.background import KeptBackground, default_seam, laid_over
from weaver.errors import WeaverError
from weaver.inversion import invert
from weaver.masks import compose_masks
from weaver.pipeline import weave


def noise(size=(32, 32), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size=(32, 32)) -> torch.Tensor:
    mask = torch.zeros(1, *size)
    mask[0, 8:24, 10:22] = 1
    return mask


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


@pytest.mark.parametrize(("seam", "reach"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_only_the_seam_is_a_mixture(seam, reach):
    over, under, masks = noise(seed=1), noise(seed=2), compose_masks(box())
    laid = pixels(laid_over(under, over, masks, seam))
    inner, outer = torch.zeros(2, 32, 32, dtype=torch.bool)
    inner[8 + reach : 24 - reach, 10 + reach : 22 - reach] = True
    outer[8 - reach : 24 + reach, 10 - reach : 22 + reach] = True
    assert torch.equal(laid[inner], pixels(over)[inner]) and torch.equal(laid[~outer], pixels(under)[~outer])
    low, high = torch.minimum(pixels(over), pixels(under)), torch.maximum(pixels(over), pixels(under))
    assert ((low <= laid) & (laid <= high)).all()
    assert not (seam > 1 and torch.equal(laid[outer], pixels(over)[outer]))


def test_soft_masks_are_a_seam_of_their_own():
    masks, over, under = compose_masks(box(), feather=6), noise(seed=1), noise(seed=2)
    expected = pixels(under) + (1 - masks[-1])[..., None] * (pixels(over).float() - pixels(under))
    torch.testing.assert_close(pixels(laid_over(under, over, masks, 0)).float(), expected, atol=0.51, rtol=0)


def test_latents_of_the_template_stand_in_cells_of_background_alone():
    latents = torch.randn(4, 4, 16, 16)
    kept = KeptBackground.build(latents, compose_masks(torch.roll(box(), 1, 2)))  # edges lie within cells
    z = torch.randn(2, 4, 16, 16)
    put = kept.put_into(z, 0)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 5:12] = True
    assert torch.equal(put[..., inside], z[..., inside])
    assert torch.equal(put[..., ~inside], latents[2].expand_as(z)[..., ~inside])
    assert torch.equal(kept.put_into(z, 2)[..., ~inside], latents[0].expand_as(z)[..., ~inside])


def test_woven_pictures_keep_every_pixel_outside_of_the_seam(tiny_pipe, concepts):
    template, arguments = noise(), {"masks": box(), "dilation": 0, "steps": 3, "guidance": 3.0, "seed": 4}
    kept = weave(tiny_pipe, "a dog", concepts[:1], template=template, keep_background=True, feather=4, **arguments)
    plain = weave(tiny_pipe, "a dog", concepts[:1], template=template, feather=4, **arguments)
    ground = kept.masks[-1] == 1
    assert torch.equal(pixels(kept.image)[ground], pixels(template)[ground]) and 0.4 < ground.float().mean() < 0.8
    assert not torch.equal(pixels(plain.image)[ground], pixels(template)[ground])
    assert not torch.equal(pixels(kept.image)[12:20, 14:18], pixels(template)[12:20, 14:18])
    assert kept.settings["keep_background"] and not plain.settings["keep_background"]
    assert default_seam((768, 1024)) == 24


def test_a_picture_of_background_alone_is_the_template(tiny_pipe, concepts):
    """Where every cell is kept, what is drawn are the template's own latents."""
    template = noise()
    path = invert(tiny_pipe, template, "a dog", 2).latents
    kept = KeptBackground.build(path, torch.ones(1, 32, 32))
    assert torch.equal(kept.put_into(torch.randn_like(path[:1]), 1), path[:1])


def test_a_background_is_kept_or_another_concepts(tiny_pipe, concepts):
    with pytest.raises(WeaverError, match="keep_background: the background is a concept, which changes it"):
        weave(tiny_pipe, "a dog", concepts[:1], background=concepts[4], masks=box(), steps=2, keep_background=True)
