"""Grounding DINO and SAM by their authors: the packages groundingdino-py and segment-anything, and their checkpoints.

Both need a torchvision that fits the installed torch. groundingdino-py 0.4 was written for transformers 4, whose BERT
had three methods that it takes: `_GroundingDino` hands them to it, and nothing of either library is changed.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn

from weaver.errors import WeaverError
from weaver.masks.assign import Box
from weaver.masks.text import Detection
from weaver.models import hub_fix, only_local

__all__ = ["OriginalGroundingDino", "OriginalSam", "build_grounding_dino"]

_CONFIGS = {96: "GroundingDINO_SwinT_OGC", 128: "GroundingDINO_SwinB_cfg"}  # by the width of the backbone
_SAMS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # by the width of the image encoder
_MISSING = "pip install segment-anything groundingdino-py torchvision, the torchvision that fits your torch"


class OriginalGroundingDino:
    """A detector (`weaver.masks.text.Detector`) of the package groundingdino.

    Parameters
    ----------
    model : as `build_grounding_dino` makes it, in float32
    side, longest : pixels that the shorter side of a picture is resized to, and the most that the longer one may have
    """

    def __init__(self, model: nn.Module, side: int = 800, longest: int = 1333) -> None:
        self.model, self.side, self.longest = model.eval(), side, longest

    @classmethod
    def load(
        cls, checkpoint: str | os.PathLike | None, *, device: str = "cpu", offline: bool = False
    ) -> OriginalGroundingDino:
        """Open the authors' checkpoint, groundingdino_swint_ogc.pth or groundingdino_swinb_cogcoor.pth.

        Its text encoder, BERT, is no part of that: it comes from the Hub, `offline` from the local cache only.

        Raises `WeaverError`, one line, where it, the package or BERT's files are not there.
        """
        field = "masks.text.detector"
        config = _package("groundingdino.util.slconfig").SLConfig
        weights = _weights(checkpoint, field, "groundingdino_swint_ogc.pth")
        weights = weights.get("model", weights)
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
        width = _width(weights, "backbone.0.patch_embed.proj.weight", _CONFIGS, checkpoint, field)
        file = Path(_package("groundingdino.config").__file__).parent / f"{_CONFIGS[width]}.py"
        settings = config.fromfile(str(file))
        try:
            if only_local(offline):
                settings.text_encoder_type = snapshot_download(settings.text_encoder_type, local_files_only=True)
            model = build_grounding_dino(settings)
        except OSError as error:
            raise WeaverError(
                f"{field}: 'bert-base-uncased', the text encoder of {checkpoint}, can't be loaded; {hub_fix(offline)}"
            ) from error
        _fill(model, weights, checkpoint, field)
        return cls(model.to(device))

    def detect(self, image: Image.Image, phrase: str, box_threshold: float, text_threshold: float) -> list[Detection]:
        """See `Detector.detect`."""
        transforms = _package("groundingdino.datasets.transforms")
        seen = transforms.Compose(
            [
                transforms.RandomResize([self.side], max_size=self.longest),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
        device = next(self.model.parameters()).device
        boxes, scores, texts = _package("groundingdino.util.inference").predict(
            self.model, seen(image, None)[0], phrase, box_threshold, text_threshold, device=device
        )
        # Centre and size in parts of the picture become corners in its pixels.
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        corners = corners * torch.tensor([image.width, image.height] * 2)
        rows = zip(corners.tolist(), scores.tolist(), texts, strict=True)
        return [Detection(tuple(box), score, text) for box, score, text in rows]


class OriginalSam:
    """An outliner (`weaver.masks.text.Outliner`) of the package segment_anything.

    Parameters
    ----------
    model : its `Sam`, in float32
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, checkpoint: str | os.PathLike | None, *, device: str = "cpu") -> OriginalSam:
        """Open the authors' checkpoint: sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth.

        Raises `WeaverError`, one line, where it or the package is not there.
        """
        field = "masks.text.segmenter"
        registry = _package("segment_anything").sam_model_registry
        weights = _weights(checkpoint, field, "sam_vit_b_01ec64.pth")
        width = _width(weights, "image_encoder.patch_embed.proj.weight", _SAMS, checkpoint, field)
        model = registry[_SAMS[width]]()
        _fill(model, weights, checkpoint, field)
        return cls(model.to(device))

    def of_boxes(self, image: Image.Image, boxes: Sequence[Box]) -> torch.Tensor:
        """See `Outliner.of_boxes`."""
        predictor = self._predictor(image)
        given = torch.tensor([list(box) for box in boxes], device=predictor.device)
        given = predictor.transform.apply_boxes_torch(given, (image.height, image.width))
        masks, _, _ = predictor.predict_torch(None, None, boxes=given, multimask_output=False)
        return masks[:, 0].cpu()

    def of_points(self, image: Image.Image, points: Sequence[tuple[float, float]]) -> torch.Tensor:
        """See `Outliner.of_points`. One point leaves open what is meant; of SAM's three answers the surest is taken."""
        masks, sure, _ = self._predictor(image).predict(
            np.array(points, dtype=float), np.ones(len(points), dtype=int), multimask_output=len(points) == 1
        )
        return torch.from_numpy(masks[sure.argmax()])

    def _predictor(self, image: Image.Image):
        predictor = _package("segment_anything").SamPredictor(self.model)
        predictor.set_image(np.array(image.convert("RGB")))
        return predictor


