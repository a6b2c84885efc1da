"""A forward of the U-Net that ends once the features it was run for are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch

from weaver.compiled import compile_whole, hooks_run
from weaver.errors import raise_if
from weaver.graphs import CUDAGraphs, uncaptured

__all__ = ["forward_until"]


class _AllFound(Exception):
    """Leaves a forward whose rest is of no use."""


def forward_until(
    unet,
    wanted: Iterable[str],
    z: torch.Tensor,
    t: torch.Tensor,
    arguments: dict,
    *,
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
    whole: bool = False,
    graphs: CUDAGraphs | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Run the U-Net on latents [B, C, h, w] and take the outputs of the modules at the paths `wanted`.

    Parameters
    ----------
    arguments : what the forward takes besides `z` and `t`
    keep : what is kept of an output; None keeps it itself
    whole : run to the end, for the U-Net's own output too; otherwise the forward is cut after the last of the modules
    graphs : replay it from these, captured when first met

    Returns the outputs by their paths, and the U-Net's output where it was run to the end. Raises `WeaverError` for a
    module that the forward does not call.
    """
    wanted = tuple(wanted)
    if not wanted and not whole:
        return {}, None
    if graphs is None:
        found, output = _forward(unet, wanted, whole, z, t, arguments, keep)
    else:
        forward = _Compiled(unet, wanted, whole) if graphs.compiled else partial(_forward, unet, wanted, whole)
        found, output = graphs.call((wanted, whole), forward, z, t, arguments)
        found = found if keep is None else {path: keep(x) for path, x in found.items()}
    missing = [path for path in wanted if path not in found]
    raise_if(
        [f"{path} was not called: unfuse the attention's projections first" for path in missing],
        "Cannot collect features",
    )
    return found, output


def _forward(unet, wanted: Sequence[str], whole: bool, z, t, arguments: dict, keep: Callable | None = None):
    found, output = {}, None

    def take(path: str, output: torch.Tensor) -> None:
        found[path] = output if keep is None else keep(output)
        if not whole and len(found) == len(wanted):
            raise _AllFound

    with uncaptured(unet), hooks_run(unet) if wanted else nullcontext(), _hooked(unet, wanted, take):
        try:
            output = unet(z, t, **arguments, return_dict=False)[0]
        except _AllFound:
            pass
    return found, output


class _Compiled:
    """The same, compiled when it is first called. What is not asked for is not computed, so nothing has to be cut."""

    def __init__(self, unet, wanted: Sequence[str], whole: bool):
        self._unet, self._wanted, self._whole = unet, wanted, whole
        self._found: dict[str, torch.Tensor] = {}
        self._forward: Callable | None = None

    def __call__(self, z, t, arguments: dict):
        self._forward = self._forward or compile_whole(self._run)
        with uncaptured(self._unet), _hooked(self._unet, self._wanted, self._keep):
            return self._forward(z, t, arguments)

    def _keep(self, path: str, output: torch.Tensor) -> None:
        self._found[path] = output

    def _run(self, z, t, arguments: dict):
        output = self._unet(z, t, **arguments, return_dict=False)[0]
        found = dict(self._found)
        self._found.clear()
        return found, output if self._whole else None


@contextmanager
def _hooked(unet, paths: Iterable[str], take: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the block each module at a path hands its output to `take`."""

    def handing(path: str):
        return lambda module, args, output: take(path, output)

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(unet.get_submodule(path).register_forward_hook(handing(path)).remove)
        yield
