"""Identity: whose drawing is it? One small classifier over drawings is the measure of identity everywhere.

The network tells every vendor's drawing of every animal from each other, repainted drawings of each animal as one more
class, and backgrounds. Its unit-length feature of a region is compared with each drawing's direction: similarities are
cosines in [-1, 1].
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from weaver.embedded.backgrounds import BACKGROUNDS, HELD_OUT_BACKGROUNDS
from weaver.embedded.catalog import CONCEPTS, ConceptCard, card_of
from weaver.embedded.crops import crop_region
from weaver.embedded.drawings import ANIMALS, DRAWINGS, TRAINING_VENDORS

__all__ = [
    "IDENTITIES",
    "IdentityNetwork",
    "classify_animal",
    "identity_of",
    "load_identity",
    "score",
    "shows",
    "similarities",
]

IDENTITY_FILE = Path(__file__).parent / "helpers" / "identity.safetensors"
REPAINTED = "repainted"

# (source, word): vendor and animal, "repainted" and animal, background kind and its class word.
IDENTITIES: tuple[tuple[str, str], ...] = (
    *((vendor, animal) for vendor, animals in DRAWINGS.items() for animal in animals),
    *((REPAINTED, animal) for animal in ANIMALS),
    *((kind, kind) for kind in BACKGROUNDS),
    *((REPAINTED, kind) for kind in BACKGROUNDS),
    *((kind, word) for kind, (word, _) in HELD_OUT_BACKGROUNDS.items()),
)


class IdentityNetwork(nn.Module):
    """Crops [B, 3, 40, 40] in [-1, 1] to cosines [B, identities]."""

    def __init__(self, width: int = 32, features: int = 64):
        super().__init__()
        levels = (width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *levels[:-1]), levels, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(levels[-1], features)
        self.directions = nn.Parameter(torch.randn(len(IDENTITIES), features))

    def forward(self, crops: Tensor) -> Tensor:
        features = self.head(self.body(crops).mean((2, 3)))
        return F.normalize(features, dim=1) @ F.normalize(self.directions, dim=1).T


@lru_cache(maxsize=1)
def load_identity() -> IdentityNetwork:
    """The trained classifier that ships with the package."""
    network = IdentityNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(IDENTITY_FILE).items()})
    return network.eval()


@torch.no_grad()
def similarities(image: Image.Image, mask: np.ndarray, *, background: bool = False) -> dict[tuple[str, str], float]:
    """Cosine of the region to every identity of its kind (animals, or backgrounds where `background` is set)."""
    cosines = load_identity()(crop_region(image, mask, whole=background)[None])[0]
    words = set(BACKGROUNDS) if background else set(ANIMALS)
    return {identity: cosines[i].item() for i, identity in enumerate(IDENTITIES) if identity[1] in words}


def classify_animal(image: Image.Image, mask: np.ndarray) -> str:
    """The animal whose drawing the region is nearest to."""
    found = similarities(image, mask)
    return max(found, key=found.get)[1]


def identity_of(card: ConceptCard) -> tuple[str, str]:
    """The identity of a shipped concept among `IDENTITIES`."""
    return card.source, card.word


def shows(scores: dict[str, float]) -> bool:
    """Whether a region, with the `score` that it has, is nearer to its own concept than to its class and to others."""
    return scores["own"] > scores["base"] and scores["own"] > scores["others"]


def score(image: Image.Image, mask: np.ndarray, concept_name: str) -> dict[str, float]:
    """How far the region shows the concept.

    Parameters
    ----------
    image : picture of h x w pixels.
    mask : [h, w] the concept's region.
    concept_name : one of ``CONCEPTS``.

    Returns
    -------
    dict
        ``own``: cosine to the concept's own drawing; ``base``: to the nearest drawing of its class word that the base
        model was trained on, repainted ones included; ``others``: to the nearest other shipped concept of its kind.
    """
    card = card_of(concept_name)
    found = similarities(image, mask, background=card.kind == "background")
    own = identity_of(card)
    others = [identity_of(c) for c in CONCEPTS.values() if c.kind == card.kind and c.name != card.name]
    trained = {*TRAINING_VENDORS, *BACKGROUNDS, REPAINTED}
    return {
        "own": found[own],
        "base": max(value for (source, word), value in found.items() if word == card.word and source in trained),
        "others": max(found[identity] for identity in others),
    }
