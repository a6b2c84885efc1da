"""Weights sum to one in every token, whatever the masks, strengths, windows and suppression."""

from __future__ import annotations

import itertools

import pytest
import torch

from weaver.fusion import ConceptUse, FusionPlan
from weaver.fusion.weights import phase_starts, token_weights
from weaver.masks.compose import compose_masks
from weaver.masks.pyramid import mask_pyramid

SIZES = [(16, 16), (8, 12), (5, 3), (1, 1)]


def random_masks(kind: str, n: int, seed: int) -> torch.Tensor:
    """[N, 24, 40] bool."""
    rng = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, 24, 40, dtype=torch.bool)
    for i in range(n):
        top, left = (int(torch.randint(0, limit, (1,), generator=rng)) for limit in (16, 30))
        if kind == "overlapping":
            masks[i, top : top + 8, left : left + 10] = True
        elif kind == "touching":
            masks[i, :, 40 * i // n : 40 * (i + 1) // n] = True
        else:
            masks[i] = torch.rand(24, 40, generator=rng) < 0.3
    return masks


@pytest.mark.parametrize("kind", ["overlapping", "touching", "noise"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("overlap", ["priority", "share"])
def test_partition_of_unity_of_weights(kind, n, overlap):
    full = compose_masks(random_masks(kind, n, seed=n), dilation=1, overlap=overlap)
    for size, masks in mask_pyramid(full, SIZES).items():
        for strengths, suppression in itertools.product(([1.0] * n, [0.3] * n, [0.0] * n), (0.0, 0.7, 3.0)):
            for tuned_background in (False, True):
                used = strengths + [1.0] * tuned_background
                weights = token_weights(masks, used, suppression)
                assert weights.shape == (1 + len(used), size[0] * size[1])
                torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1], dtype=torch.float64))


def test_partition_of_unity_in_the_plan_at_every_resolution_and_phase(tiny_pipe, concepts):
    masks = torch.rand(2, 32, 48, generator=torch.Generator().manual_seed(0)) / 2
    uses = [ConceptUse(concepts[0], strength=0.7, window=(0.2, 0.6)), ConceptUse(concepts[1], window=(0.0, 0.9))]
    plan = FusionPlan.build(
        tiny_pipe,
        uses,
        masks,
        prompt="a dog and a cat, mountain",
        background=ConceptUse(concepts[4], window=(0.5, 1.0)),
        suppression=0.5,
        height=32,
        width=48,
    )
    assert plan.phases == (0.0, 0.2, 0.5, 0.6, 0.9)
    assert {size for _, size in plan.weights} == {(16, 24), (8, 12), (4, 6), (2, 3)}
    assert len(plan.weights) == 4 * 5
    for weights in plan.weights.values():
        assert weights.shape[:3] == (2, 1, 4)
        torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[:, :, 0]))


def test_partition_of_unity_for_a_full_and_an_empty_mask():
    masks = torch.stack([torch.ones(4, 4), torch.zeros(4, 4), torch.zeros(4, 4)])
    weights = token_weights(masks, [1.0, 1.0], 0.5)
    assert torch.equal(weights, torch.tensor([[-0.5], [1.5], [0.0]], dtype=torch.float64).expand(-1, 16))


def test_an_untuned_background_merges_with_base():
    """w_base = (1 + lambda) M_bg - lambda."""
    masks = torch.tensor([[[1.0, 0.25, 0.0]], [[0.0, 0.75, 1.0]]])
    weights = token_weights(masks, [1.0], 0.4)
    torch.testing.assert_close(weights[0], 1.4 * masks[1].double().flatten() - 0.4)


def test_windows_are_half_open():
    use = ConceptUse(None, "a dog", strength=0.5, window=(0.3, 0.6))
    assert [use.strength_at(step / 10) for step in range(10)] == [0.0] * 3 + [0.5] * 3 + [0.0] * 4
    assert phase_starts([(0.3, 0.6), (0.0, 1.0), (0.6, 1.0)]) == (0.0, 0.3, 0.6)
