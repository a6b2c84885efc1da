"""What holds for every set of masks: two thousand random ones, of any size, under any settings."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from weaver.fusion.weights import token_weights
from weaver.masks.compose import MaskError, compose_masks
from weaver.masks.pyramid import VanishedMaskWarning, mask_pyramid

ROUNDING = 1e-6  # of a sum of some float32 numbers of at most one
SIDES = st.integers(1, 24)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3)


def examples(count: int):
    """The same `count` random examples in every run; a failure is shrunk to its smallest."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=slow)


@st.composite
def mask_sets(draw, least: int = 0, most: int = 4) -> torch.Tensor:
    """Dense masks [N, h, w] bool, none of them empty: boxes with single pixels turned over, that overlap at will."""
    height, width, count = draw(SIDES), draw(SIDES), draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        (top, bottom), (left, right) = np.sort(rng.integers(0, height, 2)), np.sort(rng.integers(0, width, 2))
        mask[top : bottom + 1, left : right + 1] = True
        for _ in range(rng.integers(4)):
            mask[rng.integers(height), rng.integers(width)] ^= True
        mask[top, left] |= not mask.any()
    return torch.from_numpy(masks)


@st.composite
def compositions(draw) -> dict:
    """Settings of `compose_masks`, the defaults among them."""
    return {
        "dilation": draw(st.sampled_from([0, 1, 2, 5, 0.1, 0.5])),
        "overlap": draw(st.sampled_from(["priority", "share"])),
        "min_area": draw(st.sampled_from([0, 2, 0.3])),
        "fill_holes": draw(st.booleans()),
        "feather": draw(st.sampled_from([0, 1, 2, 3, 6])),
    }


def composed(dense: torch.Tensor, **options) -> torch.Tensor:
    """The final masks; sets that leave a concept nothing, which is told, are left out."""
    try:
        return compose_masks(dense, **options)
    except MaskError as error:
        assume("concept" not in str(error))
        raise


def reduced(masks: torch.Tensor, sizes, downsampling: str) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", VanishedMaskWarning)
        return mask_pyramid(masks, sizes, downsampling=downsampling), [str(warning.message) for warning in told]


def assert_partition(masks: torch.Tensor) -> None:
    assert masks.min() >= 0 and masks.max() <= 1
    assert (masks.double().sum(0) - 1).abs().max() <= ROUNDING


@examples(700)
@given(mask_sets(), compositions(), SIZES, st.sampled_from(["area", "nearest"]), st.sampled_from([0, 0.2, 1.5]))
def test_partition_of_unity(dense, options, sizes, downsampling, suppression):
    """In every pixel, in every token of every map, and of the weights that contexts are added with."""
    final = composed(dense, **options)
    assert final.dtype == torch.float32 and final.shape == (len(dense) + 1, *dense.shape[1:])
    assert_partition(final)
    strengths = [1, 0.5, 0, 0.9][: len(dense)]
    for size, small in reduced(final, sizes, downsampling)[0].items():
        assert small.dtype == torch.float32 and small.shape == (len(final), *size)
        assert_partition(small)
        assert (token_weights(small, strengths, suppression).sum(0) - 1).abs().max() <= ROUNDING


@examples(350)
@given(mask_sets(), compositions(), SIZES)
def test_areas_are_kept_and_nothing_vanishes(dense, options, sizes):
    final = composed(dense, **options)
    small, told = reduced(final, sizes, "area")
    for masks in small.values():
        assert (masks.double().mean((1, 2)) - final.double().mean((1, 2))).abs().max() <= ROUNDING
        assert masks[:-1].any((1, 2)).all()
    assert told == []


@examples(400)
@given(mask_sets(most=5), compositions(), SIZES)
def test_the_nearest_pixel_keeps_masks_hard_and_none_vanishes_untold(dense, options, sizes):
    final = composed(dense, **options | {"overlap": "priority", "feather": 0})
    small, told = reduced(final, sizes, "nearest")
    names = [*(f"concept {number + 1}" for number in range(len(dense))), "the background"]
    for (height, width), masks in small.items():
        assert ((masks == 0) | (masks == 1)).all()
        for name, mask, whole in zip(names, masks, final, strict=True):
            said = any(f"maps of {width} x {height} tokens the mask of {name} " in message for message in told)
            assert mask.any() != (said or not whole.any())


@examples(200)
@given(mask_sets(least=1), st.integers(0, 4), st.sampled_from(["priority", "share"]))
def test_dilated_overlap_follows_the_paper_as_completed(dense, dilation, overlap):
    """The rule written out for each pixel, from its distances to the dense masks."""
    final = composed(dense, dilation=dilation, overlap=overlap)
    rows, columns = np.indices(dense.shape[1:])
    pixels = dense.numpy()
    near = np.zeros_like(pixels)
    for mask, grown in zip(pixels, near, strict=True):
        y, x = mask.nonzero()
        grown |= ((rows[..., None] - y) ** 2 + (columns[..., None] - x) ** 2).min(-1) <= dilation**2
    expected = np.zeros(final.shape, np.float32)
    for pixel in zip(rows.flat, columns.flat, strict=True):
        owners = near[:, *pixel].nonzero()[0]
        owners = owners if len(owners) < 2 else pixels[:, *pixel].nonzero()[0]
        owners = owners[:1] if overlap == "priority" else owners
        expected[owners if len(owners) else -1, *pixel] = 1 / max(1, len(owners))
    np.testing.assert_allclose(final, expected, atol=ROUNDING)


@examples(350)
@given(mask_sets(), compositions(), st.integers(1, 9))
def test_a_feather_changes_no_pixel_further_from_an_edge_than_half_of_it(dense, options, feather):
    hard = composed(dense, **options | {"feather": 0})
    soft = composed(dense, **options | {"feather": feather})
    reach = feather // 2
    owners = torch.nn.functional.pad(hard[None], (reach,) * 4, mode="replicate")[0]
    around = owners.unfold(1, 2 * reach + 1, 1).unfold(2, 2 * reach + 1, 1).flatten(3)
    inner = (around == around[..., :1]).all(-1).all(0)
    assert torch.equal(soft[:, inner], hard[:, inner])
