"""Prompts with a concept's modifier token: derived, and read by a tokenizer that never learns of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from weaver.concepts.concept import Concept
from weaver.conditioning import text_encoders
from weaver.errors import WeaverError

__all__ = [
    "PromptError",
    "caption_with",
    "TokenIds",
    "derive_prompt",
    "names_token",
    "naming_reasons",
    "read_prompts",
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


class TokenIds(NamedTuple):
    """Prompts as one tokenizer reads them: ids [B, L], how many stand before the padding, where the token's stand."""

    ids: torch.Tensor
    lengths: list[int]
    positions: list[list[int]]

    def rows(self, picks: torch.Tensor) -> TokenIds:
        """The prompts `picks` [b] of these."""
        numbers = picks.tolist()
        return TokenIds(self.ids[picks], [self.lengths[i] for i in numbers], [self.positions[i] for i in numbers])

    @staticmethod
    def joined(parts: Sequence[TokenIds]) -> TokenIds:
        """All rows, one after another."""
        ids, lengths, positions = zip(*parts, strict=True)
        return TokenIds(torch.cat(ids), sum(lengths, []), sum(positions, []))

    def to(self, device: torch.device) -> TokenIds:
        """With the ids on another device."""
        return self._replace(ids=self.ids.to(device))


def derive_prompt(
    base_prompt: str, concept: Concept, *, occurrence: int = 0, without: Sequence[str] = (), beside: Sequence[str] = ()
) -> str:
    """Put the concept's token before its class word: "a dog and a cat" -> "a dog and a <v1> cat".

    Parameters
    ----------
    occurrence : which of the places where the class word stands, from 0, for two concepts of one class.
    without : class words of other concepts, to be left out where they stand in a list, as in the paper's prompts
        (section 3.5): "a red dog and a cat, at night" without "dog" -> "a <v1> cat, at night". A word that stands
        otherwise stays, as does one that is part of a longer noun ("a dog house").
    beside : class words of the picture's concepts; a place within a longer one of these is that one's, as "bear" is
        in "polar bear".

    Raises `PromptError` when the class word does not stand there that often.
    """
    longer = [word for word in beside if len(word) > len(concept.word)]
    taken = [place.span() for word in longer for place in _whole(word, re.IGNORECASE).finditer(base_prompt)]
    found = _whole(concept.word, re.IGNORECASE).finditer(base_prompt)
    places = [place for place in found if not any(a <= place.start() and place.end() <= b for a, b in taken)]
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


def caption_with(text: str, token: str, replacement: str) -> str:
    """The text with `replacement` in the place of the first `token` that `names_token` sees."""
    return _whole(token).sub(lambda _: replacement, text, count=1)


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
    if positions and positions[-1] > limit - 2:
        times = len(pieces) - 1
        room = (limit - 2 - (positions[-1] - times * vectors)) // times
        if vectors == 1 or room < 1:
            raise PromptError(f"token {token!r} lies behind the {limit} tokens that are read of the prompt {prompt!r}")
        raise PromptError(
            f"token {token!r} stands for {vectors} vectors, and the prompt {prompt!r} has room for {room} of them in "
            f"the {limit} tokens that this model reads: take {room} vectors or fewer"
        )
    if len(body) > limit - 2:
        _log.warning("prompt %r is cut to the %d tokens that the text encoder reads", prompt, limit)
    ids = [tokenizer.bos_token_id, *body[: limit - 2], tokenizer.eos_token_id]
    padded = ids + [tokenizer.pad_token_id] * (limit - len(ids))
    return torch.tensor([padded]), positions, len(ids)


def _whole(text: str, flags: int = 0) -> re.Pattern[str]:
    """Match `text` where it is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    return re.compile(before + re.escape(text) + after, flags)


def naming_reasons(token: str, word: str) -> list[str]:
    """What is wrong with a token that is to be learned with a class word; empty when nothing is."""
    if not token.strip("<>") or any(letter.isspace() for letter in token):
        return [f"token {token!r} is empty or has white space in it; write one such as '<v1>'"]
    if names_token(f"a {word}", token):
        return [f"token {token!r} stands in the class word {word!r}; take one that is no word, as '<{token}>'"]
    return []


def read_prompts(pipe, prompts: Sequence[str], token: str | None = None, vectors: int = 1) -> dict[str, TokenIds]:
    """Prompts as each tokenizer of a pipeline reads them, by its text encoder's name, on the CPU.

    Arguments and errors are those of `tokenize`.
    """
    read = {}
    for name in text_encoders(pipe):
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        found = [tokenize(pipe, prompt, token, vectors, tokenizer=tokenizer) for prompt in prompts]
        ids, positions, lengths = zip(*found, strict=True)
        read[name] = TokenIds(torch.cat(ids), list(lengths), list(positions))
    return read
