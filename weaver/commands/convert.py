"""`weaver bank convert NAME|FILE --to FORMAT --out FILE`: a concept for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from weaver.choices import LAYOUTS
from weaver.commands.reading import add_reading, opened_model, read_whole
from weaver.errors import WeaverError

__all__ = ["add_convert_parser"]


def add_convert_parser(actions, epilog: str) -> argparse.ArgumentParser:
    """Add the action to the subparsers `actions`."""
    convert = actions.add_parser("convert", help="write a concept for other programs", epilog=epilog)
    convert.add_argument("source", metavar="NAME|FILE", help="one of the bank, or any file (./NAME for one so called)")
    convert.add_argument("--to", required=True, choices=LAYOUTS, help="the layout")
    convert.add_argument("--out", required=True, type=Path, metavar="FILE", help="where to; a token's file goes beside")
    convert.add_argument("--rank", type=int, metavar="R", help="of a LoRA's factors, where it had none (16)")
    add_reading(convert)
    convert.add_argument("--replace", action="store_true", help="in the place of files that are there")
    convert.set_defaults(command=_convert)
    return convert


def _convert(args: argparse.Namespace) -> int:
    if args.rank is not None and not args.to.endswith("lora"):
        raise WeaverError(f"--rank is a LoRA's, there is none in {args.to}: leave it out")
    pipe = opened_model(args)
    with args.stages.step("reading"):
        from weaver.concepts.bank_folder import BankFolder
        from weaver.concepts.formats.convert import RANK, convert

        bank = BankFolder(args.folder)
        in_bank = args.source in bank.names() or not (Path(args.source).suffix or Path(args.source).exists())
        path = bank.path(args.source) if in_bank else Path(args.source)
        concept = read_whole(path, args, pipe)
    with args.stages.step("converting"):
        rank = RANK if args.rank is None else args.rank
        done = convert(concept, args.to, args.out, rank=rank, pipe=pipe, replace=args.replace)
    for note in done.notes:
        print(note)
    print(f"{args.out}: {concept.name} as {args.to}")
    return 0
