"""Launches of the kernel on a GPU to be watched: its profile, and odd shapes for compute-sanitizer.

`odd` is run under compute-sanitizer by `make gpu`. `profile` times the largest layer of each head dimension with
PyTorch's profiler, and reads the hardware's counters with Nsight Compute where it is installed and may.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

from operations.cases import make_case, on_gpu, soft_weights
from weaver_kernels import context_attention
from weaver_kernels.devices import kernel_arch
from weaver_kernels.measure_attention import LayerInputs, make_inputs
from weaver_kernels.tune_attention import HEAD_DIMS
from weaver_kernels.tuning import KernelConfig, kernel_config
from weaver_kernels.unets import layers_of

KERNEL = "context_attention_kernel"
COUNTERS = ("ncu", "--clock-control", "none", "--set", "detailed", "--kernel-name", KERNEL)

ODD = {
    "sd15": {"d": 40, "length": 77},
    "sd21": {"d": 64, "length": 77, "s": 5},
    "wide": {"d": 160, "length": 77},
    "ragged": {"d": 80, "length": 77, "ragged": True, "contexts": 5, "weights": soft_weights},
    "long": {"d": 64, "length": 154, "ragged": True},
    "q-each": {"d": 80, "length": 77, "q_each": True},
    "strided": {"d": 40, "length": 33, "strided": True},
    "float32": {"d": 64, "length": 77, "dtype": torch.float32},
}


def odd(dry: bool) -> int:
    """A launch of each variant, with tokens that fill no tile; 1 where a result is not finite."""
    # Each tensor in memory of its own, or a read past its end could fall into a neighbour and count as right.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    code = 0
    for name, shape in ODD.items():
        case = make_case(**{"b": 2, "t": 77, "h": 2, "dtype": torch.float16, **shape})
        if dry:
            print(f"{name}: {tuple(case['q'].shape)} prepared")
            continue
        out = context_attention(**on_gpu(case)).cpu()
        finite = bool(torch.isfinite(out).all())
        print(f"{name}: {tuple(out.shape)}, {'finite' if finite else 'NOT FINITE'}", flush=True)
        code |= not finite
    return int(code)


def layers(device: str) -> dict[int, LayerInputs]:
    """Of each head dimension the largest layer, with the tiles that the device's configuration takes."""
    found = {}
    for dim in HEAD_DIMS:
        tile = _config(dim, device).tile
        found[dim] = make_inputs(layers_of(dim)[0], torch.float16, q_each=False, tile_sizes=(tile,), device=device)
    return found


def _config(dim: int, device: str) -> KernelConfig:
    arch = kernel_arch(torch.device(device, 0)) if device == "cuda" else 90
    return kernel_config("context_attention", dim, 16, arch)


def launch_layers(device: str) -> None:
    for dim, inputs in layers(device).items():
        inputs.launch(_config(dim, device))
    torch.cuda.synchronize()


def profile(dry: bool) -> int:
    """What PyTorch's profiler and Nsight Compute say of those layers; 1 where a launch is not seen."""
    if dry:
        for dim, inputs in layers("cpu").items():
            print(f"D = {dim}: q {tuple(inputs.q.shape)}, lists of {inputs.plan.lists.numel()} numbers")
        return 0
    from torch.profiler import ProfilerActivity

    launch_layers("cuda")  # compiles
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        launch_layers("cuda")
    found = [event.time_range.elapsed_us() for event in profiler.events() if event.name == KERNEL]
    print(f"PyTorch's profiler saw {len(found)} launches of {len(HEAD_DIMS)}")
    for microseconds, dim in zip(found, HEAD_DIMS, strict=False):
        print(f"D = {dim}: {microseconds:.1f} us")
    code = int(len(found) != len(HEAD_DIMS))
    if not shutil.which(COUNTERS[0]):
        print("Nsight Compute (ncu) is not installed: no counters")
        return code
    print(flush=True)
    ran = subprocess.run([*COUNTERS, sys.executable, "-m", "operations.gpu_launches", "layers"])
    return code or ran.returncode


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("odd", "layers", "profile"))
    parser.add_argument("--dry", action="store_true", help="prepare all on the CPU and launch nothing")
    arguments = parser.parse_args(argv)
    if arguments.what == "odd":
        return odd(arguments.dry)
    if arguments.what == "profile":
        return profile(arguments.dry)
    launch_layers("cuda")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
