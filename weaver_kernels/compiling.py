"""Compile the kernels for any NVIDIA GPU without one, and read what a binary takes.

What is compiled is what the operation would launch: configurations come from the table it reads, arguments from the
function that makes its own, and Triton specialises them as in a launch. Binaries land in Triton's cache, where a
launch finds them. A process that compiled here stands for another GPU than its own: it must not launch.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from weaver_kernels.descriptors import lost_descriptors

__all__ = [
    "SHARED_KIB",
    "Binary",
    "Compiled",
    "compile_case",
    "compile_each",
    "failures",
    "jitted",
    "missing_tools",
    "without_storage",
]

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may take, CUDA programming guide
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync")


class Binary(Protocol):
    """What is compiled: `strict` where a spill is refused, `call` the kernel, its arguments and Triton's options."""

    arch: int
    bits: int

    @property
    def strict(self) -> bool: ...

    def call(self) -> tuple: ...


@dataclass(frozen=True)
class Compiled:
    """What a case takes: registers a thread, bytes of stack a thread (spills), bytes of shared memory a block; and how
    many matrix instructions read anywhere (`weaver_kernels.descriptors`)."""

    case: Binary
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instruction: str = "none"
    error: str = ""  # why there is no binary
    lost: int = 0


def compile_case(case: Binary) -> Compiled:
    """Compile one case to a binary and read what it takes. Needs ptxas and cuobjdump, which Triton's wheel has."""
    from triton.runtime import driver

    driver.set_active(_Target(case.arch))
    try:
        kernel, arguments, options = case.call()
        binary = kernel.warmup(*arguments, grid=(1, 1, 1), **options)
    except Exception as error:  # of whatever kind, from any stage of the compiler: the case can't be launched
        return Compiled(case, error=f"{type(error).__name__}: {error}".splitlines()[0])
    usage = _resource_usage(binary.asm["cubin"])
    instruction = next((name for name in INSTRUCTIONS if name in binary.asm["ptx"]), "none")
    lost = len(lost_descriptors(_read(binary.asm["cubin"], "-sass"))) if instruction == "wgmma" else 0
    stack = usage["STACK"] + usage["LOCAL"]
    return Compiled(case, usage["REG"], stack, binary.metadata.shared, instruction, lost=lost)


def compile_each(cases: Sequence[Binary], jobs: int) -> Iterator[Compiled]:
    """Compile cases in `jobs` processes of their own, so that this one may launch; results come in their order."""
    fresh = multiprocessing.get_context("spawn")  # a fork could not use a GPU that its parent has
    with ProcessPoolExecutor(min(jobs, len(cases)) or 1, fresh, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(compile_case, cases)


def failures(compiled: Compiled, shared_kib: int | None = None) -> list[str]:
    """Why a binary must not be shipped; empty when it may. `shared_kib`: what a block may take, of other devices.

    Spills are refused where a case is strict, and else only listed.
    """
    case, reasons = compiled.case, []
    if compiled.error:
        return [f"does not compile: {compiled.error}"]
    limit = SHARED_KIB[case.arch] if shared_kib is None else shared_kib
    if compiled.stack and case.strict:
        reasons.append(f"spills {compiled.stack} bytes")
    if compiled.shared > limit * 1024:
        reasons.append(f"takes {compiled.shared} bytes of shared memory of {limit} KiB")
    if compiled.instruction == "none" and case.bits == 16:
        reasons.append("has no tensor-core instruction")
    if compiled.lost:
        reasons.append(f"reads anywhere in {compiled.lost} matrix instructions: a newer ptxas makes it right")
    return reasons


def missing_tools() -> list[str]:
    """What compiling needs and is not installed."""
    try:
        from triton import knobs
    except ImportError:
        return ["triton"]
    missing = []
    for name in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, name)
        except RuntimeError:
            missing.append(name)
    return missing


class _Target:
    """Stands where Triton asks for the GPU of the process."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # binaries are kept by device: each architecture has its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def jitted(kernel):
    """The kernel, which must not be interpreted."""
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise SystemExit("the kernel is interpreted and can't be compiled: unset TRITON_INTERPRET")
    return kernel


def without_storage(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor whose sizes and strides are all there is of it."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _read(cubin, "-res-usage")
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _read(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
