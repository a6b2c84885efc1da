"""Masks from text through the real classes of transformers: tiny, random, on pictures that are not square."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_detectors import make_grounding_dino, make_sam

from weaver.errors import WeaverError
from weaver.masks.compose import MaskError
from weaver.masks.grounded import GroundingDino, Sam
from weaver.masks.text import Detection, TextMasks

WIDTH, HEIGHT = 60, 40
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
BOXES = [(2.0, 3.0, 30.0, 20.0), (10.0, 10.0, 59.0, 39.0)]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return GroundingDino(*make_grounding_dino(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def sam():
    return Sam(*make_sam())


@pytest.fixture(scope="module")
def folder(dino, sam, tmp_path_factory):
    """Both models as they lie in folders."""
    folder = tmp_path_factory.mktemp("models")
    for name, part in (("dino", dino), ("sam", sam)):
        part.model.save_pretrained(folder / name)
        part.processor.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def test_boxes_are_in_the_pixels_of_the_picture(dino):
    inputs = dino.processor(images=PICTURE, text=[["white dog"]], return_tensors="pt")
    outputs = dino.model(**inputs)
    x, y, width, height = outputs.pred_boxes[0].unbind(-1)
    by_hand = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    by_hand = by_hand * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    scores = outputs.logits[0].sigmoid().amax(-1)
    found = dino.detect(PICTURE, "white dog", 0.0, 0.0)
    assert torch.allclose(torch.tensor([one.box for one in found]), by_hand, atol=1e-4)
    assert torch.allclose(torch.tensor([one.score for one in found]), scores)


@torch.no_grad()
def test_masks_are_in_the_pixels_of_the_picture(sam):
    """By hand: 60 x 40 pixels become 64 x 43, padded to 64 x 64; masks of 16 x 16 come back the same way."""
    pixels = sam.processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    assert not pixels[0, :, 43:].any() and pixels[0, :, :43].any()
    boxes = torch.tensor(BOXES) * torch.tensor([64 / 60, 43 / 40, 64 / 60, 43 / 40])
    low = sam.model(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False).pred_masks[0]
    large = F.interpolate(low, (64, 64), mode="bilinear", align_corners=False)[..., :43, :64]
    by_hand = F.interpolate(large, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[:, 0] > 0
    masks = sam.of_boxes(PICTURE, BOXES)
    assert masks.shape == (2, HEIGHT, WIDTH) and masks.dtype == torch.bool and by_hand.any() and not by_hand.all()
    assert torch.equal(masks, by_hand)


@torch.no_grad()
def test_one_point_takes_the_surest_of_three_answers(sam):
    masks, sure = sam._masks(PICTURE, True, input_points=[[[[5.0, 6.0]]]], input_labels=[[[1]]])
    assert sure.shape == (1, 3)
    assert torch.equal(sam.of_points(PICTURE, [(5.0, 6.0)]), masks[0, sure[0].argmax()])
    assert sam.of_points(PICTURE, [(5.0, 6.0), (30.0, 20.0)]).shape == (HEIGHT, WIDTH)


def test_detections_become_objects_with_masks(dino, sam):
    maker, told = TextMasks(sam, dino, box_threshold=0.3, text_threshold=0.25), []
    found = maker.find(PICTURE, ["white dog", "cat", "white dog"], progress=lambda *done: told.append(done))
    assert {item.word for item in found} <= {"white dog", "cat"} and found and told == [(1, 2), (2, 2)]
    for item in found:
        left, top, right, bottom = item.box
        assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
        assert item.mask.shape == (HEIGHT, WIDTH) and item.mask.any() and 0 < item.score <= 1
        assert torch.equal(item.mask, sam.of_boxes(PICTURE, [item.box])[0])


class Seen:
    """A detector that has seen what it is told."""

    def __init__(self, *detections):
        self.detections = list(detections)

    def detect(self, image, phrase, box_threshold, text_threshold):
        return self.detections


def test_an_object_without_the_attribute_keeps_half_its_score(sam):
    seen = Seen(
        Detection(BOXES[0], 0.9, "dog"),
        Detection(BOXES[1], 0.8, "the white dog"),
        Detection(BOXES[1], 0.9, "the ."),
        Detection((70.0, 3.0, 90.0, 20.0), 0.9, "white dog"),
    )
    found = TextMasks(sam, seen).find(PICTURE, ["the white dog"])
    assert [(item.box, item.score) for item in found] == [(BOXES[1], 0.8), (BOXES[0], 0.45)]


def test_boxes_end_at_the_edges(sam):
    found = TextMasks(sam, Seen(Detection((-5.0, -1.0, 200.0, 39.0), 0.9, "dog"))).find(PICTURE, ["dog"])
    assert [item.box for item in found] == [(0.0, 0.0, 60.0, 39.0)]


def test_phrases_and_thresholds_that_can_not_be(sam, dino):
    with pytest.raises(WeaverError, match=r"'a dog\. a cat' has a full stop .*; 'the' has no word that can be found"):
        TextMasks(sam, dino).find(PICTURE, ["a dog. a cat", "the"])
    with pytest.raises(
        WeaverError, match="box_threshold: is 2, expected .*; text_threshold: is nan, expected a number"
    ):
        TextMasks(sam, dino, box_threshold=2, text_threshold=float("nan"))
    with pytest.raises(MaskError, match="no detector was loaded"):
        TextMasks(sam).find(PICTURE, ["dog"])


def test_points_that_give_nothing(sam, monkeypatch):
    monkeypatch.setattr(sam, "of_points", lambda image, points: torch.zeros(HEIGHT, WIDTH, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"points \[\[3, 4\]\] gave an empty mask: give more or others"):
        TextMasks(sam).at_points(PICTURE, [(3, 4)])


def test_models_are_read_from_folders(folder, dino, sam):
    assert torch.equal(Sam.load(folder / "sam").of_boxes(PICTURE, BOXES), sam.of_boxes(PICTURE, BOXES))
    again = GroundingDino.load(str(folder / "dino"))
    assert again.detect(PICTURE, "white dog", 0.3, 0.25) == dino.detect(PICTURE, "white dog", 0.3, 0.25)
    assert again.model.config.disable_custom_kernels


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        (GroundingDino, "sam", r"masks\.text\.detector: '.*sam' is a model of kind 'sam', expected 'grounding-dino'"),
        (Sam, "dino", r"masks\.text\.segmenter: '.*' is a model of kind 'grounding-dino', expected 'sam'"),
        (Sam, "", r"masks\.text\.segmenter: '.*' can't be loaded; the folder must hold a model with its processor"),
        (
            GroundingDino,
            None,
            r"^masks\.text\.detector: 'no/model' can't be loaded; it is not complete in the local cache, \S+: run once "
            r"without --offline \(or HF_HUB_OFFLINE\), or name a folder that holds it$",
        ),
    ],
    ids=["SAM as detector", "DINO as segmenter", "no model", "not in the cache"],
)
def test_models_that_can_not_be_had(folder, kind, source, message):
    with pytest.raises(WeaverError, match=message) as caught:
        kind.load("no/model" if source is None else folder / source, offline=True)
    assert "\n" not in str(caught.value)


def test_the_environment_says_offline_too(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeaverError, match=r"'no/model' can't be loaded; it is not complete in the local cache"):
        Sam.load("no/model")


def test_damaged_weights_are_told_with_their_folder(folder, tmp_path):
    copied = shutil.copytree(folder / "sam", tmp_path / "sam")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeaverError, match=r"masks\.text\.segmenter: '.*sam' can't be loaded; the folder must hold"):
        Sam.load(copied)


def test_a_tokenizer_that_is_not_there_is_told(folder, tmp_path):
    copied = shutil.copytree(folder / "dino", tmp_path / "dino")
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(WeaverError, match=r"detector: '.*dino' has no tokenizer with any words; the folder must hold"):
        GroundingDino.load(copied)


def test_a_detector_that_sees_nothing(dino, sam):
    """The real one: of no box transformers tells one empty text."""
    assert dino.detect(PICTURE, "dog", 1.0, 0.25) == []
    assert TextMasks(sam, dino, box_threshold=1.0).find(PICTURE, ["dog", "white cat"]) == []


def test_a_box_s_surest_word_is_read_however_low_the_box_s_threshold(dino, sam, monkeypatch):
    """Else a box between the two thresholds would be dropped, which a lower box threshold is to let in."""
    unread = [one for one in dino.detect(PICTURE, "cat", 0.2, 0.5) if not one.text]
    assert len(unread) == 1 and 0.2 < unread[0].score < 0.5
    told, detect = [], dino.detect
    monkeypatch.setattr(dino, "detect", lambda *arguments: told.append(detect(*arguments)) or told[-1])
    TextMasks(sam, dino, box_threshold=0.2, text_threshold=0.5).find(PICTURE, ["cat"])
    assert [one.text for one in told[0] if one.box == unread[0].box] != [""] and all(one.text for one in told[0])


@pytest.mark.parametrize(
    ("text", "score"),
    [("co ##rgi", 0.8), ("co", 0.8), ("##rgi", 0.8), ("white co ##rgi", 0.8), ("a", None), ("dog", None)],
)
def test_pieces_of_a_word_count_as_the_word(sam, text, score):
    found = TextMasks(sam, Seen(Detection(BOXES[0], 0.8, text))).find(PICTURE, ["a corgi"])
    assert [item.score for item in found] == ([] if score is None else [score])
    half = TextMasks(sam, Seen(Detection(BOXES[0], 0.8, "co"))).find(PICTURE, ["white corgi"])
    assert [item.score for item in half] == [0.4]
