"""Everything a fusion needs, made and checked before the first step."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from weaver.conditioning import make_time_ids
from weaver.errors import raise_if
from weaver.features import Features
from weaver.fusion.contexts import (
    BASE,
    NEGATIVE,
    ConceptUse,
    context_keys_values,
    encode_contexts,
    same_contexts,
    use_reasons,
)
from weaver.fusion.inputs import amount_reasons, full_masks, steps_and_size
from weaver.fusion.support import model_reasons
from weaver.fusion.weights import phase_starts, token_weights
from weaver.latents import vae_scale_factor
from weaver.layers import layer_size
from weaver.masks.compose import mask_pyramid
from weaver_kernels import ContextKV

__all__ = ["FusionPlan"]


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """A fusion, frozen: texts as keys and values, masks as weights, the template as features. Made by `build`.

    Rows B, contexts S' (negative, base, concepts, background where it is one), tokens T, text length L, heads H, head
    dimension D, text width C.

    Parameters
    ----------
    prompts : the S' prompts, and `text` [S', L, C] their encodings; the negative one is None where it is zeros
    keys_values : path of each attn2 -> its keys and values, both [S', L, H, D]
    same_as : [S'], for each context the first one equal to it in text and weights; these are computed once
    phases : where, as parts of the run, the weights change
    weights : (phase, (h, w)) -> [S' - 1, T], how the fused row weighs base and the contexts after it; columns sum to 1
    sizes : path of each attn2 -> (h, w) of its map
    size : (h, w) of the latents, and `pixels` (height, width) of the picture
    steps : for how many steps it was planned
    guidance : omega; 1 or less draws without a negative row
    features : the template's, or None for fusion from plain noise
    pooled : SDXL's pooled embeddings [2, P] of the negative and the base prompt, which the rows have whatever they
        attend to: they enter the time embedding, where no mask reaches. None for models without
    time_ids : SDXL's [1, 6], the same for every row: the features', or the picture's size, uncropped
    """

    prompts: tuple[str | None, ...]
    text: torch.Tensor
    keys_values: Mapping[str, ContextKV]
    same_as: torch.Tensor
    phases: tuple[float, ...]
    weights: Mapping[tuple[int, tuple[int, int]], torch.Tensor]
    sizes: Mapping[str, tuple[int, int]]
    size: tuple[int, int]
    pixels: tuple[int, int]
    steps: int
    guidance: float
    features: Features | None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("keys_values", "weights", "sizes"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        pipe,
        concepts: Sequence[ConceptUse] = (),
        masks: torch.Tensor | np.ndarray | None = None,
        *,
        prompt: str,
        negative_prompt: str | None = None,
        background: ConceptUse | None = None,
        suppression: float = 0.0,
        guidance: float = 7.5,
        features: Features | None = None,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        base_hash: str | None = None,
    ) -> FusionPlan:
        """Check everything, encode the prompts, project all contexts' keys and values, and weigh the masks.

        The concepts' weights are not needed afterwards. Put the pipeline on its device and in its dtype first.

        Parameters
        ----------
        pipe : a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`, only read
        concepts : N uses of concepts, each in the region of its mask
        masks : [N, height, width] that do not overlap, or [N + 1, height, width] with the background last and summing
            to one, as `compose_masks` makes them; 0..1, in the picture's pixels or in latent cells. None if N is 0
        prompt : p_base, the concept-free prompt of the whole picture
        negative_prompt : p_neg; None is what the pipeline takes where none is given: an empty one, or zeros in SDXL
        background : a concept for everything outside the masks; None leaves it to the base model
        suppression : lambda, how far the result is pushed away from the base model's own idea; 0 or more
        guidance : omega, 0 or more; the default is Plug-and-Play's. 1 or less draws without a negative row
        features : the template's; None fuses from plain noise, without injection
        steps : of the fusion; the features' where there are some, else 50
        height, width : of the picture in pixels; the features' where there are some, else the model's own
        base_hash : the `attn2_hash` of the pipeline's U-Net where it is known, such as from before a cast to bfloat16,
            whose rounding gives another; None computes it

        Raises `WeaverError` with every reason, when something does not fit.
        """
        unet, concepts = pipe.unet, list(concepts)
        uses = [*concepts, *([background] if background is not None else [])]
        raise_if(model_reasons(pipe), "Cannot fuse with this model")
        factor = vae_scale_factor(pipe.vae)
        steps, size, reasons = steps_and_size(pipe, features, steps, height, width)
        reasons += amount_reasons({"suppression": suppression, "guidance": guidance})
        full, mask_reasons = full_masks(
            masks, [use.name for use in concepts], background.name if background else None, size, factor
        )
        prompts, encoded, text_reasons = encode_contexts(pipe, prompt, negative_prompt, concepts, background)
        reasons += mask_reasons + use_reasons(pipe, uses, base_hash) + text_reasons
        raise_if(reasons, "Cannot build the fusion plan")

        text, pooled = (None if part is None else part.to(unet.device) for part in encoded)
        keys_values, same_as = context_keys_values(unet, text, uses), same_contexts(text, uses)
        levels = len(unet.config.block_out_channels)
        sizes = {path: layer_size(path, levels, size) for path in keys_values}
        phases = phase_starts(use.window for use in uses)
        dtype = torch.float64 if unet.dtype == torch.float64 else torch.float32
        weights = {}
        for hw, reduced in mask_pyramid(full, sorted(set(sizes.values()))).items():
            for phase, start in enumerate(phases):
                strengths = [use.strength_at(start) for use in uses]
                weights[phase, hw] = token_weights(reduced, strengths, suppression).to(unet.device, dtype)
        pixels = (size[0] * factor, size[1] * factor)
        time_ids = make_time_ids(pipe, pixels, text) if features is None else features.time_ids
        return cls(
            prompts,
            text,
            keys_values,
            same_as,
            phases,
            weights,
            sizes,
            size,
            pixels,
            steps,
            guidance,
            features,
            None if pooled is None else pooled[[NEGATIVE, BASE]],
            time_ids,
        )

    def phase_at(self, progress: float) -> int:
        """Number of the phase at a part of the run, 0 (first step) to 1."""
        return bisect.bisect_right(self.phases, progress) - 1

    def pipeline_arguments(self) -> dict:
        """Arguments for a pipeline call under `attach` that say what this plan says: texts, size, steps, omega, noise.

        For SDXL with pooled embeddings and the sizes and crop of the time ids.

        Without features the noise is left to the pipeline's own `generator`.
        """
        arguments = {
            "prompt_embeds": self.text[BASE : BASE + 1],
            "negative_prompt_embeds": self.text[NEGATIVE : NEGATIVE + 1],
            "height": self.pixels[0],
            "width": self.pixels[1],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        if self.pooled is not None:
            sizes = [round(value) for value in self.time_ids[0].tolist()]
            arguments |= {
                "pooled_prompt_embeds": self.pooled[BASE : BASE + 1],
                "negative_pooled_prompt_embeds": self.pooled[NEGATIVE : NEGATIVE + 1],
                "original_size": tuple(sizes[:2]),
                "crops_coords_top_left": tuple(sizes[2:4]),
                "target_size": tuple(sizes[4:]),
            }
        return arguments if self.features is None else arguments | {"latents": self.features.z_T}
