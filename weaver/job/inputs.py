"""Every file a job reads: checked before anything long begins, and hashed for the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from weaver.concepts.concept import Concept
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.parsed import ParsedFile
from weaver.concepts.images import caption_of, mask_of
from weaver.concepts.picture_folder import caption_file, mask_file, picture_paths, tell_passed_over
from weaver.errors import WeaverError
from weaver.hashing import file_hash
from weaver.job import BackgroundSpec, Job, JobError
from weaver.job.fields import EMBEDDED
from weaver.masks.given import is_shapes_file, read_shapes
from weaver.pictures import open_picture, open_rgb
from weaver.styles import check_style

__all__ = ["InputFile", "read_inputs", "shipped_name", "training_paths", "training_pictures"]


@dataclass(frozen=True)
class InputFile:
    """One file that a job reads: the field that names it, where it is, and the SHA-256 of what it holds."""

    field: str
    path: Path
    sha256: str


def read_inputs(job: Job, source: str = "job") -> tuple[InputFile, ...]:
    """Open every picture, caption and concept file of a job, and what lies beside these and is read with them.

    A warning tells of files in folders of pictures that are not used. Raises `JobError`, one line led by `source` with
    each unreadable file behind its field.
    """
    problems, inputs = [], []
    tokens = {f"{place}.file": spec.token for place, spec in job.places()}
    for field, path, check in _files(job, problems):
        try:
            found = check()
            inputs.append(InputFile(field, path, file_hash(path)))
            if isinstance(found, ParsedFile):
                beside = map(path.with_name, found.files_beside(tokens.get(field)))
                inputs += [InputFile(f"{field}:{file.name}", file, file_hash(file)) for file in beside]
        except WeaverError as error:
            problems.append(f"{field}: {error}")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    tell_passed_over(training_paths(job).values())
    return tuple(inputs)


def training_pictures(spec: BackgroundSpec) -> list[Path]:
    """The picture files that a concept is trained on, in a fixed order; empty when it is not trained."""
    if spec.train is None:
        return []
    images = spec.train.images
    if isinstance(images, str):
        from weaver import embedded

        images = (embedded.concept_images(images.removeprefix(EMBEDDED)),)
    return picture_paths(images)


def training_paths(job: Job) -> dict[str, Path]:
    """The pictures of the user's own, and folders of them, that a job trains on, by their fields."""
    return {
        f"{place}.train.images[{number}]" if len(spec.train.images) > 1 else f"{place}.train.images": path
        for place, spec in job.places()
        if spec.train and not isinstance(spec.train.images, str)
        for number, path in enumerate(spec.train.images)
    }


def shipped_name(spec: BackgroundSpec) -> str | None:
    """The name under which the package ships this concept, or None for one of the user's own."""
    values = (spec.file, spec.train.images if spec.train else None)
    return next((v.removeprefix(EMBEDDED) for v in values if isinstance(v, str)), None)


def _files(job: Job, problems: list[str]) -> Iterator[tuple[str, Path, Callable[[], object]]]:
    """(field, path, check) of every file; complaints of shipped names that do not exist go to `problems`."""
    if image := job.template.image:
        yield "template.image", image, partial(open_rgb, image)
    for number, style in enumerate(job.styles):
        yield f"styles[{number}].file", style.file, partial(check_style, style.file)
    for place, spec in job.places():
        field = f"{place}.file" if spec.file else f"{place}.train.images"
        name = shipped_name(spec)
        if name is not None and (complaint := _unknown(name)):
            problems.append(f"{field}: {complaint}")
            continue
        if isinstance(spec.file, Path):
            yield field, spec.file, partial(read_concept_file, spec.file)
        elif spec.file is not None:
            from weaver import embedded

            path = embedded.concept_path(name)
            yield field, path, partial(Concept.load, path)
        try:
            for number, path in enumerate(training_pictures(spec)):
                yield f"{field}[{number}]", path, partial(open_rgb, path)
                if mask := mask_file(path):
                    yield f"{field}[{number}].mask.png", mask, partial(mask_of, path)
                if caption := caption_file(path):
                    yield f"{field}[{number}].txt", caption, partial(caption_of, path, spec.train.token, spec.word)
        except WeaverError as error:
            problems.append(f"{field}: {error}")
        mask = getattr(spec, "mask", None)
        if mask and mask.file:
            outlines = is_shapes_file(mask.file)
            check = partial(read_shapes, mask.file, mask.label) if outlines else partial(open_picture, mask.file)
            yield f"{place}.mask.file", mask.file, check


def _unknown(name: str) -> str | None:
    from weaver import embedded

    if name in embedded.CONCEPTS:
        return None
    close = get_close_matches(name, list(embedded.CONCEPTS), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(embedded.CONCEPTS)}"
    return f"no concept {name!r} ships with the package; {hint}"
