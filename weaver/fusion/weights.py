"""How much each context counts in each token: masks, strengths, time windows and suppression in one tensor.

`h_fuse = (1 + lambda) [sum_i h_i M_i + h_bg M_bg] - lambda h_base` (Concept Weaver, section 3.5) is a weighted sum of
contexts whose weights add up to one in every token, and stays that when strengths and windows lerp to base:
`w_i = (1 + lambda) a_i M_i` and `w_base = 1 - sum of the others`. An untuned background merges with base by that
same line: `w_base = (1 + lambda) M_bg - lambda`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["negative_weights", "phase_starts", "region_weights", "token_weights"]


def phase_starts(windows: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """Where, as parts of the run from 0, the set of concepts in use changes; the first phase starts at 0."""
    return tuple(sorted({0.0} | {float(edge) for window in windows for edge in window if 0 < edge < 1}))


def token_weights(masks: torch.Tensor, strengths: Sequence[float], suppression: float) -> torch.Tensor:
    """Weights of the fused row's contexts.

    Parameters
    ----------
    masks : [N + 1, h, w], the background last, summing to one
    strengths : one for each of the first masks; the masks left over (an untuned background) are base
    suppression : lambda, 0 for none

    Returns [S, h * w] in float64: base first, then one for each strength. Columns sum to one.
    """
    amounts = torch.tensor(list(strengths), dtype=torch.float64, device=masks.device)
    others = (1 + suppression) * amounts[:, None] * masks[: len(amounts)].double().flatten(1)
    return torch.cat([1 - others.sum(0, keepdim=True), others])


def negative_weights(masks: torch.Tensor, strengths: Sequence[float], own: Sequence[int]) -> torch.Tensor:
    """Weights of the negative row's contexts.

    Parameters
    ----------
    masks, strengths : as in `token_weights`
    own : which of the masks have a negative prompt of their own, K of them

    Returns [1 + K, h * w] in float64: the negative prompt first, then those. Columns sum to one.
    """
    return token_weights(masks[list(own)], [strengths[i] for i in own], 0.0)


def region_weights(masks: torch.Tensor, strengths: Sequence[float], whole: Sequence[bool]) -> torch.Tensor:
    """How much of what concepts change outside of cross-attention is added in each token of the fused row.

    Parameters
    ----------
    masks, strengths : as in `token_weights`
    whole : which of them change anything there

    Returns [S, h * w] in float64, in the order of `token_weights`: base, which changes nothing, has 0.
    """
    amounts = torch.tensor([0.0, *(a * on for a, on in zip(strengths, whole, strict=True))], dtype=torch.float64)
    of = masks[: len(amounts) - 1].double().flatten(1)
    return amounts[:, None].to(masks.device) * torch.cat([of.new_zeros(1, of.shape[1]), of])
