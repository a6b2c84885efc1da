"""The tuner without a GPU: what it compiles, how it chooses, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from operations.interpreted import needs_interpreter
from weaver_kernels import measure, measure_attention, tune, tuning
from weaver_kernels.child import MeasuringChild
from weaver_kernels.compiling import Compiled
from weaver_kernels.measure import eager_error, interleaved_medians, true_result, why_wrong
from weaver_kernels.measure_attention import make_inputs
from weaver_kernels.tune import measured_before, usable_configs
from weaver_kernels.tune_attention import Row, rows
from weaver_kernels.tuning import KernelConfig, config_table, kernel_config, with_row, write_table
from weaver_kernels.unets import Geometry

FAST, SLOW = KernelConfig(64, 4, 2), KernelConfig(32, 4, 1)
MARK = {"device": "NVIDIA H200", "triton": "3.6.0", "kernel": "abc"}
TABLE = {
    "default": [{"bits": bits, "head_dim": 256, "tile": 32, "warps": 4, "stages": 1} for bits in (16, 32)],
    "rows": [{"arch": [80, 90], "bits": 16, "head_dim": 80, "tile": 16, "warps": 4, "stages": 1}],
}
TODO = [Row(40, 16, False), Row(80, 16, True), Row(80, 16, False)]


def run(todo=TODO, times=None, **options):
    """Tune `todo` for sm_90 with invented times; the result and every table that was written."""
    written = []
    times = {FAST: 10.0, SLOW: 20.0} if times is None else times
    done = tune.tune(
        todo,
        TABLE,
        90,
        MARK,
        usable=([SLOW, FAST] for _ in todo),
        measure=lambda row, configs: {config: times[config] for config in configs if config in times},
        write=written.append,
        **options,
    )
    return done, written


def test_the_fastest_is_written_after_each_row():
    done, written = run()
    assert [len(table["rows"]) for table in written] == [2, 3, 4]
    assert done.table == written[-1] and not done.left and not done.failed
    found = {(row["head_dim"], row.get("q_each", False), *row["arch"]): row for row in done.table["rows"]}
    assert found[80, False, 80]["tile"] == 16, "the other device keeps its configuration"
    for key in ((40, False, 90), (80, True, 90), (80, False, 90)):
        row = found[key]
        assert (row["tile"], row["warps"], row["stages"]) == FAST[:3] and "reload" not in row
        assert row["measured"] == {**MARK, "us": 10.0}


@pytest.mark.parametrize("other", [{}, {"device": "another"}, {"triton": "4"}, {"kernel": "def"}], ids=str)
def test_only_what_the_same_device_compiler_and_kernel_measured_is_done(other):
    table = run(TODO[:2])[0].table
    assert [measured_before(table, row, 90, {**MARK, **other}) for row in TODO] == [not other, not other, False]
    assert not measured_before(table, TODO[0], 80, MARK)


def test_no_row_is_begun_when_time_is_up():
    seconds = iter([0.0, 5.0, 11.0, 11.0])
    done, written = run(seconds=10, clock=lambda: next(seconds))
    assert len(written) == 1 and done.left == TODO[1:]


def test_a_row_without_anything_usable_stops_no_other():
    done, written = run(times={})
    assert done.failed == TODO and not written and done.table == TABLE


def test_candidates_are_filtered_by_what_compiling_showed(monkeypatch, capsys):
    """Row by row, as they are asked for; shared queries also by what a query for each context would take."""
    asked = []

    def compile_each(cases, jobs):
        for case in cases:
            asked.append(case)
            spills = 8 if case.config.warps == 4 else 0
            more = 20 if case.variant == "q-each" and case.head_dim == 40 else 0
            yield Compiled(case, 255, spills, (case.config.tile + more) * 1024, "wgmma")

    monkeypatch.setattr(tune, "compile_each", compile_each)
    found = usable_configs(TODO, 90, jobs=1, shared_kib=65)
    assert {(config.tile, config.warps) for config in next(found)} == {(32, 1), (32, 2)}
    assert "(128, 4, 2, False) spills 8 bytes; takes 131072 bytes of shared memory of 64 KiB" in capsys.readouterr().out
    assert {case.head_dim for case in asked} == {40}
    assert [{(config.tile, config.warps) for config in configs} for configs in found] == [
        {(32, 1), (32, 2), (64, 2), (64, 8)}
    ] * 2


def test_what_the_table_has_is_among_the_candidates():
    for row in rows():
        for arch in (80, 86, 89, 90, 100, 120):
            chosen = kernel_config("context_attention", row.head_dim, row.bits, arch, q_each=row.q_each)
            assert chosen in row.candidates(arch), (row, arch)


def test_without_a_gpu_one_line_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_row_for_queries_of_each_context_goes_before_one_that_says_nothing(monkeypatch):
    table = with_row(TABLE, {"arch": [90], "bits": 16, "q_each": True, "head_dim": 80, **FAST._asdict()})
    monkeypatch.setattr(tuning, "config_table", lambda op: table)
    lookup = kernel_config.__wrapped__
    assert lookup("", 80, 16, 90, q_each=True) == lookup("", 72, 16, 90, q_each=True) == FAST
    assert lookup("", 80, 16, 90) == lookup("", 80, 16, 80, q_each=True) == KernelConfig(16, 4, 1)


def test_a_table_is_replaced_as_a_whole_and_keeps_its_form(tmp_path):
    source = Path(tune.TABLE)
    path = tmp_path / source.name
    write_table(path, config_table("context_attention"))
    assert path.read_text() == source.read_text(), "written by hand: `write_table` gives it its form"
    with pytest.raises(TypeError):
        write_table(path, {"rows": [{"tile": object()}]})
    assert json.loads(path.read_text()) == config_table("context_attention")
    assert list(tmp_path.iterdir()) == [path]


def times_of_those_that_survive(configs, running):
    """One raises as a device does, one ends the process; the others take as long as they have stages."""
    for config in configs:
        with running(config):
            if config.tile == 64:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it")
            if config.tile == 128:
                os._exit(7)
    return {config: float(config.stages) for config in configs}


def test_a_configuration_that_ends_its_process_is_left_out_and_the_others_are_measured_again():
    told, kept = [], [KernelConfig(32, 4, 1), KernelConfig(32, 4, 2)]
    configs = [kept[0], KernelConfig(64, 4, 1), kept[1], KernelConfig(128, 4, 1)]
    with MeasuringChild(told.append) as child:
        assert child.measure(times_of_those_that_survive, configs) == {kept[0]: 1.0, kept[1]: 2.0}
        process = child._process
        assert child.measure(times_of_those_that_survive, kept[:1]) == {kept[0]: 1.0}
        assert child._process is process  # of one that did not fail
    assert process.exitcode == 0
    assert told == [
        "  (64, 4, 1, False) RuntimeError: CUDA error: an illegal memory access was encountered; without it again",
        "  (128, 4, 1, False) ended its process with status 7; without it again",
    ]


def test_an_error_of_no_configuration_is_not_laid_on_one(monkeypatch):
    said = [{"running": FAST, "failed": "no"}, {"running": None, "failed": "out of memory"}]
    monkeypatch.setattr(MeasuringChild, "_attempt", lambda *_: said.pop(0))
    with pytest.raises(RuntimeError, match="no configuration was running: out of memory"):
        MeasuringChild(lambda line: None).measure(times_of_those_that_survive, [FAST, SLOW])


def test_nothing_is_found_where_every_configuration_ends_its_process(monkeypatch):
    monkeypatch.setattr(MeasuringChild, "_attempt", lambda _, run, configs: {"running": configs[0], "failed": "no"})
    assert MeasuringChild(lambda line: None).measure(times_of_those_that_survive, [FAST, SLOW]) == {}


def test_medians_of_runs_that_take_turns():
    order, times = [], {"a": iter([1.0, 9.0, 2.0]), "b": iter([4.0, 3.0, 50.0])}

    def runner(name):
        return lambda: order.append(name) or next(times[name])

    assert interleaved_medians({name: runner(name) for name in times}, rounds=3) == {"a": 2.0, "b": 4.0}
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("q_each", [False, True], ids=["shared-q", "q-each"])
def test_results_are_compared_with_float64_before_anything_is_timed(q_each):
    """The kernel interpreted, on the inputs the tuner makes."""
    needs_interpreter()
    torch.manual_seed(0)
    inputs = make_inputs(Geometry(4, 1, 16, 1), torch.float16, q_each=q_each, tile_sizes=(16, 32), device="cpu")
    true = true_result(inputs)
    limit = 2 * eager_error(inputs, true)
    assert 0 < limit < 1e-2
    assert why_wrong(inputs, KernelConfig(32, 4, 1), true, limit) == ""
    assert "wrong by" in why_wrong(inputs, KernelConfig(16, 4, 1), true + 0.01, limit)


def test_only_too_few_resources_are_told_as_a_reason_and_other_errors_end_the_measuring(monkeypatch):
    """After an error of the device nothing that is measured means anything."""
    needs_interpreter()
    from triton.runtime.errors import OutOfResources

    inputs = make_inputs(Geometry(4, 1, 16, 1), torch.float32, q_each=False, tile_sizes=(16,), device="cpu")
    failing = iter([OutOfResources(300, 227, "shared memory"), RuntimeError("CUDA error: an illegal memory access")])

    def launch(self, config):
        raise next(failing)

    monkeypatch.setattr(measure_attention.LayerInputs, "launch", launch)
    assert "shared memory, Required: 300" in why_wrong(inputs, FAST, torch.ones(1), 1.0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        why_wrong(inputs, FAST, torch.ones(1), 1.0)


def test_a_number_that_is_not_written_is_wrong(monkeypatch):
    needs_interpreter()
    inputs = make_inputs(Geometry(4, 1, 16, 1), torch.float32, q_each=False, tile_sizes=(16,), device="cpu")
    true = true_result(inputs)

    def launch(self, config):
        self.out.copy_(true)[0, 3, 0, 5:6] = torch.nan
        return self.out

    monkeypatch.setattr(measure_attention.LayerInputs, "launch", launch)
    assert "wrong by nan" in why_wrong(inputs, KernelConfig(16, 4, 1), true, 1.0)


def test_a_configuration_that_is_wrong_on_one_layer_is_not_chosen(monkeypatch):
    """All but the graphs: two layers, the kernel interpreted, and a clock that is invented."""
    needs_interpreter()
    right, wrong, sets_of = KernelConfig(16, 4, 1), KernelConfig(32, 4, 1), []
    launch = measure_attention.LayerInputs.launch

    def broken(self, config):
        return launch(self, config).add_(config == wrong and self.q.shape[1] == 25)

    def captured(sets, config):
        sets_of.append((config, len(sets)))
        return lambda: 3.0

    monkeypatch.setattr(measure_attention, "layers_of", lambda dim: (Geometry(4, 1, dim, 10), Geometry(5, 1, dim, 1)))
    monkeypatch.setattr(measure_attention.LayerInputs, "launch", broken)
    monkeypatch.setattr(measure, "_captured", captured)
    monkeypatch.setattr(measure, "_cache_bytes", lambda: 40_000)
    told, ran = [], []

    @contextmanager
    def running(config):
        ran.append(config)
        yield
        ran.append(None)

    found = measure_attention.time_configs(16, torch.float16, False, [right, wrong], told.append, running, device="cpu")
    assert found == {right: 33.0}
    assert ran[1::2] == [None] * (len(ran) // 2), "one at a time"
    assert ran[::2] == [right, wrong] * (2 + measure.ROUNDS) + [right, wrong] + [right] * (1 + measure.ROUNDS)
    assert len(told) == 1 and "(32, 4, 1, False) wrong by" in told[0]
    assert [config for config, _ in sets_of] == [right, wrong, right]
    assert all(n == 1 + 80_000 // measured for (_, n), measured in zip(sets_of, (31_616, 31_616, 32_768), strict=True))


def test_inputs_have_two_live_contexts_a_token():
    inputs = make_inputs(Geometry(8, 2, 16, 1), torch.float32, q_each=False, tile_sizes=(16,), device="cpu")
    assert (inputs.plan.weights[0] != 0).sum(0).tolist() == [2] * 64
    assert (inputs.plan.weights[1] != 0).sum(0).tolist() == [1] * 64
    assert inputs.again().q.shape == inputs.q.shape and inputs.again().plan is inputs.plan
