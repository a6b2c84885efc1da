"""`routed_lora` on an NVIDIA GPU: `make test-gpu`. Not run elsewhere, and never interpreted."""

from __future__ import annotations

import pytest
import torch

from operations.cases import hard_weights, soft_weights
from operations.lora_cases import (
    assert_dead_untouched,
    assert_within_twice_eager,
    fresh,
    lora_on_gpu,
    make_lora,
    planned,
    poison_dead,
    truth,
)
from operations.test_routed_lora_op import SHAPES, few
from weaver_kernels import routed_lora

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_kernels")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def check(case: dict) -> None:
    """Without and with a plan, against float64 and eager PyTorch on the CPU."""
    assert_within_twice_eager(routed_lora(**lora_on_gpu(case)).cpu(), case)
    assert_within_twice_eager(routed_lora(**planned(lora_on_gpu(case))).cpu(), case)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_the_cpu_is_tested_with(shape):
    check(make_lora(**shape, dtype=torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("ranks", [(1,), (16,), (33, 0, 8), (128, 64)], ids=str)
@pytest.mark.parametrize(("c", "o"), [(320, 320), (40, 70)])
def test_ranks_and_channels(c, o, ranks, dtype):
    check(make_lora(b=2, t=300, c=c, o=o, ranks=ranks, s=4, dtype=dtype, weights=soft_weights))


@DTYPES
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(stride, channels_last, dtype):
    layer = {"size": (24, 20), "c": 64, "o": 96, "taps": 3, "padding": 1, "stride": stride}
    check(make_lora(**layer, b=2, channels_last=channels_last, dtype=dtype, ranks=(16, 4)))


@pytest.mark.parametrize(("t", "c", "o"), [(9216, 320, 2560), (576, 5120, 1280), (64, 1280, 1280)], ids=str)
def test_sizes_of_unets(t, c, o):
    check(make_lora(b=2, t=t, c=c, o=o, s=5, ranks=(16,), dtype=torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("shape", [{"t": 300}, {"size": (20, 20), "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_what_no_adapter_is_alive_on_is_not_touched(shape, dtype):
    case = make_lora(**shape, b=2, c=64, o=64, weights=few, dtype=dtype)
    dead = poison_dead(case)
    assert_dead_untouched(routed_lora(**lora_on_gpu(case)).cpu(), dead)


def test_float64_is_computed_without_the_kernel():
    case = make_lora(b=2, t=200, dtype=torch.float64)
    for arguments in (lora_on_gpu(case), planned(lora_on_gpu(case))):
        torch.testing.assert_close(routed_lora(**arguments).cpu(), truth(case), rtol=1e-12, atol=1e-12)


@DTYPES
@pytest.mark.parametrize("shape", [{"t": 576}, {"size": (24, 24), "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_a_graph_replays_with_other_masks_and_another_number_of_contexts(shape, dtype):
    """Captured once with room for eight contexts; masks, numbers and inputs then change in place."""
    rng = torch.Generator().manual_seed(0)
    case = make_lora(**shape, b=2, c=64, o=96, s=8, dtype=dtype)
    on_device = planned(lora_on_gpu(case))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        routed_lora(**fresh(on_device))  # compiles and loads the kernel, which a capture can't
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed_lora(**on_device)
    for n_contexts, weights in ((8, hard_weights), (1, hard_weights), (3, soft_weights), (5, few)):
        changed = weights(2, n_contexts, 576, rng)
        index = torch.randint(0, 8, (2, n_contexts), generator=rng)
        on_device["plan"].update(changed.cuda(), index.cuda())
        for name in ("y", "x"):
            case[name] = torch.randn(case[name].shape, generator=rng).to(dtype)
            on_device[name].copy_(case[name])
        graph.replay()
        assert_within_twice_eager(on_device["y"].cpu(), case | {"weights": changed, "adapter_index": index})


@pytest.mark.parametrize("number", [-1, 9, 2**40])
def test_a_number_out_of_range_is_nan_without_waiting_for_the_device(number):
    weights = {"weights": lambda b, s, t, rng: torch.ones(b, s, t)}
    case = lora_on_gpu(make_lora(s=2, t=256, indexed=True, dtype=torch.float16, **weights))
    assert torch.isfinite(routed_lora(**fresh(case))).all()
    case["adapter_index"][0, 0] = number
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = routed_lora(**fresh(case))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    case = make_lora(b=2, t=300, c=64, o=64, dtype=torch.float16)
    compiled = torch.compile(lambda y, **x: routed_lora(y * 1, **x) * 1, backend=backend, fullgraph=True)
    assert_within_twice_eager(compiled(**lora_on_gpu(case)).cpu(), case)


def test_opcheck():
    case = planned(lora_on_gpu(make_lora(b=2, adapters=4, dtype=torch.float16)))
    adapters, plan = case["adapters"], case["plan"]
    tensors = case["y"], case["x"], adapters.down, adapters.up, adapters.offsets, plan.weights, plan.context_index
    operation = torch.ops.weaver_kernels.routed_lora.default
    torch.library.opcheck(operation, (*tensors, plan.lists, adapters.most, 1, 0, 1))
