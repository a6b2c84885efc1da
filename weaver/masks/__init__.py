"""Where each concept goes: masks from words, attention, files and outlines, composed so that they fill the plane."""

from weaver.masks.assign import Found, Wish, assign
from weaver.masks.attention import attention_masks
from weaver.masks.compose import MaskError, compose_masks
from weaver.masks.files import load_mask
from weaver.masks.given import box_mask, polygon_mask
from weaver.masks.overlay import draw_masks
from weaver.masks.pyramid import mask_pyramid
from weaver.masks.segmenter import segmenter_masks
from weaver.masks.text import TextMasks

__all__ = [
    "Found",
    "MaskError",
    "TextMasks",
    "Wish",
    "assign",
    "attention_masks",
    "box_mask",
    "compose_masks",
    "draw_masks",
    "load_mask",
    "mask_pyramid",
    "polygon_mask",
    "segmenter_masks",
]
