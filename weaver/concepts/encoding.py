"""Prompts as the U-Net reads them: encoded as the pipeline does, with vectors in the place of a concept's token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from weaver.compiled import hooks_run
from weaver.concepts.changes import added_to, scaled
from weaver.concepts.concept import Concept, text_module
from weaver.concepts.prompts import TokenIds, read_prompts
from weaver.conditioning import text_encoders
from weaver.memory.resting import home_of, hooked, lent

__all__ = [
    "Encoding",
    "Reading",
    "absent_is_zero",
    "encode",
    "encode_ids",
    "encode_readings",
    "read",
]


class Encoding(NamedTuple):
    """Prompts as the U-Net reads them: `text` [B, L, C], and SDXL's pooled embedding [B, P], which others lack."""

    text: torch.Tensor
    pooled: torch.Tensor | None

    def rows(self, picks: torch.Tensor) -> Encoding:
        """The prompts `picks` [b] of these."""
        return Encoding(*(part if part is None else part[picks] for part in self))

    @staticmethod
    def joined(parts: Sequence[Encoding]) -> Encoding:
        """All rows, one after another."""
        texts, pooled = zip(*parts, strict=True)
        return Encoding(torch.cat(texts), None if pooled[0] is None else torch.cat(pooled))


class Reading(NamedTuple):
    """One prompt as a pipeline's tokenizers read it [1, L], by text encoder, and the concept that acts on it."""

    ids: Mapping[str, TokenIds]
    concept: Concept | None = None
    scale: float = 1.0
    absent: bool = False  # no prompt at all, which is zeros


def encode(pipe, prompt: str | None, concept: Concept | None = None, scale: float = 1.0) -> Encoding:
    """Encode one prompt as the `encode_prompt` of the pipeline does, with a concept's token if given.

    What the concept changes in text encoders acts on this prompt, times `scale`. No prompt at all (None) is an empty
    one, or zeros where SDXL is configured so (`force_zeros_for_empty_prompt`).

    Tokenizers and text encoders are left as they are. Padding to the encoders' full length is kept, since
    cross-attention reads it.

    Returns text [1, L, C] in the (last) text encoder's dtype, on the pipeline's device. Raises `PromptError` when the
    concept's token is not in the prompt, or stands behind the last position the encoders read.
    """
    return encode_readings(pipe, [read(pipe, prompt, concept, scale)])


def read(pipe, prompt: str | None, concept: Concept | None = None, scale: float = 1.0) -> Reading:
    """What `encode` encodes; errors are its."""
    token = concept.modifier or None if concept is not None else None
    ids = read_prompts(pipe, [prompt or ""], token, concept.vectors if token else 1)
    return Reading(ids, concept, scale, absent=prompt is None and absent_is_zero(pipe))


