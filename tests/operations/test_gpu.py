"""The operations on an NVIDIA GPU: `make test-gpu`. Not run elsewhere, and never interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from operations.cases import assert_within_twice_eager, hard_weights, make_case, on_gpu, soft_weights
from weaver_kernels import (
    ContextPlan,
    context_attention,
    context_attention_reference,
    project_contexts,
    shared_attention,
    shared_attention_reference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_kernels")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def check(case: dict) -> None:
    """Without and with a plan, against float64 and eager attention on the CPU."""
    moved = on_gpu(case)
    assert_within_twice_eager(context_attention(**moved).cpu(), case)
    plan = ContextPlan(moved["weights"], moved.get("context_index"), merge=case["q"].ndim == 4)
    moved |= {"weights": plan.weights, "context_index": plan.context_index, "plan": plan}
    assert_within_twice_eager(context_attention(**moved).cpu(), case)


@DTYPES
@pytest.mark.parametrize("d", [8, 24, 40, 64, 80, 128, 160, 256])
def test_head_dims(d, dtype):
    check(make_case(b=2, t=300, h=3, d=d, length=77, s=5, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("length", [1, 33, 77, 100, 128, 154, 231])
def test_text_lengths(length, dtype):
    check(make_case(b=2, t=130, length=length, d=64, dtype=dtype, weights=soft_weights))


@DTYPES
@pytest.mark.parametrize("d", [160, 256])
def test_keys_of_wide_heads_that_do_not_fit_at_once(d, dtype):
    check(make_case(b=2, t=130, length=128, d=d, dtype=dtype, q_each=d == 160, weights=soft_weights))


@DTYPES
def test_small_weights(dtype):
    check(make_case(t=130, length=77, d=64, dtype=dtype, weights=lambda b, s, t, rng: torch.full((b, s, t), 1e-4)))


@DTYPES
@pytest.mark.parametrize("length", [77, 154])
@pytest.mark.parametrize("q_each", [False, True], ids=["shared-q", "q-each"])
def test_ragged_sliced_and_indexed(q_each, length, dtype):
    shape = {"b": 2, "t": 150, "h": 2, "d": 40, "s": 4, "contexts": 7, "length": length}
    check(make_case(**shape, ragged=True, strided=True, q_each=q_each, weights=soft_weights, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("s", [1, 7, 70])
def test_numbers_of_contexts(s, dtype):
    check(make_case(b=2, t=200, s=s, d=64, length=16, dtype=dtype))


@DTYPES
def test_logits_beyond_the_range_of_fp16(dtype):
    check(make_case(t=100, d=64, length=77, amplitude=60.0, dtype=dtype) | {"scale": 1.0})


@pytest.mark.parametrize(("t", "h", "d"), [(9216, 5, 64), (4096, 8, 40), (64, 8, 160)], ids=["sd21", "sd15", "small"])
def test_sizes_of_unets(t, h, d):
    check(make_case(b=2, t=t, h=h, d=d, length=77, s=5, dtype=torch.bfloat16))


def test_float64_and_large_heads_are_gathered():
    for shape in ({"dtype": torch.float64}, {"d": 300}):
        case = make_case(t=200, **shape)
        expected = context_attention_reference(**case)
        torch.testing.assert_close(context_attention(**on_gpu(case)).cpu(), expected, rtol=1e-5, atol=1e-5)


@DTYPES
def test_every_number_of_the_result_is_written_and_none_beside_it(dtype):
    from weaver_kernels.context_attention.launch import launch
    from weaver_kernels.tuning import KernelConfig

    case = on_gpu(make_case(b=2, t=77, h=3, d=40, dtype=dtype))
    plan = ContextPlan(case["weights"], tile_sizes=(32,))
    wide = torch.full((2, 78, 4, 48), torch.nan, dtype=dtype, device="cuda")
    out = wide[:, :77, :3, :40]
    q, k, v = (case[name] for name in ("q", "k", "v"))
    launch(q, k, v, plan.weights, None, 40**-0.5, plan.lists, plan.tile_sizes, KernelConfig(32, 4, 1), out)
    assert torch.isfinite(out).all() and wide.isnan().sum() == wide.numel() - out.numel()


@DTYPES
def test_a_graph_replays_with_other_masks_and_another_number_of_contexts(dtype):
    """Captured once with room for eight contexts; masks, numbers, queries and texts then change in place."""
    rng = torch.Generator().manual_seed(0)
    case = make_case(b=2, t=576, h=2, d=64, s=8, length=77, dtype=dtype)
    moved = on_gpu(case)
    plan = ContextPlan(moved["weights"], capacity=8)
    arguments = {name: moved[name] for name in ("q", "k", "v")}
    arguments |= {"weights": plan.weights, "context_index": plan.context_index, "plan": plan}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        context_attention(**arguments)  # compiles and loads the kernel, which a capture can't
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = context_attention(**arguments)
    for n_contexts, weights in ((8, hard_weights), (1, hard_weights), (3, soft_weights), (5, hard_weights)):
        changed = weights(2, n_contexts, 576, rng)
        index = torch.randint(0, 8, (2, n_contexts), generator=rng)
        plan.update(changed.cuda(), index.cuda())
        for name in ("q", "k", "v"):
            case[name] = torch.randn(case[name].shape, generator=rng).to(dtype)
            moved[name].copy_(case[name])
        graph.replay()
        assert_within_twice_eager(out.cpu(), case | {"weights": changed, "context_index": index})


def test_a_plan_is_built_and_updated_without_waiting_for_the_device():
    weights = hard_weights(2, 5, 576, torch.Generator().manual_seed(0)).cuda()
    index = torch.arange(5, device="cuda").expand(2, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ContextPlan(weights, index).update(weights, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("number", [-1, 9, 2**40])
@pytest.mark.parametrize("name", ["context_index", "key_lengths"])
def test_a_number_out_of_range_is_nan_without_waiting_for_the_device(name, number):
    case = make_case(s=2, t=256, d=64, length=8, weights=lambda b, s, t, rng: torch.ones(b, s, t), dtype=torch.float16)
    case |= {"context_index": torch.tensor([[0, 1]]), "key_lengths": torch.tensor([8, 8])}
    moved = on_gpu(case)
    assert torch.isfinite(context_attention(**moved)).all()
    moved[name].flatten()[0] = number
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = context_attention(**moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().all()


def test_a_number_out_of_range_is_named_when_debugging():
    code = """if True:
        import torch
        from weaver_kernels import context_attention
        x = torch.ones(1, 8, 1, 16, device="cuda", dtype=torch.float16)
        for number in (0, 1):
            index = torch.full((1, 1), number, device="cuda")
            context_attention(x, x, x, torch.ones(1, 1, 8, device="cuda"), index)
            torch.cuda.synchronize()
            print("fine", number)
    """
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_DEBUG": "1"}, capture_output=True, text=True
    )
    assert "fine 0" in ran.stdout and "fine 1" not in ran.stdout
    assert "context_index out of range" in ran.stdout + ran.stderr


def test_one_binary_serves_every_number_of_contexts_and_tokens():
    from weaver_kernels.context_attention.kernel import context_attention_kernel

    def run(s, t):
        context_attention(**on_gpu(make_case(s=s, t=t, d=48, length=77, contexts=9, dtype=torch.float16)))

    def binaries():
        return sum(len(per_device[0]) for per_device in context_attention_kernel.device_caches.values())

    run(3, 64)
    before = binaries()
    for s, t in ((1, 64), (4, 1), (16, 100), (70, 33)):
        run(s, t)
    assert binaries() == before


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    case = make_case(b=2, t=300, d=64, length=77, dtype=torch.float16)
    compiled = torch.compile(lambda **x: context_attention(**x) * 1, backend=backend, fullgraph=True)
    assert_within_twice_eager(compiled(**on_gpu(case)).cpu(), case)


def test_opcheck():
    case = on_gpu(make_case(b=2, contexts=4, ragged=True, d=40, dtype=torch.float16))
    plan = ContextPlan(case["weights"], case["context_index"])
    tensors = (case["q"], case["k"], case["v"], plan.weights, plan.context_index, case["key_lengths"])
    operation = torch.ops.weaver_kernels.context_attention.default
    torch.library.opcheck(operation, (*tensors, plan.lists, 0.3))


@pytest.mark.parametrize("rows", [2, 3, 5], ids="rows-{}".format)
@pytest.mark.parametrize("d", [40, 64, 80, 160])
def test_shared_attention(d, rows):
    q = torch.randn(1, 300, 2, d, device="cuda", dtype=torch.float16)
    k, v = torch.randn_like(q), torch.randn(rows, 300, 2, d, device="cuda", dtype=torch.float16)
    true = shared_attention_reference(q.double(), k.double(), v.double())
    per_row = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).expand(rows, -1, -1, -1) for x in (q, k, v))
    ).transpose(1, 2)
    ours, theirs = ((x.double() - true).abs().max() for x in (shared_attention(q, k, v), per_row))
    assert ours <= 2 * theirs


def test_project_contexts_is_what_it_is_on_the_cpu():
    text, weight = torch.randn(3, 77, 64).double(), torch.randn(2, 40, 64).double()
    ours = project_contexts(text.cuda(), *weight.cuda(), heads=5)
    expected = project_contexts(text, *weight, heads=5)
    torch.testing.assert_close(ours.keys.cpu(), expected.keys)
    torch.testing.assert_close(ours.values.cpu(), expected.values)


def test_importing_leaves_the_gpu_alone():
    code = "import torch, weaver_kernels; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
