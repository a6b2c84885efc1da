"""Styles over a whole picture: LoRAs that are loaded into a job's model while it draws, and unloaded afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from weaver.concepts.changes import Delta, change_shape
from weaver.concepts.concept import Concept, attn2_hash, text_module
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.parsed import ParsedFile
from weaver.concepts.formats.save_lora import diffusers_lora, lora_changes
from weaver.errors import WeaverError
from weaver.job.spec import JobError, StyleSpec

__all__ = ["check_style", "style_numbers", "styled"]

_FILE = "style.safetensors"


def check_style(path: Path) -> ParsedFile:
    """Read a LoRA; raises `WeaverError` where a file is none, and where PEFT is not there to load it."""
    file = read_concept_file(path)
    kind = "concept file" if isinstance(file, Concept) else file.format
    if not kind.endswith("LoRA"):
        raise WeaverError(
            f"{path.name} is a {kind}, and a style is a LoRA: list it under concepts, or write it as a LoRA (weaver "
            "bank convert --to diffusers-lora)"
        )
    if find_spec("peft") is None:
        raise WeaverError("a style is loaded by the package peft, which is not installed: pip install peft")
    return file


def style_numbers(path: Path) -> int:
    """How many numbers a LoRA adds to a model's weights."""
    file = read_concept_file(path)
    return sum(x.numel() for change in lora_changes(file).values() for x in change)


@contextmanager
def styled(pipe, styles: Sequence[StyleSpec], source: str = "job") -> Iterator[None]:
    """Within the block the pipeline draws everything with these LoRAs, each times its weight, text encoders too.

    Afterwards it is as it was. Raises `JobError` with the field of a file that does not fit the model.
    """
    if not styles:
        yield
        return
    try:
        for number, style in enumerate(styles):
            _load(pipe, style, f"style_{number}", f"{source}: styles[{number}].file: {style.file.name}")
        pipe.set_adapters([f"style_{n}" for n in range(len(styles))], [style.weight for style in styles])
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe, style: StyleSpec, name: str, where: str) -> None:
    """Load a style with the scale of each of its layers in the factors: of a kohya file diffusers takes one for all."""
    try:
        parsed = read_concept_file(style.file)
    except WeaverError as error:
        raise JobError(f"{where}: {error}") from error
    changes = lora_changes(parsed)
    if reason := _other_base(pipe, parsed, changes):
        raise JobError(f"{where} belongs to another base model: {reason}; take a style of this one")
    file = diffusers_lora(changes, rank=1)  # that of matrices, of which a LoRA has none
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_file(file.tensors, Path(folder) / _FILE, file.metadata)
            pipe.load_lora_weights(folder, weight_name=_FILE, adapter_name=name)
    except Exception as error:  # of diffusers or PEFT, of many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise JobError(f"{where} can't be loaded into this model: {reason}") from error


def _other_base(pipe, parsed: ParsedFile, changes: Mapping[str, Delta]) -> str | None:
    """Why a LoRA is not of this model; None when it is, or when its file does not tell and it fits.

    A token that it was trained with does not matter: no prompt of a whole picture has it.
    """
    odd = [key for key, change in changes.items() if _shape_of(pipe, key) != change_shape(change)]
    if odd:
        return f"{len(odd)} of its {len(changes)} changes do not fit, {odd[0]} among them"
    if parsed.base_hash and (found := attn2_hash(pipe.unet)) != parsed.base_hash:
        return f"its base has hash {parsed.base_hash[:12]}..., this one {found[:12]}..."
    return None


def _shape_of(pipe, key: str) -> tuple[int, ...] | None:
    """The shape of the weight that a key of `lora_changes` names, None where this model has none there.

    PEFT's wrappers, of a style before, pass on the weight of what they wrap.
    """
    part, _, path = key.partition(".")
    try:
        module = pipe.unet.get_submodule(path) if part == "unet" else text_module(pipe, key)
    except AttributeError:
        return None
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
