"""Grounding DINO and SAM as transformers has them: they run wherever transformers does, without torchvision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os.path import isdir

import torch
from PIL import Image
from safetensors import SafetensorError

from weaver.errors import WeaverError
from weaver.masks.assign import Box
from weaver.masks.text import Detection
from weaver.models import hub_fix, only_local

__all__ = ["DETECTOR", "OUTLINER", "GroundingDino", "Sam"]

# The smallest that their authors give: 690 and 375 MB. langSAM takes grounding-dino-base and sam-vit-huge.
DETECTOR, OUTLINER = "IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-base"


class GroundingDino:
    """A detector (`weaver.masks.text.Detector`) of transformers' `GroundingDinoForObjectDetection`.

    Parameters
    ----------
    model : the model, in float32
    processor : its `GroundingDinoProcessor`
    """

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, source: str | os.PathLike = DETECTOR, *, device: str = "cpu", offline: bool = False) -> GroundingDino:
        """Open a model: a folder, or a Hub id. Raises `WeaverError`, one line that says how to get it."""
        from transformers import (
            AutoTokenizer,
            GroundingDinoForObjectDetection,
            GroundingDinoImageProcessorPil,
            GroundingDinoProcessor,
        )

        # Its own CUDA kernel is fetched from the Hub and compiled; PyTorch's operations serve on every device.
        options = {"disable_custom_kernels": True}
        parts = (GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil, AutoTokenizer)
        field = "masks.text.detector"
        model, pictures, tokenizer = _opened(source, "grounding-dino", parts, offline, field, **options)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # which transformers makes where its files are not there
            raise WeaverError(f"{field}: {str(source)!r} has no tokenizer with any words; {_fix(source, offline)}")
        return cls(model.to(device), GroundingDinoProcessor(pictures, tokenizer))

    def detect(self, image: Image.Image, phrase: str, box_threshold: float, text_threshold: float) -> list[Detection]:
        """See `Detector.detect`."""
        inputs = self.processor(images=image, text=[[phrase]], return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        found = self.processor.post_process_grounded_object_detection(
            outputs,
            inputs.input_ids,
            threshold=box_threshold,
            text_threshold=text_threshold,
            target_sizes=[(image.height, image.width)],
        )[0]
        if not len(found["boxes"]):  # for which transformers gives one empty text
            return []
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["text_labels"], strict=True)
        return [Detection(tuple(box), score, text) for box, score, text in rows]


class Sam:
    """An outliner (`weaver.masks.text.Outliner`) of transformers' `SamModel`.

    Parameters
    ----------
    model : the model, in float32
    processor : its `SamProcessor`
    """

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, source: str | os.PathLike = OUTLINER, *, device: str = "cpu", offline: bool = False) -> Sam:
        """Open a model: a folder, or a Hub id. Raises `WeaverError`, one line that says how to get it."""
        from transformers import SamImageProcessorPil, SamModel, SamProcessor

        model, pictures = _opened(source, "sam", (SamModel, SamImageProcessorPil), offline, "masks.text.segmenter")
        return cls(model.to(device), SamProcessor(pictures))

    def of_boxes(self, image: Image.Image, boxes: Sequence[Box]) -> torch.Tensor:
        """See `Outliner.of_boxes`."""
        masks, _ = self._masks(image, False, input_boxes=[[list(box) for box in boxes]])
        return masks[:, 0]

    def of_points(self, image: Image.Image, points: Sequence[tuple[float, float]]) -> torch.Tensor:
        """See `Outliner.of_points`. One point leaves open what is meant; of SAM's three answers the surest is taken."""
        points = [list(point) for point in points]
        masks, sure = self._masks(image, len(points) == 1, input_points=[[points]], input_labels=[[[1] * len(points)]])
        return masks[0, sure[0].argmax()]

    def _masks(self, image: Image.Image, several: bool, **prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks [K, answers, height, width] bool, and how sure it is of each [K, answers]."""
        inputs = self.processor(image, return_tensors="pt", **prompts)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        floats = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        outputs = self.model(**{name: x.to(self.model.device) for name, x in floats.items()}, multimask_output=several)
        masks = self.processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)[0]
        return masks, outputs.iou_scores[0].cpu()


def _opened(source: str | os.PathLike, kind: str, parts: Sequence[type], offline: bool, field: str, **options) -> list:
    """A model, the first of the classes `parts`, and what goes with it, from a folder or the Hub.

    Raises `WeaverError` naming the field where they can't be read or are of another kind.
    """
    from transformers import AutoConfig

    source = str(source)
    local = {"local_files_only": only_local(offline) or isdir(source)}
    try:
        there = AutoConfig.from_pretrained(source, **local).model_type
        if there == kind:
            model = parts[0].from_pretrained(source, dtype=torch.float32, **local, **options)
            return [model, *(part.from_pretrained(source, **local) for part in parts[1:])]
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Of a model that is not in the cache transformers tells that it could not connect, and not which it is.
        why = "" if only_local(offline) and not isdir(source) else f" ({first})"
        raise WeaverError(f"{field}: {source!r} can't be loaded; {_fix(source, offline)}{why}") from error
    raise WeaverError(f"{field}: {source!r} is a model of kind {there!r}, expected {kind!r}")


def _fix(source: str | os.PathLike, offline: bool) -> str:
    """What to do where a model, of a folder or the Hub, is not all there."""
    if isdir(source):
        return "the folder must hold a model with its processor, as save_pretrained writes them"
    return f"{hub_fix(offline)}, or name a folder that holds it"
