"""What a template costs to prepare, kept on disk: its inversion, its reconstruction and, if asked, its features."""

from weaver.cache.identity import features_identity, inversion_identity, reverse_identity, uncacheable_reasons
from weaver.cache.store import Cache, CacheWarning, Entry, default_folder

__all__ = [
    "Cache",
    "CacheWarning",
    "Entry",
    "default_folder",
    "features_identity",
    "inversion_identity",
    "reverse_identity",
    "uncacheable_reasons",
]
