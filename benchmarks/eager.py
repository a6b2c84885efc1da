"""Fusion in the manner of the paper and its public relatives, written out: what ours must equal and is timed against.

`OnePass` is the paper's algorithm (Concept Weaver, section 3.5, with the injection of arXiv 2211.12572): a batch of
three rows, the template at its own latents, the negative and the fused one, whose features come from the first; in
every cross-attention a loop over contexts, each with its own key and value weights, projected in every step. `ScoreMix`
is what fusion replaces: one U-Net pass a concept, whose noise predictions are mixed; another result, so it is only
timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import SUPPRESSION, Case
from benchmarks.samplers import Sampler, guided, twin
from weaver.concepts.concept import Concept
from weaver.fusion.contexts import BASE, NEGATIVE
from weaver.layers import attention_paths, cross_attention_paths

__all__ = ["OnePass", "ScoreMix"]

FIRST = BASE + 1  # context of the first concept


class OnePass(Sampler):
    """One U-Net pass of three rows; latents are the template's and the fused picture's."""

    n_latents = 2

    def __init__(self, case: Case):
        super().__init__(case)
        self.unet = twin(case.pipe.unet)
        sites, steps = case.features.sites, case.plan.steps
        self.until = sites.resnet_steps(steps), sites.attention_steps(steps)
        self.now = (False, False)  # whether ResNet features, and queries and keys, are injected
        self.rows = self.arguments([NEGATIVE, NEGATIVE, BASE])
        source = case.inversion.unet_arguments
        self.rows["encoder_hidden_states"][:1] = source["encoder_hidden_states"]
        if "added_cond_kwargs" in self.rows:
            self.rows["added_cond_kwargs"]["text_embeds"][:1] = source["added_cond_kwargs"]["text_embeds"]
        concepts = [use.concept for use in case.uses]
        self.texts = texts_of(case)
        self.maps: dict[int, torch.Tensor] = {}
        injected = set(sites.attention_modules(self.unet))
        for path in cross_attention_paths(self.unet):
            attn = self.unet.get_submodule(path)
            attn.set_processor(_Cross(self, [projections(attn, path, concept) for concept in concepts]))
        for path in attention_paths(self.unet, "attn1"):
            self.unet.get_submodule(path).set_processor(_Self(self, path in injected))
        for path in sites.resnet_modules():
            self.unet.get_submodule(path).register_forward_hook(self._source_features)

    def phase(self, step):
        return tuple(step < until for until in self.until)

    def predict(self, latents, timestep, phase):
        self.now = phase
        source, fused = latents.split(1)
        output = self.unet(torch.cat([source, fused, fused]), timestep, **self.rows, return_dict=False)[0]
        source, negative, fused = output.split(1)
        return torch.cat([source, guided(negative, fused, self.plan.guidance)])

    def masks(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """[N + 1, T, 1], by area."""
        if tokens not in self.maps:
            full = self.case.masks.to(self.case.z.device, torch.float64)
            side = round(tokens**0.5)
            self.maps[tokens] = F.adaptive_avg_pool2d(full[None], side)[0].flatten(1)[..., None].to(dtype)
        return self.maps[tokens]

    def _source_features(self, module, args, output):
        return output[:1].expand_as(output) if self.now[0] else None


class _Cross:
    """`(1 + lambda) sum_i M_i h_i - lambda h_base` in the fused row."""

    def __init__(self, run: OnePass, changed: list[nn.ModuleDict]):
        self.run, self.changed = run, changed

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q = heads(attn.to_q(hidden_states), attn.heads)
        k, v = (heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        own = rejoined(F.scaled_dot_product_attention(q, k, v))  # [3, T, C]: every row's own text, base weights
        masks = self.run.masks(hidden_states.shape[1], hidden_states.dtype)
        base = fused = own[-1:]
        if self.changed:
            fused = torch.zeros_like(base)
            for mask, text, layer in zip(masks, self.run.texts, self.changed, strict=True):
                k, v = (heads(layer[name](text), attn.heads) for name in ("to_k", "to_v"))
                fused = fused + mask * rejoined(F.scaled_dot_product_attention(q[-1:], k, v))
            fused = (1 + SUPPRESSION) * fused - SUPPRESSION * base
        return attn.to_out[0](torch.cat([own[:-1], fused]))


class _Self:
    """Every row with a map of its own, of the template's queries and keys where these are injected."""

    def __init__(self, run: OnePass, injected: bool):
        self.run, self.injected = run, injected

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = (heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if self.injected and self.run.now[1]:
            q, k = (x[:1].expand_as(x) for x in (q, k))
        return attn.to_out[0](rejoined(F.scaled_dot_product_attention(q, k, v)))


class ScoreMix(Sampler):
    """`eps = sum_i M_i eps_i`: a U-Net pass for each concept with its weights and prompt, and one of the other rows.

    From plain noise, as its relatives do it: without a template's features, which makes it cheaper.
    """

    def __init__(self, case: Case):
        super().__init__(case)
        unet = case.pipe.unet
        self.plain, self.rows = twin(unet), self.arguments([NEGATIVE] if case.uses else [NEGATIVE, BASE])
        self.passes = []
        for use, text in zip(case.uses, texts_of(case), strict=True):
            own = twin(unet)
            for path in cross_attention_paths(own):
                attn = own.get_submodule(path)
                for name, layer in projections(attn, path, use.concept).items():
                    setattr(attn, name, layer)
            self.passes.append((own, self.arguments([BASE]) | {"encoder_hidden_states": text}))
        self.masks = case.masks.to(case.z)[:, None, None]  # [N + 1, 1, 1, h, w]

    def predict(self, latents, timestep, phase):
        rows = latents.expand(len(self.rows["encoder_hidden_states"]), -1, -1, -1)
        negative, *rest = self.plain(rows, timestep, **self.rows, return_dict=False)[0].split(1)
        scores = [unet(latents, timestep, **texts, return_dict=False)[0] for unet, texts in self.passes] or rest
        mixed = sum(mask * score for mask, score in zip(self.masks, scores, strict=True))
        return guided(negative, mixed, self.plan.guidance)


def projections(attn, path: str, concept: Concept) -> nn.ModuleDict:
    """The key and value projections with a concept's weights merged in."""
    found = nn.ModuleDict()
    for name in ("to_k", "to_v"):
        weight = getattr(attn, name).weight.detach()
        layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        layer.weight = nn.Parameter(weight + concept.deltas[f"{path}.{name}"].to(weight), requires_grad=False)
        found[name] = layer
    return found


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rejoined(x: torch.Tensor) -> torch.Tensor:
    """And back."""
    return x.transpose(1, 2).flatten(-2)


def texts_of(case: Case) -> list[torch.Tensor]:
    """The encoded prompt [1, L, C] of every concept, the background's last."""
    return [text[None] for text in case.plan.text[FIRST:]]
