"""From a plain mapping to a frozen `Job`: every field checked, every mistake told with the path of its field."""

from __future__ import annotations

import re
from dataclasses import fields as dataclass_fields
from pathlib import Path

from weaver.concepts.settings import TrainSettings
from weaver.errors import WeaverError
from weaver.fields import EMBEDDED, Fields
from weaver.job import (
    BackgroundSpec,
    ConceptSpec,
    FusionSpec,
    Job,
    JobError,
    MaskSpec,
    MasksSpec,
    TemplateSpec,
    TrainSpec,
)

__all__ = ["job_from_mapping"]

MASK_SOURCES = ("segmenter", "attention")
OVERLAPS = ("priority", "share")
SITES = ("embedded", "paper", "plug-and-play")
DEVICES = ("auto", "cpu", "cuda", "mps")
_PATHLIKE = re.compile(r"^[.~]|^/|\\|^[A-Za-z]:")
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?$")
_NAME = re.compile(r"^[\w][\w. -]*$")
_TOKEN = re.compile(r"^\S+$")


def job_from_mapping(mapping: object, *, folder: Path, source: str = "job") -> Job:
    """Check a mapping, as read from YAML or JSON, and freeze it.

    Parameters
    ----------
    folder : what relative paths in it are relative to.
    source : how to call it in errors, usually its file name.

    Raises `JobError`, one line with every problem, each led by its field: "concepts[1].mask.box: expected ...".
    """
    problems: list[str] = []
    fields = Fields(mapping, "", problems, folder)
    values = dict(
        model=_model(fields, "model", "embedded"),
        prompt=fields.text("prompt", "", required=True),
        negative_prompt=fields.text("negative_prompt", "", empty=True),
        seed=fields.whole("seed", 0),
        steps=fields.whole("steps", 50, least=1),
        size=_size(fields),
        device=fields.choice("device", DEVICES, "auto"),
        template=_template(fields.section("template")),
        masks=_masks(fields.section("masks")),
        fusion=_fusion(fields.section("fusion")),
        concepts=tuple(_concept(entry, ConceptSpec) for entry in fields.sections("concepts")),
        background=_concept(fields.section("background"), BackgroundSpec) if fields.has("background") else None,
    )
    inversion = fields.section("inversion")
    values["inversion_prompt"] = inversion.text("prompt", empty=True)
    inversion.finish()
    if not values["concepts"] and not values["background"]:
        fields.complain("concepts", "is missing; list at least one concept")
    fields.finish()
    job = Job(**values)
    _check_whole(job, fields)
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return job


def _model(fields: Fields, name: str, default: str | None) -> str | None:
    value = fields.text(name, default)
    if value is None or value == "embedded":
        return value
    folder = (fields.folder / Path(value).expanduser()).resolve()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            fields.complain(name, f"{value!r} is a folder without model_index.json, so no diffusers pipeline")
        return str(folder)
    if _PATHLIKE.search(value) or not _HUB_ID.match(value):
        fields.complain(name, f"{value!r} is no folder (looked at {folder}), no Hub id (owner/name) and not 'embedded'")
    return value


def _size(fields: Fields) -> tuple[int, int] | None:
    """`size: [width, height]`; kept as (height, width)."""
    if not fields.has("size"):
        return None
    sides = fields.numbers("size", 2, "[width, height] in pixels, such as [768, 768]")
    if sides is None:
        return None
    if any(side < 1 or side != int(side) for side in sides):
        fields.complain("size", f"must be whole pixels above 0, is [{sides[0]:g}, {sides[1]:g}]")
        return None
    return int(sides[1]), int(sides[0])


def _template(fields: Fields) -> TemplateSpec:
    if fields.has("image"):
        spec = TemplateSpec(image=fields.file("image"))
    else:
        spec = TemplateSpec(
            prompt=fields.text("prompt"),
            model=_model(fields, "model", None),
            seed=fields.whole("seed"),
            steps=fields.whole("steps", 50, least=1),
            guidance=fields.number("guidance", least=0),
            tries=fields.whole("tries", 1, least=1),
        )
    fields.finish()
    return spec


def _masks(fields: Fields) -> MasksSpec:
    spec = MasksSpec(
        source=fields.choice("source", MASK_SOURCES),
        dilation=fields.whole("dilation"),
        overlap=fields.choice("overlap", OVERLAPS, "priority"),
    )
    fields.finish()
    return spec


