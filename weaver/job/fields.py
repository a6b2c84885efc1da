"""Read typed values out of nested mappings, and collect every complaint with the path of its field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os.path import isdir, isfile
from pathlib import Path

from weaver.errors import told

__all__ = ["BANK", "EMBEDDED", "LARGEST", "Fields", "is_hub_id", "resolve_path"]

LARGEST = 2**32 - 1  # of a whole number; seeds are multiplied and added to, and must stay within 64 bits
BANK = "bank:"  # prefix of concepts in the bank, `weaver.concepts.bank_folder`: "bank:rex"
EMBEDDED = "embedded:"  # prefix of things that ship with the package: "embedded:tuxedo"

_PATHLIKE = re.compile(r"^[.~]|^/|\\|^[A-Za-z]:")
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?$")


class Fields:
    """One mapping of a job file. Every reader returns a usable value, and complains where it had to make one up.

    Parameters
    ----------
    value : what stands in the file; anything but a mapping is one complaint, and no others follow from it.
    path : where it stands, "concepts[1].mask"; empty for the whole file.
    problems : the list that complaints go to, shared with all nested sections.
    folder : what relative paths are relative to.
    """

    def __init__(self, value: object, path: str, problems: list[str], folder: Path) -> None:
        self.path, self.problems, self.folder = path, problems, folder
        self._known: set[str] = set()
        self._values: dict = {}
        self._broken = False
        if isinstance(value, Mapping):
            self._values = dict(value)
        else:
            self.complain(None, f"expected fields with names, found {_show(value)}")
            self._broken = True

    def complain(self, name: str | None, message: str) -> None:
        """Note one complaint about the field `name` of this section, or about the section itself."""
        if self._broken:
            return
        where = ".".join(part for part in (self.path, name) if part)
        self.problems.append(f"{where}: {message}" if where else message)

    def has(self, name: str) -> bool:
        """Whether the field stands in the file with a value; it counts as known from then on."""
        self._known.add(name)
        return self._values.get(name) is not None

    def text(self, name: str, default: str | None = None, *, required: bool = False, empty: bool = False) -> str | None:
        """A string; blank ones are refused unless `empty`."""
        if not self._given(name, required):
            return default
        value = self._values[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            return self._refuse(name, "text", default)
        if not value.strip() and not empty:
            self.complain(name, "is empty; write something or remove the field")
            return default
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = LARGEST) -> int | None:
        """A whole number between `least` and `most`."""
        if not self._given(name):
            return default
        value = self._values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            return self._refuse(name, "a whole number", default)
        if value < least:
            self.complain(name, f"must be at least {least}, is {value}")
            return default
        if value > most:
            self.complain(name, f"must be at most {most}, is {value}")
            return default
        return value

    def number(
        self, name: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float | None:
        """A finite number between `least` and `most`. YAML reads 1e-5 as text, so text that is a number will do."""
        if not self._given(name):
            return default
        value = _as_number(self._values[name])
        if value is None:
            return self._refuse(name, "a number", default)
        if not least <= value <= most:
            limits = f"between {least:g} and {most:g}"
            if most in (math.inf, LARGEST):  # where the upper limit is a technical one, only what is past it is told it
                limits = f"at least {least:g}" if value < least else f"at most {most}"
            self.complain(name, f"must be {limits}, is {value:g}")
            return default
        return value

    def truth(self, name: str) -> bool | None:
        """`true` or `false`."""
        if not self._given(name) or isinstance(self._values[name], bool):
            return self._values.get(name)
        return self._refuse(name, "true or false", None)

    def numbers(self, name: str, count: int, what: str) -> tuple[float, ...] | None:
        """Exactly `count` finite numbers; `what` names them in the complaint."""
        if not self._given(name):
            return None
        value = self._values[name]
        items = [_as_number(item) for item in value] if _is_list(value) else []
        if len(items) != count or None in items:
            return self._refuse(name, what, None)
        return tuple(items)

    def points(self, name: str, least: int, what: str) -> tuple[tuple[float, float], ...] | None:
        """At least `least` pairs [x, y] of finite numbers; `what` names them in the complaint."""
        if not self._given(name):
            return None
        value = self._values[name]
        pairs = [[_as_number(x) for x in pair] if _is_list(pair) else [] for pair in value] if _is_list(value) else []
        if len(pairs) < least or any(len(pair) != 2 or None in pair for pair in pairs):
            return self._refuse(name, what, None)
        return tuple(map(tuple, pairs))

    def window(self, name: str, default: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
        """A stretch [start, end] of the sampling steps, as fractions of all steps."""
        pair = self.numbers(name, 2, "[start, end] as fractions of the steps, such as [0, 0.8]")
        if pair is None:
            return default
        if not 0 <= pair[0] < pair[1] <= 1:
            self.complain(name, f"must be [start, end] with 0 <= start < end <= 1, is [{pair[0]:g}, {pair[1]:g}]")
            return default
        return pair

    def choice(self, name: str, options: Sequence[str], default: str | None = None) -> str | None:
        """One of a few words."""
        value = self.text(name, default)
        if value is not None and value not in options:
            self.complain(name, f"{value!r} is not one of {', '.join(options)}{_close(value, options)}")
            return default
        return value

    def file(self, name: str, *, folder_too: bool = False, shipped: bool = False) -> Path | str | None:
        """An existing file (or folder), made absolute; "embedded:<name>" is passed on as it is where that may ship."""
        value = self.text(name)
        if value is None or (shipped and value.startswith(EMBEDDED)):
            return value
        return self._existing(name, value, folder_too)

    def files(self, name: str) -> tuple[Path, ...] | str | None:
        """A folder, a file or a list of them, as absolute paths; "embedded:<name>" is passed on as it is."""
        self._known.add(name)
        value = self._values.get(name)
        if not _is_list(value):
            found = self.file(name, folder_too=True, shipped=True)
            return (found,) if isinstance(found, Path) else found
        if not value:
            self.complain(name, "is an empty list")
        paths = [self._existing(f"{name}[{i}]", str(item), True) for i, item in enumerate(value)]
        return tuple(path for path in paths if path is not None)

    def section(self, name: str) -> Fields:
        """A nested mapping; an empty one when the field is absent."""
        value = self._values[name] if self.has(name) else {}
        return Fields(value, ".".join(part for part in (self.path, name) if part), self.problems, self.folder)

    def sections(self, name: str) -> list[Fields] | None:
        """A list of nested mappings, empty when the field is absent; None for anything but a list."""
        if not self.has(name):
            return []
        value = self._values[name]
        if not _is_list(value):
            return self._refuse(name, "a list (each entry on a line that starts with '- ')", None)
        prefix = f"{self.path}." if self.path else ""
        return [Fields(v, f"{prefix}{name}[{i}]", self.problems, self.folder) for i, v in enumerate(value)]

    def exactly_one(self, names: Sequence[str]) -> str | None:
        """The one field of `names` that is given; a complaint for none or several."""
        given = [name for name in names if self.has(name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            self.complain(None, f"give exactly one of {', '.join(names)} (found {found})")
            return None
        return given[0]

    def finish(self) -> None:
        """Complain of every field that nothing has asked for."""
        for name in self._values:
            if name not in self._known:
                self.complain(str(name), f"unknown field{_suggest(str(name), sorted(self._known))}")

    def _given(self, name: str, required: bool = False) -> bool:
        if not self.has(name) and required:
            self.complain(name, "is missing")
        return self.has(name)

    def _refuse(self, name: str, wanted: str, default):
        self.complain(name, f"expected {wanted}, found {_show(self._values[name])}")
        return default

    def _existing(self, name: str, value: str, folder_too: bool) -> Path | None:
        path = resolve_path(self.folder, value)
        folder = isdir(path)  # not the path's own, which fails for names that are too long, and in closed folders
        if isfile(path) or (folder_too and folder):
            return path
        fault = "a folder, not a file" if folder else f"not there (looked at {path})"
        if value.startswith(EMBEDDED):
            shipped = "pictures that ship stand alone, not in a list" if folder_too else "what ships are concepts"
            fault = f"no file; {shipped}"
        self.complain(name, f"{value!r} is {fault}")
        return None


def is_hub_id(value: str) -> bool:
    """Whether a text can be a model's id on the Hub, and is no path."""
    return not _PATHLIKE.search(value) and _HUB_ID.match(value) is not None


def resolve_path(folder: Path, value: str) -> Path:
    """The absolute path that `value` means, relative to `folder`; "~" is the home folder, where there is one."""
    try:
        return (folder / Path(value).expanduser()).resolve()
    except (RuntimeError, ValueError):  # nobody's home; a path with a null in it
        return folder / value


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _show(value: object) -> str:
    return "nothing" if value is None else told(value)


def _suggest(word: str, options: Sequence[str]) -> str:
    return _close(word, options) or (f"; known: {', '.join(options)}" if options else "")


def _close(word: str, options: Sequence[str]) -> str:
    close = get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
