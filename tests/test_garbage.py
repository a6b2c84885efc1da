"""Garbage collection where memory is counted."""

from __future__ import annotations

import gc

import pytest

from weaver.garbage import left_alone


@pytest.mark.parametrize("before", [True, False])
def test_it_is_off_within_and_as_before_afterwards(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(KeyError), left_alone():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()
