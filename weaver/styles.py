"""Styles over a whole picture: LoRAs that are loaded into a job's model while it draws, and unloaded afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file

from weaver.concepts.concept import Concept
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.save_lora import diffusers_lora
from weaver.errors import WeaverError
from weaver.job.spec import JobError, StyleSpec

__all__ = ["check_style", "style_numbers", "styled"]

_FILE, _WORD = "style.safetensors", "picture"


def check_style(path: Path) -> None:
    """Raise `WeaverError` unless a file is a LoRA, and PEFT is there to load it."""
    file = read_concept_file(path)
    kind = "concept file" if isinstance(file, Concept) else file.format
    if not kind.endswith("LoRA"):
        raise WeaverError(f"{path.name} is a {kind}, and a style is a LoRA: list it under concepts")
    if find_spec("peft") is None:
        raise WeaverError("a style is loaded by the package peft, which is not installed: pip install peft")


def style_numbers(path: Path) -> int:
    """How many numbers a LoRA adds to a model's weights."""
    file = read_concept_file(path)
    changes = (*file.deltas.values(), *file.text_deltas.values(), *file.outside.values())
    return sum(x.numel() for change in changes for x in (change.down, change.up))


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
        concept = read_concept_file(style.file).concept(pipe, name=style.file.stem, word=_WORD)
    except WeaverError as error:
        raise JobError(f"{where}: {error}") from error
    file = diffusers_lora(concept, rank=1)  # that of matrices, of which a LoRA has none
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_file(file.tensors, Path(folder) / _FILE, file.metadata)
            pipe.load_lora_weights(folder, weight_name=_FILE, adapter_name=name)
    except Exception as error:  # of diffusers or PEFT, of many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise JobError(f"{where} can't be loaded into this model: {reason}") from error
    if all(name not in adapters for adapters in pipe.get_list_adapters().values()):
        raise JobError(f"{where} changes nothing of this model: is it of another base?")
