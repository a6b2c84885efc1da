"""`weave`: what can be known before sampling is told before it, and masks are taken in every form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_concept, shallow
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from weaver.checks import fusion_reasons
from weaver.errors import WeaverError
from weaver.fusion import ConceptUse
from weaver.job import FusionSpec, Job, JobError, MaskSpec
from weaver.job.resolve import check_model
from weaver.layers import EMBEDDED, PAPER, InjectionSites
from weaver.masks import compose_masks
from weaver.pipeline import weave
from weaver.places import Places

PROMPT = "a dog and a cat, mountain"


def halves() -> np.ndarray:
    masks = np.zeros((2, 32, 32), bool)
    masks[0, :, :12] = masks[1, :, 20:] = True
    return masks


@pytest.fixture
def calls(tiny_pipe):
    """Grows by one at every forward of the U-Net."""
    made = []
    handle = tiny_pipe.unet.register_forward_pre_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


FAULTS = {
    "suppression below 0": ({"suppression": -1}, "suppression: is -1, expected a finite number, 0 or more"),
    "suppression as text": ({"suppression": "0.2"}, "suppression: is '0.2'"),
    "guidance as text": ({"guidance": "7"}, "guidance: is '7'"),
    "guidance that is no number": ({"guidance": float("nan")}, "guidance: is nan"),
    "absent site": ({"sites": InjectionSites("odd", attentions=(1,))}, "attention l=1, where the U-Net has none"),
    "overlap": ({"overlap": "mix"}, "overlap is 'mix'"),
    "dilation below 0": ({"dilation": -1}, "dilation is -1"),
    "dilation that is no number": ({"dilation": float("nan")}, "dilation is nan"),
    "dilation between pixels": ({"dilation": 1.5}, "dilation is 1.5; expected whole pixels"),
    "feather": ({"feather": -1}, "feather is -1"),
    "down-sampling": ({"downsampling": "mean"}, "downsampling is 'mean'; expected one of area, nearest"),
    "empty masks": ({"masks": np.zeros((2, 32, 32))}, "the mask of c1 is empty; the mask of c2 is empty"),
    "two equal masks": ({"masks": np.ones((2, 32, 32))}, "c1 and c2 claim all of each other's mask"),
    "two equal boxes": ({"places": [MaskSpec(box=(0, 0, 8, 8))] * 2}, "c1 and c2 claim all of each other's mask"),
    "an empty composed mask": ({"masks": np.stack([np.ones((32, 32)), *np.zeros((2, 32, 32))])}, "mask of c2 is empty"),
    "composed masks over one": ({"masks": np.ones((3, 32, 32))}, "the masks of c1 and c2 overlap in 1024 pixels"),
    "masks of another number": ({"masks": np.ones((4, 32, 32))}, "or [3, 32, 32] with the background"),
    "a word the prompt lacks": ({"source_prompt": "a dog", "masks": None}, "no attention map for 'cat'"),
    "a word nobody knows": (
        {"places": [MaskSpec(), MaskSpec(word="lion")], "mask_source": "segmenter", "masks": None},
        "the segmenter does not know 'lion'",
    ),
    "template steps": ({"template_steps": 0}, "template_steps: is 0, expected a whole number from 1 to 999"),
    "steps": ({"steps": 2.0}, "steps: is 2.0"),
    "one step too many": ({"steps": 1000}, "steps: is 1000, expected a whole number from 1 to 999"),
}


def test_masks_that_leave_the_background_nothing_are_told_before_the_first_step(tiny_pipe, concepts, calls):
    masks = halves()
    masks[1] = ~masks[0]
    with pytest.raises(WeaverError, match="the masks leave the background's concept nothing"):
        weave(tiny_pipe, PROMPT, concepts[:2], background=concepts[4], masks=masks, steps=2)
    assert calls == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_before_the_first_step(tiny_pipe, concepts, calls, fault):
    changes, message = FAULTS[fault]
    masks = {} if "places" in changes else {"masks": halves()}
    with pytest.raises(WeaverError) as caught:
        weave(tiny_pipe, PROMPT, concepts[:2], **({"steps": 2, "template_steps": 2} | masks | changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert calls == []


class Foreign(AttnProcessor2_0):
    pass


def test_a_model_that_can_not_be_attached_to_is_told_before_the_first_step(tiny_pipe, concepts, calls):
    paths = (
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
    )
    attentions = [tiny_pipe.unet.get_submodule(path) for path in paths]
    own = [attention.processor for attention in attentions]
    job = Job("model", PROMPT, (), size=(32, 32), steps=2, fusion=FusionSpec(0.2, 7.5, "embedded", 0.8, 0.5))
    for attention in attentions:
        attention.processor = Foreign()
    try:
        with pytest.raises(WeaverError) as caught:
            weave(tiny_pipe, PROMPT, concepts[:2], masks=halves(), steps=2)
        assert f"{paths[0]} " in str(caught.value) and "has a Foreign" in str(caught.value)
        with pytest.raises(JobError, match=r"job.yaml: model: up_blocks.*attn2 .*has a Foreign"):
            check_model(job, tiny_pipe, "job.yaml")
    finally:
        for attention, processor in zip(attentions, own, strict=True):
            attention.processor = processor
    with pytest.raises(JobError, match=r"job.yaml: fusion.guidance: is nan, .*; fusion.lambda: is -1, "):
        wrong = dataclasses.replace(job.fusion, suppression=-1, guidance=float("nan"))
        check_model(dataclasses.replace(job, fusion=wrong), tiny_pipe, "job.yaml")
    check_model(job, tiny_pipe, "job.yaml")
    assert calls == []


def test_arguments_of_another_kind_are_told(tiny_pipe, concepts):
    with pytest.raises(
        WeaverError, match="Cannot weave: concepts: is a Concept, expected a list of concepts; size: is 64"
    ):
        weave(tiny_pipe, PROMPT, concepts[0], size=64)
    with pytest.raises(WeaverError, match="concepts: 'c1' is a str, no Concept and .*; background: 'hills' is a str"):
        weave(tiny_pipe, PROMPT, ["c1"], background="hills")


def test_types_that_weave_can_not_take_are_told_at_once_and_early(tiny_pipe, concepts, calls):
    wrong = {
        "negative_prompt": ["ugly"],
        "source_prompt": 3,
        "template": 5,
        "size": ("32", 32),
        "seed": "1",
        "template_steps": "2",
        "template_guidance": "7",
        "sites": "papers",
        "cache": "folder",
    }
    with pytest.raises(WeaverError) as caught:
        weave(tiny_pipe, None, concepts[:2], masks=halves(), steps=2, **wrong)
    message = str(caught.value)
    for reason in (
        "prompt: is None, expected one string",
        "negative_prompt: is ['ugly']",
        "source_prompt: is 3",
        "template: is 5, expected a picture, its file, or None",
        "size: is ('32', 32), expected (height, width) in pixels",
        "seed: is '1', expected a whole number",
        "template_steps: is '2', expected a whole number",
        "template_guidance: is '7', expected a finite number",
        "sites: is 'papers', expected an InjectionSites or one of paper, plug-and-play",
        "cache: is 'folder', expected a Cache: Cache(folder)",
    ):
        assert reason in message
    for arguments, reason in (
        ({"memory": "replayed"}, r"memory: is 'replayed', expected MemoryPlan\(features=...\)"),
        ({"places": "left"}, "places: is 'left', expected a list of one MaskSpec a concept"),
        ({"places": [(0, 0, 8, 8)] * 2}, "places: is .*, expected a list of one MaskSpec a concept"),
        ({"places": Places.from_masks(halves()[:1], ["c1"], (32, 32))}, "places are of 1 concepts, there are 2"),
        ({"seed": 2**64}, "seed: is 18446744073709551616, expected one of 64 bits"),
        ({"template_steps": 1000}, "template_steps: is 1000, expected a whole number from 1 to 999"),
        ({"masks": "left.png"}, "masks: is a str, expected an array"),
        ({"features": ["stored"]}, "features: is \\['stored'\\], expected one of stored"),
    ):
        with pytest.raises(WeaverError, match=reason):
            weave(tiny_pipe, PROMPT, concepts[:2], steps=2, **arguments)
    assert calls == [] and "\n" not in message


def test_sites_may_be_named_and_masks_listed(tiny_pipe, concepts):
    arguments = {"template": Image.new("RGB", (32, 32), "orange"), "steps": 2, "guidance": 2.0}
    first = weave(tiny_pipe, PROMPT, concepts[:2], masks=halves(), sites=PAPER, **arguments)
    named = weave(tiny_pipe, PROMPT, concepts[:2], masks=list(torch.tensor(halves())), sites="paper", **arguments)
    assert named.settings == first.settings and named.image.tobytes() == first.image.tobytes()


def test_a_mask_may_be_drawn_on_the_template_file(tiny_pipe, concepts, tmp_path):
    Image.new("RGB", (100, 50), "orange").save(tmp_path / "photo.png")
    drawn = np.zeros((50, 100), np.uint8)
    drawn[:, 30:50] = 255  # the left part of the middle 50 columns
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    arguments = {"places": [MaskSpec(file=tmp_path / "mask.png")], "steps": 1, "dilation": 0}
    woven = weave(tiny_pipe, PROMPT, concepts[:1], template=tmp_path / "photo.png", **arguments)
    assert woven.masks[0, 5].nonzero().flatten().tolist() == list(range(3, 16))
    with pytest.raises(WeaverError, match="the mask is 100x50, expected the template's 32x32"):
        weave(tiny_pipe, PROMPT, concepts[:1], template=Image.new("RGB", (32, 32)), **arguments)


def test_other_things_than_fusing_pipelines_are_refused(tiny_pipe, concepts):
    with pytest.raises(WeaverError, match="the U-Net is a NoneType, expected a diffusers UNet2DConditionModel"):
        weave(object(), PROMPT, concepts[:2])


def test_all_that_stands_against_a_fusion_comes_at_once(tiny_pipe, concepts_v):
    use = ConceptUse(concepts_v[0], strength=-1)
    reasons = fusion_reasons(
        tiny_pipe,
        [use],
        size=(30, 32),
        steps=0,
        sites=InjectionSites("odd", resnets=(99,)),
        amounts={"guidance": -1, "suppression": -1},
    )
    for part in ("steps: is 0", "size: is 32x30", "suppression", "guidance", "l=99", "strength of c1", "another base"):
        assert sum(part in reason for reason in reasons) == 1, part
    assert not fusion_reasons(tiny_pipe, size=(32, 32), steps=1, sites=EMBEDDED, amounts={"guidance": 0})


def test_composed_masks_are_taken_as_they_are(tiny_pipe, concepts):
    arguments = {"template": Image.new("RGB", (32, 32), "orange"), "steps": 1, "guidance": 2.0}
    first = weave(tiny_pipe, PROMPT, concepts[:2], masks=halves(), dilation=2, **arguments)
    assert first.masks[0, 0].sum() == 14
    again = weave(tiny_pipe, PROMPT, concepts[:2], masks=first.masks, dilation=3, **arguments)
    assert torch.equal(first.masks, again.masks)
    assert first.image.tobytes() == again.image.tobytes()


def test_known_masks_are_checked_while_others_are_still_to_be_found(tiny_pipe):
    """What is given goes together or not, whatever is found later."""
    specs = [MaskSpec(box=(0, 0, 8, 8)), MaskSpec(), MaskSpec(box=(0, 0, 8, 8))]
    places = Places.build(specs, ["dog", "cat", "fox"], ["a", "b", "c"], source="attention", size=(32, 32))
    settings = {"dilation": 0, "overlap": "priority", "names": ["rex", "tom", "foxy"]}
    with pytest.raises(WeaverError, match="rex and foxy claim all of each other's mask"):
        places.compose((32, 32), **settings)
    assert places.word_reasons(tiny_pipe, "a Cat") == []
    found = dataclasses.replace(places, given=tuple(compose_masks(halves())[[0, 1, 2]] > 0.5))
    assert found.compose((32, 32), **settings).shape == (4, 32, 32)


def test_a_unet_that_no_sites_are_known_for_takes_those_it_is_given(tiny_pipe):
    pipe, sites = shallow(tiny_pipe, levels=3), InjectionSites("some", resnets=(4,), attentions=(4, 7))
    uses = [ConceptUse(make_concept(pipe, number, word)) for number, word in ((1, "dog"), (2, "cat"))]
    options = {"masks": halves(), "steps": 2, "template_steps": 2}
    with pytest.raises(WeaverError, match="No injection sites are known .* pass an InjectionSites of your own"):
        weave(pipe, PROMPT, uses, **options)
    assert weave(pipe, PROMPT, uses, sites=sites, **options).settings["injection"]["sites"] == "some"
