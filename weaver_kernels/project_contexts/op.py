"""`project_contexts`: matrix products that libraries do well, arranged so that a layer takes one, two or three.

The base weights are applied to all contexts in one product. Changes are stacked and added in one batched product for
the full ones and one pair for the factors: they are never merged into the base weights, whose 16-bit rounding would
swallow the small ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from weaver_kernels.checks import gradient_reasons, own_precision, require
from weaver_kernels.project_contexts.reference import LowRank, ProjectionChange

__all__ = ["ContextKV", "equal_contexts", "project_contexts"]


@dataclass(frozen=True, eq=False)
class ContextKV:
    """Keys and values of S' contexts in one layer, both [S', L, H, D], as `context_attention` takes them."""

    keys: torch.Tensor
    values: torch.Tensor


@own_precision
def project_contexts(
    text: torch.Tensor,
    weight_k: torch.Tensor,
    weight_v: torch.Tensor,
    heads: int,
    changes: Mapping[int, ProjectionChange] | None = None,
    *,
    out: ContextKV | None = None,
) -> ContextKV:
    """Keys and values of every context in one layer, once a generation: neither text nor weights change by step.

    `K_s = text_s (W_k + delta_k,s)^T` and the same for V (arXiv 2404.03913, section 3.5: each concept has its own
    cross-attention weights, under its own prompt). Contexts S', text length L, text width C, heads H, head dimension
    D. Inference only.

    Parameters
    ----------
    text : [S', L, C]
    weight_k, weight_v : [H * D, C], the projections of the base model
    heads : H
    changes : number of a context -> what it adds to the two weights, as matrices or factors on any device; contexts
        that are not there have the base model's
    out : keys and values to write into, which keep their addresses, for a CUDA graph; None allocates

    Returns
    -------
    ContextKV in text's dtype; without `out` its keys and values are views of one tensor [S', L, 2 * H * D]

    Raises
    ------
    ValueError with every reason, when shapes, dtypes or devices do not fit or gradients are asked for.
    """
    changes = {} if changes is None else changes
    require("project_contexts", _change_reasons(changes))
    given, added = {"text": text, "weight_k": weight_k, "weight_v": weight_v}, _tensors(changes)
    reasons = _reasons(text, weight_k, weight_v, heads, changes, out) + gradient_reasons(**given, **added)
    if out is not None:
        given |= {"out.keys": out.keys, "out.values": out.values}
    require("project_contexts", reasons + _kind_reasons(given, added))
    width = len(weight_k)
    projected = text @ torch.cat([weight_k, weight_v]).to(text.dtype).T  # [S', L, 2HD]
    full, factored = _stacked(changes, width, text)
    if full is not None:
        which, delta = full
        projected[which] = torch.baddbmm(projected[which], text[which], delta.mT)
    if factored is not None:
        which, down, up = factored
        projected[which] = torch.baddbmm(projected[which], torch.bmm(text[which], down.mT), up.mT)
    keys, values = (part.unflatten(-1, (heads, -1)) for part in projected.split(width, dim=-1))
    if out is None:
        return ContextKV(keys, values)
    out.keys.copy_(keys)
    out.values.copy_(values)
    return out


def equal_contexts(text: torch.Tensor, weights: Sequence[Hashable]) -> torch.Tensor:
    """For each context the first one that is equal to it in text and weights: [S'] integers, `ContextPlan`'s `same_as`.

    text : [S', L, C]; weights : something for each context that is equal where its weights are, such as the concept's
    name and scale, or None for the base model. Reads the text once: not for the inside of a loop.
    """
    if len(weights) != len(text):
        raise ValueError(f"equal_contexts: {len(text)} texts and {len(weights)} weights")
    bits = text.detach().cpu().contiguous().view(torch.uint8).flatten(1).numpy()  # `unique` sorts for tens of ms
    pairs = list(zip((own.tobytes() for own in bits), weights, strict=True))
    return torch.tensor([pairs.index(pair) for pair in pairs], dtype=torch.int64, device=text.device)


def _stacked(changes, width, text):
    """Full changes as (contexts, [M, 2HD, C]) and factors as (contexts, [M, R, C], [M, 2HD, R]); None without any.

    A context's factors of k and v are side by side in R, filled up with zeros to the largest rank there is.
    """
    full, factored = {}, {}
    for s, change in sorted(changes.items()):
        for part, first in ((change.k, 0), (change.v, width)):
            if isinstance(part, LowRank):
                factored.setdefault(s, []).append((part, first))
            elif part is not None:
                full.setdefault(s, []).append((part, first))
    stacked_full = stacked_factored = None
    if full:
        delta = text.new_zeros(len(full), 2 * width, text.shape[-1])
        for i, parts in enumerate(full.values()):
            for part, first in parts:
                delta[i, first : first + width] = part
        stacked_full = torch.tensor(list(full), device=text.device), delta
    if factored:
        rank = max(sum(len(part.down) for part, _ in parts) for parts in factored.values())
        down = text.new_zeros(len(factored), rank, text.shape[-1])
        up = text.new_zeros(len(factored), 2 * width, rank)
        for i, parts in enumerate(factored.values()):
            start = 0
            for part, first in parts:
                end = start + len(part.down)
                down[i, start:end] = part.down
                up[i, first : first + width, start:end] = part.up
                start = end
        stacked_factored = torch.tensor(list(factored), device=text.device), down, up
    return stacked_full, stacked_factored


def _tensors(changes) -> dict[str, torch.Tensor]:
    """Every tensor of the changes, by a name that says where it is."""
    found = {}
    for s, change in changes.items():
        for name, part in zip("kv", change, strict=True):
            if isinstance(part, LowRank):
                found |= {f"{name}.{field} of context {s}": x for field, x in part._asdict().items()}
            elif part is not None:
                found[f"{name} of context {s}"] = part
    return found


def _change_reasons(changes) -> list[str]:
    """Reasons seen in the types of changes alone."""
    if not isinstance(changes, Mapping):
        return [f"changes must be {{context: ProjectionChange}}, got a {type(changes).__name__}"]
    reasons = [f"changes has context {s!r}, expected a whole number" for s in changes if not isinstance(s, int)]
    for s, change in changes.items():
        if not isinstance(change, ProjectionChange):
            reasons.append(f"the change of context {s} must be a ProjectionChange, got a {type(change).__name__}")
            continue
        for name, part in zip("kv", change, strict=True):
            factors = part if isinstance(part, LowRank) else () if part is None else (part,)
            if any(not isinstance(x, torch.Tensor) or x.ndim != 2 for x in factors):
                reasons.append(f"{name} of context {s} must be a matrix, or factors that are")
    return reasons


def _kind_reasons(given: Mapping[str, torch.Tensor], added: Mapping[str, torch.Tensor]) -> list[str]:
    """Reasons seen in dtypes and devices; what is added may be on any device, since it is copied."""
    device = given["text"].device
    reasons = [
        f"{name} must be floating-point, got {x.dtype}"
        for name, x in {**given, **added}.items()
        if not x.is_floating_point()
    ]
    beside = [f"{name} on {x.device}" for name, x in given.items() if x.device != device]
    return reasons + ([f"text is on {device}, {', '.join(beside)}"] if beside else [])


def _reasons(text, weight_k, weight_v, heads, changes, out) -> list[str]:
    reasons = []
    if text.ndim != 3:
        reasons.append(f"text must be [S', L, C], got {tuple(text.shape)}")
    if weight_k.ndim != 2 or weight_k.shape != weight_v.shape:
        got = f"{tuple(weight_k.shape)} and {tuple(weight_v.shape)}"
        reasons.append(f"weight_k and weight_v must be [H * D, C] of one shape, got {got}")
    if reasons:
        return reasons
    width, channels = weight_k.shape
    if text.shape[-1] != channels:
        reasons.append(f"text has {text.shape[-1]} channels, the weights take {channels}")
    if heads < 1 or width % heads:
        reasons.append(f"{width} outputs can't be {heads} heads")
    if beyond := [s for s in changes if not 0 <= s < len(text)]:
        reasons.append(f"changes has contexts {beyond}, text has 0..{len(text) - 1}")
    for s, change in changes.items():
        for name, part in zip("kv", change, strict=True):
            if isinstance(part, LowRank):
                down, up = part
                rank = len(down)
                if tuple(down.shape) != (rank, channels) or tuple(up.shape) != (width, rank):
                    got = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
                    reasons.append(f"{name} of context {s} must be [r, {channels}] and [{width}, r], got {got}")
            elif part is not None and tuple(part.shape) != (width, channels):
                reasons.append(f"{name} of context {s} must be {(width, channels)}, got {tuple(part.shape)}")
    if out is not None and not reasons:
        shape = (*text.shape[:2], heads, width // heads)
        for name, x in (("keys", out.keys), ("values", out.values)):
            if tuple(x.shape) != shape or x.dtype != text.dtype:
                reasons.append(f"out.{name} must be {shape} {text.dtype}, got {tuple(x.shape)} {x.dtype}")
    return reasons
