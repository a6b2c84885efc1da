"""The concepts that ship with the embedded model: drawings and backgrounds that it never saw in training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weaver.embedded.backgrounds import BACKGROUNDS
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.world import Scene, draw_scene
from weaver.errors import WeaverError

__all__ = ["CONCEPTS", "ConceptCard", "card_of", "concept_images", "concept_path", "concept_scenes"]

_ROOT = Path(__file__).parent / "concepts"
PICTURES_PER_CONCEPT = 8
_PORTRAIT = ((0.36, 0.64), (0.52, 0.66), (0.44, 0.62))  # the animal's spot in pictures of it: large, near the middle


@dataclass(frozen=True)
class ConceptCard:
    """What a shipped concept is.

    Attributes
    ----------
    name : of the concept and of its files.
    word : class word that the base model knows.
    kind : ``"animal"`` or ``"background"``.
    source : vendor of the drawing, or kind of the background.
    """

    name: str
    word: str
    kind: str
    source: str

    @property
    def training(self) -> dict[str, object]:
        """What it is learned with besides the embedded model's defaults: an animal as a LoRA of all layers."""
        return {"rank": 8, "layers": "all"} if self.kind == "animal" else {}

    @property
    def token(self) -> str:
        """The modifier token that stands before the class word in prompts."""
        return f"<{self.name}>"


_CARDS = (
    ConceptCard("tuxedo-cat", "cat", "animal", "emojione"),
    ConceptCard("blue-panda", "panda", "animal", "emojione"),
    ConceptCard("pug", "dog", "animal", "emojione"),
    ConceptCard("emerald-frog", "frog", "animal", "fluent-emoji-flat"),
    ConceptCard("sunset-mountain", "mountain", "background", "sunset-mountain"),
    ConceptCard("autumn-forest", "forest", "background", "autumn-forest"),
)
CONCEPTS: dict[str, ConceptCard] = {card.name: card for card in _CARDS}


def card_of(name: str) -> ConceptCard:
    """The card of the shipped concept `name`; a `WeaverError` names the ones there are."""
    if name not in CONCEPTS:
        raise WeaverError(f"no embedded concept is called {name!r}: choose one of {', '.join(CONCEPTS)}")
    return CONCEPTS[name]


def concept_path(name: str) -> Path:
    """The trained concept file of the shipped concept `name`."""
    return _ROOT / f"{card_of(name).name}.safetensors"


def concept_hashes(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each of these concepts' shipped files: what figures made with them record."""
    return {name: hashlib.sha256(concept_path(name).read_bytes()).hexdigest() for name in sorted(names)}


def concept_images(name: str) -> Path:
    """The folder with the pictures (and captions) of the shipped concept `name`."""
    return _ROOT / "pictures" / card_of(name).name


def concept_scenes(name: str, count: int = PICTURES_PER_CONCEPT, seed: int = 0) -> list[Scene]:
    """Scenes that show a concept: an animal alone on learned backgrounds, or a background behind learned animals."""
    card = card_of(name)
    rng = random.Random(f"{name}-{seed}")
    if card.kind == "animal":
        grounds = list(BACKGROUNDS)
        return [
            draw_scene(
                rng,
                animals=[card.word],
                background=grounds[index % len(grounds)],
                spots=[_PORTRAIT],
                vendors=(card.source,),
                varied=False,
            )
            for index in range(count)
        ]
    return [
        draw_scene(rng, animals=rng.sample(ANIMALS, 1 + index % 4), background=card.source, varied=False)
        for index in range(count)
    ]
