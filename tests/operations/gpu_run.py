"""All that needs a GPU in one go, under eight minutes: `make gpu OUT=<folder>`.

The GPU tests, tuning, benchmarks, a profile of the kernel and compute-sanitizer, each with its own time. What fails or
takes too long stops nothing else. What has passed is skipped next time, unless its sources, the device or the versions
are others; what is unfinished goes on. The folder then holds six files: `report.json`, `log.txt` with what all calls
printed, and of each operation the table of configurations and the benchmarks' rows. These are put back where they came
from before anything is run, so that another machine with the same folder goes on too. Exit status: the sum of the
numbers of the parts that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = "weaver_kernels/configs/*.json"
OPERATIONS = ("context_attention", "routed_lora")
TABLES = tuple(f"weaver_kernels/configs/{op}.json" for op in OPERATIONS)
FOLDER = "build/gpu"  # the benchmarks write tables and pictures beside their rows
ROWS = tuple(f"{FOLDER}/{op}.csv" for op in OPERATIONS)
KERNELS = ("weaver_kernels/**/*.py",)
LOG = "log.txt"
PASSED = "passed"
UNFINISHED = 3  # exit status of a command that has more to do when it is called again
ENDING = (2, 2)  # seconds that a command out of time has to end, and to be ended
TAIL = 12  # lines of a log that are shown

# The device and versions, from a process of its own: this one would hold the GPU's memory.
ASK = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    found["device"] = f"{device.name} (sm_{device.major}{device.minor})"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """Commands in turn, within `seconds` together; `dry` is what of it a machine without a GPU can do.

    sources : files that decide whether an earlier pass still counts; results : files to keep, from the project's folder
    """

    name: str
    number: int  # what it adds to the exit status
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    dry: tuple[str, ...]
    sources: tuple[str, ...]
    results: tuple[str, ...] = ()
    needs: str = ""  # a program without which there is nothing to do


def make_parts() -> tuple[Part, ...]:
    """The parts in their order; with the time it takes to end them they fit eight minutes."""
    where = "tests" if find_spec("diffusers") else "tests/operations"  # the others can't be read without it
    pytest = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", where)
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()  # most of it is compiling
    tune = (sys.executable, "-m", "weaver_kernels.tune")
    bench = (sys.executable, "-m", "benchmarks.context_attention")
    bench_lora = (sys.executable, "-m", "benchmarks.routed_lora", "--models", "sd21", "--out", FOLDER)
    tiny = ("--device", "cpu", "--quick", "--models", "sd15", "--concepts", "1", "--rounds", "1", "--providers", "ours")
    launches = ("-m", "operations.gpu_launches")
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", "--kernel-name")
    odd = {op: (sys.executable, *launches, name) for op, name in zip(OPERATIONS, ("odd", "odd-lora"), strict=True)}
    tools = ("memcheck", "racecheck")
    return (
        Part(
            "tests", 1, 130,
            ((sys.executable, *pytest, *workers),),
            (sys.executable, *pytest, "--collect-only"),
            (*KERNELS, CONFIGS, "tests/**/*.py", "weaver/fusion/**/*.py"),
        ),
        Part(
            "tune", 2, 95,
            tuple((*tune, "--op", op, "--seconds", "40") for op in OPERATIONS),
            (*tune, "--dry", "90", "--first", "1"),
            (*KERNELS, CONFIGS),
            TABLES,
        ),
        Part(
            "benchmarks", 4, 125,
            (bench_lora, (*bench, "--minutes", "1.2", "--missing", "--out", FOLDER)),
            (*bench, *tiny, "--out", f"{FOLDER}-dry"),
            (*KERNELS, CONFIGS, "benchmarks/*.py"),
            ROWS,
        ),
        Part(
            "profile", 8, 35,
            ((sys.executable, *launches, "profile"),),
            (sys.executable, *launches, "profile", "--dry"),
            (*KERNELS, CONFIGS, "tests/operations/gpu_launches.py"),
        ),
        Part(
            "sanitizer", 16, 55,
            tuple((*sanitize, f"kns={op}_kernel", "--tool", tool, *run) for op, run in odd.items() for tool in tools),
            (*odd["routed_lora"], "--dry"),
            (*KERNELS, "tests/operations/gpu_launches.py", "tests/operations/*cases.py"),
            needs="compute-sanitizer",
        ),
    )  # fmt: skip


def fingerprint(sources: Sequence[str], machine: dict, root: Path = ROOT) -> str:
    """Of the contents of the sources and of where they run."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode())
    for path in sorted({path for pattern in sources for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_commands(commands: Sequence[Sequence[str]], log: Path, seconds: float, root: Path = ROOT) -> str:
    """Run commands one after another, all of them, with their output at the end of `log`; says how it went."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root / "tests"), str(root), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "0",
    }
    failed, end = [], time.monotonic() + seconds
    with log.open("ab") as stream:
        for command in commands:
            stream.write(f"$ {' '.join(command)}\n".encode())
            stream.flush()
            try:
                process = subprocess.Popen(
                    command, cwd=root, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                stream.write(f"{error}\n".encode())
                failed.append(f"{command[0]} does not start")
                continue
            try:
                if code := process.wait(max(0.1, end - time.monotonic())):
                    failed.append("unfinished" if code == UNFINISHED else f"exit status {code}")
            except subprocess.TimeoutExpired:
                return f"out of time after {seconds:.0f} s"
            finally:
                _end(process)
    return ", ".join(failed) or PASSED


def _end(process: subprocess.Popen) -> None:
    """End a command with everything it started."""
    for wait, number in zip(ENDING, (signal.SIGTERM, signal.SIGKILL), strict=True):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, out: Path, machine: dict, before: dict, dry: bool, root: Path = ROOT) -> dict:
    """Run one part, or say why not; what is known of it afterwards."""
    if dry:
        status = run_commands([part.dry], out / LOG, 1800, root)
        return {"status": "dry run " + status}
    if machine["device"] is None:
        return {"status": f"needs an NVIDIA GPU, and torch {machine['torch']} sees none"}
    if part.needs and not shutil.which(part.needs):
        return {"status": f"{PASSED}: nothing to do, {part.needs} is not installed"}
    if before.get("status") == PASSED and before["of"] == fingerprint(part.sources, machine, root):
        return before
    start = time.monotonic()
    status = run_commands(part.commands, out / LOG, part.seconds, root)
    for result in part.results:  # also of a part that failed: what it wrote is whole
        if (root / result).exists():
            shutil.copyfile(root / result, out / Path(result).name)
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "of": fingerprint(part.sources, machine, root)}


def run_all(parts: Sequence[Part], out: Path, machine: dict, dry: bool = False, root: Path = ROOT) -> int:
    """Run all parts, keep the report up to date, and return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    if not dry and machine["device"] is not None:
        _put_back(parts, out, root)
    path, log = out / "report.json", out / LOG
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    report = {"machine": machine, "parts": dict(before)}
    code = 0
    for part in parts:
        known = before.get(part.name, {})
        begin = log.stat().st_size if log.exists() else 0
        found = run_part(part, out, machine, known, dry, root)
        report["parts"][part.name] = found
        beside = path.with_suffix(".new")  # whole, or not there: the next run reads it
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
        if found is known:
            print(f"{part.name}: passed before, in {found['seconds']} s", flush=True)
        else:
            lines = log.read_bytes()[begin:].decode(errors="replace").splitlines() if log.exists() else []
            print(*(f"  {line}" for line in lines[-TAIL:]), sep="\n", end="\n" if lines else "")
            print(f"{part.name}: {found['status']}", flush=True)
        code += 0 if found["status"].removeprefix("dry run ").startswith(PASSED) else part.number
    return code


def _put_back(parts: Sequence[Part], out: Path, root: Path) -> None:
    """Copy results of an earlier call to where the parts go on from them."""
    for result in (result for part in parts for result in part.results):
        kept, place = out / Path(result).name, root / result
        if kept.exists() and not (place.exists() and place.read_bytes() == kept.read_bytes()):
            print(f"{result}: goes on from {kept}", flush=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, place)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or the sum of the numbers of the parts that failed."""
    parts = make_parts()
    numbers = ", ".join(f"{part.number} {part.name}" for part in parts)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"Exit status: the sum of {numbers}.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, logs and results")
    parser.add_argument("--dry-run", action="store_true", help="of each part what can be done without a GPU")
    arguments = parser.parse_args(argv)
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        print(f"gpu: torch can't be asked for its device\n{asked.stderr}", file=sys.stderr)
        return sum(part.number for part in parts)
    return run_all(parts, arguments.out.resolve(), json.loads(asked.stdout), arguments.dry_run)


if __name__ == "__main__":
    sys.exit(main())
