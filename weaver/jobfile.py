"""Job files, in YAML or in the JSON of a manifest: read into a frozen `Job`, and written back."""

from __future__ import annotations

import os
from dataclasses import fields as dataclass_fields
from pathlib import Path

import yaml

from weaver.job import Job, JobError, TrainSpec
from weaver.jobparse import job_from_mapping

__all__ = ["job_to_mapping", "load_job", "read_mapping"]

# Names in a job file of what a Python name can't be, or is called otherwise in the settings.
_WRITTEN = {"suppression": "lambda", "resnet_window": "resnet", "attention_window": "attention"}


class _UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that stands twice is an error and not silently the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_job(path: str | os.PathLike) -> Job:
    """Read a job file, or the job in a manifest; relative paths in it are relative to its own folder.

    Raises `JobError`, one line that names the file and every field that is wrong.
    """
    path = Path(path)
    mapping = read_mapping(path)
    if isinstance(mapping, dict) and "weaver_manifest" in mapping:
        mapping = mapping.get("job")
    return job_from_mapping(mapping, folder=path.resolve().parent, source=str(path))


def read_mapping(path: Path) -> object:
    """What stands in a YAML or JSON file; `JobError` when it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: is no text file in UTF-8") from error
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise JobError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not valid YAML: {error}".replace("\n", " ")) from error


def job_to_mapping(job: Job, folder: Path) -> dict:
    """The mapping that `job_from_mapping` reads back to an equal `Job`, with paths relative to `folder`."""

    def plain(value):
        if isinstance(value, Path):
            return _relative(value, folder)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return section(value) if hasattr(value, "__dataclass_fields__") else value

    def section(spec) -> dict:
        pairs = [(f.name, getattr(spec, f.name)) for f in dataclass_fields(spec)]
        if isinstance(spec, TrainSpec):
            pairs = [*pairs[:-1], *spec.settings]
        return {_WRITTEN.get(name, name): plain(value) for name, value in pairs if value is not None}

    mapping = section(job)
    if Path(job.model).is_absolute():
        mapping["model"] = _relative(Path(job.model), folder)
    if job.template.model and Path(job.template.model).is_absolute():
        mapping["template"]["model"] = _relative(Path(job.template.model), folder)
    if job.template.image:
        mapping["template"] = {"image": mapping["template"]["image"]}
    if job.size:
        mapping["size"] = [job.size[1], job.size[0]]
    mapping["inversion"] = {"prompt": mapping.pop("inversion_prompt")} if job.inversion_prompt is not None else {}
    fusion = mapping["fusion"]
    fusion["injection"] = {key: fusion.pop(key) for key in ("sites", "resnet", "attention") if key in fusion}
    return mapping


def _relative(path: Path, folder: Path) -> str:
    try:
        text = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return str(path)
    return text if text.startswith(".") else f"./{text}"
