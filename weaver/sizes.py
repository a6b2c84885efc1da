"""Amounts of memory as people write and read them: "12GB", "3.8 MB"; a GB is 10^9 bytes, a GiB 2^30."""

from __future__ import annotations

import math
import re

from weaver.errors import WeaverError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def format_bytes(count: int, *, up: bool = False) -> str:
    """For people: "720 B", "3.8 MB"; never less than the count where it is rounded `up`."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            tenths = math.ceil(10 * count / factor) if up else round(10 * count / factor)
            return f"{tenths / 10:.1f} {unit}"
    return f"{count} B"


def parse_bytes(text: str) -> int:
    """How many bytes "12GB", "1.5 GiB" or "4096" is; raises `WeaverError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise WeaverError(f"{text!r} is no amount of memory; write it like 500MB, 12GB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
