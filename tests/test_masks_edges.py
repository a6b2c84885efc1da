"""Maps that follow a picture's edges, and the figures of the sources of masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.mask_sources import MARKS, PAGE, invented, live_contexts, measure, table, true_masks
from benchmarks.records import RESULTS
from weaver.embedded.training.segmenter import held_out_scenes
from weaver.masks.assign import NotFoundError
from weaver.masks.edges import follow_edges


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_it_is_the_guided_filter():
    """He et al., equations 14 to 16, written out window by window."""
    height, width, radius, softness = 7, 9, 2, 0.01
    picture, maps = noise(height, width), torch.rand(2, height, width, dtype=torch.float64)
    colours = np.asarray(picture) / 255
    windows = [
        (slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1))
        for y in range(height)
        for x in range(width)
    ]
    expected, count = np.zeros((2, height, width)), np.zeros((height, width))
    for window in windows:
        seen = colours[window].reshape(-1, 3)
        away = seen - seen.mean(0)
        for k, part in enumerate(maps.numpy()[:, *window].reshape(2, -1)):
            slope = np.linalg.solve(away.T @ away / len(seen) + softness * np.eye(3), away.T @ part / len(seen))
            expected[k][window] += (colours[window] - seen.mean(0)) @ slope + part.mean()
        count[window] += 1
    filtered = follow_edges(maps, picture, radius, softness)
    np.testing.assert_allclose(filtered, expected / count, atol=1e-10)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_coarse_map_is_parted_where_the_picture_is(scale):
    """Large windows too, which look at a smaller picture."""
    height, width, edge = 32 * scale, 48 * scale - 1, 21 * scale
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[:, edge:] = 220
    ramp = torch.linspace(-1, 1, width).add(0.125).mul(3).sigmoid().expand(1, height, width)  # 3 * scale pixels off
    filtered = follow_edges(ramp, Image.fromarray(pixels), 8 * scale)[0]
    assert filtered.shape == (height, width)
    assert filtered[:, edge - 1].max() < 0.4 and filtered[:, edge].min() > 0.6
    assert ramp[0, 0, edge] - ramp[0, 0, edge - 1] < 0.04


def test_even_maps_and_even_pictures():
    torch.testing.assert_close(
        follow_edges(torch.full((1, 12, 9), 0.3), noise(12, 9), 3), torch.full((1, 12, 9), 0.3).double()
    )
    impulse = torch.zeros(1, 21, 21)
    impulse[0, 10, 10] = 1
    spread = follow_edges(impulse, Image.new("RGB", (21, 21), "orange"), 2)
    assert spread[0, 10, 10] == pytest.approx(1 / 25) and spread[0, 5].max() == 0


def test_figures_of_sources():
    scenes = held_out_scenes(6, seed=3)

    def true_of(image, prompt, words):
        """The true mask of every word that is there, the whole picture for the others."""
        scene = next(scene for scene in scenes if scene.image is image)
        found = dict(zip(*true_masks(scene), strict=True))
        return torch.stack([found.get(word, torch.ones(64, 64, dtype=torch.bool)) for word in words])

    perfect = measure(true_of, scenes)
    assert perfect["iou"] == perfect["right_object"] == perfect["invented"] == 1 and perfect["words"] >= 6
    swapped = measure(lambda *asked: ~true_of(*asked), scenes)
    assert swapped["iou"] == swapped["right_object"] == swapped["invented"] == 0

    def blind(image, prompt, words):
        raise NotFoundError("nothing found", words)

    found = measure(blind, scenes)
    assert found["iou"] == found["invented"] == 0
    lines = table({"truth": perfect, "its complement": swapped}).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| truth | 1.00 |") and lines[3].endswith("| 0% | 0% |")
    hard, soft = (live_contexts(scenes, (16, 16), name) for name in ("nearest", "area"))
    assert 1 <= hard < soft < 3


def test_what_is_invented_is_named_by_the_prompt_and_not_drawn():
    scene, asked = held_out_scenes(1, seed=3)[0], []

    def listening(image, prompt, words):
        asked.append((prompt, words))
        return torch.zeros(len(words), 64, 64, dtype=torch.bool)

    assert not any(invented(listening, scene, number) for number in range(6))
    for prompt, (*there, word) in asked:
        assert there == true_masks(scene)[0] and word not in scene.caption and f" and a {word}, " in prompt
    assert len({words[-1] for _, words in asked}) == 6 - len(true_masks(scene)[0])


def test_the_page_has_the_recorded_table():
    record = json.loads((RESULTS / "mask_sources.json").read_text(encoding="utf-8"))
    assert table(record["sources"]) in PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
