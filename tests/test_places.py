"""Where concepts stand: objects chosen among several of one word, through every source that finds words."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from jobs import job_of
from PIL import Image
from tiny_detectors import make_grounding_dino, make_sam

from weaver import places as places_module
from weaver.errors import WeaverError
from weaver.job import MaskSpec
from weaver.job.parse import job_from_mapping
from weaver.masks import MaskError, TextMasks, box_mask, polygon_mask
from weaver.masks.grounded import GroundingDino, Sam
from weaver.masks.segmenter import segmenter_objects
from weaver.masks.text import Detection
from weaver.pipeline import weave
from weaver.places import Places
from weaver.run import run_job

PICTURE = Image.new("RGB", (32, 32), "orange")


class Two:
    """A segmenter that sees two cats and, above them, a third that touches none."""

    def segment(self, image, words, prompt=None):
        sure = np.zeros((len(words), 32, 32), dtype=np.float32)
        sure[:, 16:30, 2:12] = sure[:, 16:30, 20:30] = sure[:, 2:12, 10:20] = 0.9
        return sure


@pytest.fixture
def segmenter(monkeypatch):
    def objects(image, wishes, prompt):
        return segmenter_objects(image, wishes, prompt, segmenter=Two())

    monkeypatch.setattr(places_module, "segmenter_objects", objects)


def found(*specs, source="segmenter"):
    """The column of the middle of every mask."""
    words, labels = ["cat"] * len(specs), [f"mask {number}" for number in range(len(specs))]
    places = Places.build(specs, words, labels, source=source, size=(32, 32)).find(None, PICTURE, "cats")
    assert places.wishes == (None,) * len(specs)
    return [int(torch.nonzero(mask)[:, 1].float().mean()) for mask in places.given]


def test_a_segmenter_s_objects_are_chosen(segmenter):
    assert found(MaskSpec()) == [15]  # all of them, where nothing tells which
    assert found(MaskSpec(order=2)) == [14] and found(MaskSpec(order=3)) == [24]
    assert found(MaskSpec(at=(0.75, 0.75)), MaskSpec(at=(5, 20))) == [24, 6]
    assert found(MaskSpec(around=(0.3, 0, 0.7, 0.4)), MaskSpec(order=1), MaskSpec(word="Cat")) == [14, 6, 24]
    with pytest.raises(MaskError, match="rank: nothing tells how sure a 'cat' is here"):
        found(MaskSpec(rank=1))
    with pytest.raises(MaskError, match=r"no 'cat' at \[0, 0\]; found 'cat' in box \[2, 16, 12, 30\]"):
        found(MaskSpec(at=(0, 0)))


def test_a_rank_needs_scores():
    places = Places.build([MaskSpec(rank=1)], ["cat"], ["it"], source="segmenter", size=(32, 32))
    reason = (
        "rank 1: the segmenter does not tell how sure it is of a 'cat'; use order, at or around, or masks.source: text"
    )
    assert places.word_reasons(None, "cats") == [reason]
    assert dataclasses.replace(places, source="text").word_reasons(None, "cats") == []


MISTAKES = {
    "two kinds": ({"box": (0, 0, 1, 1), "word": "cat"}, "give exactly one of word, file, box, polygon, points (found"),
    "a choice beside a box": ({"box": (0, 0, 1, 1), "rank": 1}, "rank: chooses among objects of a word; beside"),
    "two choices": ({"order": 1, "at": (3, 4)}, "give at most one of order, rank, at, around (found order and at)"),
    "no order": ({"order": 0}, "order: is 0, expected a whole number, 1 or more"),
    "a point outside": ({"at": (3, -4)}, "at: must not be negative, is [3"),
    "a box turned round": ({"around": (9, 0, 1, 5)}, "around: must have 0 <= left < right and 0 <= top < bottom, is"),
    "a label without a file": ({"label": 2}, "label: is of a mask's file; name the file too"),
}
KINDS = {
    "a box of three": ({"box": (0, 0, 1)}, "box: is (0, 0, 1), expected [left, top, right, bottom] in pixels"),
    "a box that is a number": ({"box": 3}, "box: is 3, expected [left, top, right, bottom]"),
    "two corners": ({"polygon": ((1, 2), (3, 4))}, "polygon: is ((1, 2), (3, 4)), expected three or more corners"),
    "points that are a point": ({"points": (1, 2)}, "points: is (1, 2), expected a list of points"),
    "no number": ({"at": (float("nan"), 2)}, "at: is (nan, 2), expected a point [x, y]"),
    "half an object": ({"rank": 1.5}, "rank: is 1.5, expected a whole number"),
    "an empty word": ({"word": " "}, "word: is ' ', expected a word or a phrase"),
    "a number as a file": ({"file": 3}, "file: is 3, expected the path of a file"),
    "a label of no kind": ({"file": "mask.png", "label": 0.5}, "label: is 0.5, expected a number, a colour or a name"),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *KINDS])
def test_a_place_that_can_not_be_is_told_by_the_library_as_by_a_job(mistake, tmp_path):
    """Where a file's reader tells of another kind of value in its own words, the library tells it, too."""
    values, told = (MISTAKES | KINDS)[mistake]
    specs = [MaskSpec(**values), MaskSpec(order=0, at=(-1, 0))]
    with pytest.raises(WeaverError) as caught:
        Places.build(specs, ["cat", "dog"], ["the cat", "the dog"], source="attention", size=(32, 32))
    assert f"the cat: {told}" in str(caught.value) and "; the dog: give at most one of" in str(caught.value)
    if mistake in MISTAKES:
        (tmp_path / "rex.safetensors").write_bytes(b"")
        mapping = {"prompt": "a cat", "concepts": [{"file": "rex.safetensors", "mask": values}]}
        with pytest.raises(WeaverError) as caught:
            job_from_mapping(mapping, folder=tmp_path)
        of_a_field = told.partition(":")[0] in values
        assert f"concepts[0].mask{'.' if of_a_field else ': '}{told}" in str(caught.value)


