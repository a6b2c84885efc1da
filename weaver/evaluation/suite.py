"""The prompts that are evaluated: those of the table, and those of the sweep.

Everything follows from one shuffle with a fixed seed, of which the two take different parts: they share neither a
prompt, in words, nor a seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from weaver.embedded.backgrounds import BACKGROUNDS
from weaver.embedded.catalog import CONCEPTS
from weaver.evaluation.prompts import Case, Prompt

__all__ = ["GROUPS", "QUICK_GROUPS", "QUICK_STEPS", "cases", "quick_cases", "suite", "sweep_cases", "sweep_suite"]

GROUPS = {
    "one": "one concept",
    "two": "two concepts",
    "three": "three concepts",
    "four": "four concepts",
    "similar": "a concept beside the base model's own animal of its class, or twice in one picture",
    "touching": "two concepts that touch, in a drawn template",
    "overlapping": "two concepts of which one covers a part of the other, in a drawn template",
    "background": "one to four concepts before a background that is a concept too",
}
SEEDS = (0, 1, 2)
SWEEP_SEEDS = (3000,)


def _kinds(kind: str) -> list[str]:
    return [card.name for card in CONCEPTS.values() if card.kind == kind]


def _candidates() -> dict[str, list[Prompt]]:
    """Every prompt of each group there could be, in the order of one shuffle, without names."""
    animals, plain, concepts = _kinds("animal"), list(BACKGROUNDS), _kinds("background")
    rng = random.Random(2404)

    def those(group: str, sets: Sequence[tuple[str, ...]], grounds: Sequence[str], layout: str = "made"):
        found = [Prompt("", group, tuple(chosen), ground, layout) for chosen in sets for ground in grounds]
        rng.shuffle(found)
        return found

    sets = {n: list(itertools.permutations(animals, n)) for n in (1, 2, 3, 4)}
    beside, twice = [(name, CONCEPTS[name].word) for name in animals], [(name, name) for name in animals]
    orders = [pair[::-1] if place % 2 else pair for place, pair in enumerate(beside)]
    similar = those("similar", [*beside, *(pair[::-1] for pair in beside), *twice], plain)
    for pair in [*twice[:2], *orders[::-1]]:  # each class has its turn, the first concept's twice
        found = next(prompt for prompt in similar if prompt.animals == pair)
        similar.remove(found)
        similar.insert(0, found)
    grounds = [those("background", sets[n], concepts) for n in (1, 2, 3, 4)]
    return {
        **{group: those(group, sets[n], plain) for n, group in enumerate(("one", "two", "three", "four"), start=1)},
        "similar": similar,
        "touching": those("touching", sets[2], plain, "touching"),
        "overlapping": those("overlapping", sets[2], plain, "overlapping"),
        "background": [prompt for of_each in itertools.zip_longest(*grounds) for prompt in of_each if prompt],
    }


_TABLE = {"one": 4, "two": 12, "three": 10, "four": 6, "similar": 6, "touching": 6, "overlapping": 6, "background": 10}
_SWEEP = {"one": 1, "two": 3, "three": 2, "four": 1, "similar": 1, "touching": 1, "overlapping": 1, "background": 3}


def _named_prompts(counts: dict[str, int], prefix: str = "", taken: Sequence[Prompt] = ()) -> tuple[Prompt, ...]:
    """The first so many of each group whose words no other has, those of `taken` among them."""
    seen, found = {prompt.text_with_tokens for prompt in taken}, []
    for group, prompts in _candidates().items():
        new = [prompt for prompt in prompts if prompt.text_with_tokens not in seen][: counts[group]]
        seen.update(prompt.text_with_tokens for prompt in new)
        found += [replace(prompt, name=f"{prefix}{group}-{number:02}") for number, prompt in enumerate(new, start=1)]
    return tuple(found)


@cache
def suite() -> tuple[Prompt, ...]:
    """The prompts of the table."""
    return _named_prompts(_TABLE)


@cache
def sweep_suite() -> tuple[Prompt, ...]:
    """The prompts of the sweep: none is in the table, with whatever template."""
    return _named_prompts(_SWEEP, "sweep-", suite())


def cases() -> list[Case]:
    """Every prompt of the table with every seed."""
    return [Case(prompt, seed) for prompt in suite() for seed in SEEDS]


QUICK_GROUPS = ("four", "similar", "overlapping", "background")
QUICK_STEPS = 18
"""Of the quick look: three quarters of the table's, whose figures it does not give."""


def quick_cases() -> list[Case]:
    """The first prompt of some groups with the first seed: to see that all of it works."""
    return [Case(next(p for p in suite() if p.group == group), SEEDS[0]) for group in QUICK_GROUPS]


def sweep_cases() -> list[Case]:
    """Every prompt of the sweep with its seeds."""
    return [Case(prompt, seed) for prompt in sweep_suite() for seed in SWEEP_SEEDS]
