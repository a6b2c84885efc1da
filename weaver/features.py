"""What the U-Net sees while it draws the template again: the features that fusion injects.

They are of the reverse pass, where the U-Net reads (x_t, t) as it does during fusion; the inversion pass reads
(x_{t-1}, t), so its features are others (Concept Weaver, section 3.3; Plug-and-Play Diffusion, arXiv 2211.12572).

They are *stored* for every step; or *replayed*, computed again at every step of a fusion from its latents, the same to
the last bit in next to no memory; or, as an approximation, stored from the *inversion* pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from weaver.cache import Cache, features_identity, reverse_identity
from weaver.choices import FEATURES
from weaver.errors import raise_if
from weaver.graphs import CUDAGraphs, graph_reasons
from weaver.inversion import Inversion
from weaver.latents import decode_latents, psnr
from weaver.layers import InjectionSites, site_reasons
from weaver.memory.feature_home import home_for, kept_in
from weaver.replay import forward_until
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
        `....to_k` [1, T, H * D]; a step past a window lacks that kind. Empty where they are replayed
    z_T : the noise [1, C, h, w] the reverse pass started from, where fusion starts too
    path : the latents [n, C, h, w] of the reverse pass, from z_T to where it was cut, steps + 1 if it was not; None
        where there was no reverse pass
    unet_arguments : the source prompt, as the U-Net's forward takes it
    kind : "stored", "replayed" or "inversion", see above
    cached : whether they were taken from a cache
    """

    sites: InjectionSites
    timesteps: torch.Tensor
    tensors: tuple[Mapping[str, torch.Tensor], ...]
    z_T: torch.Tensor
    path: torch.Tensor | None
    unet_arguments: Mapping = field(default_factory=dict)
    kind: str = "stored"
    cached: bool = False

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.z_T.shape[-2:])

    @property
    def time_ids(self) -> torch.Tensor | None:
        """SDXL's [1, 6], with which they were collected; None for models without."""
        return self.unet_arguments.get("added_cond_kwargs", {}).get("time_ids")

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """The latents [1, C, h, w] that the reverse pass ended at; None if it was cut after the last injected step."""
        return self.path[-1:] if self.path is not None and len(self.path) == self.steps + 1 else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for step in self.tensors for tensor in step.values())

    def replay(self, unet, step: int) -> dict[str, torch.Tensor]:
        """The features of a step, computed by the part of the U-Net that they need, on its own processors."""
        wanted = _wanted(_modules(unet, self.sites), self.sites, step, self.steps)
        if not wanted:  # the path may have been cut before
            return {}
        return forward_until(unet, wanted, self.path[step][None], self.timesteps[step], self.unet_arguments)[0]


