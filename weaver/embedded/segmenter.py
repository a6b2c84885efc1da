"""The word-conditioned segmenter of the embedded world: a picture and a word give the word's mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from weaver.embedded.drawings import ANIMALS
from weaver.embedded.world import IMAGE_SIZE
from weaver.errors import WeaverError
from weaver.masks.shapes import connected_components

__all__ = ["Segmenter", "load_segmenter", "word_probabilities"]

SEGMENTER_FILE = Path(__file__).parent / "helpers" / "segmenter.safetensors"
_LEAST_PIXELS = 40  # of 64x64, for an animal to be seen
_FEW_OTHERS = 0.02  # of the animals' pixels


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.SiLU(),
    )  # fmt: skip


class Segmenter(nn.Module):
    """A U-Net of 64x64 pictures whose pixel features are compared with word embeddings.

    It works at half size and unfolds its last features to full size: four times cheaper than a full-size first level.

    Parameters
    ----------
    widths : channels at 32x32, 16x16 and 8x8.
    features : length of pixel features and word embeddings.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96), features: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 2, 1), nn.SiLU(), _block(widths[0], widths[0]))
        self.down = nn.ModuleList(_block(a, b, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(widths[0], 4 * features, 3, 1, 1)
        self.words = nn.Embedding(len(ANIMALS), features)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, words, 64, 64] of every word of the world for pictures [B, 3, 64, 64] in [-1, 1].

        The background's logit is 0: `word_probabilities` is the softmax over it and the words.
        """
        maps = [self.stem(pixels)]
        for block in self.down:
            maps.append(block(maps[-1]))
        features = maps.pop()
        for block in self.up:
            features = F.interpolate(features, scale_factor=2, mode="nearest")
            features = block(torch.cat([features, maps.pop()], 1))
        features = F.pixel_shuffle(self.head(features), 2)
        return torch.einsum("bchw,nc->bnhw", features, self.words.weight) + self.bias

    @torch.no_grad()
    def segment(self, image: Image.Image, words: Sequence[str], prompt: str | None = None) -> np.ndarray:
        """Soft masks of `words` in `image`.

        Parameters
        ----------
        image : RGB picture of any size; it is looked at in 64x64 pixels, as it is and mirrored.
        words : class words; objects of one class share one mask.
        prompt : what the picture shows, with every animal in it. A drawing of a new style may look more like another
            animal than like itself; so what is an animal at all is given out among those of the prompt, a share each,
            unless one of them is plainly missing. None seeks every word by itself.

        Returns
        -------
        np.ndarray
            [len(words), height, width] float32 in [0, 1].

        Raises
        ------
        WeaverError
            If a word is not one of the embedded world's animals.
        """
        unknown = [word for word in words if word not in ANIMALS]
        if unknown:
            raise WeaverError(
                f"the embedded segmenter does not know {', '.join(map(repr, unknown))}: "
                f"it knows {', '.join(ANIMALS)}; give other concepts a mask file, a box or an attention mask"
            )
        small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div(127.5).sub(1)
        logits, mirrored = self(torch.stack([pixels, pixels.flip(2)]).to(self.bias.device)).cpu()
        logits = (logits + mirrored.flip(2)) / 2
        probabilities = word_probabilities(logits[None])[0]
        if prompt is not None:
            told = [word for word in re.findall("[a-z]+", prompt.lower()) if word in ANIMALS]
            told += [word for word in words if word not in told]
            probabilities = _believe(logits, probabilities, [ANIMALS.index(word) for word in told])
        masks = probabilities[None, [ANIMALS.index(word) for word in words]]
        if image.size != small.size:
            masks = F.interpolate(masks, (image.height, image.width), mode="bilinear", align_corners=False)
        return masks[0].numpy()


def word_probabilities(logits: Tensor) -> Tensor:
    """How likely each pixel is each word [B, words, h, w], from logits; what is left of one is background."""
    return F.pad(logits, (0, 0, 0, 0, 1, 0)).softmax(1)[:, 1:]


def _believe(logits: Tensor, probabilities: Tensor, told: list[int]) -> Tensor:
    """Probabilities [words, h, w] when the animals `told` (indices of words, one for each animal) are all that stand
    there, from those of words sought by themselves and their logits.

    Nothing changes where one of them is missing: no pixels look like it, none like an animal that was not told, and
    what looks like an animal falls into fewer parts than were told.
    """
    animal = probabilities.sum(0)
    seen = torch.where(animal > 0.5, probabilities.argmax(0), -1)
    areas = torch.bincount(seen.flatten() + 1, minlength=len(ANIMALS) + 1)[1:]
    others = areas.sum() - areas[sorted(set(told))].sum()
    if any(areas[word] < _LEAST_PIXELS for word in told) and others <= _FEW_OTHERS * areas.sum():
        parts = np.bincount(connected_components(animal > 0.5).ravel())[1:]
        if (parts >= _LEAST_PIXELS).sum() < len(set(told)):
            return probabilities
    words = sorted(set(told))
    believed = torch.zeros_like(probabilities)
    # The root: between a share for each word and one for each animal, which overlap where there are more of a word.
    counts = [told.count(word) ** 0.5 for word in words]
    believed[words] = animal * _give_out(logits[words], animal > 0.5, counts)
    return believed


def _give_out(
    logits: Tensor, animal: Tensor, shares: Sequence[float], softness: float = 8.0, reach: int = 4, rounds: int = 50
) -> Tensor:
    """How the pixels `animal` [h, w] bool are divided among words [K, h, w], about in proportion to `shares`.

    Logits are averaged over a pixel's neighbours that are animals too. A bias a word is found so that, softly
    assigned, all words hold an area in proportion to their share (one side of Sinkhorn's balancing).
    """
    animal = animal[None].to(logits)
    window = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach}
    around = F.avg_pool2d(logits * animal, **window) / F.avg_pool2d(animal, **window).clamp(min=1e-3)
    inside = around[:, animal[0] > 0]
    wanted = torch.tensor(shares).to(logits).view(-1, 1) / sum(shares)
    bias = torch.zeros(len(inside), 1)
    for _ in range(rounds if inside.numel() else 0):
        share = ((inside + bias) / softness).softmax(0).mean(1, keepdim=True)
        bias -= 0.5 * softness * (share.clamp(min=1e-6) / wanted).log()
    return (around + bias.view(-1, 1, 1)).softmax(0)


@lru_cache(maxsize=1)
def load_segmenter() -> Segmenter:
    """The trained segmenter that ships with the package."""
    segmenter = Segmenter()
    segmenter.load_state_dict({name: tensor.float() for name, tensor in load_file(SEGMENTER_FILE).items()})
    return segmenter.eval()
