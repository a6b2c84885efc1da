"""What keeps the embedded model in place while it learns a concept: scenes of its own world (prior preservation)."""

from __future__ import annotations

import random

from weaver.concepts.images import TrainingSet
from weaver.embedded.world import draw_scene

__all__ = ["prior_scenes"]


def prior_scenes(count: int = 48, seed: int = 0) -> TrainingSet:
    """`count` scenes of the world with training captions; the same seed gives the same scenes."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    return TrainingSet(tuple(scene.image for scene in scenes), tuple(scene.training_caption(rng) for scene in scenes))
