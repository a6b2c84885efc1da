"""A training as TensorBoard shows it: losses and learning rate of every step, and its validation pictures."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from weaver.concepts.optimise import Step
from weaver.errors import WeaverError
from weaver.folder import make_folder

__all__ = ["TrainingLog"]


class TrainingLog:
    """Writes what TensorBoard reads into a folder; a context, at whose end all of it is on the disk.

    Raises `WeaverError` at once where the package is missing or the folder can't be made.
    """

    def __init__(self, folder: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise WeaverError(
                f"log_dir: {error}; install it by pip install tensorboard, or train without a log"
            ) from error
        make_folder("log_dir", folder)
        self._folder, self._kind, self._writer = folder, SummaryWriter, None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, step: Step) -> None:
        """Write the numbers of one step."""
        if self._writer is None:  # what an interrupted training wrote past its checkpoint no longer counts
            self._writer = self._kind(str(self._folder), purge_step=step.done)
        for name in ("loss", "own_loss", "prior_loss", "learning_rate"):
            if (value := getattr(step, name)) is not None:
                self._writer.add_scalar(f"train/{name}", value, step.done)

    def add_picture(self, prompt: str, image: Image.Image, done: int) -> None:
        """Write what was drawn for a prompt after `done` steps, the numbers of the last being written."""
        self._writer.add_image(f"validation/{prompt}", np.asarray(image), done, dataformats="HWC")
