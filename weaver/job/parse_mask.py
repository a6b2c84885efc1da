"""Where a concept stands, and who finds words: from plain mappings to frozen specs."""

from __future__ import annotations

from pathlib import Path

from weaver.choices import TEXT_BACKENDS
from weaver.job import MaskSpec, TextSpec
from weaver.job.fields import Fields, is_hub_id, resolve_path

__all__ = ["parse_mask", "parse_text"]

_KINDS = ("word", "file", "box", "polygon", "points")
_CHOICES = ("order", "rank", "at", "around")
_BOX = "[left, top, right, bottom] in pixels or in parts of 1"


def parse_mask(fields: Fields) -> MaskSpec:
    """Read the `mask` of a concept; complaints go to `fields`."""
    given = [name for name in _KINDS if fields.has(name)]
    kind = fields.exactly_one(_KINDS) if given else None
    choices = [name for name in _CHOICES if fields.has(name)]
    if choices and given and kind != "word":
        fields.complain(choices[0], "chooses among objects of a word; beside another mask it has no meaning")
    if len(choices) > 1:
        fields.complain(None, f"give at most one of {', '.join(_CHOICES)} (found {' and '.join(choices)})")
    at = fields.numbers("at", 2, "a point [x, y] in pixels or in parts of 1")
    if at and min(at) < 0:
        fields.complain("at", f"must not be negative, is {list(at)}")
    label = fields.text("label") if fields.has("label") else None
    if label is not None and kind != "file":
        fields.complain("label", "is of a mask's file; name the file too")
    spec = MaskSpec(
        word=fields.text("word"),
        order=fields.whole("order", least=1),
        rank=fields.whole("rank", least=1),
        at=at,
        around=_box(fields, "around"),
        file=fields.file("file"),
        label=int(label) if label is not None and label.isdecimal() else label,
        box=_box(fields, "box"),
        polygon=fields.points("polygon", 3, "three or more corners [[x, y], ...] in pixels or in parts of 1"),
        points=fields.points("points", 1, "a list of points [[x, y], ...] in pixels or in parts of 1"),
    )
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


def _box(fields: Fields, name: str) -> tuple[float, float, float, float] | None:
    box = fields.numbers(name, 4, _BOX)
    if box and not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        fields.complain(name, f"must have 0 <= left < right and 0 <= top < bottom, is {list(box)}")
    return box


def _pretrained(fields: Fields, name: str) -> Path | str | None:
    """A folder, made absolute, or a Hub id."""
    value = fields.text(name)
    if value is None:
        return None
    folder = resolve_path(fields.folder, value)
    if folder.is_dir():
        return folder
    if not is_hub_id(value):
        fields.complain(name, f"{value!r} is no folder (looked at {folder}) and no Hub id (owner/name)")
    return value
