"""What a picture of the suite is of: a prompt, which says what stands before what, and a seed.

Animals are concepts that ship ("tuxedo-cat") or the base model's own ("cat").
"""

from __future__ import annotations

from dataclasses import dataclass

from weaver.embedded.captions import caption_of
from weaver.embedded.catalog import CONCEPTS

__all__ = ["LAYOUTS", "Case", "Prompt"]

LAYOUTS = ("made", "touching", "overlapping")
"""Templates: made by the model from the prompt; or drawn by the world, with animals that touch or overlap."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the suite.

    Parameters
    ----------
    name : of the prompt, such as "two-03"
    group : key of `weaver.evaluation.suite.GROUPS`
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
