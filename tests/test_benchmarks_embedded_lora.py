"""The figures of the evidence for whole LoRAs, on scenes of which everything is known."""

from __future__ import annotations

import random

import pytest

from benchmarks.embedded_lora import Drawn, figures
from weaver.embedded.world import draw_scene

NAMES = ["tuxedo-cat", "pug"]


def drawn(vendor: str = "emojione", *, swapped: bool = False, without: str | None = None) -> Drawn:
    scene = draw_scene(random.Random(1), animals=["cat", "dog"], vendors=(vendor,), background="beach", varied=False)
    masks = [scene.mask(i) for i in (1, 0)] if swapped else [scene.mask(i) for i in (0, 1)]
    return Drawn(scene.image, {n: m for n, m in zip(NAMES, masks, strict=True) if n != without})


def test_concepts_in_their_regions_are_shown_and_do_not_mix():
    row = figures("whole", [drawn()], [NAMES])
    assert row["form"] == "whole" and row["own"] > 0.8 > 0.5 > max(row["base"], row["others"], row["mixed"])
    assert (row["shows"], row["leaks"], row["found"]) == ("1 of 1", "0 of 2", "2 of 2")


def test_swapped_concepts_are_mixed():
    right, wrong = figures("", [drawn()], [NAMES]), figures("", [drawn(swapped=True)], [NAMES])
    assert wrong["mixed"] == pytest.approx(right["own"], abs=0.05)
    assert (wrong["shows"], wrong["leaks"]) == ("0 of 1", "2 of 2")


def test_the_base_model_s_own_animals_are_no_concepts_and_no_mixture():
    row = figures("", [drawn("noto")], [NAMES])
    assert row["base"] > 0.5 > row["own"] and (row["shows"], row["leaks"]) == ("0 of 1", "0 of 2")


def test_an_animal_that_was_not_found_is_not_shown_and_in_no_mean():
    both, one = drawn(), drawn(without="pug")
    row = figures("", [both, one], [NAMES, NAMES])
    assert (row["shows"], row["leaks"], row["found"]) == ("1 of 2", "0 of 3", "3 of 4")
