"""Learning a concept where fusion will show it: in its region of a picture that shows others.

Custom Diffusion learns a concept from pictures of it alone, and every token of the picture reads its prompt. In a
fusion (Concept Weaver, section 3.5) a concept's prompt is read in its region alone, beside other contexts and under the
features of a template that shows another of its class. A large model bridges that; the embedded one does not. So part
of its training pictures are cut and mixed, as in SVDiff (arXiv 2303.11305): the concept, cut out, stands in a scene in
the place of another of its class, and the U-Net draws it as the fusion will.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from weaver.concepts.encoding import Encoding
from weaver.concepts.examples import Examples, encode_fixed_captions, prepare
from weaver.concepts.images import TrainingSet
from weaver.conditioning import text_encoders, unet_arguments
from weaver.errors import WeaverError
from weaver.layers import InjectionSites, cross_attention_paths, layer_size
from weaver.masks.pyramid import mask_pyramid
from weaver.processors import project_out
from weaver.replay import forward_until

__all__ = ["WovenExamples", "WovenForward", "WovenSet", "prepare_woven", "woven"]


@dataclass(frozen=True, eq=False)
class WovenSet:
    """Scenes with the concept in its place, n of them, all of one size.

    Parameters
    ----------
    images, captions : the pictures, and the concept's own prompts p_+i, which name no neighbour
    base_captions : what each shows, without the token: p_base
    masks : [n, height, width] bool, where the concept is
    templates : the same scenes with another of its class in its place
    """

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    base_captions: tuple[str, ...]
    masks: np.ndarray
    templates: tuple[Image.Image, ...]

    def __post_init__(self) -> None:
        counts = {len(part) for part in (self.images, self.captions, self.base_captions, self.masks, self.templates)}
        if len(counts) > 1 or 0 in counts:
            raise WeaverError(f"woven pictures: {sorted(counts)} of their parts, expected as many of each")
        if not self.masks.reshape(len(self.masks), -1).any(-1).all():
            raise WeaverError("woven pictures: a mask is empty")
        size = self.masks.shape[:0:-1]  # (width, height)
        if other := {image.size for image in (*self.images, *self.templates)} - {size}:
            raise WeaverError(f"woven pictures: {min(other)} pixels beside masks of {size}, expected one size of all")


@dataclass(frozen=True)
class WovenExamples:
    """Woven pictures as training reads them.

    Parameters
    ----------
    own : latents, and captions with the token
    base_text : of the scenes' own prompts, n of them
    templates : latents [n, C, h, w]
    masks : tokens of a map -> [n, T], and `region` [n, 1, h, w] those of the latents
    """

    own: Examples
    base_text: Encoding
    templates: torch.Tensor
    masks: dict[int, torch.Tensor]
    region: torch.Tensor


def prepare_woven(pipe, data: WovenSet, token: str, vectors: int, *, at_once: int | None = None) -> WovenExamples:
    """Encode woven pictures at the model's own size, `at_once` in one pass as `prepare` does."""
    own = prepare(pipe, TrainingSet(data.images, data.captions), token, vectors=vectors, at_once=at_once)
    base = prepare(pipe, TrainingSet(data.templates, data.base_captions), at_once=at_once)
    device, size = own.latents.device, tuple(own.latents.shape[-2:])
    levels = len(pipe.unet.config.block_out_channels)
    sizes = {layer_size(path, levels, size) for path in cross_attention_paths(pipe.unet)} | {size}
    masks = torch.from_numpy(data.masks).float()
    both = torch.stack([masks, 1 - masks], 1)
    pyramids = [mask_pyramid(pair, sizes) for pair in both]
    reduced = {hw: torch.stack([pyramid[hw][0] for pyramid in pyramids]).to(device) for hw in sizes}
    return WovenExamples(
        own,
        encode_fixed_captions(text_encoders(pipe), base),
        base.latents,
        {h * w: mask.flatten(1) for (h, w), mask in reduced.items()},
        reduced[size][:, None],
    )


