"""Composition of masks: who owns which pixel, and that every token's weights sum to one."""

import numpy as np
import pytest
import torch
from devices import WithoutFloat64

from weaver.masks.compose import MaskError, compose_masks
from weaver.masks.pyramid import VanishedMaskWarning, check_partition, mask_pyramid
from weaver.masks.shapes import dilate

SIZES = [(64, 64), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1), (7, 5), (13, 64), (24, 18), (100, 3)]


def picture(*rows):
    """Masks from text: digits are concepts (1 the first), '.' is none, 'x' is 1 and 2 both."""
    count = max(int(c) for row in rows for c in row.replace("x", "2").replace(".", "0"))
    cells = [["12" if c == "x" else c for c in row] for row in rows]
    return torch.tensor([[[str(n) in cell for cell in row] for row in cells] for n in range(1, count + 1)])


def drawn(masks):
    """Text from hard masks; '.' is the background."""
    owner = masks.argmax(0)
    return ["".join("." if cell == len(masks) - 1 else str(cell.item() + 1) for cell in row) for row in owner]


def blobs(count, size, seed):
    """Random discs and boxes, overlapping at will."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(count):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.1, 0.5) * min(size)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= r**2
        box = (abs(y - cy) <= r) & (abs(x - cx) <= r / 2)
        masks.append(disc if rng.random() < 0.5 else box)
    return np.stack(masks)


def assert_sums_to_one(masks, sizes=SIZES):
    check_partition(masks)
    for size, small in mask_pyramid(masks, sizes).items():
        assert small.shape == (len(masks), *size)
        assert small.dtype == torch.float32
        assert small.min() >= 0
        torch.testing.assert_close(small.sum(0), torch.ones(size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("overlap", ["priority", "share"])
@pytest.mark.parametrize("dilation", [0, 1, 5])
@pytest.mark.parametrize("seed", range(4))
def test_partition_of_unity_random_overlapping(seed, dilation, overlap):
    size = [(64, 64), (48, 80), (31, 57), (64, 64)][seed]
    masks = blobs(2 + seed, size, seed)
    assert_sums_to_one(compose_masks(masks, dilation=dilation, overlap=overlap))


def test_partition_of_unity_without_concepts():
    masks = compose_masks(torch.zeros(0, 64, 64))
    assert masks.shape == (1, 64, 64)
    assert (masks == 1).all()
    assert_sums_to_one(masks)


def test_partition_of_unity_full_mask():
    masks = compose_masks(torch.ones(1, 64, 48), dilation=3)
    assert (masks[0] == 1).all() and (masks[1] == 0).all()
    assert_sums_to_one(masks)


def test_partition_of_unity_empty_mask_from_outside():
    """A final mask may be empty (a caller's own masks); the reduction does not mind."""
    masks = torch.zeros(3, 30, 40)
    masks[2] = 1
    assert_sums_to_one(masks)


@pytest.mark.parametrize("dilation", [0, 2])
def test_partition_of_unity_touching(dilation):
    dense = torch.zeros(2, 63, 63, dtype=torch.bool)
    dense[0, 10:50, 5:31] = True
    dense[1, 10:50, 31:60] = True
    assert_sums_to_one(compose_masks(dense, dilation=dilation))


def test_partition_of_unity_soft_masks():
    masks = torch.rand(5, 50, 70, generator=torch.Generator().manual_seed(0)).softmax(0)
    assert_sums_to_one(masks)


def test_dilation_grows_by_a_disc():
    dot = torch.zeros(1, 9, 9, dtype=torch.bool)
    dot[0, 4, 4] = True
    y, x = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    for radius in range(5):
        assert torch.equal(dilate(dot, radius)[0], (y - 4) ** 2 + (x - 4) ** 2 <= radius**2)


def test_dilation_at_the_border():
    corner = torch.zeros(1, 4, 6, dtype=torch.bool)
    corner[0, 0, 0] = True
    assert dilate(corner, 2)[0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]


def test_a_disc_wider_than_the_picture_takes_no_more_than_the_picture():
    corner = torch.zeros(1, 3, 5, dtype=torch.bool)
    corner[0, 0, 0] = True
    assert dilate(corner, 10**9).all() and torch.equal(dilate(corner, 8), dilate(corner, 7))
    assert not dilate(~corner & False, 10**9).any()


def test_a_single_mask_is_dilated():
    masks = compose_masks(picture(".....", "..1..", "....."), dilation=1)
    assert drawn(masks) == ["..1..", ".111.", "..1.."]


def test_dilation_stops_at_another_dense_mask():
    """The paper's rule: where dilated masks overlap, the dense ones are kept."""
    assert drawn(compose_masks(picture("11122..", "11122.."), dilation=2)) == ["1112222", "1112222"]


def test_dilated_overlap_in_no_dense_mask_is_background():
    assert drawn(compose_masks(picture("11...22"), dilation=2)) == ["111.222"]
    assert drawn(compose_masks(picture("11..22."), dilation=2)) == ["11..222"]


def test_dense_overlap_goes_by_priority():
    masks = picture("11xx22", "11xx22")
    assert drawn(compose_masks(masks)) == ["111122", "111122"]
    assert drawn(compose_masks(masks.flip(0))) == ["221111", "221111"]


def test_dense_overlap_can_be_shared():
    masks = compose_masks(picture("11xx22"), overlap="share")
    assert masks[:, 0].tolist() == [[1, 1, 0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5, 1, 1], [0] * 6]


def test_background_is_what_the_final_masks_leave():
    masks = compose_masks(blobs(3, (40, 40), 7), dilation=3)
    torch.testing.assert_close(masks[-1], 1 - masks[:-1].sum(0))


def test_float_masks_are_taken_at_one_half():
    masks = compose_masks(torch.tensor([[[0.0, 0.49, 0.5, 1.0]]]))
    assert masks[0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", [list, np.stack, torch.stack])
def test_takes_lists_arrays_and_tensors(kind):
    masks = list(picture("11.22"))
    dense = kind([np.asarray(mask) for mask in masks]) if kind is not torch.stack else torch.stack(masks)
    assert drawn(compose_masks(dense)) == ["11.22"]


def test_reduction_is_the_mean_over_the_area():
    masks = compose_masks(blobs(2, (64, 48), 3))
    expected = torch.nn.functional.avg_pool2d(masks[None], 16)[0]
    torch.testing.assert_close(mask_pyramid(masks, [(4, 3)])[4, 3], expected)


def test_reduction_counts_parts_of_pixels():
    masks = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]])
    small = mask_pyramid(masks, [(1, 2)])[1, 2]
    torch.testing.assert_close(small[0, 0], torch.tensor([2 / 3, 0.0]))


