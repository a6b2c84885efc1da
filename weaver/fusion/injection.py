"""The template's features at the steps of a fusion: at hand, on their way from the CPU's memory, or computed again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weaver.features import Features

__all__ = ["Injection"]


class Injection:
    """Follows one fusion through the features of its template.

    `replaying` is set while the U-Net draws the template: what a fusion puts onto it stands aside then.
    """

    def __init__(self, features: Features | None):
        self._features = features
        self._stream: torch.cuda.Stream | None = None
        self._coming: dict[int, tuple[Mapping, torch.cuda.Event]] = {}
        self.replaying = False

    def at(self, unet, step: int, device: torch.device) -> Mapping[str, torch.Tensor]:
        """Path of a module -> its output in the template's row at a step; empty past the windows.

        device : the U-Net's, which asked for it looks through all of its modules
        """
        features = self._features
        if features is None:
            return {}
        if features.kind == "replayed":
            self.replaying = True
            try:
                return features.replay(unet, step)
            finally:
                self.replaying = False
        tensors = features.tensors[step]
        if device.type == "cuda" and any(not x.is_cuda for x in tensors.values()):
            return self._fetched(device, step)
        return tensors

    def _fetched(self, device: torch.device, step: int) -> Mapping[str, torch.Tensor]:
        """The features of a step on the GPU, while those of the next one are being copied there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if step not in self._coming:
            self._coming = {step: self._fetch(device, step)}
        tensors, done = self._coming.pop(step)
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for tensor in tensors.values():
            tensor.record_stream(current)
        if step + 1 < self._features.steps:
            self._coming = {step + 1: self._fetch(device, step + 1)}
        return tensors

    def _fetch(self, device: torch.device, step: int) -> tuple[Mapping, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            tensors = {path: x.to(device, non_blocking=True) for path, x in self._features.tensors[step].items()}
            done = torch.cuda.Event()
            done.record()
        return tensors, done
