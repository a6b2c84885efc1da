"""Launches of the kernels on a GPU to be watched: their profile, and odd shapes for compute-sanitizer.

`odd` and `odd-lora` are run under compute-sanitizer by `make gpu`. `profile` times the largest layer of each head
dimension, and the largest Linear with LoRAs in three regions, with PyTorch's profiler, and reads the hardware's
counters with Nsight Compute where it is installed and may.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

from operations.cases import make_case, on_gpu, soft_weights
from operations.lora_cases import lora_on_gpu, make_lora
from weaver_kernels import context_attention, routed_lora
from weaver_kernels.devices import kernel_arch
from weaver_kernels.measure_attention import LayerInputs, make_inputs
from weaver_kernels.measure_lora import LoraInputs, make_lora_inputs
from weaver_kernels.tune_attention import HEAD_DIMS
from weaver_kernels.tuning import KernelConfig, LoraConfig, kernel_config, lora_config
from weaver_kernels.unets import UNETS, layers_of, linears

KERNELS = ("context_attention_kernel", "routed_lora_kernel")
NAMED = f"regex:{'|'.join(KERNELS)}"
COUNTERS = ("ncu", "--clock-control", "none", "--set", "detailed", "--kernel-name", NAMED)
LORA_RANK = 16

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
ODD_LORA = {
    "linear": {},
    "mixed ranks": {"ranks": (33, 0, 8, 128), "s": 4, "weights": soft_weights},
    "strided": {"strided": True},
    "3x3": {"size": (11, 7), "taps": 3, "padding": 1},
    "3x3 of two steps, channels last": {"size": (11, 7), "taps": 3, "padding": 1, "stride": 2, "channels_last": True},
    "lora of float32": {"dtype": torch.float32},
}


def odd(dry: bool) -> int:
    """A launch of each variant, with tokens that fill no tile; 1 where a result is not finite."""
    # Each tensor in memory of its own, or a read past its end could fall into a neighbour and count as right.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    code = 0
    for name, shape in ODD.items():
        case = make_case(**{"b": 2, "t": 77, "h": 2, "dtype": torch.float16, **shape})
        code |= not _told(name, case["q"], None if dry else context_attention(**on_gpu(case)))
    return int(code)


def odd_lora(dry: bool) -> int:
    """The same of `routed_lora`."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    code = 0
    for name, shape in ODD_LORA.items():
        case = make_lora(**{"b": 2, "t": 77, "dtype": torch.float16, **shape})
        code |= not _told(name, case["x"], None if dry else routed_lora(**lora_on_gpu(case)))
    return int(code)


def _told(name: str, prepared: torch.Tensor, out: torch.Tensor | None) -> bool:
    """Print how a launch went, or that it is prepared; whether all is finite."""
    finite = out is None or bool(torch.isfinite(out.cpu()).all())
    shape = tuple((prepared if out is None else out).shape)
    print(f"{name}: {shape}{' prepared' if out is None else ', finite' if finite else ', NOT FINITE'}", flush=True)
    return finite


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


def lora_layer(device: str) -> tuple[LoraInputs, LoraConfig]:
    """The Linear of SD 2.1 with the most numbers on the largest map, and its configuration."""
    arch = kernel_arch(torch.device(device, 0)) if device == "cuda" else 90
    config = lora_config(LORA_RANK, 16, arch)
    layer = max(linears(UNETS["sd21"]), key=lambda one: one.tokens * (one.inputs + one.outputs))
    return make_lora_inputs(layer, torch.float16, rank=LORA_RANK, tile_sizes=(config.tile,), device=device), config


def launch_layers(device: str) -> None:
    for dim, inputs in layers(device).items():
        inputs.launch(_config(dim, device))
    inputs, config = lora_layer(device)
    inputs.launch(config)
    torch.cuda.synchronize()


def profile(dry: bool) -> int:
    """What PyTorch's profiler and Nsight Compute say of those layers; 1 where a launch is not seen."""
    if dry:
        for dim, inputs in layers("cpu").items():
            print(f"D = {dim}: q {tuple(inputs.q.shape)}, lists of {inputs.plan.lists.numel()} numbers")
        print(f"LoRAs of rank {LORA_RANK}: x {tuple(lora_layer('cpu')[0].x.shape)}")
        return 0
    from torch.profiler import ProfilerActivity

    launch_layers("cuda")  # compiles
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        launch_layers("cuda")
    launched = [*(f"D = {dim}" for dim in HEAD_DIMS), f"LoRAs of rank {LORA_RANK}"]
    found = [event.time_range.elapsed_us() for event in profiler.events() if event.name in KERNELS]
    print(f"PyTorch's profiler saw {len(found)} launches of {len(launched)}")
    for name, microseconds in zip(launched, found, strict=False):
        print(f"{name}: {microseconds:.1f} us")
    code = int(len(found) != len(launched))
    if not shutil.which(COUNTERS[0]):
        print("Nsight Compute (ncu) is not installed: no counters")
        return code
    print(flush=True)
    ran = subprocess.run([*COUNTERS, sys.executable, "-m", "operations.gpu_launches", "layers"])
    return code or ran.returncode


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("odd", "odd-lora", "layers", "profile"))
    parser.add_argument("--dry", action="store_true", help="prepare all on the CPU and launch nothing")
    arguments = parser.parse_args(argv)
    if arguments.what != "layers":
        return {"odd": odd, "odd-lora": odd_lora, "profile": profile}[arguments.what](arguments.dry)
    launch_layers("cuda")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
