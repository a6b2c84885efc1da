"""Load the pipeline a job names: the embedded model, a folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import isdir
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open

from weaver.concepts.concept import attn2_projections
from weaver.errors import WeaverError
from weaver.hashing import remembered

__all__ = [
    "ModelError",
    "choose_device",
    "hub_fix",
    "is_embedded",
    "load_model",
    "model_source",
    "only_local",
    "quiet_libraries",
    "quietly",
    "threads_for",
    "weights_hash",
]

_SMALL_MODEL = 50_000_000  # parameters of the U-Net; Stable Diffusion's has 860 million


class ModelError(WeaverError):
    """A model that can't be loaded, a kind that can't be used, or a device that is not there; names it."""


def load_model(
    model: str,
    *,
    device: str = "auto",
    offline: bool = False,
    dtype: torch.dtype | None = None,
    fuses: bool = True,
):
    """Load a diffusers pipeline.

    Parameters
    ----------
    model : "embedded", a folder, or a Hub id (owner/name).
    device : "auto", or as `torch.device` takes it.
    offline : take a Hub model from the local cache only; folders and the embedded model need no network anyway.
    dtype : of the weights; None is float16 on CUDA and float32 elsewhere.
    fuses : whether it is to fuse in a job, which takes a `StableDiffusionPipeline`; a template may come from any
        text-to-image pipeline.

    Raises `ModelError`, one line.
    """
    device = choose_device(device)
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    if model == "embedded":
        from weaver import embedded

        return embedded.load_pipeline(device, dtype)
    with model_source(model, offline=offline, fuses=fuses) as (folder, _, local):
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=local)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def model_source(model: str, *, offline: bool = False, fuses: bool = True) -> Iterator[tuple[str, Mapping, bool]]:
    """Where a model is: folder or Hub id, what its model_index.json holds, and whether only local files may be read.

    Arguments are those of `load_model`. Within the block, where its files are read, `OSError` becomes `ModelError`.
    """
    if model == "embedded":
        from weaver.embedded import MODEL_DIR

        model = str(MODEL_DIR)
    from diffusers import DiffusionPipeline

    local = only_local(offline) or isdir(model)
    try:
        config = DiffusionPipeline.load_config(model, local_files_only=local)
        kind = config.get("_class_name")
        if fuses and kind != "StableDiffusionPipeline":
            raise ModelError(
                f"{model!r} is a {kind}; concepts are fused in a StableDiffusionPipeline (1.x, 2.x), in SDXL by the "
                "library only (weaver.weave, weaver.attach). "
                "Any text-to-image pipeline can make the template: name it as template.model"
            )
        yield model, config, local
    except OSError as error:
        fix = "the folder must hold a complete diffusers pipeline" if isdir(model) else hub_fix(offline)
        raise ModelError(f"{model!r} can't be loaded; {fix} ({_first_line(error)})") from error


def only_local(offline: bool = False) -> bool:
    """Whether models of the Hub are taken from the local cache only: that is asked for, or in the environment."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def hub_fix(offline: bool = False) -> str:
    """What to do where a model of the Hub can't be had; arguments are those of `only_local`."""
    if only_local(offline):
        return f"it is not complete in the local cache, {HF_HUB_CACHE}: run once without --offline (or HF_HUB_OFFLINE)"
    return "check its name and the network"


def choose_device(device: str = "auto") -> str:
    """The device to work on: CUDA where there is one, else the CPU; a device that is named is checked."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not there.get(device.split(":")[0], lambda: True)():
        raise ModelError(f"{device!r} is not available here; use 'auto' or 'cpu'")
    return device


def is_embedded(pipe) -> bool:
    """Whether a pipeline is the model that ships with the package, wherever it was loaded from.

    It has the same weights then, which one of them tells: training moves them all.
    """
    from weaver.embedded import MODEL_DIR

    name, linear = next(iter(attn2_projections(pipe.unet).items()), (None, None))
    with safe_open(MODEL_DIR / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        if f"{name}.weight" not in file.keys():
            return False
        own = file.get_tensor(f"{name}.weight")
    weight = linear.weight.detach()
    if weight.is_meta:  # built from its configuration alone (`weaver.memory.shapes`), which says where that lies
        weight = _tensor_in(Path(pipe.unet.config.get("_name_or_path") or ""), f"{name}.weight")
        if weight is None:
            return False
    return own.shape == weight.shape and torch.equal(own.to(weight.dtype), weight.cpu())


@contextmanager
def threads_for(pipe, device: str | None = None) -> Iterator[None]:
    """One thread for a small model on the CPU: ten times faster on a busy machine, and the same numbers on any.

    `device` is the kind of device that it will run on; None is where it is.
    """
    before = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in pipe.unet.parameters()) < _SMALL_MODEL
    if small and (device or pipe.device.type) == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights_hash(pipe, *, exact: bool = False) -> str:
    """Hash all weights of a pipeline, wherever they came from: SHA-256, 64 hex digits.

    As in `weaver.concepts.concept.attn2_hash`, float16 and float32 of one checkpoint, on any device, hash alike; not
    when `exact`, which tells any two weights apart.
    """

    def compute(weights) -> str:
        digest = hashlib.sha256()
        for name, value in weights:
            value = value.cpu()
            if not exact and value.dtype in (torch.float32, torch.float64):
                value = value.half()
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    modules = [
        (part, module) for part, module in sorted(pipe.components.items()) if isinstance(module, torch.nn.Module)
    ]
    weights = ((f"{part}.{name}", x) for part, module in modules for name, x in sorted(module.state_dict().items()))
    return remembered(("all weights", exact), weights, compute)


def quiet_libraries() -> None:
    """Keep notices, warnings and loading bars of the libraries off the terminal; errors still show."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b.*")
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # of every try to reach the Hub; that none succeeded is told


@contextmanager
def quietly() -> Iterator[None]:
    """`quiet_libraries`, and afterwards as before."""
    import diffusers
    import huggingface_hub
    import transformers

    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    hub_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    hub_verbosity = huggingface_hub.utils.logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            (log.enable_progress_bar if bars else log.disable_progress_bar)()
        huggingface_hub.utils.logging.set_verbosity(hub_verbosity)
        if hub_bars:  # which go with transformers'
            huggingface_hub.utils.enable_progress_bars()
        else:
            huggingface_hub.utils.disable_progress_bars()


def _tensor_in(folder: Path, name: str) -> torch.Tensor | None:
    """One tensor of a model's folder; None where there is no such file or tensor."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