def build_grounding_dino(config) -> nn.Module:
    """The package's model with random weights, of any transformers.

    `config` is one of its own, an `SLConfig` or anything with the same attributes. Its `text_encoder_type` is
    "bert-base-uncased" or a folder with a BERT and its tokenizer.
    """
    backbones = _package("groundingdino.models.GroundingDINO.backbone")
    transformers = _package("groundingdino.models.GroundingDINO.transformer")
    same = (
        "num_queries",
        "num_feature_levels",
        "nheads",
        "dec_pred_bbox_embed_share",
        "two_stage_type",
        "two_stage_bbox_embed_share",
        "two_stage_class_embed_share",
        "num_patterns",
        "text_encoder_type",
        "sub_sentence_present",
        "max_text_len",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which BERT it opens
        return _grounding_dino_class()(
            backbones.build_backbone(config),
            transformers.build_transformer(config),
            query_dim=4,
            iter_update=True,
            **{name: getattr(config, name) for name in same},
        )


@lru_cache
def _grounding_dino_class() -> type[nn.Module]:
    """The package's class, which gives BERT what it lacks before it looks for it."""
    base = _package("groundingdino.models.GroundingDINO.groundingdino").GroundingDINO

    class _GroundingDino(base):
        def __setattr__(self, name: str, value) -> None:
            if name == "bert" and hasattr(value, "pooler") and not hasattr(value, "get_head_mask"):
                value = _Bert(value)
            super().__setattr__(name, value)

    return _GroundingDino


class _Bert(nn.Module):
    """The parts of transformers' BERT, with three methods that it had before transformers 5."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.config = bert.config
        self.embeddings, self.encoder, self.pooler = bert.embeddings, bert.encoder, bert.pooler
        for part in (self.embeddings, self.encoder):
            part.register_forward_pre_hook(_known_arguments, with_kwargs=True)

    def get_extended_attention_mask(self, mask: torch.Tensor, input_shape=None, device=None) -> torch.Tensor:
        """The same as `invert_attention_mask` in an encoder."""
        return self.invert_attention_mask(mask)

    def invert_attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """What is added to attention's scores, [B, 1, 1 or L, L], of a mask [B, L] or [B, L, L], 1 where it looks."""
        dtype = self.embeddings.word_embeddings.weight.dtype
        mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return (1 - mask.to(dtype)) * torch.finfo(dtype).min

    def get_head_mask(self, head_mask, layers: int) -> list[None]:
        """Every head of every layer is used."""
        return [None] * layers


def _known_arguments(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Leave out what a module's `forward` has no name for any more."""
    known = inspect.signature(module.forward).parameters
    return args, {name: value for name, value in kwargs.items() if name in known}


def _package(name: str):
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit the torch
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        package = name.partition(".")[0]
        raise WeaverError(
            f"masks.text.backend: the package {package} can't be imported ({first}); {_MISSING}, or take 'transformers'"
        ) from error


def _weights(checkpoint: str | os.PathLike | None, field: str, usual: str) -> dict:
    """What a checkpoint holds; nothing in it is run."""
    if checkpoint is None:
        raise WeaverError(f"{field}: the original packages bring no weights; name their checkpoint, such as {usual}")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeaverError(f"{field}: {checkpoint} is not there; download {usual} from its authors' page") from error
    except Exception as error:  # unpickling damaged files raises anything
        raise WeaverError(f"{field}: {checkpoint} is no checkpoint of PyTorch or is damaged; get it anew") from error
    if not isinstance(weights, dict):
        raise WeaverError(f"{field}: {checkpoint} holds a {type(weights).__name__}, expected weights by their names")
    return weights


def _width(weights: dict, name: str, known: dict[int, str], checkpoint, field: str) -> int:
    width = weights[name].shape[0] if isinstance(weights.get(name), torch.Tensor) else None
    if width not in known:
        raise WeaverError(f"{field}: {checkpoint} holds none of the models {', '.join(known.values())}")
    return width


def _fill(model: nn.Module, weights: dict, checkpoint, field: str) -> None:
    """Load weights; what older versions wrote besides is passed over, and nothing may be missing."""
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        raise WeaverError(f"{field}: {checkpoint} has weights of other sizes than its model; get it anew") from error
    if missing:
        raise WeaverError(f"{field}: {checkpoint} lacks {len(missing)} weights, {missing[0]} among them; get it anew")
