"""Options and steps that commands share: reading a concept's file of any format whole, repeating a manifest's run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from weaver.choices import ON_UNUSED

__all__ = ["add_on_unused", "add_reading", "opened_model", "read_whole", "tell_versions"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell what a file may leave out."""
    parser.add_argument("--word", metavar="W", help="its class word, such as dog, which only our own files tell")
    parser.add_argument("--token", metavar="T", help="which of the file's tokens; of our own files, a new one")
    parser.add_argument("--model", metavar="M", help="its base model, a folder, a Hub id or embedded")
    add_on_unused(parser)


def add_on_unused(parser: argparse.ArgumentParser) -> None:
    """Add the option that tells what to do with what a fusion does not use."""
    parser.add_argument(
        "--on-unused",
        choices=ON_UNUSED,
        default="warn",
        help="what to do where a concept's file has parts that fusion does not use (warn)",
    )


def opened_model(args: argparse.Namespace):
    """The pipeline that `--model` names, on the CPU; None without."""
    from weaver.models import quiet_libraries

    quiet_libraries()
    if args.model is None:
        return None
    with args.stages.step(f"loading {args.model}"):
        from weaver.models import load_model

        return load_model(args.model, device="cpu", offline=args.offline)


def read_whole(path: Path, args: argparse.Namespace, pipe, name: str | None = None):
    """The concept in a file, on its base where it needs one.

    What of it a fusion does not use is told, and so is a file beside it that its token was taken from.
    """
    from weaver.concepts.formats.reading import load_concept

    told = {"name": name, "word": args.word, "token": args.token, "on_unused": args.on_unused}
    return load_concept(path, pipe, **told, tell=tqdm.write)  # above the bars


def tell_versions(manifest: Mapping | None) -> None:
    """Say which libraries are others than those that a manifest was made with, if it is one."""
    if manifest:
        from weaver.manifest import changed_versions

        if changed := changed_versions(manifest):
            print(f"weaver: the manifest was made with other versions: {', '.join(changed)}", file=sys.stderr)
