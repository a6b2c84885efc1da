"""Where each concept goes: masks from words, attention, files and boxes, composed so that they fill the plane."""

from weaver.masks.attention import attention_masks
from weaver.masks.compose import MaskError, compose_masks
from weaver.masks.files import box_mask, load_mask
from weaver.masks.overlay import draw_masks
from weaver.masks.pyramid import mask_pyramid
from weaver.masks.segmenter import segmenter_masks

__all__ = [
    "MaskError",
    "attention_masks",
    "box_mask",
    "compose_masks",
    "draw_masks",
    "load_mask",
    "mask_pyramid",
    "segmenter_masks",
]
