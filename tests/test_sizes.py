"""Amounts of memory as people write and read them."""

from __future__ import annotations

import pytest

from weaver import WeaverError
from weaver.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 500 * 10**6), ("4096", 4096)]
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12XB", "1e9", "1.GB"])
def test_amounts_that_are_none(text):
    with pytest.raises(WeaverError, match="500MB"):
        parse_bytes(text)


def test_amounts_as_people_read_them():
    assert [format_bytes(n) for n in (0, 999, 3_800_000, 8 * 2**30)] == ["0 B", "999 B", "3.8 MB", "8.6 GB"]