def test_reduction_keeps_the_area():
    masks = compose_masks(blobs(3, (60, 44), 5))
    for small in mask_pyramid(masks, SIZES).values():
        torch.testing.assert_close(small.mean((1, 2)), masks.mean((1, 2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(1, 4, 4), "the mask of concept 1 is empty"),
        (torch.full((1, 4, 4), 0.4), "empty"),
        (torch.full((1, 4, 4), torch.nan), "outside 0..1"),
        (torch.full((1, 4, 4), 255.0), "outside 0..1"),
        (torch.ones(4, 4), r"shape \(4, 4\), expected"),
        ([np.ones((4, 4)), np.ones((4, 5))], r"different sizes: \(4, 4\), \(4, 5\)"),
        (torch.ones(2, 4, 4), "concept 1 and concept 2 claim all of each other's mask"),
    ],
)
def test_unusable_masks(masks, message):
    with pytest.raises(MaskError, match=message):
        compose_masks(masks)


@pytest.mark.parametrize("overlap", ["priority", "share"])
def test_two_concepts_that_claim_all_of_each_others_mask(overlap):
    with pytest.raises(MaskError, match="cat and panda claim all of each other's mask"):
        compose_masks(torch.ones(2, 4, 4), overlap=overlap, names=["cat", "panda"])


def test_a_concept_that_keeps_nothing():
    dense = torch.zeros(2, 20, 20)
    dense[0, :15] = 1
    dense[1, 3:9, 3:9] = 1
    with pytest.raises(MaskError, match="panda keeps 0.0% of its mask; name it before the concepts that cover it"):
        compose_masks(dense, names=["cat", "panda"])
    assert compose_masks(dense.flip(0), names=["panda", "cat"])[0].sum() == 36


def test_every_unusable_mask_is_named():
    dense = torch.zeros(3, 4, 4)
    dense[1] = 1
    with pytest.raises(MaskError, match="mask of cat is empty; the mask of fox is empty"):
        compose_masks(dense, names=["cat", "dog", "fox"])


def test_masks_on_a_device_without_float64():
    masks = torch.from_numpy(blobs(2, (32, 32), 1)).float().as_subclass(WithoutFloat64)
    final = compose_masks(masks, dilation=1)
    small = mask_pyramid(final.as_subclass(WithoutFloat64), [(8, 8)])[8, 8]
    assert type(final) is type(small) is torch.Tensor
    assert torch.equal(small, mask_pyramid(compose_masks(blobs(2, (32, 32), 1), dilation=1), [(8, 8)])[8, 8])


