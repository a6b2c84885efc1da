"""The kernel compiles for every generation of GPU in the table, without one: a subset of `make compile-check`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weaver_kernels.compile_check import ARCHS, HEAD_DIMS, HEADERS, cases, lora_cases, table_line
from weaver_kernels.compiling import Compiled, compile_case, failures
from weaver_kernels.compiling_attention import Case
from weaver_kernels.compiling_lora import LORA, LoraCase
from weaver_kernels.tuning import (
    KernelConfig,
    LoraConfig,
    config_table,
    default_config,
    default_lora_config,
    kernel_config,
    lora_config,
    tile_sizes,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compiled_kernels.md"


def test_the_subset_may_be_shipped():
    """In a process of its own: this one has the kernel interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "weaver_kernels.compile_check", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    instructions = re.findall(r"\| (\d+) \| 16 \|.*\| ([\w.]+) \|$", ran.stdout, re.MULTILINE)
    assert {arch: name for arch, name in instructions} == {
        "80": "mma.sync",
        "86": "mma.sync",
        "90": "wgmma",
        "100": "tcgen05.mma",
        "120": "mma.sync",
    }


def test_an_interpreted_kernel_is_not_taken_for_a_compiled_one():
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        compile_case(Case(64, 90, 16))


def test_every_row_of_the_table_is_compiled():
    compiled = {(case.arch, case.bits, case.config) for case in cases()}
    whole = {(case.arch, case.bits, case.head_dim, case.config) for case in cases() if case.n_keys == 128}
    for row in config_table("context_attention")["rows"]:
        config = KernelConfig(row["tile"], row["warps"], row["stages"], row.get("reload", False))
        for arch in row["arch"]:
            assert (arch, row["bits"], config) in compiled
            assert "q_each" in row or (arch, row["bits"], row["head_dim"], config) in whole
    assert {case.head_dim for case in cases() if case.n_keys == 77} >= set(HEAD_DIMS)
    others = {(case.arch, case.bits, case.head_dim, case.config) for case in cases() if case.variant == "default"}
    for arch in ARCHS:
        for row in config_table("context_attention")["default"]:
            for dim in {40, 64, 80, row["head_dim"]}:
                assert (arch, row["bits"], dim, default_config("context_attention", dim, row["bits"])) in others


def test_every_row_of_the_table_of_routed_lora_is_compiled():
    compiled = {(case.arch, case.bits, case.spread, case.config) for case in lora_cases()}
    for row in config_table(LORA)["rows"]:
        config = LoraConfig(*(row[name] for name in LoraConfig._fields))
        for arch in row["arch"]:
            for spread in [row["spread"]] if "spread" in row else [False, True]:
                assert (arch, row["bits"], spread, config) in compiled


