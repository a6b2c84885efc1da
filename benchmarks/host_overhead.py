"""Host time of one call of `context_attention` on the GPU's path, all but Triton's own launcher.

``python -m benchmarks.host_overhead [--out FOLDER]``

The kernel is replaced by one whose launch does nothing, so what is left is: the checks, the dispatch to the operation,
the choice of configuration and lists, the result's allocation and the kernel's arguments. Without a GPU the same path
is taken on CPU tensors, with the table's configuration of an H100. Parts are timed in turn with the whole, in CPU
time, on which other work has no claim.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import torch

from benchmarks import report, rows
from benchmarks.machine import choose_device, device_name, versions
from benchmarks.shapes import MODELS, blob_masks, make_plan, make_texts
from benchmarks.timing import quantiles
from weaver_kernels import context_attention, tuning
from weaver_kernels.checks import gradient_reasons
from weaver_kernels.context_attention import launch, op, plan
from weaver_kernels.context_attention.checks import shape_reasons

N, ARCH = 3, 90
CALLS, SAMPLES = 20, 500  # a sample is the mean of so many calls: few, so that most are not interrupted


class SilentKernel:
    """Takes every argument of a launch and launches nothing."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        return lambda *arguments, **named: None


@contextmanager
def silent(device: torch.device) -> Iterator[None]:
    """Within, calls end where Triton's launcher would begin; on the CPU they take the GPU's path."""
    with mock.patch.object(launch, "context_attention_kernel", SilentKernel()):
        if device.type == "cuda":
            yield
            return
        on_cpu = torch.library.Library("weaver_kernels", "IMPL")
        with mock.patch.object(op, "kernel_arch", _an_h100), mock.patch.object(plan, "kernel_arch", _an_h100):
            with warnings.catch_warnings():  # it is meant to take the other's place
                warnings.simplefilter("ignore")
                on_cpu.impl("context_attention", op._cuda, "CPU", allow_override=True)
            try:
                yield
            finally:
                on_cpu._destroy()


def _an_h100(device: torch.device) -> int:
    return ARCH


def parts(device: torch.device) -> dict[str, Callable[[], object]]:
    """The whole call and parts of it, on a layer of SD 2.1 with two rows."""
    geometry = MODELS["sd21"].layers[0]
    own = make_plan(blob_masks(N, MODELS["sd21"].latents), geometry, device)
    texts = make_texts(geometry, N + 3, torch.float16, device, torch.Generator(device).manual_seed(0))
    q, k, v = vars(texts).values()
    given = (q, k, v, own.weights, own.context_index)
    scale = geometry.dim**-0.5
    config = tuning.kernel_config("context_attention", geometry.dim, 16, ARCH)

    def checks() -> list[str]:
        return shape_reasons(*given, None, None) + gradient_reasons(q=q, k=k, v=v, weights=own.weights)

    def launched() -> torch.Tensor:
        return launch.launch(q, k, v, own.weights, None, scale, own.lists, own.tile_sizes, config)

    return {
        "whole call": lambda: context_attention(*given, plan=own),
        "of it checks": checks,
        "of it the operation, dispatched": lambda: op._operation(*given, None, own.lists, scale),
        "of that the operation's body": lambda: op._cuda(*given, None, own.lists, scale),
        "of that arguments and result": launched,
    }


def sample(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Mean seconds of a call, by part, many times."""
    found = {name: [] for name in calls}
    for _ in range(SAMPLES):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            found[name].append((time.thread_time() - start) / CALLS)
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    torch.set_num_threads(1)
    known = {"device": device_name(device), "versions": versions(device), "op": "context_attention", "model": "sd21"}
    known |= {"layer": str(MODELS["sd21"].layers[0]), "masks": "hard", "N": N, "dtype": "float16"}
    with silent(device):
        samples = sample(parts(device))
    found = []
    for name, seconds in samples.items():
        p20, p50, p80 = (f"{1e6 * x:.2f}" for x in quantiles(seconds))
        print(f"{name:34} {min(seconds) * 1e6:7.2f} us at best, {p50} us")
        times = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "samples": SAMPLES}
        found.append({**known, "provider": name, **times, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"})
    rows.upsert(args.out / "host_overhead.csv", found)
    report.write(args.out)


if __name__ == "__main__":
    main()