def test_dilation_by_a_part_of_the_object():
    """A tenth of the root of the area: 2 pixels for a square of 20, none for one of 4."""
    dense = torch.zeros(2, 64, 64, dtype=torch.bool)
    dense[0, 4:24, 4:24] = dense[1, 40:44, 40:44] = True
    masks = compose_masks(dense, dilation=0.1)
    assert torch.equal(masks[0].bool(), dilate(dense[:1], 2)[0]) and torch.equal(masks[1].bool(), dense[1])


@pytest.mark.parametrize("least", [3, 0.3])
def test_small_parts_are_dropped(least):
    assert drawn(compose_masks(picture("111.11.1", "111....."), min_area=least)) == ["111.....", "111....."]


def test_a_mask_of_specks_alone_is_refused():
    with pytest.raises(MaskError, match="cat has no part of 3 pixels, its largest has 2; make min_area smaller"):
        compose_masks(picture("11.1.2222"), min_area=3, names=["cat", "dog"])


def test_holes_are_filled_but_for_what_another_mask_claims():
    rows = ["11111.", "1.12..", "11111."]
    assert drawn(compose_masks(picture("11111.", "1.121.", "11111."), fill_holes=True))[1] == "11121."
    assert drawn(compose_masks(picture(*rows), fill_holes=True))[1] == "1112.."
    assert drawn(compose_masks(picture(*rows)))[1] == "1.12.."


def test_what_reaches_the_border_is_no_hole():
    assert drawn(compose_masks(picture("11.", "1..", "111"), fill_holes=True)) == ["11.", "1..", "111"]


@pytest.mark.parametrize("feather", [2, 3, 4, 8])
def test_a_feather_is_as_wide_as_told(feather):
    """From 0 to 1 in so many steps, evenly on both sides, also beside another mask and the border."""
    dense = torch.zeros(2, 20, 60)
    dense[0, :, 20:40] = dense[1, :, 40:] = 1
    masks = compose_masks(dense, feather=feather)
    rise = masks[0, 7, 10:30]
    steps = 2 * (feather // 2)
    assert ((rise > 0) & (rise < 1)).sum() == steps and (rise.diff() >= 0).all()
    torch.testing.assert_close(rise, 1 - rise.flip(0))
    torch.testing.assert_close(masks[0, 7, 30:50], 1 - masks[1, 7, 30:50])
    assert (masks[1, :, 50:] == 1).all()


def test_the_nearest_pixel_is_the_one_at_the_centre():
    small = mask_pyramid(compose_masks(picture("11111222")), [(1, 2), (3, 16)], downsampling="nearest")
    assert drawn(small[1, 2]) == ["12"]
    assert drawn(small[3, 16]) == ["1111111111222222"] * 3


def test_a_mask_between_the_centres_keeps_the_token_that_it_fills_most():
    masks = compose_masks(picture("..........22", "...11.....22", "............", "............"))
    assert drawn(mask_pyramid(masks, [(2, 3)], downsampling="nearest")[2, 3]) == ["1.2", "..."]


def test_a_mask_that_no_token_is_left_for_is_told():
    masks = compose_masks(picture("1122", "1122"))
    with pytest.warns(VanishedMaskWarning, match="maps of 1 x 1 tokens the mask of cat holds no token; .*area"):
        small = mask_pyramid(masks, [(1, 1)], downsampling="nearest", names=["cat", "dog"])
    assert drawn(small[1, 1]) == ["2"]


def test_wrong_settings():
    ones = torch.ones(1, 4, 4)
    with pytest.raises(MaskError, match="overlap is 'mix'"):
        compose_masks(ones, overlap="mix")
    with pytest.raises(MaskError, match="dilation is -1"):
        compose_masks(ones, dilation=-1)
    with pytest.raises(
        MaskError, match=r"dilation is 1\.5; .* min_area is True; .* fill_holes is 'yes'; .*feather is -2"
    ):
        compose_masks(ones, dilation=1.5, min_area=True, fill_holes="yes", feather=-2)
    with pytest.raises(MaskError, match="downsampling is 'mean'; expected one of area, nearest"):
        mask_pyramid(ones, [(2, 2)], downsampling="mean")
    with pytest.raises(MaskError, match="1 masks for 2 concepts"):
        compose_masks(ones, names=["cat", "dog"])


def test_pyramid_refuses_masks_that_do_not_sum_to_one():
    with pytest.raises(MaskError, match=r"sum to 2\.\.2: use compose_masks"):
        mask_pyramid(torch.ones(2, 4, 4), [(2, 2)])
    with pytest.raises(MaskError, match="0 or more"):
        mask_pyramid(torch.stack([torch.full((4, 4), 1.5), torch.full((4, 4), -0.5)]), [(2, 2)])
