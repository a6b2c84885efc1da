"""Which machine and which software a row was measured with, and how fast and hot the device ran meanwhile."""

from __future__ import annotations

import platform
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

__all__ = ["Readings", "choose_device", "device_name", "versions", "watched"]


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"no way to measure on {name}: cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """What tells devices apart: a GPU's name, capability and size, or a CPU's name and the threads that are used."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability, size = f"sm_{found.major}{found.minor}", f"{found.total_memory / 2**30:.0f} GiB"
        return f"{found.name} ({capability}, {found.multi_processor_count} SMs, {size})"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    """Name, family, model and stepping: a virtual machine's name alone may be of any processor."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = {name.strip(): value for name, value in re.findall(r"^([^:\n]+):[ \t]*(.*)$", text.split("\n\n")[0], re.M)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = "/".join(found.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{found['model name']} {numbers}"


def versions(device: torch.device) -> str:
    """Of all that the figures depend on."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "xformers"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found.append(f"cuda {torch.version.cuda}")
        found += [f"driver {line.strip()}" for line in _nvidia_smi(device, "driver_version")]
    return "; ".join(found)


class Readings:
    """Medians of what was read while measuring; empty where nothing can be read."""

    def __init__(self) -> None:
        self.notes: dict[str, float] = {}

    def take(self, lines: list[str]) -> None:
        numbers = [[float(x) for x in line.split(",")] for line in lines if re.fullmatch(r"[\d., ]+", line)]
        columns = zip(*numbers, strict=False)
        self.notes = dict(zip(("sm_mhz", "memory_mhz", "watts"), map(median, columns), strict=False))


@contextmanager
def watched(device: torch.device) -> Iterator[Readings]:
    """Read clocks and power of a GPU over and over while the block runs."""
    readings, done, lines = Readings(), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            if not (found := _nvidia_smi(device, "clocks.sm,clocks.mem,power.draw")):
                return
            lines.extend(found)
            done.wait(0.1)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield readings
    finally:
        done.set()
        reader.join()
        readings.take(lines)


def _nvidia_smi(device: torch.device, query: str) -> list[str]:
    """What it says, a line for each reading; nothing where there is no such device or program."""
    if device.type != "cuda":
        return []
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
