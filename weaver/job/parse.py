"""From a plain mapping to a frozen `Job`: every field checked, every mistake told with the path of its field."""

from __future__ import annotations

from os.path import isdir, isfile
from pathlib import Path

from weaver.choices import DOWNSAMPLINGS, FEATURES, KEPT_AND_CHANGED, MASK_SOURCES, OVERLAPS
from weaver.job import (
    SAME_MODEL,
    BackgroundSpec,
    ConceptSpec,
    FusionSpec,
    Job,
    JobError,
    MasksSpec,
    StyleSpec,
    TemplateSpec,
)
from weaver.job.fields import BANK, EMBEDDED, LARGEST, Fields, is_hub_id, resolve_path
from weaver.job.parse_concept import parse_concept
from weaver.job.parse_mask import parse_text
from weaver.layers import SDXL, SITES

__all__ = ["job_from_mapping"]

_JOB_SITES = tuple(name for name, sites in SITES.items() if sites is not SDXL)  # SDXL fuses in the library only
DEVICES = ("auto", "cpu", "cuda", "mps")


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
    entries = fields.sections("concepts")
    values = dict(
        model=_model(fields, "model", "embedded"),
        prompt=fields.text("prompt", "", required=True),
        negative_prompt=fields.text("negative_prompt", "", empty=True),
        seed=fields.whole("seed", 0),
        steps=fields.whole("steps", 50, least=1),
        size=_size(fields),
        device=fields.choice("device", DEVICES, "auto"),
        template=_template(fields.section("template")),
        keep_background=bool(fields.truth("keep_background")),
        masks=_masks(fields.section("masks")),
        fusion=_fusion(fields.section("fusion")),
        concepts=tuple(parse_concept(entry, ConceptSpec) for entry in entries or ()),
        background=parse_concept(fields.section("background"), BackgroundSpec) if fields.has("background") else None,
        styles=tuple(_style(entry) for entry in fields.sections("styles") or ()),
    )
    inversion = fields.section("inversion")
    values["inversion_prompt"] = inversion.text("prompt", empty=True)
    inversion.finish()
    if entries == [] and not values["background"]:
        fields.complain("concepts", "is missing; list at least one concept")
    fields.finish()
    job = Job(**values)
    _check_whole(job, fields)
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return job


def _model(fields: Fields, name: str, default: str | None, words: tuple[str, ...] = ("embedded",)) -> str | None:
    value = fields.text(name, default)
    if value is None or value in words:
        return value
    folder = resolve_path(fields.folder, value)
    if isdir(folder):
        if not isfile(folder / "model_index.json"):
            fields.complain(name, f"{value!r} is a folder without model_index.json, so no diffusers pipeline")
        return str(folder)
    if not is_hub_id(value):
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


def _style(fields: Fields) -> StyleSpec:
    if not fields.has("file"):
        fields.complain("file", "is missing; name a LoRA")
    value = fields.text("file")
    if value and value.startswith(BANK):
        reason = f"{value!r} is no file: the bank keeps concepts, and a style is a LoRA; name its file, or write the "
        fields.complain("file", reason + "concept as one (weaver bank convert --to diffusers-lora)")
    elif value and value.startswith(EMBEDDED):
        fields.complain("file", f"{value!r} is no file, and no style ships with the package; name a LoRA's")
    else:
        value = fields.file("file")
    spec = StyleSpec(file=value, weight=fields.number("weight", 1.0))
    fields.finish()
    return spec


def _template(fields: Fields) -> TemplateSpec:
    if fields.has("image"):
        for name in ("prompt", "model", "seed", "steps", "guidance", "tries"):
            if fields.has(name):
                fields.complain(name, "has no meaning beside image, which is taken as it is; remove one of the two")
        spec = TemplateSpec(image=fields.file("image"))
    else:
        spec = TemplateSpec(
            prompt=fields.text("prompt"),
            model=_model(fields, "model", None, ("embedded", SAME_MODEL)),
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
        dilation=_extent(fields, "dilation", None),
        overlap=fields.choice("overlap", OVERLAPS, "priority"),
        text=parse_text(fields.section("text")),
        min_area=_extent(fields, "min_area", 0),
        fill_holes=bool(fields.truth("fill_holes")),
        feather=fields.whole("feather", 0),
        downsampling=fields.choice("downsampling", DOWNSAMPLINGS, "area"),
    )
    fields.finish()
    return spec


def _extent(fields: Fields, name: str, default: float | None) -> float | None:
    """Whole pixels, or a part of an object below 1."""
    value = fields.number(name, default, least=0, most=LARGEST)
    if value is None or (value < 1 and value > 0):
        return value
    if value % 1:
        fields.complain(name, f"must be whole pixels or a part of the object below 1, is {value:g}")
        return default
    return int(value)


def _fusion(fields: Fields) -> FusionSpec:
    injection = fields.section("injection")
    spec = FusionSpec(
        suppression=fields.number("lambda", least=0),
        guidance=fields.number("guidance", least=0),
        eta=fields.number("eta", least=0, most=1),
        sites=injection.choice("sites", _JOB_SITES),
        resnet_window=injection.number("resnet", least=0, most=1),
        attention_window=injection.number("attention", least=0, most=1),
        features=injection.choice("features", FEATURES, "stored"),
    )
    injection.finish()
    fields.finish()
    return spec


def _check_whole(job: Job, fields: Fields) -> None:
    """What no field can tell by itself."""
    if job.keep_background and job.background:
        fields.complain(None, KEPT_AND_CHANGED)
    names: dict[str, str] = {}
    for place, spec in job.places():
        if spec.file is None and spec.train is None:
            continue  # told already; it has no name of its own
        name = spec.name.casefold()  # of files, which many disks do not tell apart by case
        if other := names.get(name):
            fields.complain(f"{place}.name", f"{spec.name!r} is taken by {other}; give each concept its own name")
        names.setdefault(name, place)