def test_places_may_be_arrays():
    box, corners = (0, 0, 8, 8), ((0, 0), (9, 0), (9, 9))
    specs = [MaskSpec(box=np.array(box)), MaskSpec(polygon=np.array(corners, np.float32))]
    places = Places.build(specs, ["cat", "dog"], ["it", "that"], source="attention", size=(32, 32))
    expected = box_mask(box, (32, 32)), polygon_mask(corners, (32, 32))
    assert all(torch.equal(mask, other) for mask, other in zip(places.given, expected, strict=True))


def test_outlines_need_nothing_to_be_found():
    places = Places.build(
        [MaskSpec(polygon=((0, 0), (1, 0), (0, 1)))], ["cat"], ["it"], source="attention", size=(32, 32)
    )
    assert places.sources == ("polygon",) and places.find(None, PICTURE, "cats") is places
    assert places.given[0][0, :31].all() and not places.given[0][31].any()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Grounding DINO and SAM, and the folder that they lie in."""
    folder = tmp_path_factory.mktemp("detectors")
    dino, sam = GroundingDino(*make_grounding_dino(folder)), Sam(*make_sam())
    for name, part in (("dino", dino), ("sam", sam)):
        part.model.save_pretrained(folder / name)
        part.processor.save_pretrained(folder / name)
    return folder, dino, sam


class TwoDogs:
    """A detector that sees a dog on the left and, surer of it, one on the right."""

    model = torch.nn.Identity()

    def detect(self, image, phrase, box_threshold, text_threshold):
        return [Detection((2.0, 4.0, 14.0, 28.0), 0.6, "dog"), Detection((18.0, 4.0, 30.0, 28.0), 0.9, "dog")]


class Boxes:
    """An outliner whose objects fill their boxes."""

    model = torch.nn.Identity()

    def of_boxes(self, image, boxes):
        masks = torch.zeros(len(boxes), image.height, image.width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[int(top) : int(bottom), int(left) : int(right)] = True
        return masks


def test_two_concepts_of_one_class_get_a_dog_each(tiny_pipe, concepts):
    finder = TextMasks(Boxes(), TwoDogs())
    arguments = {"template": PICTURE, "steps": 1, "dilation": 0, "mask_source": finder}
    prompt, dog = "a dog and a cat", MaskSpec(word="dog")
    woven = weave(tiny_pipe, prompt, concepts[:2], places=[dog, dog], **arguments)
    assert [mask.nonzero()[:, 1].min().item() for mask in woven.masks[:2]] == [2, 18]
    assert woven.settings["masks"]["sources"] == ["text: dog", "text: dog"]
    woven = weave(tiny_pipe, prompt, concepts[:2], places=[MaskSpec(word="dog", rank=1), dog], **arguments)
    assert [mask.nonzero()[:, 1].min().item() for mask in woven.masks[:2]] == [18, 2]


def test_points_are_given_to_sam_without_a_detector(models):
    spec, picture = MaskSpec(points=((0.25, 0.75), (0.5, 0.5))), Image.effect_noise((32, 32), 80)
    places = Places.build([spec], [None], ["it"], source="attention", size=(32, 32))
    assert places.needs_finder and places.words == (None,) and places.sources == ("points",)
    opened = places.opened(segmenter=models[0] / "sam")
    assert opened.finder.detector is None
    found = opened.find(None, picture, "a cat")
    assert torch.equal(found.given[0], models[2].of_points(picture.convert("RGB"), [(8.0, 24.0), (16.0, 16.0)]))
    assert found.finder is None and not found.needs_finder


def test_a_job_s_masks_from_text(models, job_folder, tmp_path):
    """The models are recorded, and a manifest takes no others."""
    folder = models[0]
    text = {"detector": str(folder / "dino"), "segmenter": str(folder / "sam"), "box_threshold": 0.0}
    concepts = [{"file": "tom.safetensors", "mask": {"word": "dog"}}]
    masks = {"source": "text", "text": text, "dilation": 0}
    job = job_of(
        job_folder, prompt="a cat", masks=masks, steps=1, template={"image": "template.png"}, concepts=concepts
    )
    done = run_job(job, tmp_path / "text")
    assert done.result.settings["masks"]["sources"] == ["text: dog"]
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
    assert len(manifest["record"]["weights"]["masks.text"]) == 64
    manifest["record"]["weights"]["masks.text"] = "0" * 64
    with pytest.raises(WeaverError, match=r"masks\.text: its weights are not those that the manifest was written with"):
        run_job(job, tmp_path / "again", manifest=manifest)