class WovenForward:
    """Puts the first rows of a training batch under the conditions of a fusion. Made by `woven`.

    Their cross-attention reads their own text inside the masks and the base model's context outside; and where
    the noise is as strong as in the injected part of a fusion's steps, they have the features of their templates.
    """

    def __init__(self, unet, examples: WovenExamples, sites: InjectionSites, paths: list[str]):
        self._unet, self._examples, self._sites, self._paths = unet, examples, sites, paths
        self._rows, self._base, self._masks = 0, None, {}
        self._taking = False
        self._injected: dict[str, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, picks: torch.Tensor, t: torch.Tensor, total: int, noised, inject: bool = True) -> None:
        """Make ready for a forward whose first rows are `picks` [b] of the woven pictures.

        The timesteps are t [b] of `total`, on the CPU. `noised` adds the noise that some of those rows have to latents:
        (latents, rows) -> latents. Without `inject` none has its template's features.
        """
        examples = self._examples
        self._injected = {}
        resnets = t >= total * (1 - self._sites.resnet_window)
        attentions = t >= total * (1 - self._sites.attention_window)
        rows = (resnets | attentions).nonzero()[:, 0]
        if inject and len(rows):
            self._taking = True
            of = picks[rows]
            z, text = noised(examples.templates[of], rows), examples.base_text.rows(of)
            time_ids = examples.own.time_ids if examples.own.time_ids is None else examples.own.time_ids[of]
            arguments = unet_arguments(text.text.to(z.dtype), text.pooled, time_ids)
            found, _ = forward_until(self._unet, self._paths, z, t[rows].to(z.device), arguments)
            self._taking = False
            of_resnets = set(self._sites.resnet_modules())
            for path, feature in found.items():
                inside = (resnets if path in of_resnets else attentions)[rows]
                self._injected[path] = rows[inside].to(feature.device), feature[inside]
        self._rows = len(picks)
        self._base = examples.base_text.text[picks]
        self._masks = {tokens: mask[picks][:, None, :, None] for tokens, mask in examples.masks.items()}
        self._weights = {}

    def rest(self) -> None:
        """Until the next `begin` the U-Net's forwards are those of its prompts alone."""
        self._rows, self._injected = 0, {}

    def weights(self, x: torch.Tensor) -> torch.Tensor | None:
        """Where a change of a layer that reads the picture acts on tokens x [B, T, C], as [B, T, 1]: in a fusion's rows
        inside the masks alone. None is everywhere."""
        if not self._rows:
            return None
        tokens = x.shape[1]
        if tokens not in self._weights:
            mask = self._masks[tokens][:, 0]  # [b, T, 1]
            self._weights[tokens] = torch.cat([mask, mask.new_ones(len(x) - self._rows, tokens, 1)])
        return self._weights[tokens]

    def acts(self) -> bool:
        """Whether those changes act: not while templates are drawn."""
        return not self._taking

    def attend(self, attn, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Cross-attention [B, T, C] of all rows, those of a fusion to two contexts."""
        q = _heads(attn, attn.to_q(hidden_states))
        if self._taking:
            return project_out(attn, _attend(attn, q, *_untuned(attn, text)).transpose(1, 2))
        out = _attend(attn, q, attn.to_k(text), attn.to_v(text))
        rows = self._rows
        if rows:
            base = _attend(attn, q[:rows], *_untuned(attn, self._base.to(text.dtype)))
            mask = self._masks[hidden_states.shape[1]].to(out.dtype)
            out = torch.cat([base.lerp(out[:rows], mask), out[rows:]])
        return project_out(attn, out.transpose(1, 2))

    def hook(self, path: str):
        """Forward hook of an injected module, which puts the template's output in the place of its own."""

        def replace(module, args, output):
            rows, feature = self._injected.get(path, ((), None))
            return output.index_copy(0, rows, feature.to(output.dtype)) if len(rows) else None

        return replace


class _Processor:
    def __init__(self, forward: WovenForward):
        self._forward = forward

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self._forward.attend(attn, hidden_states, encoder_hidden_states)


@contextmanager
def woven(unet, examples: WovenExamples, sites: InjectionSites) -> Iterator[WovenForward]:
    """Within the block the U-Net's forwards are those of `WovenForward`; afterwards it is as it was."""
    paths = sites.resnet_modules() + sites.projection_modules(unet)
    forward = WovenForward(unet, examples, sites, paths)
    with ExitStack() as undo:
        for path in cross_attention_paths(unet):
            attention = unet.get_submodule(path)
            undo.callback(attention.set_processor, attention.processor)
            attention.set_processor(_Processor(forward))
        for path in paths:
            undo.callback(unet.get_submodule(path).register_forward_hook(forward.hook(path)).remove)
        yield forward


def _heads(attn, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _untuned(attn, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the base model, past the hooks that add what is learned."""
    return F.linear(text, attn.to_k.weight), F.linear(text, attn.to_v.weight)


def _attend(attn, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] and text [B, L, H * D] twice -> [B, H, T, D], with gradients, which `weaver_kernels` do not have."""
    return F.scaled_dot_product_attention(q, _heads(attn, keys), _heads(attn, values), scale=attn.scale)
