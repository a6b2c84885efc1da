"""The field's own measures, for pictures of any model: CLIP and DINO alignment, and Detect-and-Compare.

By the protocol of CustomConcept101 (arXiv 2212.04488) they are of the whole picture, and so comparable with published
tables. Inside masks (`inside`) they say more of several concepts, and are comparable with nothing but themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from weaver.errors import WeaverError
from weaver.models import choose_device

__all__ = [
    "CLIP",
    "DINO",
    "FieldModels",
    "detect_and_compare",
    "field_measures",
    "image_alignment",
    "inside",
    "text_alignment",
]

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
"""The protocol's models."""
_TEXT_SCALE = 2.5  # of CLIPScore (arXiv 2104.08718), which CustomConcept101 reports
_SHORTER, _MIDDLE = 256, 224  # pixels, of DINO's pictures
_GREY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class FieldModels:
    """The networks that features are taken from; made by `load`, or of any classes of the same kind.

    Parameters
    ----------
    clip, clip_processor : a `transformers.CLIPModel` with its processor
    dino, dino_processor : a `transformers.ViTModel` (DINO) or `Dinov2Model` with its image processor
    """

    clip: torch.nn.Module
    clip_processor: object
    dino: torch.nn.Module
    dino_processor: object

    @classmethod
    def load(cls, clip: str = CLIP, dino: str = DINO, *, device: str = "auto", offline: bool = False) -> FieldModels:
        """Load both by Hub ids or folders; raises `WeaverError` naming the one that can't be had."""
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

        device, found = choose_device(device), []
        for name, kinds in ((clip, (CLIPModel, CLIPProcessor)), (dino, (AutoModel, AutoImageProcessor))):
            for kind in kinds:
                try:
                    part = kind.from_pretrained(name, local_files_only=offline)
                except (OSError, ValueError) as error:
                    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise WeaverError(
                        f"{name!r} can't be loaded as {kind.__name__} ({line}): is its name right?"
                    ) from (error)
                found.append(part.to(device).eval() if isinstance(part, torch.nn.Module) else part)
        return cls(*found)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """CLIP's unit features of prompts [n, D]; longer ones are cut to what it reads."""
        read = self.clip_processor.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        features = self.clip.get_text_features(**read.to(self.clip.device))
        return F.normalize(_pooled(features).float(), dim=-1).cpu()

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image], kind: str) -> torch.Tensor:
        """Unit features of pictures [n, D]: "clip", or "dino", the last layer's class token.

        Each sees the middle of a picture as CustomConcept101 shows it: CLIP by its own processor, DINO the middle
        224 pixels of a picture whose shorter side was brought to 256 (of its own size in that ratio).
        """
        if kind not in ("clip", "dino"):
            raise WeaverError(f"features are of {kind!r}, expected clip or dino")
        if not pictures:
            raise WeaverError("there is no picture to take features of")
        of_clip = kind == "clip"
        processor = self.clip_processor.image_processor if of_clip else self.dino_processor
        model = self.clip if of_clip else self.dino
        images, options = [image.convert("RGB") for image in pictures], {}
        if not of_clip:  # Hub's DINO would be shown the whole picture squeezed into a square
            images, options = [_centred(image, model.config.image_size) for image in images], {"do_resize": False}
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        pixels = pixels.to(model.device, model.dtype)
        features = (
            _pooled(model.get_image_features(pixel_values=pixels))
            if of_clip
            else model(pixel_values=pixels).last_hidden_state[:, 0]
        )
        return F.normalize(features.float(), dim=-1).cpu()


