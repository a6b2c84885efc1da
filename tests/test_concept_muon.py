"""Muon: orthogonal steps, as PyTorch's takes them in bfloat16; and AdamW of what is no matrix, as PyTorch's."""

from __future__ import annotations

import pytest
import torch

from weaver.concepts.muon import Muon, orthogonalised

SHAPES = [(24, 40), (40, 24), (24, 40), (16, 3)]


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_steps_are_those_of_torch():
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for matrix, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            matrix.grad, other.grad = gradient, gradient.clone()
        mine.step()
        reference.step()
    for matrix, other, start in zip(ours, theirs, matrices(), strict=True):
        # theirs are iterated in bfloat16, whose numbers have three digits
        assert (matrix - other).norm() < 0.02 * (other - start).norm()


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 24, 1)])
def test_singular_values_are_brought_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(shape, generator=generator) * 1e-6
    found = orthogonalised(given)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), found.flatten(), dim=0) > 0.98


def test_without_a_gradient_nothing_moves():
    moved = matrices()
    moved[0].grad = torch.zeros_like(moved[0])
    Muon(moved, lr=0.1).step()
    assert all(torch.equal(matrix, start) for matrix, start in zip(moved, matrices(), strict=True))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"a tensor of shape \(5,\) is none"):
        Muon([torch.zeros(5)], lr=0.1)


def test_groups_of_adamw_are_those_of_torch():
    """Vectors of a token beside matrices, with rates of their own, one without a gradient; kept and gone on from."""
    start = [torch.linspace(-1, 1, 12).reshape(2, 6), torch.full((5,), 0.5), torch.zeros(3)]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    matrix = torch.eye(3).requires_grad_()
    told = {"betas": (0.9, 0.99), "weight_decay": 0.1}

    def muon():
        return Muon([{"params": [matrix]}, {"params": ours, "lr": 0.3, "adamw": True}], lr=0.1, **told)

    mine, reference = muon(), torch.optim.AdamW(theirs, lr=0.3, **told)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for x, y in zip(ours[:2], theirs[:2], strict=True):
            x.grad = y.grad = torch.randn(x.shape, generator=generator)
        matrix.grad = torch.ones(3, 3)
        if step == 2:
            kept, mine = mine.state_dict(), muon()
            mine.load_state_dict(kept)
        mine.step()
        reference.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert torch.equal(ours[2], start[2]) and not torch.equal(ours[1], start[1]) and matrix[0, 1] < 0
