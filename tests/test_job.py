"""Job files: what they may say, what they come to, and one clear line for each mistake."""

from __future__ import annotations

import json
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from weaver.concepts.settings import TrainSettings
from weaver.demo import DEMO_JOB
from weaver.job import JobError
from weaver.job.file import job_to_mapping, read_job
from weaver.job.parse import job_from_mapping

GOOD = {
    "model": "some/model",
    "prompt": "a cat and a dog, mountain background",
    "concepts": [
        {"name": "tom", "word": "cat", "train": {"images": "pictures", "token": "<v1>"}},
        {"name": "rex", "word": "dog", "file": "rex.safetensors"},
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    (tmp_path / "rex.safetensors").write_bytes(b"")
    return tmp_path


def changed(**changes) -> dict:
    return GOOD | changes


def with_concept(**changes) -> dict:
    """The good job with its first concept changed; None removes a field."""
    first = {key: value for key, value in (GOOD["concepts"][0] | changes).items() if value is not None}
    return GOOD | {"concepts": [first, GOOD["concepts"][1]]}


def with_train(**changes) -> dict:
    return with_concept(train=GOOD["concepts"][0]["train"] | changes)


def test_defaults_and_paths(folder):
    job = job_from_mapping(GOOD, folder=folder)
    assert job.seed == 0 and job.steps == 50 and job.size is None and job.background is None
    assert job.concepts[0].train.images == (folder / "pictures",)
    assert job.concepts[1].file == folder / "rex.safetensors"
    assert job.fusion.guidance is None and job.masks.source is None


def test_everything_a_job_can_say_survives_writing_and_reading(folder, tmp_path_factory):
    mapping = {
        "model": "some/model",
        "prompt": "a cat and a dog",
        "negative_prompt": "blurry",
        "seed": 3,
        "steps": 20,
        "size": [768, 512],
        "device": "cpu",
        "template": {
            "prompt": "two pets", "model": "other/model", "seed": 9, "steps": 30, "guidance": 5, "tries": 4
        },
        "concepts": [
            {
                "name": "tom", "word": "cat", "prompt": "a <v1> cat",
                "strength": 0.8, "window": [0.1, 0.9], "scale": 0.5,
                "negative_prompt": "dog",
                "train": {
                    "images": ["pictures", "mask.png"], "token": "<v1>", "caption": "one {token} cat", "steps": 7,
                    "learning_rate": "1e-4", "flip": True,
                },
                "mask": {"file": "mask.png", "label": 2},
            },
            {"file": "rex.safetensors", "mask": {"box": [0, 0, 0.5, 1]}},
            {"name": "third", "file": "rex.safetensors", "mask": {"word": "puppy"}},
            {"name": "by order", "file": "rex.safetensors", "mask": {"word": "white dog", "order": 2}},
            {"name": "by rank", "file": "rex.safetensors", "mask": {"rank": 1}},
            {"name": "at", "file": "rex.safetensors", "mask": {"at": [0.5, 0.25]}},
            {"name": "around", "file": "rex.safetensors", "mask": {"around": [3, 4, 50, 60]}},
            {"name": "outlined", "file": "rex.safetensors", "mask": {"polygon": [[0, 0], [9, 0], [9, 9.5]]}},
            {"name": "pointed at", "file": "rex.safetensors", "mask": {"points": [[20, 30]]}},
            {"name": "coloured", "file": "rex.safetensors", "mask": {"file": "mask.png", "label": "#e69f00"}},
        ],
        "background": {"name": "hills", "file": "rex.safetensors", "word": "mountain"},
        "inversion": {"prompt": "a photo"},
        "keep_background": False,
        "masks": {
            "source": "text", "dilation": 0.3, "overlap": "share", "min_area": 9, "fill_holes": True, "feather": 4,
            "downsampling": "nearest", "text": {
                "detector": "pictures", "segmenter": "some/sam", "box_threshold": 0.4, "text_threshold": 0.1
            },
        },
        "fusion": {
            "lambda": 0.3, "guidance": 6, "eta": 0.2, "injection": {
                "sites": "plug-and-play", "resnet": 0.7, "attention": 0.4, "features": "replayed"
            },
        },
    }  # fmt: skip
    job = job_from_mapping(mapping, folder=folder)
    assert job.size == (512, 768)
    assert dict(job.concepts[0].train.settings) == {"steps": 7, "learning_rate": 1e-4, "flip": True}
    assert job.concepts[1].name == "rex" and job.concepts[1].mask.box == (0, 0, 0.5, 1)
    assert job.concepts[0].mask.label == 2 and job.concepts[-1].mask.label == "#e69f00"
    assert job.masks.text.detector == folder / "pictures" and job.masks.text.segmenter == "some/sam"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    written = json.loads(json.dumps(job_to_mapping(job, elsewhere)))
    assert job_from_mapping(written, folder=elsewhere) == job
    with_picture = replace(job, template=replace(job.template, image=folder / "mask.png"))
    assert job_to_mapping(with_picture, elsewhere)["template"].keys() == {"image"}


def test_every_training_setting_can_be_given(folder):
    values = {f.name: TrainSettings.embedded().__dict__[f.name] for f in dataclass_fields(TrainSettings)}
    job = job_from_mapping(with_train(**values), folder=folder)
    assert TrainSettings(**dict(job.concepts[0].train.settings)) == TrainSettings.embedded()


def test_settings_that_suit_the_embedded_model_alone_are_left_to_it(folder):
    """A job of the embedded model need not tell the rank that it has by itself; which model it is, is known later."""
    for wishes in ({"layers": "all"}, {"batch": 0}):
        job = job_from_mapping(with_train(**wishes), folder=folder)
        assert TrainSettings.embedded(**dict(job.concepts[0].train.settings))


def test_the_job_that_ships_is_in_order():
    job, _ = read_job(DEMO_JOB)
    assert job.model == "embedded" and len(job.concepts) >= 2 and job.background is not None
    assert all(spec.train and spec.train.images.startswith("embedded:") for spec in job.everyone)


MISTAKES = {
    "unknown field": (changed(lamda=0.3), "lamda: unknown field"),
    "unknown nested field": (changed(fusion={"lamda": 0.3}), "fusion.lamda: unknown field; did you mean 'lambda'?"),
    "unknown field of a concept": (
        with_concept(strenght=1),
        "concepts[0].strenght: unknown field; did you mean 'strength'?",
    ),
    "zero steps": (changed(steps=0), "steps: must be at least 1, is 0"),
    "zero template steps": (changed(template={"steps": 0}), "template.steps: must be at least 1"),
    "zero training steps": (with_train(steps=0), "concepts[0].train: training settings: steps is 0"),
    "half steps": (changed(steps=2.5), "steps: expected a whole number, found 2.5"),
    "no prompt": (changed(prompt=None), "prompt: is missing"),
    "empty prompt": (changed(prompt="  "), "prompt: is empty"),
    "no concepts": (changed(concepts=None), "concepts: is missing"),
    "empty concepts": (changed(concepts=[]), "concepts: is missing; list at least one concept"),
    "concepts no list": (changed(concepts={"file": "rex.safetensors"}), "concepts: expected a list"),
    "a concept that is no mapping": (changed(concepts=["tom"]), "concepts[0]: expected fields with names, found 'tom'"),
    "file and train": (with_concept(file="rex.safetensors"), "concepts[0]: give exactly one of file, train"),
    "neither file nor train": (with_concept(train=None), "concepts[0]: give exactly one of file, train (found none)"),
    "no such concept file": (
        changed(concepts=[{"file": "no.safetensors"}]),
        "concepts[0].file: 'no.safetensors' is not there",
    ),
    "pictures missing": (with_train(images="nowhere"), "concepts[0].train.images: 'nowhere' is not there"),
    "a name that no file can have": (with_train(images="a" * 300), "concepts[0].train.images: 'aaaaaaaaaa"),
    "a model's name that no folder can have": (changed(model="./" + "a" * 300), "model: './aaaaaaaaaa"),
    "a template that ships": (
        changed(template={"image": "embedded:pug"}),
        "template.image: 'embedded:pug' is no file; what ships are concepts",
    ),
    "pictures that ship in a list": (
        with_train(images=["embedded:pug"]),
        "concepts[0].train.images[0]: 'embedded:pug' is no file; pictures that ship stand alone, not in a list",
    ),
    "a mask that ships": (
        with_concept(mask={"file": "embedded:pug"}),
        "concepts[0].mask.file: 'embedded:pug' is no file; what ships",
    ),
    "no class word": (with_concept(word=None), "concepts[0].word: is missing"),
    "token with white space": (with_train(token="<v 1>"), "concepts[0].train.token: token '<v 1>' is empty or has"),
    "token missing in the prompt": (
        with_concept(prompt="a cat"),
        "concepts[0].prompt: lacks the concept's token '<v1>'",
    ),
    "token that is the class word": (
        with_train(token="cat"),
        "concepts[0].train.token: token 'cat' stands in the class word 'cat'; take one that is no word, as '<cat>'",
    ),
    "caption without token": (with_train(caption="a cat"), "concepts[0].train.caption: 'a cat' lacks the token"),
    "the same name twice": (with_concept(name="rex"), "concepts[1].name: 'rex' is taken by concepts[0]"),
    "a name but for its case": (with_concept(name="Rex"), "concepts[1].name: 'rex' is taken by concepts[0]"),
    "name that is no file name": (with_concept(name="../tom"), "concepts[0].name: '../tom' must be letters"),
    "negative strength": (with_concept(strength=-1), "concepts[0].strength: must be between 0 and 2, is -1"),
    "strength far past the concept": (with_concept(strength=3), "concepts[0].strength: must be between 0 and 2, is 3"),
    "window turned round": (with_concept(window=[0.8, 0.2]), "concepts[0].window: must be [start, end]"),
    "box of three": (
        with_concept(mask={"box": [0, 0, 1]}),
        "concepts[0].mask.box: expected [left, top, right, bottom]",
    ),
    "box turned round": (with_concept(mask={"box": [9, 0, 1, 5]}), "concepts[0].mask.box: must have 0 <= left < right"),
    "box and file": (
        with_concept(mask={"box": [0, 0, 1, 1], "file": "mask.png"}),
        "concepts[0].mask: give exactly one of",
    ),
    "mask file missing": (with_concept(mask={"file": "m.png"}), "concepts[0].mask.file: 'm.png' is not there"),
    "model folder missing": (changed(model="./none"), "model: './none' is no folder"),
    "model folder without a model": (
        changed(model="pictures"),
        "model: 'pictures' is a folder without model_index.json",
    ),
    "two choices": (with_concept(mask={"order": 1, "at": [3, 4]}), "concepts[0].mask: give at most one of order, rank"),
    "choice beside a box": (
        with_concept(mask={"box": [0, 0, 1, 1], "rank": 1}),
        "concepts[0].mask.rank: chooses among objects of a word",
    ),
    "order zero": (with_concept(mask={"order": 0}), "concepts[0].mask.order: is 0, expected a whole number, 1 or"),
    "point of three": (with_concept(mask={"at": [1, 2, 3]}), "concepts[0].mask.at: expected a point [x, y]"),
    "polygon of two": (
        with_concept(mask={"polygon": [[1, 2], [3, 4]]}),
        "concepts[0].mask.polygon: expected three or more corners",
    ),
    "points without pairs": (
        with_concept(mask={"points": [1, 2]}),
        "concepts[0].mask.points: expected a list of points",
    ),
    "label without a file": (with_concept(mask={"label": 2}), "concepts[0].mask.label: is of a mask's file"),
    "label of a box": (
        with_concept(mask={"box": [0, 0, 1, 1], "label": 2}),
        "concepts[0].mask.label: is of a mask's file",
    ),
    "threshold above one": (
        changed(masks={"text": {"box_threshold": 1.5}}),
        "masks.text.box_threshold: must be between 0 and 1",
    ),
    "detector of no kind": (changed(masks={"text": {"detector": "./no"}}), "masks.text.detector: './no' is no folder"),
    "unknown backend": (changed(masks={"text": {"backend": "mine"}}), "masks.text.backend: 'mine' is not one of"),
    "kept and changed": (
        changed(keep_background=True, background={"file": "rex.safetensors", "word": "mountain"}),
        "keep_background: the background is a concept, which changes it; leave one of the two out",
    ),
    "kept that is no truth value": (changed(keep_background="all"), "keep_background: expected true or false"),
    "dilation between pixels": (changed(masks={"dilation": 2.5}), "masks.dilation: must be whole pixels or a part of"),
    "negative dilation": (changed(masks={"dilation": -1}), "masks.dilation: must be at least 0, is -1"),
    "dilation beyond 32 bits": (changed(masks={"dilation": 2**33}), "masks.dilation: must be at most 4294967295"),
    "feather between pixels": (changed(masks={"feather": 0.5}), "masks.feather: expected a whole number"),
    "unknown mask source": (changed(masks={"source": "atention"}), "masks.source: 'atention' is not one of"),
    "negative lambda": (changed(fusion={"lambda": -0.5}), "fusion.lambda: must be at least 0"),
    "lambda no number": (changed(fusion={"lambda": "much"}), "fusion.lambda: expected a number, found 'much'"),
    "window past the end": (
        changed(fusion={"injection": {"resnet": 1.5}}),
        "fusion.injection.resnet: must be between 0 and 1",
    ),
    "unknown features": (
        changed(fusion={"injection": {"features": "kept"}}),
        "fusion.injection.features: 'kept' is not one of stored",
    ),
    "unknown sites": (changed(fusion={"injection": {"sites": "mine"}}), "fusion.injection.sites: 'mine' is not one of"),
    "sites of no model that jobs are for": (
        changed(fusion={"injection": {"sites": "sdxl"}}),
        "fusion.injection.sites: 'sdxl' is not one of paper, plug-and-play, embedded",
    ),
    "size of one number": (changed(size=512), "size: expected [width, height]"),
    "seed beyond 64 bits": (changed(seed=10**23), "seed: must be at most 4294967295"),
    "training seed beyond 64 bits": (with_train(seed=10**23), "concepts[0].train.seed: must be at most 4294967295"),
    "template seed beyond 64 bits": (changed(template={"seed": 2**63}), "template.seed: must be at most 4294967295"),
    "number beyond floats": (changed(fusion={"lambda": 10**400}), "fusion.lambda: expected a number"),
    "home of nobody": (
        changed(concepts=[{"file": "~nobody-here/x"}]),
        "concepts[0].file: '~nobody-here/x' is not there",
    ),
    "model in the home of nobody": (changed(model="~nobody-here/x"), "model: '~nobody-here/x' is no folder"),
    "same as nothing": (changed(model="./same"), "model: './same' is no folder"),
    "token in a longer word": (
        with_concept(prompt="a sksy cat", train={"images": "pictures", "token": "sks"}),
        "concepts[0].prompt: lacks the concept's token 'sks'",
    ),
    "seed true": (changed(seed=True), "seed: expected a whole number, found True"),
    "negative seed": (changed(seed=-1), "seed: must be at least 0"),
    "picture and prompt": (
        changed(template={"image": "mask.png", "prompt": "x"}),
        "template.prompt: has no meaning beside image",
    ),
}


def test_the_words_of_a_choice_are_told_once(folder):
    with pytest.raises(JobError) as caught:
        job_from_mapping(changed(masks={"overlap": "zzz"}), folder=folder, source="my.yaml")
    assert str(caught.value) == "my.yaml: masks.overlap: 'zzz' is not one of priority, share"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_field(folder, mistake):
    mapping, message = MISTAKES[mistake]
    with pytest.raises(JobError) as caught:
        job_from_mapping(mapping, folder=folder, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [None, "tom", 5, ["tom"]], ids=str)
def test_an_entry_that_is_no_concept_is_told_once(folder, broken):
    for concepts in ([broken, broken], [GOOD["concepts"][0] | {"train": broken or 7}, broken]):
        with pytest.raises(JobError) as caught:
            job_from_mapping(changed(concepts=concepts), folder=folder, source="my.yaml")
        assert str(caught.value).count("concepts[") == 2 and "is taken" not in str(caught.value)


def test_concepts_that_are_no_list_are_told_once(folder):
    with pytest.raises(JobError) as caught:
        job_from_mapping(changed(concepts={"file": "rex.safetensors"}), folder=folder)
    assert str(caught.value).count("concepts") == 1


def test_all_mistakes_are_told_at_once(folder):
    with pytest.raises(JobError) as caught:
        job_from_mapping(changed(steps=0, seed=-1, colour="red"), folder=folder)
    assert all(part in str(caught.value) for part in ("steps: ", "seed: ", "colour: "))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: [", "line 1 column 10: not valid YAML"),
        ("prompt: a\nprompt: b\n", "line 2 column 1: not valid YAML: 'prompt' stands twice"),
        ("just text", "expected fields with names, found 'just text'"),
        ("", "expected fields with names, found nothing"),
        ("prompt: \x00", "not valid YAML"),
        ("prompt: {{name}}", "line 1 column 10: not valid YAML: a field's name must be plain text"),
        ("prompt: 2020-13-45", "not valid YAML: month must be in 1..12"),
        ("weaver_manifest: 2\njob: {}", "weaver_manifest: is 2, this release reads 1"),
        ("weaver_manifest: true\njob: {}", "weaver_manifest: is True, this release reads 1"),
        ("weaver_manifest: 1\njob: {}", "not a whole manifest: inputs, record.versions, record.weights must be"),
        ("weaver_manifest: 1\nrecord: [1]", "not a whole manifest: job, inputs, record.versions, record.weights must"),
    ],
    ids=[
        *("broken", "twice", "text", "empty", "control", "braces", "date"),
        *("version 2", "version true", "no record", "record a list"),
    ],
)
def test_files_that_are_no_jobs(tmp_path, text, message):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(JobError) as caught:
        read_job(tmp_path / "job.yaml")
    assert "job.yaml" in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(JobError, match="none.yaml: can't be read"):
        read_job(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(JobError, match="binary.yaml: is no text file in UTF-8"):
        read_job(tmp_path / "binary.yaml")


def test_a_job_file_and_a_manifest_are_read_alike(folder):
    (folder / "job.yaml").write_text(yaml.safe_dump(GOOD))
    manifest = {"weaver_manifest": 1, "job": GOOD, "inputs": {}, "record": {"versions": {}, "weights": {}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (job, none), (same, read) = read_job(folder / "job.yaml"), read_job(folder / "manifest.json")
    assert job == same and none is None and read == manifest


def test_a_merge_key_takes_fields_over(folder):
    (folder / "job.yaml").write_text(
        "prompt: a cat and a dog\n"
        "concepts:\n"
        "- &one {word: cat, train: {images: pictures, token: <v1>}, strength: 0.5}\n"
        "- &two {<<: *one, word: dog}\n"
        "- {<<: *two, name: third}\n"
    )
    job, _ = read_job(folder / "job.yaml")
    assert [(spec.name, spec.word, spec.strength) for spec in job.concepts] == [
        ("cat", "cat", 0.5),
        ("dog", "dog", 0.5),
        ("third", "dog", 0.5),
    ]
