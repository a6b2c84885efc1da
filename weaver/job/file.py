"""Job files, in YAML or in the JSON of a manifest: read into a frozen `Job`, and written back."""

from __future__ import annotations

import os
from dataclasses import fields as dataclass_fields
from pathlib import Path

import yaml

from weaver.job import Job, JobError, TrainSpec
from weaver.job.parse import job_from_mapping

__all__ = ["MANIFEST_VERSION", "job_to_mapping", "read_job", "read_mapping"]

MANIFEST_VERSION = 1
_MANIFEST_KEY = "weaver_manifest"

# Names in a job file of what a Python name can't be, or is called otherwise in the settings.
_WRITTEN = {"suppression": "lambda", "resnet_window": "resnet", "attention_window": "attention"}


class _UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that stands twice is an error and not silently the last one."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a field's name must be plain text; put a value with braces into quotes")
            if (key.tag, key.value) in seen:
                raise self._error(key, f"{key.value!r} stands twice")
            seen.add((key.tag, key.value))
        return node

    @staticmethod
    def _error(node, problem: str) -> yaml.MarkedYAMLError:
        return yaml.composer.ComposerError(None, None, problem, node.start_mark)


def read_job(path: str | os.PathLike) -> tuple[Job, dict | None]:
    """Read a job file, or a manifest and the job in it; relative paths are relative to the file's own folder.

    Returns the job and the manifest, None for a job file. A manifest has "job", "inputs" {field: SHA-256} and "record"
    with at least "versions" and "weights", as `weaver.manifest` makes them. Raises `JobError`, one line that names the
    file and every field that is wrong.
    """
    path = Path(path)
    mapping, manifest = read_mapping(path), None
    if isinstance(mapping, dict) and _MANIFEST_KEY in mapping:
        manifest = _checked(mapping, path)
        mapping = manifest["job"]
    return job_from_mapping(mapping, folder=path.resolve().parent, source=str(path)), manifest


def _checked(manifest: dict, path: Path) -> dict:
    version = manifest[_MANIFEST_KEY]
    if type(version) is not int or version != MANIFEST_VERSION:
        raise JobError(f"{path}: {_MANIFEST_KEY}: is {version!r}, this release reads {MANIFEST_VERSION}")
    record = manifest.get("record")
    record = record if isinstance(record, dict) else {}
    sections = {"job": manifest.get("job"), "inputs": manifest.get("inputs")}
    sections |= {f"record.{name}": record.get(name) for name in ("versions", "weights")}
    if broken := [name for name, section in sections.items() if not isinstance(section, dict)]:
        raise JobError(f"{path}: not a whole manifest: {', '.join(broken)} must be fields with names; run the job file")
    return manifest


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
    except ValueError as error:  # a value that looks like a date and is none, a number of thousands of digits
        raise JobError(f"{path}: not valid YAML: {error}") from error


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
    injection = ("sites", "resnet", "attention", "features")
    fusion["injection"] = {key: fusion.pop(key) for key in injection if key in fusion}
    return mapping


def _relative(path: Path, folder: Path) -> str:
    try:
        text = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return str(path)
    return text if text.startswith(".") else f"./{text}"
