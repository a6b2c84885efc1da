"""The prompts that are evaluated: what stands in each picture, before what, and how its template is had.

Animals are concepts that ship ("tuxedo-cat") or the base model's own ("cat"). Everything follows from one shuffle with
a fixed seed, of which the table and the sweep take different parts: they share neither a prompt nor a seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from weaver.embedded.backgrounds import BACKGROUNDS
from weaver.embedded.captions import caption_of
from weaver.embedded.catalog import CONCEPTS

__all__ = ["GROUPS", "LAYOUTS", "Case", "Prompt", "cases", "quick_cases", "suite", "sweep_cases", "sweep_suite"]

LAYOUTS = ("made", "touching", "overlapping")
"""Templates: made by the model from the prompt; or drawn by the world, with animals that touch or overlap."""

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
SWEEP_SEEDS = (1000,)


@dataclass(frozen=True)
class Prompt:
    """One prompt of the suite.

    Parameters
    ----------
    name : of the prompt, such as "two-03"
    group : key of `GROUPS`
    animals : from left to right, each the name of a concept that ships, or a class word for the base model's own
    ground : the background, a word of the world or the name of a background concept
    layout : one of `LAYOUTS`
    """

    name: str
    group: str
    animals: tuple[str, ...]
    ground: str
    layout: str = "made"

    @property
    def words(self) -> tuple[str, ...]:
        """The class word of each animal."""
        return tuple(CONCEPTS[name].word if name in CONCEPTS else name for name in self.animals)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The animals that are concepts, in their order."""
        return tuple(name for name in self.animals if name in CONCEPTS)

    @property
    def background(self) -> str | None:
        """The background where it is a concept."""
        return self.ground if self.ground in CONCEPTS else None

    @property
    def ground_word(self) -> str:
        """The background's class word."""
        return CONCEPTS[self.ground].word if self.ground in CONCEPTS else self.ground

    @property
    def text(self) -> str:
        """p_base, without any concept's token: "a cat and a panda, forest background"."""
        return caption_of([f"a {word}" for word in self.words], self.ground_word)

    @property
    def text_with_tokens(self) -> str:
        """The same with every concept's token before its class word."""
        animals = [f"a {_named(name)}" for name in self.animals]
        return caption_of(animals, _named(self.ground))


@dataclass(frozen=True)
class Case:
    """One picture of the suite: a prompt and a seed, of the template's noise and of the fusion's."""

    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        return f"{self.prompt.name}-s{self.seed}"


def _named(name: str) -> str:
    return f"{CONCEPTS[name].token} {CONCEPTS[name].word}" if name in CONCEPTS else name


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


def _named_prompts(counts: dict[str, int], start: dict[str, int], prefix: str = "") -> tuple[Prompt, ...]:
    found = []
    for group, prompts in _candidates().items():
        chosen = prompts[start.get(group, 0) :][: counts[group]]
        for number, prompt in enumerate(chosen, start=1):
            name = f"{prefix}{group}-{number:02}"
            found.append(Prompt(name, group, prompt.animals, prompt.ground, prompt.layout))
    return tuple(found)


@cache
def suite() -> tuple[Prompt, ...]:
    """The prompts of the table."""
    return _named_prompts(_TABLE, {})


@cache
def sweep_suite() -> tuple[Prompt, ...]:
    """The prompts of the sweep, none of which is in the table."""
    return _named_prompts(_SWEEP, _TABLE, "sweep-")


def cases() -> list[Case]:
    """Every prompt of the table with every seed."""
    return [Case(prompt, seed) for prompt in suite() for seed in SEEDS]


def quick_cases() -> list[Case]:
    """The first prompt of each group with more than one concept, with the first seed: to see that all of it works."""
    firsts: dict[str, Prompt] = {}
    for prompt in suite():
        firsts.setdefault(prompt.group, prompt)
    return [Case(prompt, SEEDS[0]) for group, prompt in firsts.items() if group != "one"]


def sweep_cases() -> list[Case]:
    """Every prompt of the sweep with its seeds."""
    return [Case(prompt, seed) for prompt in sweep_suite() for seed in SWEEP_SEEDS]
