"""One training loop for all the small networks: warm-up and cosine over a time budget, EMA, a recorded curve.

The budget is wall-clock time, so that the same command serves a laptop and a GPU. Under ``torchrun`` the processes
average their gradients; each draws its own samples. Matrices may be given to Muon (momentum with orthogonalised
updates), which needs fewer samples than AdamW for a denoiser; not on a CPU without bfloat16, in which it works.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist

from weaver.version import __version__

__all__ = ["LoopSettings", "autocast", "device_from_environment", "is_main_process", "train"]


@dataclass(frozen=True)
class LoopSettings:
    """Settings of one training.

    Attributes
    ----------
    minutes : wall-clock budget; the learning rate follows it.
    learning_rate : peak of the schedule.
    batch : samples a step and process, to count those seen.
    warmup_steps : steps of linear warm-up.
    weight_decay : of AdamW.
    ema_decay : decay of the averaged weights that are kept.
    report_every : steps between two rows of the curve.
    checkpoint_minutes : minutes between two checkpoints.
    """

    minutes: float
    learning_rate: float
    batch: int
    warmup_steps: int = 100
    weight_decay: float = 1e-3
    ema_decay: float = 0.999
    report_every: int = 100
    checkpoint_minutes: float = 5.0


def is_main_process() -> bool:
    """Whether this process reports and saves."""
    return int(os.environ.get("RANK", 0)) == 0


def device_from_environment() -> torch.device:
    """The GPU of this process, or the CPU; joins the process group where ``torchrun`` started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that does not is 15 times slower at it."""
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it; elsewhere nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average over the processes; what took no part in one process's step counts as zero there."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def _agree(value: float, device: torch.device) -> float:
    """The main process's `value`, in every process."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], device=device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def _append(curve: Path | None, row: dict) -> None:
    """Add one row to the recorded curve, in the main process."""
    if curve is not None and is_main_process():
        with curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _code_version() -> dict[str, str]:
    """The package's version, the SHA-256 of all code of the embedded model, and PyTorch's version."""
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return {"concept-weaver": __version__, "weaver/embedded": digest, "torch": torch.__version__}


@contextmanager
def _swapped(parameters: list[torch.nn.Parameter], average: list[torch.Tensor]) -> Iterator[None]:
    """Inside the block the parameters hold their averages."""
    kept = [p.detach().clone() for p in parameters]
    torch._foreach_copy_([p.data for p in parameters], average)
    try:
        yield
    finally:
        torch._foreach_copy_([p.data for p in parameters], kept)


def train(
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[int], torch.Tensor],
    settings: LoopSettings,
    *,
    save: Callable[[], None],
    matrices: list[torch.nn.Parameter] = (),
    evaluate: Callable[[], dict[str, float]] | None = None,
    curve: Path | None = None,
    arguments: Mapping[str, object] = MappingProxyType({}),
) -> int:
    """Train `parameters` on `loss_of(step)` until the time budget is used; returns the number of steps.

    Those of `parameters` that are also in `matrices` are moved by Muon where the device has bfloat16, all others by
    AdamW.

    `save` and `evaluate` are called with the averaged weights in place, in the main process only. A row
    ``{"settings": {...}}`` and rows ``{"minutes", "step", "samples", "loss", ...}`` are appended to `curve`, one JSON
    object a line. The first holds the loop's settings, processes, device, optimisers, the code's version and
    `arguments`, whatever else the training follows from.
    """
    device = parameters[0].device
    processes = int(os.environ.get("WORLD_SIZE", 1))
    matrices = list(matrices) if has_bfloat16(device) else []
    told = asdict(settings) | {"processes": processes, "device": device.type}
    told |= {"optimiser": "muon and adamw" if matrices else "adamw", "code": _code_version()}
    _append(curve, {"settings": told | {"arguments": dict(arguments)}})
    by_muon = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in by_muon]
    # torch's Muon takes matrices only: convolutions are given as views [out, in * h * w] of the same memory.
    views = [torch.nn.Parameter(p.data.view(len(p), -1)) for p in matrices]
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=True, **common)]
    if views:
        optimizers.append(torch.optim.Muon(views, adjust_lr_fn="match_rms_adamw", **common))
    average = [p.detach().clone() for p in parameters]
    started, step, recent, next_checkpoint = time.monotonic(), 0, [], settings.checkpoint_minutes
    while True:
        minutes = _agree((time.monotonic() - started) / 60, device)
        done = minutes >= settings.minutes
        if step and (done or step % settings.report_every == 0) and is_main_process():
            with _swapped(parameters, average):
                samples = step * settings.batch * processes
                loss = torch.stack(recent).mean().item() if recent else 0.0
                row = {"minutes": round(minutes, 2), "step": step, "samples": samples, "loss": loss}
                row.update(evaluate() if evaluate else {})
                recent.clear()
                print(json.dumps(row), flush=True)
                _append(curve, row)
                if done or minutes > next_checkpoint:
                    next_checkpoint = minutes + settings.checkpoint_minutes
                    save()
        if done:
            return step
        fraction = minutes / settings.minutes
        rate = settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, (step + 1) / settings.warmup_steps)
        loss = loss_of(step)
        loss.backward()
        if dist.is_initialized():
            _average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for view, matrix in zip(views, matrices, strict=True):
            view.grad = matrix.grad.view_as(view)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        step += 1
        recent.append(loss.detach())  # not asked for its value, which would wait for a GPU
        decay = min(settings.ema_decay, (1 + step) / (20 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
