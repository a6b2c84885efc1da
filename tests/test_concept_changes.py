"""What a change adds to a Linear while it is learned, and its gradients, against the matrix multiplied out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weaver.concepts.changes import added_to, parts_of
from weaver_kernels import LowRank


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "factors"])
def test_a_change_adds_what_its_matrix_would(kind, bias, weighted):
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, bias=bias, dtype=torch.float64).requires_grad_(False)
    delta = _drawn(10, 6) if kind == "matrix" else LowRank(_drawn(3, 6), _drawn(10, 3))
    x, sent = _drawn(2, 5, 6), torch.randn(2, 5, 10, dtype=torch.float64)
    weight = torch.rand(2, 5, 1, dtype=torch.float64) if weighted else None
    learned = [x, *parts_of(delta).values()]

    with added_to([(linear, delta)], lambda given: weight):
        found = linear(x)
    gradients = torch.autograd.grad((found * sent).sum(), learned)

    matrix = delta if kind == "matrix" else delta.up @ delta.down
    expected = linear(x) + (1.0 if weight is None else weight) * (x @ matrix.T)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * sent).sum(), learned))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["tokens", "rows"])
def test_factors_in_float32_on_a_model_in_half_precision(dtype, flat):
    """As a LoRA is learned; x and what is added to need not be contiguous."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, dtype=dtype).requires_grad_(False)
    delta = LowRank(*(torch.randn(shape, requires_grad=True) for shape in ((3, 6), (10, 3))))
    x, weight = (torch.randn(5, 6), torch.rand(5, 1)) if flat else (torch.randn(5, 2, 6), torch.rand(5, 2, 1))
    x, weight = (part if flat else part.transpose(0, 1) for part in (x.to(dtype), weight))
    with added_to([(linear, delta)], lambda given: weight):
        found = linear(x)
    assert found.dtype == dtype and found.shape == (*x.shape[:-1], 10)
    doubles = [part.detach().double() for part in (x, weight, linear.weight, linear.bias, delta.up @ delta.down)]
    x, weight, matrix, bias, change = doubles
    expected = x @ matrix.T + bias + weight * (x @ change.T)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max())
    gradients = torch.autograd.grad(found.float().square().sum(), list(delta))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


def test_a_change_acts_within_the_block_alone_and_only_where_it_may():
    linear, x = nn.Linear(6, 10), torch.randn(2, 5, 6)
    before, matrix = linear(x), torch.ones(10, 6)
    with added_to([(linear, matrix)], acts=lambda: False):
        assert torch.equal(linear(x), before)
    with added_to([(linear, matrix)]):
        assert not torch.equal(linear(x), before)
    assert torch.equal(linear(x), before)
