"""What concepts take of the host's memory: loaded from files of the true size, and after their projection.

``python -m benchmarks.concept_memory [--models sd21 sdxl] [--concepts 10] [--record]``

Keys and values of every cross-attention are changed by whole matrices in float16, as Custom Diffusion does, which is
the most that this package's training makes. Random numbers: neither size nor time depends on them. What is told is by
how much the process grew, by the kernel's count of resident pages (Linux), for each concept. `--record` writes the rows
into `benchmarks/results/concept_memory.csv`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks import rows
from benchmarks.machine import device_name, versions
from benchmarks.model_shapes import MODELS
from weaver.concepts.concept import Concept, attn2_projections
from weaver.fusion.contexts import ConceptUse, context_keys_values

__all__ = ["measure"]

TEXT_LENGTH = 77
KEY = ("device", "model", "N", "what")
FIELDS = (*KEY, "mb_each", "versions", "date")


def measure(model: str, concepts: int) -> dict[str, float]:
    """Megabytes that each of so many concepts takes: "loaded", and its "keys and values" of one prompt."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(MODELS[model]["unet"]).half()
    linears = attn2_projections(unet)
    with tempfile.TemporaryDirectory() as folder:
        deltas = {key: torch.randn(linear.weight.shape).half() for key, linear in linears.items()}
        file = Concept("rex", "", "dog", deltas=deltas).save(Path(folder) / "rex.safetensors")
        Concept.load(file)  # whatever is held from the first on
        loaded, each = _grown(lambda: [Concept.load(file) for _ in range(concepts)])
    for linear in linears.values():  # the rest of the U-Net stays shapes alone
        linear.weight = torch.nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.float16), requires_grad=False)
    text = torch.randn(
        concepts + 2, TEXT_LENGTH, unet.config.cross_attention_dim
    ).half()  # a negative and a base prompt come first
    uses = [ConceptUse(concept) for concept in each]
    context_keys_values(unet, text, uses)  # whatever is held from the first on
    kept, _ = _grown(lambda: context_keys_values(unet, text, uses))
    return {"loaded": loaded / concepts / 1e6, "keys and values": kept / len(text) / 1e6}


def _grown(make: Callable) -> tuple[int, object]:
    """By how many bytes the process is larger for what `make` returns, and that."""
    gc.collect()
    before = _resident()
    made = make()
    gc.collect()
    return _resident() - before, made


def _resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the kernel
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd21", "sdxl"], choices=MODELS)
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write rows into benchmarks/results/concept_memory.csv")
    args = parser.parse_args()
    cpu, found = torch.device("cpu"), []
    about = {"device": device_name(cpu), "N": args.concepts, "versions": versions(cpu)}
    about["date"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    for model in args.models:
        for what, amount in measure(model, args.concepts).items():
            print(f"{model}, {args.concepts} concepts, {what:15} {amount:7.2f} MB each", flush=True)
            found.append(about | {"model": model, "what": what, "mb_each": f"{amount:.4g}"})
    if args.record:
        rows.upsert(Path("benchmarks/results/concept_memory.csv"), found, KEY, FIELDS)


if __name__ == "__main__":
    main()
