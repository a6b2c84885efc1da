"""One prompt a concept, from the prompt of the whole picture (Concept Weaver, section 3.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weaver.concepts.concept import Concept
from weaver.concepts.prompts import derive_prompt, names_token
from weaver.errors import WeaverError

__all__ = ["own_prompt_reasons", "own_prompts", "token_reasons"]


def own_prompts(prompt: str, concepts: Sequence[Concept], background: Concept | None = None) -> list[str | WeaverError]:
    """The prompt p_+i of every concept, the background's last; an error in the place of one that can't be had.

    A concept's prompt names no other concept of the picture: "a dog and a cat, at night" gives "a <v1> dog, at night"
    and "a <v2> cat, at night". The background's names them all. The k-th concept of a class word takes its k-th place
    in the prompt; those of one class stay in each other's prompts, since the word can't tell them apart. A word within
    another concept's longer one is no place of its own.

    Parameters
    ----------
    prompt : p_base, without any token
    concepts, background : anything with a name, a token and a class word
    """
    seen: dict[str, int] = {}
    found: list[str | WeaverError] = []
    everyone = [*concepts, *([background] if background is not None else [])]
    words = [concept.word for concept in everyone]
    for concept in everyone:
        word = concept.word.lower()
        occurrence = seen[word] = seen.get(word, -1) + 1
        others = [] if concept is background else [o.word for o in concepts if o.word.lower() != word]
        try:
            found.append(derive_prompt(prompt, concept, occurrence=occurrence, without=others, beside=words))
        except WeaverError as error:
            found.append(error)
    return found


def own_prompt_reasons(prompt: str, concept: Concept | None, everyone: Sequence[Concept]) -> list[str]:
    """What is wrong with the prompt p_+i of a concept, or of a region without one: it names its own token, no other.

    `everyone` are the concepts of the picture; all are anything with a modifier token and a class word. Two that have
    the same token are both meant by it, each in its own prompt.
    """
    own = "" if concept is None else concept.modifier
    reasons = []
    if own and not names_token(prompt, own):
        reasons.append(f"{prompt!r} lacks the concept's token {own!r}; put it before {concept.word!r}")
    others = {other.modifier for other in everyone} - {"", own}
    if strange := sorted(token for token in others if names_token(prompt, token)):
        reasons.append(f"{prompt!r} holds another concept's token {strange[0]!r}; each names its own only")
    return reasons


def token_reasons(texts: Mapping[str, str | None], concepts: Sequence[Concept]) -> list[str]:
    """What is wrong with texts that no concept's token may stand in; empty when nothing is.

    Parameters
    ----------
    texts : by the name of the field they come from; the base model reads them, to which a token is a few letters
    concepts : anything with a name, a modifier token and a class word
    """
    return [
        f"{field}: {text!r} holds {concept.token!r}, the token of {concept.name}; {_instead(concept)}"
        for field, text in texts.items()
        for concept in concepts
        if text and concept.modifier and names_token(text, concept.modifier)
    ]


def _instead(concept: Concept) -> str:
    if concept.token.startswith("<"):
        return f"write {concept.word!r} alone, tokens belong into the concepts' own prompts"
    return f"the base model reads that as a word: call the concept otherwise, such as token '<{concept.token}>'"
