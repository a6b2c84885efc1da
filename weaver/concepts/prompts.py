"""Prompts with a concept's modifier token, read by a tokenizer and text encoder that never learn of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from weaver.compiled import hooks_run
from weaver.concepts.changes import added_to, scaled
from weaver.concepts.concept import Concept, text_module
from weaver.conditioning import text_encoders
from weaver.errors import WeaverError
from weaver.memory.resting import home_of, hooked, lent

__all__ = [
    "Encoding",
    "PromptError",
    "absent_is_zero",
    "derive_prompt",
    "encode",
    "encode_text",
    "names_token",
    "tokenize",
]

_log = logging.getLogger(__name__)
# What may follow a noun that is not itself part of a longer one, as "dog" is in "a dog house".
_FOLLOWS = (
    r"(?:about|above|across|after|against|along|alone|among|around|as|asleep|at|before|behind|below|beneath|beside|"
    r"between|beyond|but|by|during|for|from|here|in|indoors|inside|into|is|are|like|near|next|of|off|on|onto|or|"
    r"outdoors|outside|over|past|that|there|through|to|together|toward|towards|under|underneath|up|upon|while|who|with|"
    r"within|without|lies|looks|plays|runs|sits|sleeps|stands|walks|wears|watches|"
    r"(?!(?:build|ceil|cloth|draw|even|morn|paint|str|th)ing\b)\w{2,}ing)\b"
)
_STAND_IN = 0  # any ordinary id: its embedding is replaced, and it can't be taken for the end of the text


class PromptError(WeaverError):
    """A prompt that lacks the modifier token or the class word; names both."""


class Encoding(NamedTuple):
    """A prompt as the U-Net reads it: `text` [1, L, C], and SDXL's pooled embedding [1, P], which others lack."""

    text: torch.Tensor
    pooled: torch.Tensor | None


@torch.no_grad()
def encode(pipe, prompt: str | None, concept: Concept | None = None, scale: float = 1.0) -> Encoding:
    """Encode one prompt as the `encode_prompt` of the pipeline does, with a concept's token if given.

    What the concept changes in text encoders acts on this prompt, times `scale`.

    Stable Diffusion's text is the last hidden state of its encoder. SDXL's joins the hidden states before the last of
    both encoders, and its pooled embedding is the second's (arXiv 2307.01952, section 2.1). No prompt at all (None) is
    an empty one, or zeros where SDXL is configured so (`force_zeros_for_empty_prompt`).

    Tokenizers and text encoders are left as they are. Padding to the encoders' full length is kept, since
    cross-attention reads it.

    Returns text in the (last) text encoder's dtype, on the pipeline's device. Raises `PromptError` when the concept's
    token is not in the prompt, or stands behind the last position the encoders read.
    """
    if prompt is None:
        empty = encode(pipe, "")
        return Encoding(*map(torch.zeros_like, empty)) if absent_is_zero(pipe) else empty
    texts, pooled = [], None
    encoders = text_encoders(pipe)
    for name, encoder in encoders.items():
        device = home_of(encoder) or _device_of(pipe, encoder)
        token = concept.modifier or None if concept is not None else None
        vectors = concept.embeddings[name] if token else None
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        count = 1 if vectors is None else len(vectors)
        ids, positions, length = tokenize(pipe, prompt, token, count, tokenizer=tokenizer)
        ids, places = ids.to(device), [(0, position) for position in positions]
        if "text_encoder_2" not in encoders:
            with lent(encoder), _changed(pipe, name, concept, scale):
                return Encoding(encode_text(encoder, ids, [length], places, vectors), None)
        with lent(encoder), _changed(pipe, name, concept, scale), _embeddings_replaced(encoder, places, vectors):
            output = encoder(ids, output_hidden_states=True)
        texts.append(output.hidden_states[-2])
        pooled = output[0]
    return Encoding(torch.cat(texts, dim=-1).to(pipe.text_encoder_2.dtype), pooled)


def _device_of(pipe, encoder) -> torch.device:
    """Where an encoder runs; where it is, unless hooks move it, for which the pipeline looks through all its parts."""
    return pipe._execution_device if hooked(encoder) else encoder.get_input_embeddings().weight.device


def absent_is_zero(pipe) -> bool:
    """Whether the pipeline reads zeros where no negative prompt is given, not an empty one."""
    return "text_encoder_2" in text_encoders(pipe) and bool(pipe.config.force_zeros_for_empty_prompt)


def derive_prompt(base_prompt: str, concept: Concept, *, occurrence: int = 0, without: Sequence[str] = ()) -> str:
    """Put the concept's token before its class word: "a dog and a cat" -> "a dog and a <v1> cat".

    Parameters
    ----------
    occurrence : which of the places where the class word stands, from 0, for two concepts of one class.
    without : class words of other concepts, to be left out where they stand in a list, as in the paper's prompts
        (section 3.5): "a red dog and a cat, at night" without "dog" -> "a <v1> cat, at night". A word that stands
        otherwise stays, as does one that is part of a longer noun ("a dog house").

    Raises `PromptError` when the class word does not stand there that often.
    """
    places = list(_whole(concept.word, re.IGNORECASE).finditer(base_prompt))
    if not 0 <= occurrence < len(places):
        raise PromptError(
            f"prompt {base_prompt!r} names {concept.word!r} {len(places)} times, concept {concept.name!r} needs "
            f"number {occurrence + 1}: put the class word into the prompt, or give this concept its own prompt"
        )
    at = places[occurrence].start()
    head, tail = base_prompt[:at], f"{concept.token} {base_prompt[at:]}".lstrip()
    for word in dict.fromkeys(without):
        head, tail = _left_out(head, word, before=True), _left_out(tail, word, before=False)
    return head + tail


