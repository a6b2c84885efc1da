"""The sweep of injection sites: what is in a row, and that what was recorded is of the defaults that there are."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.embedded_sites import KINDS, Arm, Template, arms, figures
from benchmarks.records import RESULTS
from weaver.embedded.world import draw_scene
from weaver.evaluation.sweep import OBJECTIVE
from weaver.layers import EMBEDDED


def template(ground: str | None, kind: str, vendor: str = "noto") -> Template:
    options = {"background": kind, "vendors": (vendor,), "varied": False}
    scene = draw_scene(random.Random(1), animals=["cat", "dog"], **options)
    return Template(scene, ("tuxedo-cat", "pug"), ground)


def test_backgrounds_count_as_animals_do_and_psnr_is_of_the_base_models():
    before = [template(None, "beach"), template("sunset-mountain", "mountain")]
    drawn = [template(None, "beach", "emojione"), template(None, "sunset-mountain", "emojione")]
    right = figures(before, [one.scene.image for one in drawn])
    assert right["animals right"] == "4 of 4" and right["backgrounds right"] == "1 of 1"
    assert right["J"] == pytest.approx(1 + right["mask_iou"], abs=0.0011)
    kept = figures(before, [drawn[0].scene.image, template(None, "mountain", "emojione").scene.image])
    assert kept["backgrounds right"] == "0 of 1" and kept["margin"] < right["margin"]
    assert kept["J"] == pytest.approx(0.8 + kept["mask_iou"], abs=0.0011)
    assert kept["background_psnr"] == right["background_psnr"] > 20
    same = figures(before, [one.scene.image for one in before])
    assert same["animals right"] == "0 of 4" and same["J"] == pytest.approx(same["mask_iou"], abs=0.0011)


def test_no_recorded_row_is_better_than_the_defaults_by_one_identity():
    record = json.loads((RESULTS / "embedded_sites.json").read_text(encoding="utf-8"))
    assert record["drawn_by_default"] == Arm(EMBEDDED).label, "the defaults changed since: record it again"
    assert record["objective"] == OBJECTIVE, "the objective changed since: record it again"
    assert [row["arm"] for row in record["rows"]] == [arm.label for arm in arms()]
    rows = {row["arm"]: row for row in record["rows"]}
    ours = rows[record["drawn_by_default"]]
    animals, backgrounds = (list(map(int, ours[f"{kind}s right"].split(" of "))) for kind in KINDS)
    assert animals[0] == animals[1] and backgrounds[0] == backgrounds[1]
    but_outlines = {arm: round(row["J"] - row["mask_iou"], 3) for arm, row in rows.items()}
    assert but_outlines[record["drawn_by_default"]] == max(but_outlines.values())
    assert max(row["J"] for row in rows.values()) - ours["J"] < 1 / (animals[1] + backgrounds[1])
