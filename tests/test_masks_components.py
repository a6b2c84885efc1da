"""Objects of one class word, told apart."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from weaver.embedded.drawings import ANIMALS, HELD_OUT_VENDORS
from weaver.embedded.world import draw_scene
from weaver.masks.assign import Wish
from weaver.masks.components import found_in, split_objects, tidy
from weaver.masks.compose import MaskError
from weaver.masks.shapes import connected_components


def discs(*circles, size=(64, 64)):
    y, x = np.mgrid[: size[0], : size[1]]
    return torch.from_numpy(np.any([(y - cy) ** 2 + (x - cx) ** 2 <= r * r for cy, cx, r in circles], axis=0))


def centres(masks):
    return [mask.nonzero()[:, 1].float().mean().item() for mask in masks]


def text(*rows):
    return torch.tensor([[c == "#" for c in row] for row in rows])


def test_components_are_numbered_in_reading_order():
    labels = connected_components(text("#.#.#", "#.###", ".....", "##..#"))
    assert labels.tolist() == [[1, 0, 2, 0, 2], [1, 0, 2, 2, 2], [0, 0, 0, 0, 0], [3, 3, 0, 0, 4]]


@pytest.mark.parametrize("seed", range(3))
def test_components_match_flood_fill(seed):
    mask = np.random.default_rng(seed).random((23, 31)) < 0.55
    labels = connected_components(mask)
    seen = np.zeros_like(labels)
    count = 0
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        count += 1
        queue = [start]
        while queue:
            y, x = queue.pop()
            if 0 <= y < 23 and 0 <= x < 31 and mask[y, x] and not seen[y, x]:
                seen[y, x] = count
                queue += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    assert np.array_equal(labels, seen)


def test_components_of_full_and_empty_masks():
    assert (connected_components(torch.ones(3, 4)) == 1).all()
    assert (connected_components(torch.zeros(3, 4)) == 0).all()


def test_two_objects_from_left_to_right():
    mask = discs((40, 48, 12), (20, 12, 8))
    parts = split_objects(mask, 2, "cat")
    assert torch.equal(parts[0] | parts[1], mask)
    assert not (parts[0] & parts[1]).any()
    assert centres(parts) == [12, 48]


def test_touching_objects_are_cut_at_their_waist():
    mask = discs((32, 18, 13), (32, 44, 13))
    assert connected_components(mask).max() == 1
    parts = split_objects(mask, 2, "cat")
    assert torch.equal(parts[0] | parts[1], mask)
    assert abs(parts[0].sum() - parts[1].sum()) < 0.1 * mask.sum()
    assert centres(parts)[0] < 22 and centres(parts)[1] > 40


def test_three_objects_and_a_speck():
    mask = discs((32, 8, 7), (32, 30, 7), (32, 54, 7))
    mask[0, 0] = True
    parts = split_objects(mask, 3, "cat")
    assert centres(parts) == [8, 30, 54]
    assert not parts[:, 0, 0].any()


def test_more_objects_than_asked_leaves_the_smallest_out():
    parts = split_objects(discs((32, 8, 7), (32, 30, 5), (32, 54, 7)), 2, "cat")
    assert centres(parts) == [8, 54]


@pytest.mark.parametrize(
    "mask",
    [discs((32, 32, 20)), discs((32, 32, 20), (5, 5, 2)), torch.zeros(64, 64, dtype=torch.bool)],
    ids=["one", "one and a speck", "none"],
)
def test_fewer_objects_than_concepts(mask):
    with pytest.raises(MaskError, match="2 'cat' asked for, .* a box or a mask file each"):
        split_objects(mask, 2, "cat")


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ([Wish("cat")], [30]),
        ([Wish("cat", order=1)], [10, 50]),
        ([Wish("cat", at=(8.0, 32.0))], [10, 50]),
        ([Wish("cat"), Wish("cat")], [10, 50]),
        ([Wish("cat", order=3)], [10, 50]),
        ([Wish("cat")] * 3, [10, 50]),
    ],
    ids=["all of it", "the first", "at a point", "two", "the third of two", "three of two"],
)
def test_a_mask_of_a_word_is_cut_into_as_many_objects_as_may_be_meant(wishes, expected):
    """Where it can't be, it is cut into what there is, so that an error can show that."""
    found = found_in(discs((32, 50, 3), (32, 10, 3))[None], ["cat"], wishes)
    assert [item.centre() for item in found] == expected and {item.word for item in found} == {"cat"}


def test_an_empty_mask_holds_no_object():
    masks = torch.stack([discs((32, 50, 8)), torch.zeros(64, 64, dtype=torch.bool)])
    for wishes in ([Wish("cat"), Wish("dog")], [Wish("cat"), Wish("dog", order=2)], [Wish("cat"), *[Wish("dog")] * 2]):
        assert [item.word for item in found_in(masks, ["cat", "dog"], wishes)] == ["cat"]


def test_tidy_drops_specks_and_fills_holes():
    mask = text("#....", "..###", "..#.#", "..###", ".....")
    assert torch.equal(tidy(mask), text(".....", "..###", "..###", "..###", "....."))


def test_tidy_keeps_parts_of_like_size_bays_and_extremes():
    mask = text("##.##", "##.##", "#..##")
    assert torch.equal(tidy(mask), mask)
    for value in (True, False):
        assert torch.equal(tidy(torch.full((3, 3), value)), torch.full((3, 3), value))


def drawing(animals, seed, spots=None):
    options = {"background": "beach", "vendors": HELD_OUT_VENDORS, "varied": False, "spots": spots}
    scene = draw_scene(random.Random(seed), animals=animals, **options)
    return torch.from_numpy(scene.labels > 0)


def test_one_animal_is_not_cut_in_two():
    """The shapes of every animal in held-out drawings: some have necks between their ears, none are two animals."""
    wishes = [Wish("animal")] * 2
    masks = [drawing([word], seed) for word in ANIMALS for seed in range(4)]
    assert all(len(found_in(mask[None], ["animal"], wishes)) == 1 for mask in masks)
    cut = [mask for mask in masks if falls_apart(mask)]
    assert cut, "none of these falls apart when it is worn, so that this shows nothing"


def falls_apart(mask):
    with suppress(MaskError):
        return len(split_objects(mask, 2)) == 2
    return False


def test_animals_that_touch_are_cut_apart():
    spots = [((0.28, 0.3), (0.56, 0.64), (0.44, 0.46)), ((0.7, 0.72), (0.56, 0.64), (0.44, 0.46))]
    masks = [drawing([word] * 2, seed, spots) for word in ANIMALS for seed in range(3)]
    found = [len(found_in(mask[None], ["animal"], [Wish("animal")] * 2)) for mask in masks]
    assert found.count(2) >= 0.85 * len(masks)
