"""The words that settings can be, by themselves so that a job file is read without any library."""

from __future__ import annotations

__all__ = ["MASK_SOURCES", "OVERLAPS"]

MASK_SOURCES = ("segmenter", "attention")  # who finds words in a template
OVERLAPS = ("priority", "share")  # who gets what two masks claim