@torch.no_grad()
def encode_readings(pipe, readings: Sequence[Reading]) -> Encoding:
    """Prompts as `encode` encodes each, in as few calls of the text encoders as their changes allow."""
    encoders, together = text_encoders(pipe), {}
    for row, reading in enumerate(readings):
        changes = (id(reading.concept), reading.scale) if reading.concept and reading.concept.text_deltas else None
        together.setdefault(changes, []).append(row)
    rows, parts = [row for of_call in together.values() for row in of_call], []
    for of_call in ([readings[row] for row in rows] for rows in together.values()):
        ids, vectors = {}, {}
        for name, encoder in encoders.items():
            device = home_of(encoder) or _device_of(pipe, encoder)
            ids[name] = TokenIds.joined([reading.ids[name] for reading in of_call]).to(device)
            vectors[name] = [
                reading.concept.embeddings[name].to(device).repeat(len(reading.ids[name].positions[0]) // n, 1)
                for reading in of_call
                if reading.concept is not None and (n := reading.concept.vectors) and reading.ids[name].positions[0]
            ]
        vectors = {name: torch.cat(found) for name, found in vectors.items() if found}
        around = partial(_at_work, pipe, of_call[0].concept, of_call[0].scale)
        parts.append(encode_ids(encoders, ids, vectors, around=around))
    found = Encoding.joined(parts).rows(torch.tensor(rows).argsort())
    for row, reading in enumerate(readings):
        if reading.absent:
            for part in found:
                part[row] = 0
    return found


def absent_is_zero(pipe) -> bool:
    """Whether the pipeline reads zeros where no negative prompt is given, not an empty one."""
    return "text_encoder_2" in text_encoders(pipe) and bool(pipe.config.force_zeros_for_empty_prompt)


def encode_ids(
    encoders: Mapping[str, torch.nn.Module],
    read: Mapping[str, TokenIds],
    vectors: Mapping[str, torch.Tensor],
    around: Callable[[str], AbstractContextManager] = nullcontext,
) -> Encoding:
    """Run a pipeline's text encoders over B prompts that were read; differentiable in `vectors`.

    Stable Diffusion's text is the last hidden state of its encoder. SDXL's joins the hidden states before the last of
    both encoders, and its pooled embedding is the second's (arXiv 2307.01952, section 2.1).

    Parameters
    ----------
    encoders : of the pipeline, by name, in their order (`text_encoders`)
    read : their prompts, each on its encoder's device
    vectors : by encoder [V, C], what stands at the token's positions; empty where there is no token
    around : the context in which the encoder of a name runs
    """
    texts, pooled, dtype = [], None, list(encoders.values())[-1].dtype
    is_sdxl = "text_encoder_2" in encoders
    for name, encoder in encoders.items():
        with around(name), _embeddings_replaced(encoder, read[name].positions, vectors[name] if vectors else None):
            if is_sdxl:
                output = encoder(read[name].ids, output_hidden_states=True)
                texts.append(output.hidden_states[-2])
                pooled = output[0]
            else:
                texts.append(encoder(read[name].ids, attention_mask=_mask(encoder, read[name]))[0])
    return Encoding(torch.cat(texts, dim=-1).to(dtype), pooled)


def _mask(encoder, read: TokenIds) -> torch.Tensor | None:
    """What Stable Diffusion's encoder is told of padding, where it is configured to be."""
    if not getattr(encoder.config, "use_attention_mask", False):
        return None
    inside = torch.arange(read.ids.shape[1]) < torch.tensor(read.lengths)[:, None]
    return inside.long().to(read.ids.device)


def _device_of(pipe, encoder) -> torch.device:
    """Where an encoder runs; where it is, unless hooks move it, for which the pipeline looks through all its parts."""
    return pipe._execution_device if hooked(encoder) else encoder.get_input_embeddings().weight.device


@contextmanager
def _at_work(pipe, concept: Concept | None, scale: float, name: str) -> Iterator[None]:
    """Within the block the text encoder `name` is on its device and acts with what the concept changes in it."""
    changes = {} if concept is None else concept.text_deltas
    changes = {key: delta for key, delta in changes.items() if key.startswith(f"{name}.")}
    encoder = text_encoders(pipe)[name]
    with lent(encoder):
        if not changes:
            yield
            return
        acting = [(text_module(pipe, key), scaled(delta, scale, encoder.dtype)) for key, delta in changes.items()]
        with added_to(acting), hooks_run(encoder):
            yield


@contextmanager
def _embeddings_replaced(encoder, positions: Sequence[Sequence[int]], vectors: torch.Tensor | None) -> Iterator[None]:
    """Within the block `vectors` [V, C] stand in turn at those positions of each row, in place of the ids' own."""
    places = [(row, position) for row, of_row in enumerate(positions) for position in of_row]
    if vectors is None or not places:
        yield
        return

    def replace(module, args, output):
        rows, columns = torch.tensor(places, device=output.device).T
        return output.index_put((rows, columns), vectors.to(output).repeat(len(places) // len(vectors), 1))

    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        with hooks_run(encoder):
            yield
    finally:
        handle.remove()
