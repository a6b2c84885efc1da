"""Compile the kernels for every device of the table without a GPU, and say what they take: `make compile-check`.

What is compiled is what the operation would launch: configurations come from the table it reads, arguments from the
function that makes its own, and they are specialised by Triton's rules (16-byte alignment, multiples of 16, ones).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from weaver_kernels.tuning import KernelConfig, config_table, kernel_config

__all__ = ["Case", "Compiled", "cases", "compile_case", "failures", "main"]

OP = "context_attention"
ARCHS = (80, 86, 89, 90, 100, 120)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may take, CUDA programming guide
HEAD_DIMS = (40, 64, 80, 160)  # of Stable Diffusion 1.5, 2.1 and XL
TEXT, LONG_TEXT = 77, 154
NO_SPILLS_TO = 80  # head dimension, at 77 keys
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync")
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
QUICK = ((40, 86, 16), (64, 90, 16), (64, 100, 16), (80, 80, 16), (160, 120, 16), (64, 89, 32))


@dataclass(frozen=True)
class Case:
    """One binary: heads of `head_dim`, a type of `bits` bits, `n_keys` keys, compute capability `arch`."""

    head_dim: int
    arch: int
    bits: int
    n_keys: int = TEXT
    variant: str = ""  # "q-each" or "ragged"

    @property
    def config(self) -> KernelConfig:
        return kernel_config(OP, self.head_dim, self.bits, self.arch)


@dataclass(frozen=True)
class Compiled:
    """What a case takes: registers a thread, bytes of stack a thread (spills), bytes of shared memory a block."""

    case: Case
    registers: int
    stack: int
    shared: int
    instruction: str


def cases(archs=ARCHS) -> list[Case]:
    """Every row of the table at 77 keys, Stable Diffusion's head dimensions at 154 too, and each variant."""
    rows = config_table(OP)["rows"]
    found = []
    for arch in archs:
        for bits in (16, 32):
            dims = {row["head_dim"] for row in rows if arch in row["arch"] and row["bits"] == bits}
            found += [Case(dim, arch, bits) for dim in sorted(dims | set(HEAD_DIMS))]
        found += [Case(dim, arch, 16, LONG_TEXT) for dim in HEAD_DIMS]
        found += [Case(dim, arch, 16, variant=variant) for dim in (64, 80) for variant in ("q-each", "ragged")]
    return found


def compile_case(case: Case) -> Compiled:
    """Compile one case to a binary and read what it takes. Needs ptxas and cuobjdump, which Triton's wheel has."""
    import triton
    from triton.backends.compiler import GPUTarget

    from weaver_kernels.context_attention.kernel import build_options

    signature, constants, attributes = _specialised(_arguments(case))
    source = triton.compiler.ASTSource(_kernel(), signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=build_options(case.config))
    usage = _resource_usage(binary.asm["cubin"])
    instruction = next((name for name in INSTRUCTIONS if name in binary.asm["ptx"]), "none")
    return Compiled(case, usage["REG"], usage["STACK"] + usage["LOCAL"], binary.metadata.shared, instruction)


def failures(compiled: Compiled) -> list[str]:
    """Why a binary must not be shipped; empty when it may.

    Spills are refused at 77 keys of 16 bits to D = 80, which is what Stable Diffusion runs; with larger heads, longer
    or ragged texts and float32 they are only listed.
    """
    case, reasons = compiled.case, []
    strict = case.n_keys == TEXT and case.variant != "ragged" and case.bits == 16
    if compiled.stack and strict and case.head_dim <= NO_SPILLS_TO:
        reasons.append(f"spills {compiled.stack} bytes")
    if compiled.shared > SHARED_KIB[case.arch] * 1024:
        reasons.append(f"takes {compiled.shared} bytes of shared memory of {SHARED_KIB[case.arch]} KiB")
    if compiled.instruction == "none" and case.bits == 16:
        reasons.append("has no tensor-core instruction")
    return reasons


def _kernel():
    from triton.runtime.jit import JITFunction

    from weaver_kernels.context_attention.kernel import context_attention_kernel

    if not isinstance(context_attention_kernel, JITFunction):
        raise SystemExit("compile-check: the kernel is interpreted; unset TRITON_INTERPRET")
    return context_attention_kernel


def _arguments(case: Case) -> dict:
    """Arguments as a U-Net of 8 heads hands them over, in tensors without storage."""
    from weaver_kernels.context_attention.kernel import kernel_arguments

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = torch.float16 if case.bits == 16 else torch.float32
    rows, n_contexts, n_tokens, heads, tiles = 2, 5, 4096, 8, 4096 // case.config.tile
    out = empty(rows, n_tokens, heads, case.head_dim, dtype=dtype)
    q = empty(rows, n_contexts, *out.shape[1:], dtype=dtype) if case.variant == "q-each" else out
    keys = empty(n_contexts, case.n_keys, heads, case.head_dim, dtype=dtype)
    return kernel_arguments(
        q,
        keys,
        keys,
        empty(rows, n_contexts, n_tokens, dtype=torch.float32),
        empty(rows, n_contexts),
        empty(n_contexts) if case.variant == "ragged" else None,
        case.head_dim**-0.5,
        empty(rows, n_tokens),
        empty(rows, tiles),
        empty(rows, tiles, n_contexts),
        out,
        case.config.tile,
    )


def _specialised(arguments: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility of the arguments, as a launch would find them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(_kernel().params):
        name, value = parameter.name, arguments[parameter.name]
        fixed = parameter.is_constexpr or (value == 1 if isinstance(value, int) else False)
        if parameter.is_constexpr or (fixed and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # what torch allocates is aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _missing_tools() -> list[str]:
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


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when everything may be shipped, 1 when something may not, 2 when it can't be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cases of all")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS, help="only these")
    arguments = parser.parse_args(argv)
    if missing := _missing_tools():
        print(f"compile-check: {', '.join(missing)} not found; Triton's Linux wheels bring all of it", file=sys.stderr)
        return 2
    chosen = [Case(*one) for one in QUICK] if arguments.quick else cases(arguments.arch)
    print("| sm | bits | D | L | variant | tile | warps | stages | registers | stack | shared KiB (of) | instruction |")
    print("|" + "---|" * 12)
    bad = 0
    for case in chosen:
        compiled = compile_case(case)
        reasons = failures(compiled)
        bad += bool(reasons)
        shared = f"{compiled.shared / 1024:.1f} ({SHARED_KIB[case.arch]})"
        cells = (case.arch, case.bits, case.head_dim, case.n_keys, case.variant, *case.config)
        cells += (compiled.registers, compiled.stack, shared, compiled.instruction)
        print(
            "| " + " | ".join(map(str, cells)) + " |" + "".join(f" FAILS: {reason}" for reason in reasons), flush=True
        )
    print(f"{len(chosen)} compiled, {bad} must not be shipped")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
