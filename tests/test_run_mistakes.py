"""Mistakes that a job alone does not show: told in one line before any sampling, and nothing is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jobs import TRAINED, job_of

from weaver.errors import WeaverError
from weaver.job import choose
from weaver.run import run_job

MISTAKES = {
    "concept of another base model": (
        {"concepts": [{"file": "stranger.safetensors"}]},
        "concepts[0].file: concept 'stranger' belongs to another base model",
    ),
    "concept file unreadable": (
        {"concepts": [{"file": "broken.safetensors"}]},
        "concepts[0].file: ",
    ),
    "token missing in the prompt": (
        {"concepts": [{"file": "tom.safetensors", "prompt": "a cat"}]},
        "concepts[0].prompt: 'a cat' lacks the concept's token '<v1>'",
    ),
    "token of another concept": (
        {"concepts": [{"file": "tom.safetensors", "prompt": "a <v1> cat, <v2> dog"}, {"file": "rex.safetensors"}]},
        "concepts[0].prompt: 'a <v1> cat, <v2> dog' holds another concept's token '<v2>'",
    ),
    "class word missing in the prompt": (
        {"prompt": "a dog", "concepts": [{"file": "tom.safetensors"}]},
        "concepts[0]: prompt 'a dog' names 'cat' 0 times",
    ),
    "mask of another size": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "flat.png"}}]},
        "flat.png: the mask is 32x20, expected the template's 32x32, or its shape at another size",
    ),
    "detector that is not there": (
        {"masks": {"source": "text", "text": {"detector": "captions"}}, "concepts": [{"file": "tom.safetensors"}]},
        "can't be loaded; the folder must hold a model with its processor",
    ),
    "phrase that no detector takes": (
        {"masks": {"source": "text"}, "concepts": [{"file": "tom.safetensors", "mask": {"word": "a cat. a dog"}}]},
        "concepts[0].mask: 'a cat. a dog' has a full stop in it",
    ),
    "points outside": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"points": [[40, 3]]}}]},
        "concepts[0].mask: points [[40.0, 3.0]] are outside the 32x32 template",
    ),
    "label that is nowhere": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "left.png", "label": 7}}]},
        "left.png: label 7 is nowhere in it; it holds 0, 255",
    ),
    "segmenter for another model": ({"masks": {"source": "segmenter"}}, "masks.source: the segmenter knows"),
    "shipped concept for another model": (
        {"prompt": "a dog", "concepts": [{"file": "embedded:pug"}]},
        "concepts[0]: 'pug' belongs to the embedded model, the model is ",
    ),
    "shipped pictures for another model": (
        {"prompt": "a dog", "concepts": [{"word": "dog", "train": {"images": "embedded:pug"}}]},
        "concepts[0]: 'pug' belongs to the embedded model, the model is ",
    ),
    "empty mask": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "empty.png"}}]},
        "concepts[0].mask: ",
    ),
    "box outside": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"box": [0, 0, 99, 10]}}]},
        "concepts[0].mask: box",
    ),
    "unreadable mask": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "broken.png"}}]},
        "concepts[0].mask.file: ",
    ),
    "unreadable template": ({"template": {"image": "broken.png"}}, "template.image: "),
    "unreadable training picture": (
        {"concepts": [{"word": "cat", "train": {"images": ["pictures/0.png", "broken.png"]}}]},
        "concepts[0].train.images[1]: ",
    ),
    "caption without the token": (
        {"concepts": [TRAINED | {"train": TRAINED["train"] | {"images": "captions"}}]},
        "concepts[0].train.images[0].txt: ",
    ),
    "token in the prompt": (
        {"prompt": "a <v1> cat and a dog"},
        "prompt: 'a <v1> cat and a dog' holds '<v1>', the token of tom; write 'cat' alone",
    ),
    "token in the negative prompt": ({"negative_prompt": "<v1> cat"}, "negative_prompt: '<v1> cat' holds '<v1>'"),
    "token in the source prompt": ({"inversion": {"prompt": "<v2> dog"}}, "inversion.prompt: '<v2> dog' holds '<v2>'"),
    "token in the template's prompt": ({"template": {"prompt": "<v2> dog"}}, "template.prompt: '<v2> dog' holds"),
    "one mask for two": (
        {"concepts": [{"file": name, "mask": {"file": "left.png"}} for name in ("tom.safetensors", "rex.safetensors")]},
        "concepts[0].mask and concepts[1].mask claim all of each other's mask",
    ),
    "masks that leave the background nothing": (
        {
            "concepts": [{"file": "tom.safetensors", "mask": {"box": [0, 0, 1, 1]}}],
            "background": {"file": "hills.safetensors"},
        },
        "background: the masks cover the whole picture and leave it nothing",
    ),
    "word that is not in the prompt": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"word": "unicorn"}}]},
        "concepts[0].mask: no attention map for 'unicorn'",
    ),
    "more template steps than the model has": (
        {"template": {"model": "same", "steps": 1000}},
        "template.steps: is 1000, expected a whole number from 1 to 999",
    ),
    "settings that only the embedded model fills up": (
        {"concepts": [TRAINED | {"train": TRAINED["train"] | {"layers": "all", "rank": None}}]},
        "concepts[0].train: training settings: layers is 'all' and rank is 0",
    ),
    "more steps than the model has": ({"steps": 1000}, "steps: is 1000, expected a whole number from 1 to 999"),
    "size the model can't draw": ({"size": [30, 32]}, "size: is 30x32, expected multiples of 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_sampling_and_leaves_nothing(job_folder, tmp_path, monkeypatch, mistake):
    changes, message = MISTAKES[mistake]
    monkeypatch.setattr(choose, "template_picture", lambda *a, **k: pytest.fail("sampling began"))
    with pytest.raises(WeaverError) as caught:
        run_job(job_of(job_folder, **changes), tmp_path / "out", source="job.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("job.yaml: ")
    assert list(tmp_path.iterdir()) == []


def test_sites_that_the_model_lacks_are_told_with_their_field(job_folder, tmp_path):
    """No name that a job takes lacks a layer in the models it takes; a model of one's own may."""
    job = job_of(job_folder)
    job = replace(job, fusion=replace(job.fusion, sites="sdxl"))
    with pytest.raises(
        WeaverError, match="^job.yaml: fusion.injection.sites: injection sites 'sdxl' name attention l=1"
    ):
        run_job(job, tmp_path / "out", source="job.yaml")
