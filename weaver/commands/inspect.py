"""`weaver inspect FILE`: what a concept's file is and what of it is used, without any model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from weaver.errors import printable
from weaver.sizes import format_bytes

__all__ = ["add_parser", "print_summary"]


def add_parser(commands, epilog: str) -> None:
    """Add the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "inspect", help="what a concept's file is, and what of it a fusion uses", epilog=epilog
    )
    parser.add_argument("file", type=Path, help="a concept, LoRA, Custom Diffusion or textual inversion file")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    parser.set_defaults(command=_inspect, offline=False)


def _inspect(args: argparse.Namespace) -> int:
    with args.stages.step("reading the file"):
        from weaver.concepts.formats.summary import summarise

        summary = summarise(args.file)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(args.file, summary)
    return 0


def print_summary(path: Path, summary: Mapping) -> None:
    """Print what `weaver.concepts.formats.summary.summarise` found in a file."""
    print(f"{path}: {summary['format']}, {format_bytes(summary['bytes'])}, SHA-256 {summary['sha256'][:12]}")
    for token, vectors in summary["tokens"].items():
        beside = f", in {printable(summary['token_files'][token])} beside it" if token in summary["token_files"] else ""
        print(f"  token {printable(token)}: {vectors} vector{'s' * (vectors > 1)} in each text encoder{beside}")
    if summary["lacks"]:
        print(f"  no token: {printable(summary['lacks'])}")
    for key in ("word", "base"):
        if summary[key]:
            print(f"  {'class word' if key == 'word' else 'base model, by hash'}: {printable(summary[key])}")
    for part in summary["parts"]:
        ranks = part["ranks"]
        kind = f"rank {ranks[0]}" + f" to {ranks[-1]}" * (len(ranks) > 1) if ranks else "whole matrices"
        share = "" if part["share"] is None else f", {part['share']:.0%} of the squared norm"
        used = "" if part["used"] else ", not used"
        print(f"  {printable(part['name'])}: {part['changes']} weights, {kind}{share}{used}")
    for key, value in summary["settings"].items():
        print(f"  {printable(key)}: {printable(value)}")
