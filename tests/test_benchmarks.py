"""The benchmarks' harness: what it records, what it refuses, and what a floor is. Nothing here asserts a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import context_attention as benchmark
from benchmarks import harness, host_overhead, providers, report, rows, shapes
from benchmarks.floors import Floor, Rates, Work, attention_work, floor
from benchmarks.sums import settings, unet_ms
from benchmarks.targets import CPU, GPU, targets
from benchmarks.timing import HostCall, buffer_sets, interleave, quantiles
from benchmarks.whole_targets import WHOLE_CPU, WHOLE_GPU
from weaver_kernels import ContextPlan, context_attention, context_attention_reference
from weaver_kernels.tuning import kernel_config

CPU_DEVICE = torch.device("cpu")
UNCOMPILED = ("ours", "eager", "sdpa + einsum", "sorted varlen")
TINY = shapes.UNet("tiny", 8, (shapes.Geometry(8, 2, 8, 5), shapes.Geometry(4, 3, 8, 1)))


def row(**changes) -> dict:
    about = {"device": "a CPU", "op": "o", "model": "sd21", "layer": "96x96 5x64", "masks": "hard", "N": 3}
    return {**about, "dtype": "float32", "provider": "ours", "p50_us": "5", **changes}


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path):
    path = tmp_path / "deep" / "results.csv"
    rows.upsert(path, [row(), row(provider="eager", p50_us="9"), row(N=12), row(N=8)])
    rows.upsert(path, [row(p50_us="4")])
    found = [(r["N"], r["provider"], r["p50_us"]) for r in rows.read(path)]
    assert found == [("3", "eager", "9"), ("3", "ours", "4"), ("8", "ours", "5"), ("12", "ours", "5")]
    assert [p.name for p in path.parent.iterdir()] == ["results.csv"]


def test_devices_never_share_a_row(tmp_path):
    path = tmp_path / "results.csv"
    rows.upsert(path, [row(device="a GPU", p50_us="1")])
    rows.upsert(path, [row(device="a CPU", p50_us="7")])
    assert {(r["device"], r["p50_us"]) for r in rows.read(path)} == {("a GPU", "1"), ("a CPU", "7")}
    assert [setting.device for setting in settings(rows.read(path))] == ["a CPU", "a GPU"]


def test_rows_that_can_not_be_told_apart_are_refused_all_at_once(tmp_path):
    path = tmp_path / "results.csv"
    rows.upsert(path, [row()])
    with pytest.raises(ValueError, match="row 1 has no device; row 2 has no provider; row 1 has speed, no column"):
        rows.upsert(path, [row(p50_us="1"), row(device="", speed=3), row(provider=None)])
    assert [r["p50_us"] for r in rows.read(path)] == ["5"]


def candidate(provider, call, true):
    return harness.Candidate(row(provider=provider), lambda: [call], true, torch.float32, Floor(1e-9, "bytes"))


def test_what_is_wrong_is_not_recorded_and_what_can_not_run_is_told():
    true = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    one_token = true.float()
    one_token[1, 4] *= 1.00001

    def unable():
        raise RuntimeError("no such attention\nhere")

    calls = {
        "right": true.float,
        "one token": lambda: one_token,
        "nan": lambda: true.float().where(true < 1, torch.nan),
        "unable": unable,
    }
    found = harness.measure([candidate(*call, true) for call in calls.items()], CPU_DEVICE, Rates(1e9, 1e9), rounds=1)
    assert [r["provider"] for r in found.rows] == ["right"]
    assert [line.split(" is wrong")[0] for line in found.wrong] == ["one token, N = 3", "nan, N = 3"]
    assert found.left_out == ["unable, N = 3: RuntimeError no such attention"]
    assert set(found.rows[0]) <= set(rows.FIELDS)


def test_work_of_a_layer_by_hand():
    q, k = torch.empty(2, 6, 5, 8, dtype=torch.float16), torch.empty(4, 7, 5, 8, dtype=torch.float16)
    weights = torch.zeros(2, 3, 6)
    weights[0, :2], weights[1, 2, :3] = 0.5, -1  # 12 and 3 live pairs
    read_and_written = 2 * (2 * 6 * 5 * 8) * 2  # q and the result
    keys_and_values = 2 * (4 * 7 * 5 * 8) * 2
    assert attention_work(q, k, weights) == Work(read_and_written + keys_and_values + 15 * 4, 15 * 5 * 7 * 8 * 4)


@pytest.mark.parametrize(
    ("launch", "by", "seconds"), [(0.0, "bytes", 3.0), (2.5, "bytes", 3.0), (3.5, "launch", 3.5)], ids=str
)
def test_a_floor_is_the_largest_part(launch, by, seconds):
    assert floor(Work(300, 500), Rates(copy=100, matrix=250), launch) == Floor(seconds, by)
    assert floor(Work(300, 5000), Rates(copy=100, matrix=250), launch) == Floor(20.0, "arithmetic")


def test_samples_are_taken_in_turn():
    told = []
    calls = {name: HostCall([lambda name=name: told.append(name) or torch.zeros(1)]) for name in "abc"}
    for call in calls.values():
        call.repeats = 1
    told.clear()
    assert [len(found) for found in interleave(calls, rounds=4).values()] == [4, 4, 4]
    assert all(sorted(told[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))


def test_memory_and_quantiles_of_a_call():
    call = HostCall([lambda: (torch.zeros(1000) + 1).sum().repeat(10)])
    assert 4000 <= call.peak <= 9000
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert buffer_sets(1, CPU_DEVICE) == 1


@pytest.mark.parametrize("kind", shapes.MASKS)
@pytest.mark.parametrize("n", benchmark.CONCEPTS)
def test_masks_sum_to_one_and_end(n, kind):
    masks = shapes.blob_masks(n, 64, kind)
    assert masks.shape == (n + 1, 64, 64)
    torch.testing.assert_close(masks.sum(0), torch.ones(64, 64))
    assert (masks.flatten(1).sum(1) > 8).all()
    live = (masks > 0).sum(0).float().mean()
    assert live == 1 if kind == "hard" else 1.1 < live < 2.5
    weights = shapes.make_plan(masks, shapes.Geometry(16, 1, 8, 1), CPU_DEVICE).weights
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 256))


def test_a_forward_has_as_many_cross_attentions_as_its_u_net():
    assert {name: sum(g.count for g in unet.layers) for name, unet in shapes.MODELS.items()} == {
        "sd21": 16,
        "sdxl": 70,
        "sd15": 16,
    }


def one_layer(n=4, side=9, kind="soft"):
    geometry = shapes.Geometry(side, 2, 8, 1)
    plan = shapes.make_plan(shapes.blob_masks(n, 18, kind), geometry, CPU_DEVICE)
    texts = shapes.make_texts(geometry, n + 3, torch.float32, CPU_DEVICE, torch.Generator().manual_seed(0))
    doubles = (x.double() for x in (*vars(texts).values(), plan.weights))
    return plan, texts, context_attention_reference(*doubles)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", shapes.MASKS)
def test_providers_agree_with_the_reference(kind, monkeypatch):
    """Compiled ones as they are before compiling, and packed attention as a GPU would be handed it."""
    monkeypatch.setattr(providers, "compiled", lambda function: function)
    monkeypatch.setattr(providers.SortedVarlen, "attend_packed", segments)
    plan, texts, true = one_layer(kind=kind)
    for name in set(providers.PROVIDERS) - {"xformers"}:
        provider = providers.PROVIDERS[name](plan, torch.float32)
        kept = provider.keep(texts)
        assert harness.token_error(provider(texts.q, *kept), true) < harness.tolerance(torch.float32), name
        if name == "sorted varlen":
            assert harness.token_error(provider.packed(texts.q, *kept), true) < harness.tolerance(torch.float32)


def segments(self, q, k, v):
    ends = zip(self.ends_q[:-1], self.ends_q[1:], self.ends_k[:-1], self.ends_k[1:], strict=True)
    return torch.cat([providers.attend(q[a:b], k[c:d], v[c:d]) for a, b, c, d in ends])


def test_a_run_records_tells_and_goes_on(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch)
    quick = partial(_run, tmp_path)
    assert quick("--concepts", "1", "3", "--masks", "hard") == 0
    first = rows.read(tmp_path / "context_attention.csv")
    assert {(r["provider"], r["N"], r["layer"]) for r in first} == {
        (name, n, str(layer)) for name in UNCOMPILED for n in "13" for layer in TINY.layers
    }
    assert "not measured: xformers, N = 1: NotSupported" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## NVIDIA GPU" in text and "not yet measured" in text
    assert len(list(tmp_path.glob("context_attention-*-sd21.svg"))) == 1

    monkeypatch.setitem(
        providers.PROVIDERS, "eager", type("Off", (providers.Eager,), {"__call__": lambda *a: 0 * a[1]})
    )
    assert quick("--concepts", "1", "3", "--masks", "hard", "--missing") == 0  # nothing is
    assert quick("--concepts", "1", "8", "--masks", "hard") == 1
    found = {(r["provider"], r["N"]) for r in rows.read(tmp_path / "context_attention.csv")}
    assert ("ours", "8") in found and ("eager", "8") not in found
    assert "NOT RECORDED: eager, N = 8 is wrong by 1.0e+00" in capsys.readouterr().err


def tiny(monkeypatch):
    """Small layers, and rates that need not be measured."""
    monkeypatch.setitem(shapes.MODELS, "sd21", TINY)
    monkeypatch.setattr(benchmark, "measure_rates", lambda *_: Rates(1e9, 1e9))


def _run(out, *more):
    names = [*UNCOMPILED, "xformers"]
    return benchmark.main(
        ["--quick", "--device", "cpu", "--rounds", "1", "--out", str(out), *more, "--providers", *names]
    )


def test_time_that_is_up_leaves_parts_to_the_next_run(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch)
    assert _run(tmp_path, "--minutes", "1e-9") == 3
    assert "no time for 1 of 2 parts" in capsys.readouterr().out
    assert {r["layer"] for r in rows.read(tmp_path / "context_attention.csv")} == {str(TINY.layers[0])}
    assert _run(tmp_path, "--minutes", "1", "--missing") == 0


def test_times_of_what_is_not_ours_any_more_are_taken_again(tmp_path, monkeypatch):
    tiny(monkeypatch)
    path = tmp_path / "context_attention.csv"
    run = partial(_run, tmp_path, "--concepts", "1", "3")
    assert run() == 0
    before = set(map(rows.key_of, rows.read(path)))
    assert all(bool(r["implementation"]) == (r["provider"] == "ours") for r in rows.read(path))
    measured = []
    monkeypatch.setattr(benchmark, "measure", lambda *a: measured.append(1) or harness.measure(*a))
    assert run("--missing") == 0 and not measured
    monkeypatch.setattr(benchmark, "source_hash", lambda *modules: "another")
    assert run("--missing") == 0 and len(measured) == len(TINY.layers)
    assert {r["implementation"] for r in rows.read(path) if r["provider"] == "ours"} == {"another"}
    assert before == set(map(rows.key_of, rows.read(path)))


def test_on_a_gpu_ours_is_the_kernel_with_its_configuration(monkeypatch):
    layer = shapes.MODELS["sd21"].layers[0]
    found = {}
    for arch in (0, 86, 90):
        monkeypatch.setattr(benchmark, "kernel_arch", lambda device, arch=arch: arch)
        found[arch] = benchmark.implementation(layer, torch.float16, CPU_DEVICE)
    chosen = {arch: "-".join(map(str, kernel_config("context_attention", 64, 16, arch))) for arch in (86, 90)}
    assert [found[arch].split()[1] for arch in (86, 90)] == list(chosen.values()) and len(set(chosen.values())) == 2
    assert found[86].split()[0] == found[90].split()[0]
    assert found[0] not in found[90]


def rows_of(sums: dict) -> list[dict]:
    """Rows of SD 2.1 at 768 whose layers all take the same."""
    return [
        {**row(provider=name, layer=str(layer), N=str(n), p50_us=str(us)), "share": "0.8", "live": "2"}
        for (name, n), us in sums.items()
        for layer in shapes.MODELS["sd21"].layers
    ]


def test_sums_and_targets():
    measured = rows_of({("ours", 1): 10, ("ours", 8): 12, ("eager", 8): 60, ("sdpa + einsum", 8): 48})
    assert unet_ms(measured, "sd21")["ours", 1] == pytest.approx(16 * 10 / 1000)
    assert ("ours", 1) not in unet_ms(measured[1:], "sd21")  # a layer is missing
    found = list(targets(settings(measured), CPU, "float32").values())
    assert found == [None, "4.00", None, "1.20 (sd21)"]
    large = ["80% (sd21 96x96 5x64, N=1, of 4 measured)", None, None, "1.20 (sd21)"]
    assert list(targets(settings(measured), GPU, "float32").values()) == large
    of_sdxl = [{**row(model="sdxl", layer="64x64 10x64", masks=masks), "share": "0.6"} for masks in shapes.MASKS]
    least = targets(settings([*measured, *of_sdxl]), GPU, "float32")
    assert "60% (sdxl 64x64 10x64, N=3, of 5 measured)" in least.values()
    assert list(targets({}, CPU, "float32").values()) == [None] * 4
    assert list(targets(settings(measured), CPU, "float16").values()) == [None] * 4


def test_an_empty_report_says_that_nothing_is_measured(tmp_path):
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        text.count("not yet measured") == len([*GPU, *WHOLE_GPU, *WHOLE_CPU]) + 2
    )  # and the host's overhead, and LoRAs


def test_host_time_is_that_of_the_path_of_a_gpu():
    weights, q = torch.ones(1, 1, 20), torch.randn(1, 20, 2, 8)
    k, v = torch.randn(2, 1, 5, 2, 8)
    expected = context_attention(q, k, v, weights)
    with host_overhead.silent(CPU_DEVICE):
        for name, call in host_overhead.parts(CPU_DEVICE).items():
            assert call() == [] if name == "of it checks" else call().shape == (2, 9216, 5, 64)
        assert context_attention(q, k, v, weights).shape == q.shape
    plan = ContextPlan(weights)
    assert torch.equal(context_attention(q, k, v, plan.weights, plan.context_index, plan=plan), expected)
