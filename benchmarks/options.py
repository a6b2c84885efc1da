"""The command-line options that benchmarks of operations and steps share, and what follows from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.machine import choose_device

__all__ = ["QUICK_RESULTS", "RESULTS", "add_operation_options", "chosen", "make_parser", "results_folder"]

RESULTS, QUICK_RESULTS = Path("benchmarks/results"), Path("outputs/benchmarks")
_DTYPES = ("float16", "bfloat16", "float32")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what all of them have: where, in which type, for which N, and how often."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=_DTYPES, help="float16 on a GPU, else float32")
    parser.add_argument("--concepts", nargs="+", type=int, metavar="N", help="how many concepts")
    parser.add_argument("--rounds", type=int, help="samples of each")
    parser.add_argument("--threads", type=int, help="of the CPU")
    return parser


def add_operation_options(parser: argparse.ArgumentParser, *, quick: str, models: Iterable[str], providers) -> None:
    """What benchmarks of one operation against its rivals have besides; `quick` says what of it is measured then."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--models", nargs="+", choices=tuple(models))
    parser.add_argument("--providers", nargs="+", choices=tuple(providers))
    parser.add_argument("--out", type=Path, help=f"folder of results ({RESULTS}; {QUICK_RESULTS} for --quick)")


def results_folder(args: argparse.Namespace) -> Path:
    """Where rows go: what was measured quickly is kept apart."""
    return args.out or (QUICK_RESULTS if args.quick else RESULTS)


def chosen(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type to measure in; from then on PyTorch has the threads that were asked for, and is quiet."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells of each call whose memory it counts
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    usual = torch.float16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, args.dtype) if args.dtype else usual
