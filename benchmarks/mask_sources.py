"""How well does each source find objects by their words? ``python -m benchmarks.mask_sources``

Scenes of the embedded world in drawings that the embedded model never saw, whose true masks are known. For every word
that stands in a scene: the intersection over union of its mask with the true one, and whether it lies on the right
object at all (half of the mask and more). A word that is not found counts as 0. And of every scene one word that the
prompt names beside the others, but that is not drawn: whether a mask is given for it all the same. Prints a table, and
how many contexts the tokens of the model's largest map attend to with the true masks, down-sampled both ways.
``--record`` keeps the figures in ``benchmarks/results/mask_sources.json``, and writes the table into ``docs/masks.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from benchmarks.records import RESULTS, write_record
from benchmarks.tables import DOCS, into_page
from benchmarks.tables import table as markdown
from weaver.embedded import load_pipeline, model_hash
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.training.segmenter import held_out_scenes
from weaver.embedded.world import Scene
from weaver.fusion.weights import token_weights
from weaver.masks import MaskError, attention_masks, compose_masks, mask_pyramid, segmenter_masks
from weaver.masks.assign import NotFoundError
from weaver.models import quiet_libraries

PAGE = DOCS / "masks.md"
MARKS = "<!-- mask sources: written by python -m benchmarks.mask_sources --record -->", "<!-- mask sources end -->"

# Finds words in a picture that a prompt describes: [N, height, width] bool, one mask a word.
Source = Callable[[Image.Image, str, Sequence[str]], torch.Tensor]


def sources(pipe) -> dict[str, Source]:
    """Every source that needs no other weights than the embedded model's, by its name in the table."""
    return {
        "segmenter": lambda image, prompt, words: segmenter_masks(image, words, prompt),
        "segmenter, without the prompt": lambda image, prompt, words: segmenter_masks(image, words),
        "attention": lambda image, prompt, words: attention_masks(pipe, image, prompt, words),
    }


def overlaps(found: torch.Tensor, truth: torch.Tensor) -> list[tuple[float, bool]]:
    """Intersection over union, and whether half of the mask is right, of masks [N, h, w] bool beside the true ones."""
    both, either = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
    return [
        (int(b) / int(e), 2 * int(b) >= int(mask.sum()) > 0) for b, e, mask in zip(both, either, found, strict=True)
    ]


def true_masks(scene: Scene) -> tuple[list[str], torch.Tensor]:
    """The words that stand in a scene, and where each of them stands, all its objects together."""
    words = sorted({animal.word for animal in scene.objects})
    masks = [
        np.isin(scene.labels, [i + 1 for i, animal in enumerate(scene.objects) if animal.word == word])
        for word in words
    ]
    return words, torch.from_numpy(np.stack(masks))


def measure(source: Source, scenes: Sequence[Scene]) -> dict:
    """Of all words of all scenes: their number, the mean overlap, by how many animals stand there, and the hits."""
    rows: list[tuple[int, float, bool]] = []
    for scene in scenes:
        words, truth = true_masks(scene)
        try:
            found = source(scene.image, scene.caption, words)
        except MaskError:
            found = torch.zeros_like(truth)
        rows += [(len(scene.objects), *row) for row in overlaps(found, truth)]
    counts = sorted({count for count, _, _ in rows})
    return {
        "words": len(rows),
        "iou": _mean(iou for _, iou, _ in rows),
        "iou_by_animals": {str(n): _mean(iou for count, iou, _ in rows if count == n) for n in counts},
        "right_object": _mean(hit for _, _, hit in rows),
        "invented": _mean(invented(source, scene, number) for number, scene in enumerate(scenes)),
    }


def invented(source: Source, scene: Scene, number: int) -> bool:
    """Whether a word that the prompt names, and that is not drawn, is given a mask; `number` picks the word."""
    words = true_masks(scene)[0]
    absent = [word for word in ANIMALS if word not in words]
    word, (animals, _, ground) = absent[number % len(absent)], scene.caption.rpartition(", ")
    try:
        found = source(scene.image, f"{animals} and a {word}, {ground}", [*words, word])
    except NotFoundError as error:
        return word not in error.words
    except MaskError:
        return False
    return bool(found[-1].any())


def live_contexts(scenes: Sequence[Scene], size: tuple[int, int], downsampling: str) -> float:
    """How many contexts a token of a map attends to on average, with the true masks of the scenes."""
    counts = []
    for scene in scenes:
        masks = compose_masks(true_masks(scene)[1], dilation=1)
        small = mask_pyramid(masks, [size], downsampling=downsampling)[size]
        counts.append((token_weights(small, [1.0] * (len(masks) - 1), 0.0) != 0).sum(0).double().mean())
    return round(float(torch.stack(counts).mean()), 3)


def table(figures: Mapping[str, Mapping]) -> str:
    """The figures of the sources as a table in Markdown."""
    counts = sorted({n for row in figures.values() for n in row["iou_by_animals"]})
    head = ["source", "IoU", *(f"of {n}" for n in counts), "on the right object", "given for what is not there"]
    lines = []
    for name, row in figures.items():
        by = [f"{row['iou_by_animals'][n]:.2f}" for n in counts]
        lines.append([name, f"{row['iou']:.2f}", *by, f"{row['right_object']:.0%}", f"{row['invented']:.0%}"])
    return markdown(head, lines)


def _mean(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    pipe, scenes = load_pipeline(), held_out_scenes(args.scenes)
    figures = {name: measure(source, scenes) for name, source in sources(pipe).items()}
    side = pipe.unet.config.sample_size
    live = {name: live_contexts(scenes, (side, side), name) for name in ("area", "nearest")}
    print(table(figures))
    print(f"contexts a token on maps of {side} x {side}: " + ", ".join(f"{v:.2f} by {k}" for k, v in live.items()))
    if args.record:
        told = {"model": model_hash(), "scenes": len(scenes), "sources": figures, "live_contexts": live}
        write_record(RESULTS, "mask_sources", told)
        into_page(PAGE, MARKS, table(figures))


if __name__ == "__main__":
    main()