@torch.no_grad()
def collect_features(
    pipe,
    inversion: Inversion,
    sites: InjectionSites,
    *,
    kind: str = "stored",
    reconstruct: bool = True,
    storage: torch.device | str | None = None,
    cache: Cache | None = None,
    graphs: CUDAGraphs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Draw the template again from its noise, under its prompt and without guidance, and have the features of that.

    Parameters
    ----------
    pipe : the pipeline that inverted the picture; it is only read
    sites : which layers, and for which part of the steps
    kind : "stored" or "replayed", which give the same picture, or "inversion", which approximates
    reconstruct : go on to the end, to know how well the inversion held; False stops after the last injected step, and
        of the kind "inversion" does not draw the template again at all
    storage : device to keep stored features on; None is the U-Net's, or the CPU where they would take more than half of
        a GPU's free memory. From the CPU's memory they are brought to a GPU a step ahead of their use
    cache : where the reverse pass, and features if it keeps them, are looked for and kept; for an inversion that was
        made with a cache
    graphs : replay the steps from these CUDA graphs
    progress : called after each step with (done, steps)

    Raises `WeaverError` when the U-Net lacks a site.
    """
    reasons = site_reasons(pipe.unet, sites)
    reasons += graph_reasons(pipe.unet, graphs)
    reasons += [] if kind in FEATURES else [f"the kind is {kind!r}, expected one of {', '.join(FEATURES)}"]
    raise_if(reasons, "Cannot collect features")
    run = _Run(pipe, inversion, sites, storage, graphs, progress)
    identity = None if cache is None else inversion.identity
    known = cache.get(reverse_identity(identity)) if identity else None
    path = known and known["latents"].to(run.device)
    kept = features_identity(identity, sites, kind) if identity and cache.features and kind != "replayed" else None
    stored = cache.get(kept) if kept and (path is not None or not reconstruct) else None
    if stored is not None:
        tensors = run.by_step(stored)
        run.finish()
        return run.features(tensors, path, kind, cached=True)

    tensors = None
    if path is None and (kind != "inversion" or reconstruct):
        total = run.steps if reconstruct else run.injected
        path, tensors = run.reverse(total, take=kind == "stored")
        if identity and total == run.steps:
            cache.put(reverse_identity(identity), {"latents": path})
    if kind == "inversion":
        tensors = run.take(inversion.latents[:-1].flip(0))  # the inversion pass read the latents one step nearer to z_0
    elif kind == "stored" and tensors is None:
        tensors = run.take(path)
    run.finish()
    if kept:
        cache.put(kept, {f"{step}.{name}": x for step, found in enumerate(tensors) for name, x in found.items()})
    return run.features(tensors or ({},) * run.steps, path, kind)


class _Run:
    """The forwards of one collection."""

    def __init__(self, pipe, inversion: Inversion, sites: InjectionSites, storage, graphs, progress):
        self.unet, self.inversion, self.sites = pipe.unet, inversion, sites
        self.steps, self.device = inversion.steps, inversion.latents.device
        self._modules = _modules(self.unet, sites)
        if graphs is not None:
            graphs.follow(self.unet)
        self.injected = max(sites.resnet_steps(self.steps), sites.attention_steps(self.steps))
        self.scheduler = ddim_scheduler(pipe.scheduler)
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self._storage, self._graphs, self._progress, self._told = storage, graphs, progress, False

    def reverse(self, total: int, take: bool) -> tuple[torch.Tensor, tuple[Mapping, ...] | None]:
        """Draw `total` steps again: latents [total + 1, C, h, w], and the features if they are to be taken."""
        path, found = [self.inversion.z_T.contiguous()], []
        for step, t in enumerate(self.scheduler.timesteps[:total]):
            output = self._forward(step, path[-1], found if take else None, whole=True)
            z = self.scheduler.step(output, t, path[-1], return_dict=False)[0]
            path.append(z.contiguous())  # laid out as a part of the whole path is: another layout rounds otherwise
            self._tell(step + 1, total)
        return torch.cat(path), self._each_step(found) if take else None

    def take(self, latents: torch.Tensor) -> tuple[Mapping, ...]:
        """The features of every injected step, whose latents are known: [n, C, h, w]."""
        found: list[Mapping] = []
        for step in range(self.injected):
            self._forward(step, latents[step][None], found, whole=False)
            self._tell(step + 1, self.injected)
        return self._each_step(found)

    def by_step(self, stored: Mapping[str, torch.Tensor]) -> tuple[Mapping[str, torch.Tensor], ...]:
        """Tensors named "<step>.<module path>" as a mapping for each step."""
        self._settle(sum(tensor.nbytes for tensor in stored.values()))
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(self.steps)]
        for name, tensor in stored.items():
            step, path = name.split(".", 1)
            found[int(step)][path] = self._keep(tensor)
        return tuple(map(MappingProxyType, found))

    def features(self, tensors, path: torch.Tensor | None, kind: str, cached: bool = False) -> Features:
        arguments, timesteps = self.inversion.unet_arguments, self.scheduler.timesteps
        return Features(self.sites, timesteps, tensors, self.inversion.z_T, path, arguments, kind, cached)

    def finish(self) -> None:
        """Wait for what is on its way to the CPU's memory, and tell the end where nothing was to be done."""
        if self.device.type == "cuda" and torch.device(self._storage or self.device).type == "cpu":
            torch.cuda.synchronize(self.device)
        if not self._told:
            self._tell(self.steps, self.steps)

    def _forward(self, step: int, z: torch.Tensor, found: list | None, whole: bool) -> torch.Tensor | None:
        wanted = [] if found is None else _wanted(self._modules, self.sites, step, self.steps)
        t, arguments = self.scheduler.timesteps[step], self.inversion.unet_arguments
        options = {"keep": self._keep, "whole": whole, "graphs": self._graphs}
        taken, output = forward_until(self.unet, wanted, z, t, arguments, **options)
        if found is not None:
            if not found and self._storage is None:  # the first step says how large those of all steps are
                self._settle(self._whole_size(taken))
                taken = {path: self._keep(x) for path, x in taken.items()}
            found.append(MappingProxyType(taken))
        return output

    def _whole_size(self, taken: Mapping[str, torch.Tensor]) -> int:
        """Bytes of the features of all steps, of which these are the first step's."""
        steps = self.sites.resnet_steps(self.steps), self.sites.attention_steps(self.steps)
        return sum(tensor.nbytes * steps[path not in self._modules[0]] for path, tensor in taken.items())

    def _settle(self, nbytes: int) -> None:
        if self._storage is None:
            self._storage = home_for(nbytes, self.device)

    def _keep(self, output: torch.Tensor) -> torch.Tensor:
        return output if self._storage is None else kept_in(self._storage, output, self.device)

    def _each_step(self, found: list[Mapping]) -> tuple[Mapping, ...]:
        return (*found, *({},) * (self.steps - len(found)))

    def _tell(self, done: int, total: int) -> None:
        self._told = True
        if self._progress:
            self._progress(done, total)


def _modules(unet, sites: InjectionSites) -> tuple[list[str], list[str]]:
    """Paths of the modules that are ResNet features and attention features."""
    return sites.resnet_modules(), sites.projection_modules(unet)


def _wanted(modules: tuple[list[str], list[str]], sites: InjectionSites, step: int, steps: int) -> list[str]:
    """Those of them whose outputs are injected at a step."""
    resnets, projections = modules
    resnets = resnets if step < sites.resnet_steps(steps) else []
    return resnets + (projections if step < sites.attention_steps(steps) else [])


def reconstruction_psnr(pipe, inversion: Inversion, features: Features) -> float:
    """How near the reverse pass came to the picture, in dB, against the autoencoder's own rendering of it."""
    raise_if(
        ["the features were collected with reconstruct=False"] if features.reconstruction is None else [],
        "Cannot measure the reconstruction",
    )
    return psnr(decode_latents(pipe.vae, features.reconstruction), decode_latents(pipe.vae, inversion.z_0))
