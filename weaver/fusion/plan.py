"""Everything a fusion needs, made and checked before the first step."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch.nn.functional import pad

from weaver.concepts.concept import Concept
from weaver.conditioning import make_time_ids
from weaver.errors import raise_if
from weaver.features import Features
from weaver.fusion.contexts import (
    ConceptUse,
    as_use,
    concept_reasons,
    context_keys_values,
    encode_contexts,
    own_projections,
    row_contexts,
    same_contexts,
    use_reasons,
)
from weaver.fusion.inputs import amount_reasons, full_masks, steps_and_size, string_reasons
from weaver.fusion.regional import RegionalChanges, regional_changes, regional_reasons
from weaver.fusion.routes import OwnProjections
from weaver.fusion.rows import FUSED, NEGATED, Row
from weaver.fusion.support import model_reasons
from weaver.fusion.weights import negative_weights, phase_starts, region_weights, token_weights
from weaver.latents import vae_scale_factor
from weaver.layers import layer_size
from weaver.masks.pyramid import downsampling_reasons, mask_pyramid
from weaver_kernels import ContextKV

__all__ = ["FusionPlan"]


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """A fusion, frozen: texts as keys and values, masks as weights, the template as features. Made by `build`.

    Contexts S', of which a row attends to S; variants V, kinds of rows 2 (negative and fused), tokens T, text length L,
    heads H, head dimension D, text width C.

    Parameters
    ----------
    prompts : the S' prompts, and `text` [S', L, C] their encodings; the negative one is None where it is zeros
    keys_values : path of each attn2 -> its keys and values, both [S', L, H, D]
    own_projections : path of an attn2 -> what contexts change in its `to_q` and `to_out`; paths without are left out
    regional : path of any other module -> what contexts change in it, each in its region; paths without are left out
    same_as : [S'], for each context the first one equal to it in text and weights; these are computed once
    index : [2, V, S], the contexts of each kind of row and variant; the first of them is the negative or base prompt
    phases : where, as parts of the run, the weights change
    weights : (phase, (h, w)) -> [2, V, S, T], how they are weighed; they sum to 1 in every token
    regions : (phase, (h, w)) -> [2, V, S, T], how much of `regional` is added, for the sizes of its maps
    sizes : path of each attn2 -> (h, w) of its map
    size : (h, w) of the latents, and `pixels` (height, width) of the picture
    steps : for how many steps it was planned
    guidance : omega; 1 or less draws without a negative row
    features : the template's, or None for fusion from plain noise
    pooled : SDXL's pooled embeddings [S', P]; a row has that of its first context whatever it attends to, since they
        enter the time embedding, where no mask reaches. None for models without
    time_ids : SDXL's [1, 6], the same for every row: the features', or the picture's size, uncropped
    """

    prompts: tuple[str | None, ...]
    text: torch.Tensor
    keys_values: Mapping[str, ContextKV]
    own_projections: Mapping[str, OwnProjections]
    regional: Mapping[str, RegionalChanges]
    same_as: torch.Tensor
    index: torch.Tensor
    phases: tuple[float, ...]
    weights: Mapping[tuple[int, tuple[int, int]], torch.Tensor]
    regions: Mapping[tuple[int, tuple[int, int]], torch.Tensor]
    sizes: Mapping[str, tuple[int, int]]
    size: tuple[int, int]
    pixels: tuple[int, int]
    steps: int
    guidance: float
    features: Features | None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("keys_values", "own_projections", "regional", "weights", "regions", "sizes"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        pipe,
        concepts: Sequence[Concept | ConceptUse] = (),
        masks: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray] | None = None,
        *,
        prompt: str,
        negative_prompt: str | None = None,
        background: Concept | ConceptUse | None = None,
        suppression: float = 0.0,
        guidance: float = 7.5,
        features: Features | None = None,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        downsampling: str = "area",
        base_hash: str | None = None,
    ) -> FusionPlan:
        """Check everything, encode the prompts, project all contexts' keys and values, and weigh the masks.

        The concepts' weights are not needed afterwards. Put the pipeline on its device and in its dtype first.

        Parameters
        ----------
        pipe : a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`, only read
        concepts : N concepts or uses of them, each in the region of its mask
        masks : [N, height, width] that do not overlap, or [N + 1, height, width] with the background last and summing
            to one, as `compose_masks` makes them, or a list of as many [height, width]; 0..1, in the picture's pixels
            or in latent cells. None if N is 0
        prompt : p_base, the concept-free prompt of the whole picture
        negative_prompt : p_neg; None is what the pipeline takes where none is given: an empty one, or zeros in SDXL
        background : a concept for everything outside the masks; None leaves it to the base model
        suppression : lambda, how far the result is pushed away from the base model's own idea; 0 or more
        guidance : omega, 0 or more; the default is Plug-and-Play's. 1 or less draws without a negative row
        features : the template's; None fuses from plain noise, without injection
        steps : of the fusion; the features' where there are some, else 50
        height, width : of the picture in pixels; the features' where there are some, else the model's own
        downsampling : how masks are reduced to the tokens of each map, "area" or "nearest" (`mask_pyramid`)
        base_hash : the `attn2_hash` of the pipeline's U-Net where it is known, such as from before a cast to bfloat16,
            whose rounding gives another; None computes it

        Raises `WeaverError` with every reason, when something does not fit.
        """
        raise_if(model_reasons(pipe), "Cannot fuse with this model")
        reasons = concept_reasons(concepts, background)
        reasons += string_reasons({"prompt": prompt, "negative_prompt": negative_prompt}, optional=["negative_prompt"])
        raise_if(reasons, "Cannot build the fusion plan")
        concepts, background = list(map(as_use, concepts)), None if background is None else as_use(background)
        uses = [*concepts, *([background] if background is not None else [])]
        unet, factor = pipe.unet, vae_scale_factor(pipe.vae)
        steps, size, reasons = steps_and_size(pipe, features, steps, height, width)
        reasons += amount_reasons({"suppression": suppression, "guidance": guidance})
        full, mask_reasons = full_masks(
            masks, [use.name for use in concepts], background.name if background else None, size, factor
        )
        prompts, encoded, text_reasons = encode_contexts(pipe, prompt, negative_prompt, concepts, background)
        reasons += downsampling_reasons(downsampling)
        reasons += mask_reasons + use_reasons(pipe, uses, base_hash) + regional_reasons(unet, uses) + text_reasons
        raise_if(reasons, "Cannot build the fusion plan")

        device = unet.device  # which is found by walking through all modules
        text, pooled = (None if part is None else part.to(device) for part in encoded)
        keys_values, same_as = context_keys_values(unet, text, uses), same_contexts(text, uses)
        levels = len(unet.config.block_out_channels)
        sizes = {path: layer_size(path, levels, size) for path in keys_values}
        phases = phase_starts(use.window for use in uses)
        dtype = torch.float64 if unet.dtype == torch.float64 else torch.float32
        regional, whole = (
            regional_changes(unet, uses, len(text), size, text.dtype),
            [bool(use.in_region) for use in uses],
        )
        weights, regions, of_regions = {}, {}, {change.size for change in regional.values()}
        maps = sorted(of_regions.union(sizes.values()))
        names = [use.name for use in concepts]
        for hw, reduced in mask_pyramid(full, maps, downsampling=downsampling, names=names).items():
            for phase, start in enumerate(phases):
                strengths = [use.strength_at(start) for use in uses]
                own = [i for i, use in enumerate(uses) if use.negative_prompt is not None]
                fused = token_weights(reduced, strengths, suppression)
                negative = pad(negative_weights(reduced, strengths, own), (0, 0, 0, len(uses) - len(own)))
                weights[phase, hw] = torch.stack([negative, fused])[:, None].to(device, dtype)
                if hw in of_regions:
                    added = region_weights(reduced, strengths, whole)
                    regions[phase, hw] = torch.stack([torch.zeros_like(added), added])[:, None].to(device, dtype)
        pixels = (size[0] * factor, size[1] * factor)
        time_ids = make_time_ids(pipe, pixels, text) if features is None else features.time_ids
        return cls(
            prompts,
            text,
            keys_values,
            own_projections(unet, uses, text.dtype),
            regional,
            same_as,
            torch.tensor(row_contexts(uses), device=device)[:, None],
            phases,
            weights,
            regions,
            sizes,
            size,
            pixels,
            steps,
            guidance,
            features,
            pooled,
            time_ids,
        )

    @property
    def variants(self) -> int:
        """The number V of variants, 1 but for what `stack_plans` made."""
        return self.index.shape[1]

    @property
    def live_contexts(self) -> dict[tuple[int, int], float]:
        """How many contexts a token of the fused rows attends to on average, by the (h, w) of the map.

        These are the contexts whose weight there is not 0, in the phase that has most of them.
        """
        found: dict[tuple[int, int], float] = {}
        for (_, hw), weights in self.weights.items():
            if hw in self.sizes.values():
                found[hw] = max(found.get(hw, 0), (weights[FUSED] != 0).sum(1).float().mean().item())
        return found

    def phase_at(self, progress: float) -> int:
        """Number of the phase at a part of the run, 0 (first step) to 1."""
        return bisect.bisect_right(self.phases, progress) - 1

    def route(self, path: str) -> tuple:
        """The kind of layer that the attn2 at `path` is: its size, and which contexts have projections of their own."""
        own = self.own_projections.get(path)
        return (self.sizes[path], *(own if own is not None else OwnProjections()).which)

    def leads(self, rows: Sequence[Row]) -> list[int]:
        """The first context of each row: the negative or the base prompt of its variant."""
        return [int(self.index[row][0]) for row in rows]

    def pipeline_arguments(self, pipe=None) -> dict:
        """Arguments for a pipeline call under `attach` that say what this plan says: texts, size, steps, omega, noise.

        For SDXL with pooled embeddings and the sizes and crop of the time ids.

        Parameters
        ----------
        pipe : the pipeline that is to be called; None is any that draws from noise, with a ControlNet or without. The
            noise (`latents`, the features' z_T) is meant for those alone: pass an image-to-image or inpainting one, and
            it is left out, since inpainting would start from it in the place of its own picture at a strength below 1.
            So is a size that the pipeline takes from its picture

        Without features the noise is left to the pipeline's own `generator`.
        """
        negative, base = (self.leads([(kind, v) for v in range(self.variants)]) for kind in (NEGATED, FUSED))
        arguments = {
            "prompt_embeds": self.text[base],
            "negative_prompt_embeds": self.text[negative],
            "height": self.pixels[0],
            "width": self.pixels[1],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        if self.pooled is not None:
            sizes = [round(value) for value in self.time_ids[0].tolist()]
            arguments |= {
                "pooled_prompt_embeds": self.pooled[base],
                "negative_pooled_prompt_embeds": self.pooled[negative],
                "original_size": tuple(sizes[:2]),
                "crops_coords_top_left": tuple(sizes[2:4]),
                "target_size": tuple(sizes[4:]),
            }
        if self.features is not None:
            arguments["latents"] = self.features.z_T.expand(self.variants, -1, -1, -1)
        if pipe is None:
            return arguments
        taken = inspect.signature(pipe.__call__).parameters
        left_out = {name for name in ("height", "width", "latents") if name not in taken}
        left_out |= {"latents"} if "strength" in taken else set()
        return {name: value for name, value in arguments.items() if name not in left_out}
