"""Hashes that are not computed again: only where no bit has changed."""

from __future__ import annotations

import pytest
import torch

from weaver import hashing
from weaver.hashing import bit_sums, remembered


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (7,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8], ids=str)
def test_every_word_counts(shape, dtype, monkeypatch):
    monkeypatch.setattr(hashing, "_CHUNK", 4)
    x = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {bit_sums([x])}
    for i in range(x.numel()):
        y = x.clone()
        y.view(-1)[i] += 1
        seen.add(bit_sums([y]))
    assert len(seen) == 1 + x.numel()
    assert bit_sums([x.clone()]) == bit_sums([x])


def test_places_count():
    x = torch.arange(12.0)
    assert bit_sums([x]) != bit_sums([x.flip(0)])
    assert bit_sums([x.view(3, 4)]) == bit_sums([x]) != bit_sums([x.view(3, 4).T])
    assert bit_sums([x, -x]) == (*bit_sums([x]), *bit_sums([-x]))
    torch.testing.assert_close(bit_sums([torch.zeros(5)]), (0,))


def test_changes_that_even_out_count():
    """Whose sum is zero, and whose sum weighted by their places is zero too."""
    a, b = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert bit_sums([torch.tensor([0.0, 1, 1, 0])]) != bit_sums([torch.tensor([1.0, 0, 0, 1])])
    assert bit_sums([torch.stack([a, b, b, a])]) != bit_sums([torch.stack([b, a, a, b])])
    bits = torch.randint(0, 2**20, (16,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    changed = bits.clone()
    changed[4:7] += torch.tensor([1, -2, 1], dtype=torch.int32)
    assert bit_sums([bits]) != bit_sums([changed])


def test_what_has_changed_is_computed_again(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(hashing, "_KNOWN", type(hashing._KNOWN)())
    computed, weights = [], {"a": torch.ones(3), "b": torch.ones(2)}

    def compute(named):
        computed.append(dict(named))
        return str(len(computed))

    def ask(kind="kind"):
        return remembered(kind, weights.items(), compute)

    assert [ask(), ask()] == ["1", "1"]
    weights["a"].data[1] += 1  # which no version counter tells
    assert [ask(), ask("other"), ask()] == ["2", "3", "2"]
    weights["a"].data[1] -= 1
    assert ask() == "1"
    weights["b"] = weights["b"].half().float().view(1, 2)
    assert ask() == "4"
    for i in range(hashing._MOST):
        ask(i)
    assert len(hashing._KNOWN) == hashing._MOST and ask() == str(len(computed))


def test_weights_on_the_host_count_beside_those_on_a_gpu(monkeypatch):
    """Of which no sum is made: that takes longer than the hash itself."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.ndim == 2))
    monkeypatch.setattr(hashing, "_KNOWN", type(hashing._KNOWN)())
    summed, sums = [], hashing.bit_sums
    monkeypatch.setattr(hashing, "bit_sums", lambda tensors: summed.append(len(tensors)) or sums(tensors))
    there, computed = torch.ones(2, 2), []

    def ask(*host):
        weights = [("unet", there), *((str(i), value) for i, value in enumerate(host))]
        return remembered("kind", weights, lambda _: computed.append(1) or str(len(computed)))

    resting = torch.arange(6).half()
    assert [ask(resting), ask(resting.clone()), ask(resting.flip(0)), ask(resting)] == ["1", "1", "2", "1"]
    there[0, 0] = 2
    assert ask(resting) == "3" and set(summed) == {1}


def test_on_the_cpu_it_is_computed_each_time():
    computed = []
    for _ in range(2):
        remembered("kind", [("a", torch.ones(2))], lambda named: computed.append(named) or "hash")
    assert len(computed) == 2
