"""A forward of the U-Net that ends once the features it was run for are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

import torch

from weaver.compiled import hooks_run
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
        found, output = graphs.call((wanted, whole), partial(_forward, unet, wanted, whole), z, t, arguments)
        found = found if keep is None else {path: keep(x) for path, x in found.items()}
    missing = [path for path in wanted if path not in found]
    raise_if(
        [f"{path} was not called: unfuse the attention's projections first" for path in missing],
        "Cannot collect features",
    )
    return found, output


def _forward(unet, wanted: Sequence[str], whole: bool, z, t, arguments: dict, keep: Callable | None = None):
    found, output = {}, None

    def take(path: str):
        def hook(module, args, output):
            found[path] = output if keep is None else keep(output)
            if not whole and len(found) == len(wanted):
                raise _AllFound

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(uncaptured(unet))
        hooks.enter_context(hooks_run(unet) if wanted else nullcontext())
        for path in wanted:
            hooks.callback(unet.get_submodule(path).register_forward_hook(take(path)).remove)
        try:
            output = unet(z, t, **arguments, return_dict=False)[0]
        except _AllFound:
            pass
    return found, output