def test_sizes_that_follow_the_contexts_and_the_tokens_make_no_other_binary():
    """In a process of its own, compiled for a GPU that is not there: a graph must find its binary whatever N is."""
    code = """if True:
        import torch
        from triton.runtime import driver
        from weaver_kernels.compiling import _Target
        from weaver_kernels.compiling_attention import _kernel
        from weaver_kernels.context_attention.launch import kernel_arguments
        from weaver_kernels.tuning import KernelConfig

        def empty(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device="meta")

        driver.set_active(_Target(80))
        kernel = _kernel()
        for s, t in ((3, 64), (1, 64), (4, 1), (16, 100), (70, 33)):
            q, k = empty(2, t, 2, 16, dtype=torch.float16), empty(s, 16, 2, 16, dtype=torch.float16)
            weights = empty(2, s, t, dtype=torch.float32)
            config = KernelConfig(16, 4, 1)
            _, tensors, others, options = kernel_arguments(q, k, k, weights, None, empty(1), (16,), config, q)
            kernel.warmup(*tensors, 1.0, *others, grid=(1, 1, 1), **options)
        print("binaries", sum(len(per_device[0]) for per_device in kernel.device_caches.values()))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "binaries 1\n" in ran.stdout, ran.stdout + ran.stderr


def test_sizes_that_follow_the_adapters_the_tokens_and_the_layer_make_no_other_binary():
    """Of `routed_lora`: all Linears of a U-Net with adapters of up to 16 ranks are one."""
    code = """if True:
        import torch
        from triton.runtime import driver
        from weaver_kernels.compiling import _Target, jitted, without_storage as empty
        from weaver_kernels.routed_lora.kernel import routed_lora_kernel
        from weaver_kernels.routed_lora.launch import kernel_arguments
        from weaver_kernels.tuning import LoraConfig

        driver.set_active(_Target(80))
        kernel = jitted(routed_lora_kernel)
        sizes = (3, 64, 320, 320), (1, 64, 320, 2560), (4, 1, 640, 640), (16, 100, 1280, 5120), (70, 33, 32, 16)
        for s, t, c, o in sizes:
            half = {"dtype": torch.float16}
            layer = empty(2, t, o, **half), empty(2, t, c, **half), empty(16 * s, c, **half), empty(16 * s, o, **half)
            weights = empty(2, s, t, dtype=torch.float32)
            config = LoraConfig(16, 16, 16, 4, 1, 64)
            _, tensors, others, options = kernel_arguments(*layer, empty(s + 1), weights, empty(1), (16,), 16, config)
            kernel.warmup(*tensors, *others, grid=(1, 1, 1), **options)
        print("binaries", sum(len(per_device[0]) for per_device in kernel.device_caches.values()))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "binaries 1\n" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("case", "measured", "message"),
    [
        (Case(64, 90, 16), (128, 8, 1024, "wgmma"), "spills 8 bytes"),
        (Case(64, 90, 16, variant="q-each"), (128, 8, 1024, "wgmma"), "spills 8 bytes"),
        (Case(160, 90, 16), (255, 8, 1024, "wgmma"), None),
        (Case(80, 120, 16, variant="ragged"), (255, 16, 1024, "mma.sync"), None),
        (Case(80, 120, 16, variant="default"), (255, 16, 1024, "mma.sync"), "spills 16 bytes"),
        (Case(80, 120, 32), (255, 8, 1024, "none"), "spills 8 bytes"),
        (Case(64, 90, 32, 128), (255, 8, 1024, "none"), None),
        (Case(64, 86, 16), (128, 0, 99 * 1024 + 1, "mma.sync"), "shared memory of 99 KiB"),
        (Case(64, 86, 16), (128, 0, 99 * 1024, "mma.sync"), None),
        (Case(64, 86, 16), (128, 0, 1024, "none"), "no tensor-core instruction"),
        (Case(64, 86, 32), (128, 0, 1024, "none"), None),
        (Case(64, 86, 16), (0, 0, 0, "none", "PTXASError: no"), "does not compile: PTXASError: no"),
        (LoraCase(16, 86, 16), (255, 8, 1024, "mma.sync"), "spills 8 bytes"),
        (LoraCase(16, 86, 32), (255, 8, 1024, "none"), None),
        (LoraCase(16, 86, 16, default=True), (255, 8, 1024, "mma.sync"), None),
    ],
    ids=[
        "spill",
        "spill-of-variant",
        "spill-of-160",
        "spill-of-ragged",
        "spill-of-default",
        "spill-of-fp32",
        "spill-of-longer-text",
        "shared",
        "shared-fits",
        "no-tensor-core",
        "fp32",
        "no-binary",
        "lora-spill",
        "lora-fp32",
        "lora-default",
    ],
)
def test_what_fails(case, measured, message):
    reasons = failures(Compiled(case, *measured))
    assert reasons == [] if message is None else len(reasons) == 1 and message in reasons[0]


def test_other_devices_have_limits_of_their_own():
    taken = Compiled(Case(64, 103, 16, chosen=KernelConfig(64, 4, 2)), 128, 0, 100 * 1024, "tcgen05.mma")
    assert failures(taken, 227) == []
    assert "of 99 KiB" in failures(taken, 99)[0]


def test_the_committed_page_is_of_the_table_that_is_read():
    """Configurations and verdicts; registers are those of the Triton it was written with."""
    page = PAGE.read_text(encoding="utf-8")
    for (op, header), every in zip(HEADERS.items(), (cases(), lora_cases()), strict=True):
        lines = page.split(f"### All of `{op}`")[1].split("\n## ")[0].split(header)[1].splitlines()[2:]
        written = [tuple(cell.strip() for cell in line.split("|")[1:11]) for line in lines]
        expected = [table_line(Compiled(case)) for case in every]
        looked_up = 11 if op == LORA else 9
        assert [line[: looked_up - 1] for line in written] == [
            tuple(cell.strip() for cell in line.split("|")[1:looked_up]) for line in expected
        ]
    assert "FAILS" not in page


def test_the_table_serves_every_device_and_head_dimension_it_promises(recwarn):
    for arch in ARCHS:
        for bits in (16, 32):
            for dim in (8, 40, 64, 65, 80, 160, 256):
                assert kernel_config("context_attention", dim, bits, arch).tile in tile_sizes("context_attention")
            for rank in (1, 16, 17, 64, 128):
                for spread in (False, True):
                    assert lora_config(rank, bits, arch, spread=spread).tile in tile_sizes("context_attention")
    assert not recwarn


def test_another_device_gets_a_safe_configuration_and_a_warning():
    kernel_config.cache_clear()
    with pytest.warns(UserWarning, match="compute capability 7.5.*make tune"):
        config = kernel_config("context_attention", 64, 16, 75)
    assert config == default_config("context_attention", 64, 16) != default_config("context_attention", 64, 32)
    lora_config.cache_clear()
    with pytest.warns(UserWarning, match="rank 32 on compute capability 7.5.*make tune"):
        assert lora_config(20, 16, 75) == default_lora_config(16)