def _centred(image: Image.Image, side: int) -> Image.Image:
    """The middle `side` x `side` pixels of a picture whose shorter side is brought to 256 / 224 of that."""
    shorter = round(side * _SHORTER / _MIDDLE)
    width, height = (max(shorter, shorter * one // min(image.size)) for one in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def text_alignment(models: FieldModels, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """How far pictures show their prompts, one each, without any token (CLIP-T).

    Returns ``cosine``, the mean that the paper's table has, and ``score``, 2.5 max(cosine, 0), as CustomConcept101
    reports it.
    """
    if len(pictures) != len(prompts):
        raise WeaverError(f"{len(pictures)} pictures for {len(prompts)} prompts: give one each")
    cosines = (models.pictures(pictures, "clip") * models.texts(prompts)).sum(-1)
    return {"cosine": cosines.mean().item(), "score": (_TEXT_SCALE * cosines.clamp(min=0)).mean().item()}


def image_alignment(
    models: FieldModels, pictures: Sequence[Image.Image], references: Sequence[Image.Image], kind: str = "clip"
) -> float:
    """How far pictures look like a concept's own: the mean cosine of every pair (CLIP-I, or DINO-I by `kind`).

    `pictures` are whole ones, to compare with published tables, or their parts `inside` masks.
    """
    return (models.pictures(pictures, kind) @ models.pictures(references, kind).T).mean().item()


def field_measures(
    models: FieldModels,
    image: Image.Image,
    prompt: str,
    references: Mapping[str, Sequence[Image.Image]],
    masks: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float | dict[str, float]]:
    """All of these measures of one picture, under names that say what each is of.

    Parameters
    ----------
    prompt : of the picture, without any token
    references : for each concept the pictures that it was learned from
    masks : for each concept its region [height, width] in the picture

    Returns ``clip_text`` (cosine) and ``clip_score``; for each concept ``clip_image`` and ``dino_image``, of the whole
    picture; and with masks ``clip_image_inside_mask`` and ``dino_image_inside_mask``, and ``detect_and_compare``, by
    DINO, of what is inside the masks beside the references, which should then be crops too.
    """
    text = text_alignment(models, [image], [prompt])
    found: dict = {"clip_text": text["cosine"], "clip_score": text["score"]}
    parts = {} if masks is None else {name: inside(image, masks[name]) for name in references}
    for kind in ("clip", "dino"):
        for label, shown in ((f"{kind}_image", dict.fromkeys(references, image)), (f"{kind}_image_inside_mask", parts)):
            if shown:
                found[label] = {n: image_alignment(models, [shown[n]], own, kind) for n, own in references.items()}
    if parts:
        found["detect_and_compare"] = detect_and_compare(models, list(parts.values()), list(references.values()))
    return found


def inside(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The part of a picture inside mask [height, width] (0.5 and more) on grey, a square about its bounding box.

    Raises `WeaverError` for an empty mask, and for one of another size.
    """
    mask = np.asarray(mask, np.float32) >= 0.5
    if mask.shape != (image.height, image.width):
        raise WeaverError(f"the mask is {mask.shape}, the picture {(image.height, image.width)}: give both one size")
    if not mask.any():
        raise WeaverError("the mask is empty: there is nothing inside")
    alone = Image.new("RGB", image.size, _GREY)
    alone.paste(image.convert("RGB"), mask=Image.fromarray(mask))
    ys, xs = np.nonzero(mask)
    part = alone.crop((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
    square = Image.new("RGB", (max(part.size),) * 2, _GREY)
    square.paste(part, ((square.width - part.width) // 2, (square.height - part.height) // 2))
    return square


def detect_and_compare(
    models: FieldModels,
    detected: Sequence[Image.Image],
    references: Sequence[Sequence[Image.Image]],
    kind: str = "dino",
) -> float:
    """Detect-and-Compare of several subjects in one picture (MuDI, arXiv 2404.04243): 1 is right, mixing takes it down.

    `1 - |S_DC - S_GT|_F^2`, where S_DC [n, n] are the mean cosines of each detected subject to each reference set, and
    S_GT those of the reference sets to each other, a picture with itself among them. Where the paper leaves it open, it
    is as its authors published it: each reference set in its turn takes the nearest of the subjects that are left, and
    another number of subjects than n gives 0. Theirs are detected by OWLv2 and compared by DreamSim; here by what the
    caller detects with and the features of `kind`, so figures are comparable between pictures, not with their table.

    Parameters
    ----------
    detected : the subjects found in the picture, such as their parts `inside` masks
    references : n sets of pictures, of the same kind as `detected`
    kind : "dino" or "clip"
    """
    if not references:
        raise WeaverError("there are no references to compare with: give one set of pictures a subject")
    if len(detected) != len(references):
        return 0.0
    own, features = [models.pictures(of_one, kind) for of_one in references], models.pictures(detected, kind)
    truth = torch.stack([torch.stack([(a @ b.T).mean() for b in own]) for a in own])
    found = torch.stack([(features @ of_one.T).mean(1) for of_one in own], 1)  # [detected, n]
    order: list[int] = []
    for subject in range(len(own)):
        order.append(max(set(range(len(own))) - set(order), key=lambda row: found[row, subject].item()))
    return 1 - (found[order] - truth).square().sum().item()


def _pooled(features) -> torch.Tensor:
    """CLIP's projected features, which newer releases of transformers return within an object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output