def _fusion(fields: Fields) -> FusionSpec:
    injection = fields.section("injection")
    spec = FusionSpec(
        suppression=fields.number("lambda", least=0),
        guidance=fields.number("guidance", least=0),
        sites=injection.choice("sites", SITES),
        resnet_window=injection.number("resnet", least=0, most=1),
        attention_window=injection.number("attention", least=0, most=1),
    )
    injection.finish()
    fields.finish()
    return spec


def _concept(fields: Fields, kind: type) -> BackgroundSpec:
    source = fields.exactly_one(("file", "train"))
    train = _train(fields.section("train")) if source == "train" else None
    file = fields.file("file") if source == "file" else None
    word = fields.text("word")
    if train and not word:
        fields.complain("word", "is missing; name the class the concept belongs to, such as 'dog'")
    name = fields.text("name", _default_name(file, train, word))
    if not _NAME.match(name):
        fields.complain("name", f"{name!r} must be letters, digits, '_', '-', '.' and spaces, not first a sign")
    prompt = fields.text("prompt")
    if train and prompt and train.token not in prompt:
        fields.complain("prompt", f"lacks the concept's token {train.token!r}; put it before {word!r}")
    values = dict(
        name=name,
        word=word,
        file=file,
        train=train,
        prompt=prompt,
        strength=fields.number("strength", 1.0, least=0),
        window=fields.window("window"),
        scale=fields.number("scale", 1.0),
    )
    if kind is ConceptSpec:
        values["mask"] = _mask(fields.section("mask"))
    fields.finish()
    return kind(**values)


def _default_name(file: Path | str | None, train: TrainSpec | None, word: str | None) -> str:
    if isinstance(file, Path):
        return file.stem
    shipped = file or (train.images if train and isinstance(train.images, str) else "")
    return shipped.removeprefix(EMBEDDED) or word or "concept"


def _train(fields: Fields) -> TrainSpec:
    token = fields.text("token", "<v1>")
    if not _TOKEN.match(token):
        fields.complain("token", f"{token!r} has white space in it; write it like '<v1>'")
    images = fields.files("images")
    if images is None and not fields.has("images"):
        fields.complain("images", "is missing; name a folder or a list of pictures")
    caption = fields.text("caption")
    if caption and "{token}" not in caption and token not in caption:
        fields.complain("caption", f"{caption!r} lacks the token; write {{token}} in it, as in 'a {{token}} dog'")
    readers = {"int": fields.whole, "bool": fields.truth}
    settings = {f.name: readers.get(f.type, fields.number)(f.name) for f in dataclass_fields(TrainSettings)}
    settings = {name: value for name, value in settings.items() if value is not None}
    fields.finish()
    try:
        TrainSettings(**settings)
    except WeaverError as error:
        fields.complain(None, str(error))
    return TrainSpec(images=images or (), token=token, caption=caption, settings=tuple(settings.items()))


def _mask(fields: Fields) -> MaskSpec:
    if not any(fields.has(name) for name in ("word", "file", "box")):
        fields.finish()
        return MaskSpec()
    kind = fields.exactly_one(("word", "file", "box"))
    box = fields.numbers("box", 4, "[left, top, right, bottom] in pixels or in parts of 1") if kind == "box" else None
    if box and not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        fields.complain("box", f"must have 0 <= left < right and 0 <= top < bottom, is {list(box)}")
    spec = MaskSpec(
        word=fields.text("word") if kind == "word" else None,
        file=fields.file("file") if kind == "file" else None,
        label=fields.whole("label") if kind == "file" else None,
        box=box,
    )
    fields.finish()
    return spec


def _check_whole(job: Job, fields: Fields) -> None:
    """What no field can tell by itself."""
    names: dict[str, str] = {}
    for place, spec in job.places():
        if other := names.get(spec.name):
            fields.complain(f"{place}.name", f"{spec.name!r} is taken by {other}; give each concept its own name")
        names.setdefault(spec.name, place)
        shipped = [value for value in (spec.file, spec.train and spec.train.images) if isinstance(value, str) and value]
        if shipped and not job.embedded:
            fields.complain(place, f"{shipped[0]!r} belongs to the embedded model, the model is {job.model!r}")
    if job.masks.source == "segmenter" and not job.embedded:
        fields.complain("masks.source", "the segmenter knows the embedded model's world only; use 'attention', "
                        "or give every concept a mask file or box")  # fmt: skip
