"""What made a picture: enough to make it again, in the picture itself and, with the inputs' paths, in the manifest."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from weaver.concepts.concept import Concept, attn2_hash
from weaver.hashing import file_hash
from weaver.job import BackgroundSpec, Job, JobError
from weaver.job.file import MANIFEST_VERSION, job_to_mapping
from weaver.job.inputs import InputFile

__all__ = [
    "PNG_KEY",
    "changed_versions",
    "check_inputs",
    "check_weights",
    "make_manifest",
    "picture_record",
    "save_png",
    "with_files",
]

PNG_KEY = "concept-weaver"
_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "concept-weaver")


def picture_record(job: Job, pipe, concepts: Sequence[Concept], settings: dict, inputs, weights: dict) -> dict:
    """All that decides what the picture looks like, without paths; it travels in the PNG.

    Parameters
    ----------
    job : with its defaults resolved
    concepts : one for each of `Job.everyone`
    settings : as `WeaveResult` has them
    inputs : the job's `InputFile`s
    weights : {"model": `weights_hash`}, and "template.model" where another one makes the template
    """
    hashes: dict[str, list[dict]] = {}
    for file in inputs:
        place = file.field.split(".")[0]
        hashes.setdefault(place, []).append({"name": file.path.name, "sha256": file.sha256})
    entries = [
        _concept_entry(spec, concept) | {"files": hashes.get(place, [])}
        for (place, spec), concept in zip(job.places(), concepts, strict=True)
    ]
    return {
        "model": {"name": job.model if not Path(job.model).is_absolute() else Path(job.model).name,
                  "attn2": attn2_hash(pipe.unet)},
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "settings": settings,
        "template": _template_entry(job) | {"files": hashes.get("template", [])},
        "concepts": entries[: len(job.concepts)],
        "background": entries[-1] if job.background else None,
        "styles": [
            {"weight": style.weight, "files": hashes[f"styles[{number}]"]} for number, style in enumerate(job.styles)
        ],
        "device": {"type": pipe.device.type, "dtype": str(pipe.unet.dtype).removeprefix("torch.")},
        "versions": library_versions(),
        "weights": weights,
    }  # fmt: skip


def make_manifest(job: Job, folder: Path, record: dict, inputs: tuple[InputFile, ...]) -> dict:
    """The manifest of a run whose results lie in `folder`; `weaver run` takes it as a job and makes them again."""
    return {
        "weaver_manifest": MANIFEST_VERSION,
        "job": job_to_mapping(job, folder),
        "inputs": {file.field: file.sha256 for file in inputs},
        "record": record,
    }


def check_inputs(manifest: Mapping, inputs: tuple[InputFile, ...], source: str) -> None:
    """Raise `JobError`, led by `source`, when the files that a manifest's run was made from are no longer the same."""
    was, found = manifest["inputs"], {file.field: file for file in inputs}
    changed = [
        f"{field}: {found[field].path.name if field in found else 'the file'} is not what it was when the manifest was "
        f"written (sha256 {sha256[:12]}...); restore it, or run the job file"
        for field, sha256 in was.items()
        if field not in found or found[field].sha256 != sha256
    ]
    changed += [
        f"{field}: {file.path.name} was not there when the manifest was written; move it away, or run the job file"
        for field, file in found.items()
        if field not in was
    ]
    if changed:
        raise JobError(f"{source}: " + "; ".join(changed))


def check_weights(manifest: Mapping, field: str, sha256: str, source: str) -> None:
    """Raise `JobError` when the model of a field, "model" or "template.model", has other weights than in a manifest."""
    was = manifest["record"]["weights"].get(field)
    if was != sha256:
        raise JobError(
            f"{source}: {field}: its weights are not those that the manifest was written with (sha256 "
            f"{sha256[:12]}..., was {str(was)[:12]}...); restore them, or run the job file"
        )


def with_files(manifest: Mapping, files: Mapping[str, Path]) -> dict:
    """A manifest whose run took these files, by their fields, in the place of those that it had."""
    return {**manifest, "inputs": manifest["inputs"] | {field: file_hash(file) for field, file in files.items()}}


def changed_versions(manifest: Mapping) -> list[str]:
    """Libraries that are not as a manifest says, "torch 2.13.0 (was 2.11.0)"; the picture may differ in detail."""
    now, then = library_versions(), manifest["record"]["versions"]
    return [f"{name} {now.get(name)} (was {was})" for name, was in then.items() if now.get(name) != was]


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that the numbers come from."""
    from weaver.version import __version__

    versions = {"python": platform.python_version(), "concept-weaver": __version__}
    for name in _LIBRARIES:
        try:
            versions.setdefault(name, version(name))
        except PackageNotFoundError:
            continue
    return versions


def save_png(image: Image.Image, path: Path, record: dict | None = None) -> None:
    """Write a PNG, with `record` as JSON in its text chunk "concept-weaver"."""
    text = PngInfo()
    if record is not None:
        text.add_itxt(PNG_KEY, json.dumps(record, sort_keys=True, ensure_ascii=False))
    image.save(path, pnginfo=text)


def _concept_entry(spec: BackgroundSpec, concept: Concept) -> dict:
    return {
        "name": spec.name,
        "token": concept.token,
        "word": concept.word,
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt,
        "strength": spec.strength,
        "window": list(spec.window),
        "scale": spec.scale,
        "parts": spec.parts,
        "trained": dict(concept.settings),
    }


def _template_entry(job: Job) -> dict:
    spec = job.template
    if spec.image:
        return {}
    model = spec.model and (Path(spec.model).name if Path(spec.model).is_absolute() else spec.model)
    return {
        "prompt": spec.prompt,
        "model": model,
        "seed": spec.seed,
        "steps": spec.steps,
        "guidance": spec.guidance,
    }
