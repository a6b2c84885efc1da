"""Where a concept stands, and who finds words: from plain mappings to frozen specs."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from os.path import isdir
from pathlib import Path

from weaver.choices import TEXT_BACKENDS
from weaver.job import MaskSpec, TextSpec
from weaver.job.fields import LARGEST, Fields, is_hub_id, resolve_path
from weaver.job.mask_rules import FORMS, mask_reasons

__all__ = ["parse_mask", "parse_text"]


def parse_mask(fields: Fields) -> MaskSpec:
    """Read the `mask` of a concept; complaints go to `fields`."""
    label = fields.text("label") if fields.has("label") else None
    spec = MaskSpec(
        word=fields.text("word"),
        order=fields.whole("order", least=-LARGEST),
        rank=fields.whole("rank", least=-LARGEST),
        at=fields.numbers("at", 2, FORMS["at"]),
        around=fields.numbers("around", 4, FORMS["around"]),
        file=fields.file("file"),
        label=int(label) if label is not None and label.isdecimal() else label,
        box=fields.numbers("box", 4, FORMS["box"]),
        polygon=fields.points("polygon", 3, FORMS["polygon"]),
        points=fields.points("points", 1, FORMS["points"]),
    )
    given = [field.name for field in dataclass_fields(spec) if fields.has(field.name)]
    for name, reason in mask_reasons(spec, given):
        fields.complain(name, reason)
    fields.finish()
    return spec


def parse_text(fields: Fields) -> TextSpec:
    """Read the section `masks.text`; complaints go to `fields`."""
    backend = fields.choice("backend", TEXT_BACKENDS, "transformers")
    read = fields.file if backend == "original" else lambda name: _pretrained(fields, name)
    spec = TextSpec(
        backend=backend,
        detector=read("detector"),
        segmenter=read("segmenter"),
        box_threshold=fields.number("box_threshold", TextSpec.box_threshold, least=0, most=1),
        text_threshold=fields.number("text_threshold", TextSpec.text_threshold, least=0, most=1),
    )
    fields.finish()
    return spec


def _pretrained(fields: Fields, name: str) -> Path | str | None:
    """A folder, made absolute, or a Hub id."""
    value = fields.text(name)
    if value is None:
        return None
    folder = resolve_path(fields.folder, value)
    if isdir(folder):
        return folder
    if not is_hub_id(value):
        fields.complain(name, f"{value!r} is no folder (looked at {folder}) and no Hub id (owner/name)")
    return value
