"""One concept of a job file, the background's included, from a plain mapping to a frozen spec."""

from __future__ import annotations

import re
from dataclasses import fields as dataclass_fields
from pathlib import Path

from weaver.choices import MOST_STRENGTH, PARTS
from weaver.concepts.bank_folder import BankFolder
from weaver.concepts.prompts import names_token, naming_reasons
from weaver.concepts.settings import CHOICES, TrainSettings
from weaver.errors import WeaverError
from weaver.job import BackgroundSpec, ConceptSpec, TrainSpec
from weaver.job.fields import BANK, EMBEDDED, Fields
from weaver.job.parse_mask import parse_mask

__all__ = ["parse_concept"]

_NAME = re.compile(r"^[\w][\w. -]*$")


def parse_concept(fields: Fields, kind: type[BackgroundSpec]) -> BackgroundSpec:
    """Read a section of a job file as a `kind`, `ConceptSpec` or `BackgroundSpec`; complaints go to `fields`."""
    source = fields.exactly_one(("file", "train"))
    train = _train(fields.section("train")) if source == "train" else None
    file = _concept_file(fields) if source == "file" else None
    token = fields.text("token") if source == "file" else None
    word = fields.text("word")
    if train and not word:
        fields.complain("word", "is missing; name the class the concept belongs to, such as 'dog'")
    elif train:
        for reason in naming_reasons(train.token, word):
            fields.complain("train.token", reason)
    name = fields.text("name", _default_name(file, train, word))
    if not _NAME.match(name):
        fields.complain("name", f"{name!r} must be letters, digits, '_', '-', '.' and spaces, not first a sign")
    prompt = fields.text("prompt")
    if train and prompt and not names_token(prompt, train.token):
        fields.complain("prompt", f"lacks the concept's token {train.token!r}; put it before {word!r}")
    values = dict(
        name=name,
        word=word,
        file=file,
        token=token,
        train=train,
        prompt=prompt,
        strength=fields.number("strength", 1.0, least=0, most=MOST_STRENGTH),
        window=fields.window("window"),
        scale=fields.number("scale", 1.0),
        negative_prompt=fields.text("negative_prompt", empty=True),
        parts=fields.choice("parts", PARTS, "whole"),
    )
    if kind is ConceptSpec:
        values["mask"] = parse_mask(fields.section("mask"))
    fields.finish()
    return kind(**values)


def _concept_file(fields: Fields) -> Path | str | None:
    """A file as `Fields.file` reads it, or that of a concept in the bank."""
    value = fields.text("file")
    if value is None or not value.startswith(BANK):
        return fields.file("file", shipped=True)
    try:
        return BankFolder().path(value.removeprefix(BANK)).resolve()
    except WeaverError as error:
        fields.complain("file", str(error))
        return None


def _default_name(file: Path | str | None, train: TrainSpec | None, word: str | None) -> str:
    if isinstance(file, Path):
        return file.stem
    shipped = file or (train.images if train and isinstance(train.images, str) else "")
    return shipped.removeprefix(EMBEDDED) or word or "concept"


def _train(fields: Fields) -> TrainSpec:
    token = fields.text("token", "<v1>")
    images = fields.files("images")
    if images is None and not fields.has("images"):
        fields.complain("images", "is missing; name a folder or a list of pictures")
    caption = fields.text("caption")
    if caption and not names_token(caption.replace("{token}", token), token):
        fields.complain("caption", f"{caption!r} lacks the token; write {{token}} in it, as in 'a {{token}} dog'")
    readers = {"int": fields.whole, "bool": fields.truth, "str": lambda name: fields.choice(name, CHOICES[name])}
    settings = {f.name: readers.get(f.type, fields.number)(f.name) for f in dataclass_fields(TrainSettings)}
    settings = {name: value for name, value in settings.items() if value is not None}
    fields.finish()
    try:
        TrainSettings.embedded(**settings)  # which fills up more than the others do; which model it is, is known later
    except WeaverError as error:
        fields.complain(None, str(error))
    return TrainSpec(images=images or (), token=token, caption=caption, settings=tuple(settings.items()))
