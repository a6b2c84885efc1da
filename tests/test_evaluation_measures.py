"""What is measured of a picture, on scenes of which everything is known."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from weaver.embedded.world import Scene, draw_scene
from weaver.errors import WeaverError
from weaver.evaluation.measures import edge_iou, find_animals, mask_iou, measure, psnr_outside

CONCEPTS = ("tuxedo-cat", "pug")
SMALL_SPOTS = [((0.18, 0.2), (0.6, 0.62), (0.3, 0.32)), ((0.5, 0.52), (0.6, 0.62), (0.3, 0.32))]
THIRD_SPOT = ((0.82, 0.84), (0.6, 0.62), (0.28, 0.3))


def scene(animals=("cat", "dog"), vendor="emojione", spots=None, background="beach", seed=1) -> Scene:
    return draw_scene(
        random.Random(seed),
        animals=list(animals),
        vendors=(vendor,),
        background=background,
        spots=spots,
        varied=False,
    )


def measured(of: Scene, animals=CONCEPTS, masks=None, template=None, **options):
    masks = [of.mask(i) for i in range(len(animals))] if masks is None else masks
    return measure(of.image, animals, of.caption, template=template or of.image, masks=masks, **options)


def test_concepts_in_their_places_are_right_and_do_not_leak():
    found = measured(scene())
    assert [(c.name, c.present, c.right, c.leaked) for c in found.concepts] == [
        (n, True, True, False) for n in CONCEPTS
    ]
    assert all(c.own > c.base and c.own > c.others for c in found.concepts)
    assert found.background_psnr == float("inf") and found.edge_iou == 1 and found.mask_iou > 0.85


def test_the_base_model_s_own_animals_are_no_concepts():
    found = measured(scene(vendor="noto"))
    assert [(c.present, c.right, c.leaked) for c in found.concepts] == [(True, False, False)] * 2


def test_swapped_concepts_are_wrong_and_leak():
    of = scene()
    found = measured(of, masks=[of.mask(1), of.mask(0)])
    assert [(c.present, c.right, c.leaked) for c in found.concepts] == [(True, False, True)] * 2


def test_a_concept_in_the_place_of_the_base_model_s_own_animal_leaks():
    of = scene(("cat", "cat"))
    found = measured(of, animals=("tuxedo-cat", "cat"))
    assert [(c.right, c.leaked) for c in found.concepts] == [(True, True)]
    twice = measured(of, animals=("tuxedo-cat", "tuxedo-cat"))
    assert [(c.right, c.leaked) for c in twice.concepts] == [(True, False)] * 2  # asked for twice


def test_a_concept_in_the_background_leaks():
    of = scene(("cat", "dog", "cat"), spots=[*SMALL_SPOTS, THIRD_SPOT])
    found = measured(of)
    assert [(c.name, c.right, c.leaked) for c in found.concepts] == [("tuxedo-cat", True, True), ("pug", True, False)]


def test_an_empty_place_shows_nothing():
    of = scene()
    empty = replace(of, image=scene(("cat",), spots=SMALL_SPOTS[:1]).image)
    gone = measured(empty, masks=[np.zeros((64, 64), bool) | np.eye(64, dtype=bool), of.mask(1)]).concepts[1]
    assert not gone.present and not gone.right


def test_a_background_concept_has_the_place_that_is_left():
    right = measured(scene(background="sunset-mountain"), background="sunset-mountain")
    wrong = measured(scene(background="mountain"), background="sunset-mountain")
    assert [found.concepts[-1].right for found in (right, wrong)] == [True, False]
    assert right.concepts[-1].leaked is None and right.background_psnr is None


def test_without_a_template_animals_are_found_where_they_are():
    of = scene(seed=3)
    found = measure(of.image, CONCEPTS[::-1], of.caption)  # in another order than they stand
    assert [(c.name, c.right) for c in found.concepts] == [("pug", True), ("tuxedo-cat", True)]
    assert (found.background_psnr, found.edge_iou, found.mask_iou) == (None, None, None)
    plain = Image.new("RGB", (64, 64), (120, 190, 250))
    nothing = measure(plain, CONCEPTS, of.caption).concepts
    assert [(c.present, c.right, c.leaked, c.own) for c in nothing] == [(False, False, False, None)] * 2


def test_two_of_a_class_are_found_apart():
    of = scene(("cat", "cat"), vendor="noto")
    first, second = find_animals(of.image, ["cat", "cat"], of.caption)
    assert mask_iou(first, of.mask(0)) > 0.7 and mask_iou(second, of.mask(1)) > 0.7
    single = scene(("cat",), vendor="noto")
    assert find_animals(single.image, ["cat", "cat"], single.caption)[1] is None


def test_psnr_is_of_what_lies_outside():
    first, second = Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (51, 51, 51))
    inside = np.zeros((8, 8), bool)
    assert psnr_outside(first, second, inside) == pytest.approx(-20 * np.log10(0.2))
    mixed = Image.fromarray(np.where(np.arange(8)[None, :, None] < 4, 0, 51).repeat(8, 0).repeat(3, 2).astype(np.uint8))
    inside[:, 4:] = True
    assert psnr_outside(first, mixed, inside) == float("inf")
    assert psnr_outside(first, second, ~np.zeros((8, 8), bool)) is None


def test_edges_that_move_are_lost():
    def box(left: int) -> Image.Image:
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[8:24, left : left + 12] = 255
        return Image.fromarray(pixels)

    assert edge_iou(box(4), box(4)) == 1
    assert edge_iou(box(4), box(5)) > 0.5 > edge_iou(box(4), box(14))


def test_masks_compare():
    one = np.eye(4, dtype=bool)
    assert mask_iou(one, one) == 1 and mask_iou(one, ~one) == 0
    assert mask_iou(None, None) == 1 and mask_iou(one, None) == 0


def test_masks_must_fit_the_animals():
    of = scene()
    with pytest.raises(WeaverError, match="1 masks for 2 animals"):
        measured(of, masks=[of.mask(0)])
    with pytest.raises(WeaverError, match="no masks for 2 animals"):
        measure(of.image, CONCEPTS, of.caption, template=of.image)
