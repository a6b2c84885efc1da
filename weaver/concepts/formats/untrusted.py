"""Why the content of a file from elsewhere is not used."""

from __future__ import annotations

from weaver.errors import told

__all__ = ["Refusal", "damaged", "short"]


class Refusal(Exception):
    """Why a file is not loaded; whoever opened it says which file."""


def damaged(kind: str, error: Exception) -> Refusal:
    """That a file of some kind can't be read to its end."""
    return Refusal(f"is no whole {kind} ({short(error)}): it is cut short or damaged; download or save it again")


def short(error: Exception) -> str:
    """What an error says, in one short line."""
    return told(getattr(error, "strerror", None) or str(error) or type(error).__name__)