def _left_out(text: str, word: str, *, before: bool) -> str:
    """Drop list members such as ", a red dog" or "a red dog and" of the part of a prompt before or after the token."""
    noun = rf"(?:(?:an?|the|one|another)\s+(?:(?!and\b|with\b|an?\b|the\b)[\w-]+\s+){{0,3}})?{_whole(word).pattern}"
    joint = r"(?:\s*,\s*(?:and\s+)?|\s+and\s+)"
    forms = [rf"{joint}{noun}(?={joint}|\s*(?:$|[.!?:;)])|\s+{_FOLLOWS})", rf"(?<!\w){noun}{joint}"]
    for form in forms if before else forms[:1]:
        text = re.sub(form, "", text, flags=re.IGNORECASE)
    return text


def names_token(text: str, token: str) -> bool:
    """Whether a token stands in a text as `tokenize` finds it, not as a part of a longer word."""
    return _whole(token).search(text) is not None


def tokenize(
    pipe, prompt: str, token: str | None = None, vectors: int = 1, *, tokenizer=None
) -> tuple[torch.Tensor, list[int], int]:
    """Turn a prompt into ids, with room for `vectors` embeddings wherever `token` stands.

    The text on both sides of the token is tokenized by itself, as it is around an added token. `tokenizer` is one of
    the pipeline's; None is its first.

    Returns ids [1, L], the positions of the token's vectors (in order, a multiple of `vectors`), and the number of
    ids before padding.
    """
    tokenizer = pipe.tokenizer if tokenizer is None else tokenizer
    convert = getattr(pipe, "maybe_convert_prompt", lambda text, _: text)  # the pipeline's own textual inversions
    limit = tokenizer.model_max_length
    pieces = [prompt] if token is None else _whole(token).split(prompt)
    if token is not None and len(pieces) == 1:
        raise PromptError(f"token {token!r} is not in its prompt {prompt!r}: put it before the class word")
    body: list[int] = []
    positions: list[int] = []
    for number, piece in enumerate(pieces):
        if number:
            positions += range(1 + len(body), 1 + len(body) + vectors)
            body += [_STAND_IN] * vectors
        if piece.strip():
            body += tokenizer(convert(piece, tokenizer), add_special_tokens=False, verbose=False).input_ids
    if len(body) > limit - 2:
        _log.warning("prompt %r is cut to the %d tokens that the text encoder reads", prompt, limit)
    if positions and positions[-1] > limit - 2:
        raise PromptError(f"token {token!r} lies behind the {limit} tokens that are read of the prompt {prompt!r}")
    ids = [tokenizer.bos_token_id, *body[: limit - 2], tokenizer.eos_token_id]
    padded = ids + [tokenizer.pad_token_id] * (limit - len(ids))
    return torch.tensor([padded]), positions, len(ids)


def encode_text(
    encoder,
    ids: torch.Tensor,
    lengths: Sequence[int],
    places: Sequence[tuple[int, int]] = (),
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a text encoder over ids [B, L], `lengths` of which stand before the padding.

    At `places`, pairs of row and position, `vectors` [V, C] stand in turn in place of the ids' embeddings.
    Differentiable in `vectors`. Returns the last hidden state [B, L, C] on the device of the ids.
    """
    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long().to(ids.device)
    with _embeddings_replaced(encoder, places, vectors):
        return encoder(ids, attention_mask=mask)[0].to(encoder.dtype)


@contextmanager
def _changed(pipe, name: str, concept: Concept | None, scale: float) -> Iterator[None]:
    """Within the block the text encoder `name` acts with what the concept changes in it."""
    changes = {} if concept is None else concept.text_deltas
    changes = {key: delta for key, delta in changes.items() if key.startswith(f"{name}.")}
    encoder = text_encoders(pipe)[name]
    if not changes:
        yield
        return
    acting = [(text_module(pipe, key), scaled(delta, scale, encoder.dtype)) for key, delta in changes.items()]
    with added_to(acting), hooks_run(encoder):
        yield


@contextmanager
def _embeddings_replaced(encoder, places: Sequence[tuple[int, int]], vectors: torch.Tensor | None) -> Iterator[None]:
    if vectors is None or not places:
        yield
        return

    def replace(module, args, output):
        rows, positions = torch.tensor(places, device=output.device).T
        return output.index_put((rows, positions), vectors.to(output).repeat(len(places) // len(vectors), 1))

    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        with hooks_run(encoder):
            yield
    finally:
        handle.remove()


def _whole(text: str, flags: int = 0) -> re.Pattern[str]:
    """Match `text` where it is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    return re.compile(before + re.escape(text) + after, flags)
