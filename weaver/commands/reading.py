"""Options and steps of the commands that read a concept's file of any format as a whole concept."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_reading", "opened_model", "read_whole"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell what a file may leave out."""
    parser.add_argument("--word", metavar="W", help="its class word, such as dog, which only our own files tell")
    parser.add_argument("--token", metavar="T", help="which of the file's tokens; of our own files, a new one")
    parser.add_argument("--model", metavar="M", help="its base model, a folder, a Hub id or embedded")


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
    """The concept in a file, on its base where it needs one; what of it a fusion does not use is told."""
    from weaver.concepts.formats.reading import load_concept

    return load_concept(path, pipe, name=name, word=args.word, token=args.token)
