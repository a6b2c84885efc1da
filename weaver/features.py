"""What the U-Net sees while it draws the template again: the features that fusion injects.

They are taken on the reverse pass, where the U-Net reads (x_t, t) as it does during fusion; the inversion pass reads
(x_{t-1}, t), so its features are others (Concept Weaver, section 3.3; Plug-and-Play Diffusion, arXiv 2211.12572).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType

import torch

from weaver.cache import Cache, features_identity, reconstruction_identity
from weaver.errors import raise_if
from weaver.inversion import Inversion
from weaver.latents import decode_latents, psnr
from weaver.layers import InjectionSites, site_reasons
from weaver.schedule import ddim_scheduler

__all__ = ["Features", "collect_features", "reconstruction_psnr"]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one template, step by step.

    Parameters
    ----------
    sites : where they come from and for how many steps they are injected
    timesteps : [steps] integers, falling
    tensors : for every step, module path -> that module's output, one row: `....conv2` [1, C, h, w], `....to_q` and
        `....to_k` [1, T, H * D]; a step past a window lacks that kind
    z_T : the noise [1, C, h, w] the reverse pass started from, where fusion starts too
    reconstruction : the latents [1, C, h, w] it ended at; None if it was cut after the last injected step
    cached : whether they were taken from a cache
    time_ids : SDXL's [1, 6], with which they were collected; None for models without
    """

    sites: InjectionSites
    timesteps: torch.Tensor
    tensors: tuple[Mapping[str, torch.Tensor], ...]
    z_T: torch.Tensor
    reconstruction: torch.Tensor | None
    cached: bool = False
    time_ids: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.z_T.shape[-2:])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for step in self.tensors for tensor in step.values())


@torch.no_grad()
def collect_features(
    pipe,
    inversion: Inversion,
    sites: InjectionSites,
    *,
    reconstruct: bool = True,
    storage: torch.device | str | None = None,
    cache: Cache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Draw the template again from its noise, under its prompt and without guidance, and keep the features.

    Parameters
    ----------
    pipe : the pipeline that inverted the picture; it is only read
    sites : which layers, and for which part of the steps
    reconstruct : go on to the end, to know how well the inversion held; False stops after the last injected step
    storage : device to keep the features on; None is the U-Net's. They are brought back a step at a time
    cache : where the reconstruction, and features if it keeps them, are looked for and kept; for an inversion that was
        made with a cache
    progress : called after each step with (done, steps)

    Raises `WeaverError` when the U-Net lacks a site.
    """
    unet = pipe.unet
    raise_if(site_reasons(unet, sites), "Cannot collect features")
    scheduler = ddim_scheduler(pipe.scheduler)
    scheduler.set_timesteps(inversion.steps, device=inversion.latents.device)
    device = inversion.latents.device
    identity = None if cache is None else inversion.identity
    known = cache.get(reconstruction_identity(identity)) if identity and reconstruct else None
    end = known and known["latents"].to(device)
    if identity and cache.features and (end is not None or not reconstruct):
        if (stored := cache.get(features_identity(identity, sites))) is not None:
            tensors = _by_step(stored, inversion.steps, device if storage is None else storage)
            if progress:
                progress(inversion.steps, inversion.steps)
            return Features(sites, scheduler.timesteps, tensors, inversion.z_T, end, True, inversion.time_ids)
    resnets = sites.resnet_modules()
    projections = [f"{path}.{name}" for path in sites.attention_modules(unet) for name in ("to_q", "to_k")]
    resnet_steps, attention_steps = sites.resnet_steps(inversion.steps), sites.attention_steps(inversion.steps)
    total = inversion.steps if reconstruct and end is None else max(resnet_steps, attention_steps)

    z, kept = inversion.z_T, []
    for step, t in enumerate(scheduler.timesteps[:total]):
        wanted = resnets * (step < resnet_steps) + projections * (step < attention_steps)
        found: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:
            for path in wanted:
                hooks.callback(unet.get_submodule(path).register_forward_hook(_keep(found, path, storage)).remove)
            output = unet(z, t, **inversion.unet_arguments, return_dict=False)[0]
        missing = [
            f"{path} was not called: unfuse the attention's projections first" for path in wanted if path not in found
        ]
        raise_if(missing, "Cannot collect features")
        kept.append(MappingProxyType(found))
        z = scheduler.step(output, t, z, return_dict=False)[0]
        if progress:
            progress(step + 1, total)
    kept += [{}] * (inversion.steps - len(kept))
    if identity and reconstruct and end is None:
        cache.put(reconstruction_identity(identity), {"latents": z})
    if identity and cache.features:
        flat = {f"{step}.{path}": tensor for step, found in enumerate(kept) for path, tensor in found.items()}
        cache.put(features_identity(identity, sites), flat)
    end = z if reconstruct and end is None else end
    return Features(sites, scheduler.timesteps, tuple(kept), inversion.z_T, end, False, inversion.time_ids)


def reconstruction_psnr(pipe, inversion: Inversion, features: Features) -> float:
    """How near the reverse pass came to the picture, in dB, against the autoencoder's own rendering of it."""
    raise_if(
        ["the features were collected with reconstruct=False"] if features.reconstruction is None else [],
        "Cannot measure the reconstruction",
    )
    return psnr(decode_latents(pipe.vae, features.reconstruction), decode_latents(pipe.vae, inversion.z_0))


def _keep(found: dict[str, torch.Tensor], path: str, storage) -> Callable:
    def hook(module, args, output):
        found[path] = output if storage is None else output.to(storage)

    return hook


def _by_step(stored: Mapping[str, torch.Tensor], steps: int, device) -> tuple[Mapping[str, torch.Tensor], ...]:
    """Tensors named "<step>.<module path>" as a mapping for each step."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(steps)]
    for name, tensor in stored.items():
        step, path = name.split(".", 1)
        found[int(step)][path] = tensor.to(device)
    return tuple(map(MappingProxyType, found))
