"""accelerate's `Accelerator` for one training, which leaves nothing of its own in the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import distributed

__all__ = ["accelerated", "process_reasons"]

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # by which accelerate counts


def process_reasons() -> list[str]:
    """Why no training can run in this process: it is one of several, for which accelerate would wait."""
    if distributed.is_available() and distributed.is_initialized():
        count, told = distributed.get_world_size(), "this process is one of {} that compute together"
    else:
        found = {name: os.environ[name] for name in _SIZES if os.environ.get(name, "1") not in ("", "0", "1")}
        name, count = next(iter(found.items()), ("", 1))
        told = f"the environment has {name}={{}}"
    if count == 1:
        return []
    return [f"{told.format(count)}; a concept is learned by one process: start it without a launcher of several"]


@contextmanager
def accelerated(pipe, accumulate: int) -> Iterator[Accelerator]:
    """One that accumulates gradients of `accumulate` batches, and scales them where the model is in float16.

    accelerate's states are the process's: what is there was made by a caller's own `Accelerator`, and is as before
    afterwards; what was not there is gone again, so that a caller's first may have any precision.
    """
    grouped = distributed.is_available() and distributed.is_initialized()
    first = [not state._shared_state for state in (AcceleratorState, PartialState)]
    shared = GradientState()
    before = shared.plugin_kwargs, shared.sync_gradients
    plugin = GradientAccumulationPlugin(accumulate, adjust_scheduler=False, sync_with_dataloader=False)
    try:
        # Precision is the process's in accelerate, and here the model's: its weights have it, and only float16 is
        # scaled, since gradients of its activations vanish below 6e-8. The model stays where it is.
        accelerator = Accelerator(device_placement=False, gradient_accumulation_plugin=plugin)
        half = pipe.unet.dtype == torch.float16
        accelerator.scaler = torch.amp.GradScaler(pipe._execution_device.type, enabled=half)
        yield accelerator
    finally:
        shared.plugin_kwargs, shared.sync_gradients = before
        if first[0]:
            AcceleratorState._reset_state(reset_partial_state=first[1])
        if distributed.is_available() and distributed.is_initialized() and not grouped:
            distributed.destroy_process_group()  # of one process, where a launcher was told to start one
