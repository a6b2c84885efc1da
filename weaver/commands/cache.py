"""`weaver cache list|prune|clear`: what is kept, and throwing it away."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from weaver.errors import WeaverError
from weaver.sizes import format_bytes, parse_bytes

__all__ = ["CHOICES", "add_parser", "chosen_cache", "size"]

CHOICES = ("off", "latents", "features")


def add_parser(commands, epilog: str) -> None:
    """Add the command and its three actions to the subparsers `commands`."""
    cache = commands.add_parser("cache", help="inversions kept on disk: list, prune, clear", epilog=epilog)
    actions = cache.add_subparsers(title="actions", metavar="list | prune | clear", required=True, dest="action")
    for name, help_text in (
        ("list", "what is kept, the last used first"),
        ("prune", "throw away what was not used for longest"),
        ("clear", "throw away everything"),
    ):
        action = actions.add_parser(name, help=help_text, epilog=epilog)
        action.add_argument(
            "--folder", type=Path, metavar="DIR", help="another cache than $WEAVER_CACHE or ~/.cache/concept-weaver"
        )
        action.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
        if name == "prune":
            action.add_argument("--to", type=size, metavar="SIZE", help="what may remain, such as 2GB (8.6 GB)")
        action.set_defaults(command={"list": _list, "prune": _prune, "clear": _clear}[name], offline=False)


def chosen_cache(choice: str):
    """The `Cache` that `--cache off|latents|features` means; None for off."""
    from weaver.cache.store import Cache

    return None if choice == "off" else Cache(features=choice == "features")


def _list(args: argparse.Namespace) -> int:
    cache = _cache(args)
    entries = cache.entries()
    for entry in entries:
        inversion = _mapping(entry.identity.get("inversion", entry.identity))
        picture = _mapping(inversion.get("picture"))
        digest = str(picture.get("rgb") or picture.get("latents") or "")
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        what = f"{str(entry.identity.get('kind', 'unknown')):15} {format_bytes(entry.nbytes):>9}  {used}"
        print(f"{entry.key[:12]}  {what}  picture {digest[:8]}  {inversion.get('prompt', '')!r}")
    print(f"{cache.folder}: {_count(entries)} of at most {format_bytes(cache.limit)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    cache = _cache(args)
    gone = cache.prune(args.to)
    print(f"{cache.folder}: {_count(gone)} thrown away, {_count(cache.entries())} left")
    return 0


def _clear(args: argparse.Namespace) -> int:
    cache = _cache(args)
    print(f"{cache.folder}: {_count(cache.clear())} thrown away")
    return 0


def _cache(args: argparse.Namespace):
    from weaver.cache.store import Cache

    return Cache(args.folder)


def _mapping(value) -> Mapping:
    """A part of an identity, which may be any plain value: nothing where it has no parts."""
    return value if isinstance(value, Mapping) else {}


def _count(entries) -> str:
    total = format_bytes(sum(entry.nbytes for entry in entries))
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'} ({total})"


def size(text: str) -> int:
    """An amount of memory on the command line, in bytes."""
    try:
        return parse_bytes(text)
    except WeaverError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
