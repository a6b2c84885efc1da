"""`weaver bank add|list|show|remove|verify|convert`: a folder of concepts, in this package's format."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from weaver.commands.convert import add_convert_parser
from weaver.commands.inspect import print_summary
from weaver.commands.reading import add_reading, opened_model, read_whole
from weaver.errors import WeaverError, printable
from weaver.sizes import format_bytes

__all__ = ["add_parser"]

_WIDEST = 40  # letters of a cell of the list
_ACTIONS = "add | list | show | remove | verify | convert"


def add_parser(commands, epilog: str) -> None:
    """Add the command and its actions to the subparsers `commands`."""
    bank = commands.add_parser("bank", help="concepts kept in a folder: add, list, verify, convert", epilog=epilog)
    actions = bank.add_subparsers(title="actions", metavar=_ACTIONS, required=True, dest="action")

    add = actions.add_parser("add", help="keep concepts of any known format, converted to our own", epilog=epilog)
    add.add_argument("files", nargs="+", metavar="FILE", type=Path, help="what `weaver inspect` reads")
    add.add_argument("--name", metavar="N", help="what to call it (its own name, or the file's)")
    add_reading(add)
    add.add_argument("--preview", action="append", default=[], metavar="PNG", type=Path, help="a picture of it")
    add.add_argument("--replace", action="store_true", help="in the place of one that has this name")
    add.set_defaults(command=_add)

    listed = actions.add_parser("list", help="what there is", epilog=epilog)
    listed.add_argument("--json", action="store_true", help="the cards as JSON")
    listed.set_defaults(command=_list)

    show = actions.add_parser("show", help="what one is, its card and previews", epilog=epilog)
    show.add_argument("name", metavar="NAME")
    show.add_argument("--json", action="store_true", help="the same as JSON")
    show.set_defaults(command=_show)

    remove = actions.add_parser("remove", help="throw concepts away", epilog=epilog)
    remove.add_argument("names", nargs="+", metavar="NAME")
    remove.set_defaults(command=_remove)

    verify = actions.add_parser("verify", help="look whether files, cards and previews are whole", epilog=epilog)
    verify.add_argument("names", nargs="*", metavar="NAME", help="all when left out")
    verify.add_argument("--model", metavar="M", help="see also whether they fit this model")
    verify.set_defaults(command=_verify)

    convert = add_convert_parser(actions, epilog)
    for action in (add, listed, show, remove, verify, convert):
        action.add_argument(
            "--folder",
            type=Path,
            metavar="DIR",
            help="another bank than $WEAVER_BANK or ~/.local/share/concept-weaver/bank",
        )
        if action in (add, verify, convert):
            action.add_argument("--offline", action="store_true", help="take the model from the local cache only")
        action.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
        action.set_defaults(**{"offline": False} if action in (listed, show, remove) else {})


def _add(args: argparse.Namespace) -> int:
    if len(args.files) > 1 and (args.name or args.token or args.preview):
        raise WeaverError("--name, --token and --preview are of one concept: add the files one by one")
    pipe = opened_model(args)
    with args.stages.step("reading"):
        from weaver.concepts.bank_folder import Kept
        from weaver.pictures import open_rgb

        previews = [open_rgb(path) for path in args.preview]
        kept = [Kept(read_whole(path, args, pipe, args.name), previews) for path in args.files]
    bank = _bank(args)
    for card in bank.add(kept, args.replace):
        print(f"{card.name}: {printable(_called(card))}, {printable(card.method)}, {format_bytes(card.bytes)}")
    print(f"{bank.folder}: {_count(len(bank.names()))}")
    return 0


def _list(args: argparse.Namespace) -> int:
    bank = _bank(args)
    entries = bank.entries()
    if args.json:
        concepts = [_told_of(bank, entry.name, entry.card, entry.fault) for entry in entries]
        print(json.dumps({"folder": str(bank.folder), "concepts": concepts}, indent=2))
        return 0
    rows = [("name", "token", "word", "method", "size", "base")] if entries else []
    for entry in entries:
        card = entry.card
        if card is None:
            rows.append((entry.name, f"- {printable(entry.fault)}", "", "", "", ""))
        else:
            base = card.base[:12] or "any that it fits"
            rows.append((card.name, card.token, card.word, card.method, format_bytes(card.bytes), base))
    rows = [tuple(printable(cell, _WIDEST) for cell in row) if row[-1] else row for row in rows]
    whole = [row for row in rows if row[-1]]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    total = format_bytes(sum(entry.card.bytes for entry in entries if entry.card))
    print(f"{bank.folder}: {_count(len(entries))} ({total})")
    return 0


def _show(args: argparse.Namespace) -> int:
    with args.stages.step("reading the file"):
        from weaver.concepts.formats.summary import summarise

        bank = _bank(args)
        path = bank.path(args.name)
        summary = summarise(path)
    card, fault = None, ""
    try:
        card = bank.card(args.name)
    except WeaverError as error:
        fault = str(error)
    if args.json:
        print(json.dumps(summary | {"card": _told_of(bank, args.name, card, fault)}, indent=2))
        return 0
    print_summary(path, summary)
    if card is None:
        print(f"  card: {printable(fault)}")
        return 0
    print(f"  card: {printable(_called(card))}, from {printable(card.method)}, SHA-256 {card.sha256[:12]}")
    for preview in card.previews:
        print(f"  preview: {bank.folder / preview}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    bank = _bank(args)
    bank.remove(args.names)
    print(f"{bank.folder}: {', '.join(args.names)} thrown away, {_count(len(bank.names()))} left")
    return 0


def _verify(args: argparse.Namespace) -> int:
    pipe, bank = opened_model(args), _bank(args)
    names = args.names or bank.names()
    broken = 0
    for name in names:
        faults = bank.faults(name, pipe)
        broken += bool(faults)
        for fault in faults:
            print(f"weaver: {name}: {' '.join(fault.split())}", file=sys.stderr)
    print(f"{bank.folder}: {_count(len(names))} looked at, {broken or 'none'} of them broken")
    return 2 if broken else 0


def _bank(args: argparse.Namespace):
    from weaver.concepts.bank_folder import BankFolder

    return BankFolder(args.folder)


def _told_of(bank, name: str, card, fault: str) -> dict:
    """A card as plain JSON values with the paths of its files, or why there is none."""
    if card is None:
        return {"name": name, "fault": fault}
    previews = [str(bank.folder / preview) for preview in card.previews]
    return asdict(card) | {"file": str(bank.path(name)), "previews": previews}


def _called(card) -> str:
    return f"'{card.token} {card.word}'" if card.token else f"'{card.word}'"


def _count(number: int) -> str:
    return f"{number} concept{'s' * (number != 1)}"
