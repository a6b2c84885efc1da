"""The live-context plan: sorted tokens, lists, merging, and updates in place."""

from __future__ import annotations

import pytest
import torch

from operations.cases import hard_weights, make_case, soft_weights, truth
from weaver_kernels import ContextPlan, context_attention
from weaver_kernels.context_attention.blocks import key_blocks, split
from weaver_kernels.context_attention.lists import (
    live_lists,
    live_order,
    live_tokens,
    split_live_tokens,
    tile_layout,
    tile_list,
)
from weaver_kernels.context_attention.plan import merge_equal


def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("s", [1, 3, 62, 63, 130])
def test_order_puts_equal_live_sets_side_by_side(s):
    alive = torch.rand(2, s, 1, generator=rng()).expand(-1, -1, 60) > 0.5
    alive = torch.where(torch.rand(2, 1, 60, generator=rng()) > 0.5, alive, ~alive)
    alive[:, :, ::7] = alive[:, :, ::7].roll(1, dims=1)
    order = live_order(alive)
    for row, tokens in zip(alive, order, strict=True):
        assert sorted(tokens.tolist()) == list(range(60))
        sets = [tuple(row[:, token].tolist()) for token in tokens.tolist()]
        runs = 1 + sum(a != b for a, b in zip(sets, sets[1:], strict=False))
        assert runs == len(set(sets))


def test_tokens_of_one_set_keep_their_order():
    alive = hard_weights(1, 4, 50, rng()) != 0
    order = live_order(alive)[0].tolist()
    for label in range(3):
        tokens = [token for token in order if alive[0, label, token]]
        assert tokens == sorted(tokens)


