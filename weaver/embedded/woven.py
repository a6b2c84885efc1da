"""Pictures of the embedded world in which a concept stands among others, to learn it as a fusion will show it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageFilter

from weaver.concepts.images import TrainingSet
from weaver.concepts.own_prompts import own_prompts
from weaver.concepts.woven import WovenSet
from weaver.defaults import default_dilation
from weaver.embedded.backgrounds import BACKGROUNDS, draw_background
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.segmenter import load_segmenter
from weaver.embedded.world import IMAGE_SIZE, Scene, draw_scene
from weaver.pictures import fit

__all__ = ["woven_scenes"]

_ANIMALS = ((1, 2, 3), (0.2, 0.65, 0.15))  # how many stand in a scene, and how often
_LEAST_PIXELS = 60  # of the place in a scene
_SURE = 0.5


def woven_scenes(pictures: TrainingSet, token: str, word: str, count: int = 64, seed: int = 0) -> WovenSet | None:
    """Cut a concept out of its pictures and put it into scenes of the world; None for a word the world does not know.

    An animal takes the place of one of its word, in a scene of one to three animals. Behind the animals of a picture
    of a background stands the world's own of that word, as the template. What is cut out the segmenter finds.
    """
    rng = random.Random(f"{word}-{seed}")
    images = [fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE)) for image in pictures.images]
    if word in ANIMALS:
        cuts = [_cut(image, word) for image in images]
        cuts = [cut for cut in cuts if cut is not None]
        made = [_in_place(cuts, token, word, rng) for _ in range(count)] if cuts else []
    elif word in BACKGROUNDS:
        both = list(zip(images, pictures.captions, strict=True))
        made = [_behind(*both[i % len(both)], token, word, rng) for i in range(count)]
        made = [entry for entry in made if entry[3].any()]
    else:
        made = []
    if not made:
        return None
    images, captions, base, masks, templates = zip(*made, strict=True)
    return WovenSet(images, captions, base, np.stack(masks), templates)


def _cut(image: Image.Image, word: str) -> Image.Image | None:
    """The animal of a picture with what is around it transparent, cropped to it; None where none is found."""
    found = load_segmenter().segment(image, [word], word)[0] > _SURE
    if not found.any():
        return None
    cut = image.convert("RGB")
    cut.putalpha(Image.fromarray((found * 255).astype(np.uint8)))
    return cut.crop(_box(found))


def _in_place(cuts: list[Image.Image], token: str, word: str, rng: random.Random):
    """A scene in which one of `cuts` has taken the place of an animal of its word."""
    scene, place = _scene_with(word, rng)
    left, top, right, bottom = _box(scene.mask(place))
    cut = rng.choice(cuts)
    scale = max(right - left, bottom - top) / max(cut.size)
    cut = cut.resize(tuple(max(1, round(side * scale)) for side in cut.size), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    corner = [
        min(max((low + high - side) // 2, 0), IMAGE_SIZE - side)
        for low, high, side in zip((left, top), (right, bottom), cut.size, strict=True)
    ]
    image = _without(scene, place, rng)
    image.paste(cut, corner, cut)
    mask = Image.new("L", image.size)
    mask.paste(cut.getchannel("A"), corner)
    own = SimpleNamespace(name=token, token=token, modifier=token, word=word)
    others = [SimpleNamespace(name=animal.word, token=f"<{animal.word}>", word=animal.word) for animal in scene.objects]
    caption = own_prompts(scene.caption, [own, *(other for other in others if other.word != word)])[0]
    return image, caption, scene.caption, _grown(np.asarray(mask) > 127), scene.image


def _scene_with(word: str, rng: random.Random) -> tuple[Scene, int]:
    """A scene with one animal of the word, and which of its objects that is."""
    others = [animal for animal in ANIMALS if animal != word]
    while True:
        animals = [word, *rng.choices(others, k=rng.choices(*_ANIMALS)[0] - 1)]
        rng.shuffle(animals)
        scene = draw_scene(rng, animals=animals, varied=False)
        place = animals.index(word)
        if scene.mask(place).sum() >= _LEAST_PIXELS:
            return scene, place


def _without(scene: Scene, place: int, rng: random.Random) -> Image.Image:
    """The scene without one of its objects, on a background of its kind."""
    others = (scene.labels > 0) & ~scene.mask(place)
    return _joined(scene.image, others, scene.background, rng)


def _behind(image: Image.Image, caption: str, token: str, word: str, rng: random.Random):
    """A picture of a background, and as its template the same animals before the world's background of the word."""
    animals = load_segmenter().segment(image, list(ANIMALS)).sum(0) > _SURE
    base = " ".join(caption.replace(token, "").split())
    return image, caption, base, ~_grown(animals), _joined(image, animals, word, rng)


def _joined(image: Image.Image, kept: np.ndarray, background: str, rng: random.Random) -> Image.Image:
    """The pixels `kept` of a picture before another background."""
    ground = np.array(draw_background(background, rng, 2 * IMAGE_SIZE).resize(image.size, Image.Resampling.BOX))
    ground[kept] = np.asarray(image.convert("RGB"))[kept]
    return Image.fromarray(ground)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask as much larger as a fusion's masks are by default."""
    size = 2 * default_dilation(mask.shape) + 1
    return np.asarray(Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(size))) > 127


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is inside a mask."""
    rows, columns = np.nonzero(mask)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
