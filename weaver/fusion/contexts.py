"""The texts that a fusion attends to, and their keys and values in every cross-attention layer.

Contexts are numbered the same way everywhere: 0 negative, 1 base, then the concepts in their order, then the
background where it is a concept too (Concept Weaver, section 3.5), then the concepts' own negative prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from weaver.choices import MOST_STRENGTH, PARTS
from weaver.concepts.changes import Delta, moved, scaled
from weaver.concepts.concept import Concept, attn2_hash, attn2_parameters
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.concepts.encoding import Encoding, Reading, absent_is_zero, encode_readings, read
from weaver.concepts.own_prompts import own_prompt_reasons, own_prompts, token_reasons
from weaver.conditioning import text_encoders
from weaver.errors import WeaverError, told
from weaver.fusion.inputs import string_reasons
from weaver.fusion.routes import OwnProjections
from weaver.layers import cross_attention_paths, has_region
from weaver.memory.resting import lent
from weaver.values import is_number
from weaver_kernels import ContextKV, LowRank, ProjectionChange, equal_contexts, project_contexts

__all__ = [
    "BASE",
    "FIRST_USE",
    "NEGATIVE",
    "ConceptUse",
    "acting_weight",
    "as_use",
    "concept_reasons",
    "context_keys_values",
    "encode_contexts",
    "own_projections",
    "row_contexts",
    "same_contexts",
    "use_reasons",
]

NEGATIVE, BASE = 0, 1
FIRST_USE = 2
_OF_TEXT = (".to_k", ".to_v")


@dataclass(frozen=True, eq=False)
class ConceptUse:
    """One concept as a fusion uses it.

    Parameters
    ----------
    concept : the concept; None is a region with a prompt of its own and the base model's weights
    prompt : p_+i, which names this concept's token and no other; None derives it from the base prompt, as
        `weaver.concepts.own_prompts` says
    strength : how much of the concept its region shows, 0 to 2; the rest is base, so that weights keep summing to one:
        above 1 base counts less than nothing, and the region is pushed past the concept, away from base
    window : part of the steps, [start, end) within 0..1, in which the concept is used; base outside of it
    scale : multiplies the concept's weight deltas
    negative_prompt : what its region is kept away from, in the place of the picture's negative prompt, with the base
        model's weights and as far as strength and window show the concept; None leaves the picture's
    parts : "whole", all that the concept changes, each change in its region (`weaver.fusion.regional`); or
        "cross-attention", which is all that the paper's concepts change
    """

    concept: Concept | None
    prompt: str | None = None
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0
    negative_prompt: str | None = None
    parts: str = "whole"

    def __post_init__(self):
        if self.concept is None and self.prompt is None:
            raise WeaverError("a region without a concept needs a prompt")

    @property
    def name(self) -> str:
        return self.concept.name if self.concept is not None else f"region {self.prompt!r}"

    @cached_property
    def in_region(self) -> Mapping[str, Delta]:
        """What is added in the region, by the path of the module, besides what the texts of cross-attention give.

        Factors of cross-attention's queries and outputs are among it: added so, they cost the tokens of the region. As
        matrices, and without the other parts of a LoRA, they are the context's own (`weaver.fusion.routes`).
        """
        if self.concept is None or self.parts != "whole":
            return {}
        own = {
            key: x for key, x in self.concept.deltas.items() if not key.endswith(_OF_TEXT) and isinstance(x, LowRank)
        }
        return own | {path: change for path, change in self.concept.outside.items() if has_region(path)}

    def strength_at(self, progress: float) -> float:
        """The strength at a part of the run, 0 (first step) to 1."""
        start, end = self.window
        return self.strength if start <= progress < end else 0.0


def as_use(concept: Concept | ConceptUse) -> ConceptUse:
    """How a fusion uses a concept; one by itself is used with the defaults."""
    return concept if isinstance(concept, ConceptUse) else ConceptUse(concept)


def concept_reasons(concepts, background) -> list[str]:
    """Which concepts are of another kind than a fusion takes, and the texts of their uses; empty when none is."""
    reasons, entries = [], [] if background is None else [("background", background)]
    if isinstance(concepts, Sequence) and not isinstance(concepts, str):
        entries = [*(("concepts", entry) for entry in concepts), *entries]
    else:
        reasons.append(f"concepts: is a {type(concepts).__name__}, expected a list of concepts")
    for where, entry in entries:
        concept = entry.concept if isinstance(entry, ConceptUse) else entry
        if not isinstance(concept, Concept) and (concept is not None or concept is entry):
            reasons.append(f"{where}: {told(concept)} is a {type(concept).__name__}, no Concept and no ConceptUse")
        elif isinstance(entry, ConceptUse):
            texts = {"prompt": entry.prompt, "negative_prompt": entry.negative_prompt}
            reasons += [f"{where}: a use's {reason}" for reason in string_reasons(texts, optional=texts)]
    return reasons


def use_reasons(pipe, uses: Sequence[ConceptUse], base_hash: str | None = None) -> list[str]:
    """What is wrong with the settings and the base model of each use; empty when nothing is.

    `base_hash` is the `attn2_hash` of the pipeline's U-Net where it is known already; it takes reading 100 MB.
    """
    reasons = []
    if any(use.concept is not None for use in uses):
        base_hash, weights = base_hash or attn2_hash(pipe.unet), attn2_parameters(pipe.unet)
    for use in uses:
        if not (is_number(use.strength) and 0 <= use.strength <= MOST_STRENGTH):
            limits = f"0 to {MOST_STRENGTH:g} (1 is all of it, more goes past it)"
            reasons.append(f"strength of {use.name} is {told(use.strength)}, expected {limits}")
        if not is_number(use.scale):
            reasons.append(f"scale of {use.name} is {told(use.scale)}, expected a finite number")
        if use.parts not in PARTS:
            reasons.append(f"parts of {use.name} is {told(use.parts)}, expected one of {', '.join(PARTS)}")
        window = tuple(use.window) if isinstance(use.window, Iterable) else ()
        if len(window) != 2 or not all(map(is_number, window)) or not 0 <= window[0] < window[1] <= 1:
            told_window = told(use.window)
            reasons.append(f"window of {use.name} is {told_window}, expected (start, end) with 0 <= start < end <= 1")
        if use.concept is not None:
            try:
                use.concept.check_base(pipe, base_hash, weights)
            except WeaverError as error:
                reasons.append(str(error))
    return reasons


def encode_contexts(
    pipe, prompt: str, negative_prompt: str | None, uses: Sequence[ConceptUse], background: ConceptUse | None = None
) -> tuple[tuple[str | None, ...], Encoding | None, list[str]]:
    """Write and encode the prompt of every context, in their order.

    Returns the prompts and their encodings, text [S', L, C] and pooled [S', P]; or the reasons
    why one can't be had, and None for the encodings. Where a concept's token does not fit the text encoders, these are
    None too, and `use_reasons` says why. A negative prompt None stays None only where its encoding is zeros.
    """
    if negative_prompt is None and not absent_is_zero(pipe):
        negative_prompt = ""
    uses = [*uses, *([background] if background is not None else [])]
    concepts = [use.concept for use in uses if use.concept is not None]
    last = background and background.concept
    derived = iter(own_prompts(prompt, concepts[:-1] if last else concepts, last))
    prompts: list[tuple[str | None, Concept | None, float]] = [(negative_prompt, None, 1.0), (prompt, None, 1.0)]
    reasons = token_reasons({"prompt": prompt, "negative_prompt": negative_prompt}, concepts)
    for use in uses:
        own = next(derived) if use.concept is not None else None
        own = own if use.prompt is None else use.prompt
        if isinstance(own, WeaverError):
            reasons.append(str(own))
            continue
        reasons += [f"the prompt of {use.name}: {reason}" for reason in own_prompt_reasons(own, use.concept, concepts)]
        prompts.append((own, use.concept, use.scale))
    for use in uses:
        if use.negative_prompt is not None:
            reasons += token_reasons({f"the negative prompt of {use.name}": use.negative_prompt}, concepts)
            prompts.append((use.negative_prompt, None, 1.0))
    texts = tuple(text for text, *_ in prompts)
    if reasons or any(concept.embedding_reasons(pipe) + concept.text_reasons(pipe) for concept in concepts):
        return texts, None, reasons
    readings: dict[tuple, Reading] = {}
    for key in prompts:
        try:
            readings[key] = read(pipe, *key) if key not in readings else readings[key]
        except WeaverError as error:
            reasons.append(str(error))
    if reasons:
        return texts, None, reasons
    with lent(*text_encoders(pipe).values()):
        found = encode_readings(pipe, list(readings.values()))
    of_key = {key: row for row, key in enumerate(readings)}
    return texts, found.rows(torch.tensor([of_key[key] for key in prompts])), []


@torch.no_grad()
def context_keys_values(unet, text: torch.Tensor, uses: Sequence[ConceptUse]) -> dict[str, ContextKV]:
    """Keys and values of every context in every cross-attention layer, with each concept's own weights.

    Neither text nor weights change from step to step, so this is done once a generation. The negative and the base
    context have the untuned weights.

    Parameters
    ----------
    text : [S', L, C]; `uses` are those of contexts 2 and on, and the ones after them have the untuned weights

    Returns path of the attn2 -> keys and values, each [S', L, H, D] in the U-Net's dtype.
    """
    text = text.to(unet.dtype)
    found = {}
    for path in cross_attention_paths(unet):
        attention = unet.get_submodule(path)
        changes = {
            s: ProjectionChange(*(_change(use, f"{path}.{name}", text.dtype) for name in ("to_k", "to_v")))
            for s, use in enumerate(uses, start=FIRST_USE)
            if use.concept is not None
        }
        weights = (acting_weight(projection, text) for projection in (attention.to_k, attention.to_v))
        found[path] = project_contexts(text, *weights, attention.heads, changes)
    return found


def own_projections(unet, uses: Sequence[ConceptUse], dtype: torch.dtype) -> dict[str, OwnProjections]:
    """What concepts change in `to_q`, `to_out` and its bias of every cross-attention, for those where one does.

    Returns path of the attn2 -> changes in `dtype`, on the U-Net's device, by the number of the context.
    """
    found, device = {}, unet.device  # which is found by walking through all modules
    for path in cross_attention_paths(unet):
        parts = []
        for name in ("to_q", "to_out.0", OUTPUT_BIAS):
            changes = {
                s: _change(use, f"{path}.{name}", dtype)
                for s, use in enumerate(uses, start=FIRST_USE)
                if use.concept is not None and f"{path}.{name}" not in use.in_region
            }
            parts.append({s: moved(change, device, dtype) for s, change in changes.items() if change is not None})
        if any(parts):
            found[path] = OwnProjections(*parts)
    return found


def same_contexts(text: torch.Tensor, uses: Sequence[ConceptUse]) -> torch.Tensor:
    """[S'], for each context the first one equal to it in text and weights, which need not be computed twice."""
    weights: list = [None] * len(text)
    for s, use in enumerate(uses, start=FIRST_USE):
        weights[s] = (use.concept, use.scale) if use.concept is not None else None
    return equal_contexts(text, weights)


def row_contexts(uses: Sequence[ConceptUse]) -> list[list[int]]:
    """The contexts of a negative row and of a fused one, both with as many: the negative row's own prompts, padded."""
    fused = [BASE, *range(FIRST_USE, FIRST_USE + len(uses))]
    own = sum(use.negative_prompt is not None for use in uses)
    negative = [NEGATIVE, *range(fused[-1] + 1, fused[-1] + 1 + own)]
    return [negative + [NEGATIVE] * (len(fused) - len(negative)), fused]


def _change(use: ConceptUse, name: str, dtype: torch.dtype) -> Delta | None:
    """What a concept adds to one projection; None where it leaves it as it is."""
    delta = use.concept.deltas.get(name)
    return None if delta is None else scaled(delta, use.scale, dtype)


def acting_weight(projection: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """[H * D, C], the weight by which a projection acts, that of an adapter around it included."""
    if type(projection) is nn.Linear:
        return projection.weight
    return projection(torch.eye(text.shape[-1], dtype=text.dtype, device=text.device)).T