@pytest.mark.parametrize("size", [16, 64])
def test_tile_lists_hold_what_is_alive_on_the_tile_and_nothing_else(size):
    """A tile that has nothing has the row's first context, whose weights are zero there, by a number that there is."""
    alive = soft_weights(2, 5, 75, rng()) > 1
    alive[1, :, :40] = False
    order = live_order(alive)
    index = torch.tensor([[7, 6, 5, 4, 3], [99, 2, -1, 2**40, 0]])
    found = tile_list(alive, order, size, index)
    assert found.shape == (2, -(-75 // size), 11)
    for b in range(2):
        for tile in range(found.shape[1]):
            tokens = order[b, tile * size : (tile + 1) * size].long()
            expected = alive[b][:, tokens].any(1).nonzero()[:, 0].tolist()
            pairs = found[b, tile, 1 : 1 + 2 * found[b, tile, 0]].view(-1, 2).tolist()
            assert pairs == ([[s, min(int(index[b, s]), 2**31 - 1)] for s in expected] or [[0, 0]])
    assert size == 64 or [1, 0, 0] in found[1, :, :3].tolist()


def test_hard_masks_leave_about_two_contexts_a_tile():
    """Own concept and base, and a third where a tile lies on the border of two sets."""
    alive = hard_weights(1, 9, 64 * 64, rng()) != 0
    counts = tile_list(alive, live_order(alive), 64)[..., 0]
    assert counts.sum() <= 2 * counts.numel() + 7


def test_live_tokens():
    alive = soft_weights(2, 4, 30, rng()) > 0.5
    tokens, counts = live_tokens(alive)
    for b in range(2):
        for s in range(4):
            assert tokens[b, s, : counts[b, s]].tolist() == alive[b, s].nonzero()[:, 0].tolist()


def test_one_buffer_holds_all_lists():
    alive = soft_weights(2, 4, 30, rng()) > 0.5
    for part, expected in zip(split_live_tokens(live_lists(alive, ()), alive.shape), live_tokens(alive), strict=True):
        assert torch.equal(part, expected)
    lists, order = live_lists(alive, (16, 8)), live_order(alive)
    assert torch.equal(lists[:60].view(2, 30), order)
    for size, (n_tiles, at) in tile_layout(2, 4, 30, (16, 8)).items():
        found = tile_list(alive, order, size)
        assert torch.equal(lists[at : at + found.numel()].view(2, n_tiles, 9), found)


@pytest.mark.parametrize("same_as", [None, torch.tensor([0, 1, 1, 3])], ids=["by-number", "by-content"])
def test_equal_contexts_are_summed_in_the_first(same_as):
    weights = torch.randn(1, 4, 6, generator=rng())
    index = torch.tensor([[1, 2, 1, 3]])
    merged = merge_equal(weights, index, same_as)
    equal = [0, 2] if same_as is None else [0, 1, 2]
    torch.testing.assert_close(merged[:, 0], weights[:, equal].sum(1))
    assert all((merged[0, s] == 0).all() for s in equal[1:])
    assert torch.equal(merged[:, 3], weights[:, 3])


@pytest.mark.parametrize("number", [-1, 4, 2**40])
def test_a_number_out_of_range_is_equal_to_no_other_and_stays(number):
    """Whose tokens are NaN on a GPU: it must not become the number of a context that is there."""
    weights = torch.randn(1, 4, 6, generator=rng())
    index = torch.tensor([[3, number, 1, 3]])
    plan = ContextPlan(weights, index, same_as=torch.tensor([0, 1, 1, 3]))
    torch.testing.assert_close(plan.weights[:, 0], weights[:, 0] + weights[:, 3])
    assert torch.equal(plan.weights[:, 1:3], weights[:, 1:3])
    assert plan.context_index[0, 1] == min(number, 2**31 - 1)


def test_merged_weights_of_16_bits_are_summed_in_float32():
    plan = ContextPlan(torch.tensor([[[1.0], [0.002]]], dtype=torch.bfloat16), torch.tensor([[0, 0]]))
    assert plan.weights.dtype == torch.float32 and 1.0019 < plan.weights[0, 0] < 1.0021


def test_merging_changes_nothing_but_the_work():
    case = make_case(b=2, s=6, contexts=3, weights=soft_weights, dtype=torch.float64)
    plan = ContextPlan(case["weights"], case["context_index"])
    assert (plan.weights != 0).sum() < (case["weights"] != 0).sum()
    out = context_attention(case["q"], case["k"], case["v"], plan.weights, plan.context_index, plan=plan)
    torch.testing.assert_close(out, truth(case), rtol=1e-6, atol=1e-6)  # weights are summed in float32


@pytest.mark.parametrize("tile_sizes", [(), (16, 32)], ids=["live-tokens", "tiles"])
def test_updates_are_in_place_and_the_same_as_a_new_plan(tile_sizes):
    plan = ContextPlan(soft_weights(2, 3, 40, rng()), capacity=8, tile_sizes=tile_sizes)
    buffers = (plan.weights, plan.context_index, plan.lists)
    addresses = [buffer.data_ptr() for buffer in buffers]
    for n_contexts in (8, 1, 5):
        weights = hard_weights(2, n_contexts, 40, rng())
        index = torch.randint(0, 9, (2, n_contexts), generator=rng())
        plan.update(weights, index)
        fresh = ContextPlan(weights, index, capacity=8, tile_sizes=tile_sizes)
        for buffer, expected in zip(buffers, (fresh.weights, fresh.context_index, fresh.lists), strict=True):
            assert torch.equal(buffer, expected)
        assert [buffer.data_ptr() for buffer in (plan.weights, plan.context_index, plan.lists)] == addresses


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "not-merged"])
def test_an_update_with_its_own_weights_keeps_them(merge):
    weights, index = soft_weights(2, 3, 40, rng()), torch.tensor([[0, 2, 1], [2, 0, 1]])
    plan = ContextPlan(weights, capacity=4, merge=merge)
    address = plan.weights.data_ptr()
    for own in (plan.weights[:, :3], plan.weights[:, :2], plan.weights[:, 1:3]):
        expected = own.clone()
        plan.update(own, index[:, : own.shape[1]])
        assert torch.equal(plan.weights[:, : own.shape[1]], expected) and not plan.weights[:, own.shape[1] :].any()
    assert plan.weights.data_ptr() == address


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"same_as": torch.tensor([0])}, "same_as must have a number for each of 3 contexts"),
        ({"same_as": torch.tensor([0.0, 1.0, 2.0])}, r"same_as must be \[S'\] integers, got \(3,\) torch.float32"),
        ({"same_as": torch.zeros(3, dtype=torch.int64, device="meta")}, "several devices: cpu, meta"),
        ({"context_index": torch.tensor([[0.9, 1.0, 2.0]] * 2)}, "integers, got .* torch.float32"),
        ({"weights": torch.zeros(2, 3, 40, dtype=torch.int32)}, "floating-point, got .*torch.int32"),
        ({"weights": torch.zeros(2, 3, 40, requires_grad=True)}, "inference only, and weights requires grad"),
        ({"capacity": -1}, "capacity must be 0 or more, got -1"),
        ({"tile_sizes": (16, 0)}, r"tile_sizes must be 1 or more, got \[16, 0\]"),
    ],
    ids=["short", "float", "device", "float-index", "integers", "gradients", "capacity", "tiles"],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ContextPlan(**{"weights": torch.ones(2, 3, 40)} | change)


@pytest.mark.parametrize(
    ("weights", "index", "message"),
    [
        (torch.zeros(2, 9, 40), None, r"weights must be \[2, S <= 8, 40\], got \(2, 9, 40\)"),
        (torch.zeros(2, 3, 41), None, "got \\(2, 3, 41\\)"),
        (torch.zeros(6, 40), None, "got \\(6, 40\\)"),
        (torch.zeros(2, 3, 40), torch.zeros(2, 4, dtype=torch.int32), r"context_index must be \(2, 3\)"),
    ],
    ids=["capacity", "tokens", "axes", "index"],
)
def test_bad_updates(weights, index, message):
    plan = ContextPlan(torch.ones(2, 3, 40), capacity=8)
    with pytest.raises(ValueError, match=message):
        plan.update(weights, index)


def test_bad_weights():
    with pytest.raises(ValueError, match=r"weights must be \[B, S, T\]"):
        ContextPlan(torch.zeros(3, 40))


def test_blocks_hold_every_length_with_less_waste_than_one():
    for n in range(1, 257):
        first, second = split(n)
        smallest = max(16, 1 << (n - 1).bit_length())
        assert n <= first + second <= smallest
        assert all(block == 0 or (block >= 16 and block & (block - 1) == 0) for block in (first, second))
    for row_bytes, most in ((80, 128), (256, 128), (320, 80), (1024, 80)):
        for n in range(1, 400):
            at_a_time, first, second = key_blocks(n, row_bytes)
            assert at_a_time <= first + second <= most
        assert key_blocks(77, row_bytes) == (77, 64, 16) == key_blocks(154, row_bytes)
