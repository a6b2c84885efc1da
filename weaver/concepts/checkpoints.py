"""A training that goes on where it was interrupted, and ends as if it had not been."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weaver.concepts.images import TrainingSet
from weaver.concepts.kept_pictures import KeptPictures
from weaver.errors import WeaverError, differences
from weaver.folder import whole_file

__all__ = ["Checkpoint", "data_hash"]

_LAYOUT = 2  # of the file: which parts a training has. It had an optimiser for weights and one for vectors before


@dataclass(eq=False)
class Checkpoint:
    """A file with all that a training is made of between two steps.

    Parameters
    ----------
    path : the file, written whole or not at all; `remove` throws it away
    every : steps from one to the next
    identity : what the training is of, as hashes
    settings : how it learns, plain values; a file of another training, or of other settings, is refused
    """

    path: Path
    every: int
    identity: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)
    _parts: Mapping[str, object] = field(default_factory=dict)
    _learned: Sequence[torch.Tensor] = ()

    def begin(self, learned: Sequence[torch.Tensor], generator: torch.Generator, **parts) -> int:
        """Bring a training to where the file has it; returns how many steps are done, 0 without a file.

        Parameters
        ----------
        learned : the tensors that are learned, which are written to
        parts : what else changes from step to step, each with a `state_dict`
        """
        self._parts, self._learned, self._generator = parts, learned, generator
        state = self.read()
        if state is None:
            return 0
        with torch.no_grad():
            for tensor, value in zip(learned, state["learned"], strict=True):
                tensor.copy_(value)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        return int(state["step"])

    def read(self) -> dict | None:
        """What the file holds, None without one; raises `WeaverError`, which names every difference, for another's."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, settings, _ = dict(state["identity"]), dict(state["settings"]), int(state["step"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise WeaverError(f"{self.path}: not a readable checkpoint ({error}): remove it to begin anew") from error
        if state.get("layout") != _LAYOUT:
            raise WeaverError(f"{self.path}: a checkpoint of another version of this package: remove it to begin anew")
        odd = [key for key, value in self.identity.items() if identity.get(key) != value]
        if changed := differences(settings, self.settings):
            odd.append(f"settings ({'; '.join(changed)})")
        if odd:
            raise WeaverError(
                f"{self.path}: a checkpoint of a training with other {' and '.join(odd)}: ask for what it has to go "
                "on, remove it to begin anew, or name another"
            )
        return state

    def after(self, step: int) -> None:
        """Write the file if it is time, `step` steps being done."""
        if step % self.every:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"identity": dict(self.identity), "settings": dict(self.settings)}
        state |= {"layout": _LAYOUT, "step": step, "generator": self._generator.get_state()}
        state["learned"] = [tensor.detach() for tensor in self._learned]
        with whole_file(self.path) as partial:
            torch.save(state, partial)

    def class_pictures(self, **identity) -> KeptPictures:
        """Where pictures of the class are kept as long as the file is, made from what `identity` says."""
        return KeptPictures(_pictures_of(self.path), identity)

    @staticmethod
    def remove(path: Path) -> None:
        """Throw away what was kept for a training at its end: its result takes the place of it."""
        path.unlink(missing_ok=True)
        shutil.rmtree(_pictures_of(path), ignore_errors=True)


def _pictures_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.class")


def data_hash(data: TrainingSet | None) -> str:
    """SHA-256 of pictures, captions, masks and framings; empty without any."""
    if data is None:
        return ""
    digest = hashlib.sha256()
    for image, caption, mask in zip(data.images, data.captions, data.all_masks(), strict=True):
        for part in (image, mask):
            digest.update(b"-" if part is None else f"{part.mode} {part.size}".encode() + part.tobytes())
        digest.update(caption.encode() + b"\n")
    if any(data.framings):
        digest.update(repr(data.framings).encode())
    return digest.hexdigest()
