"""All concepts' weights in one model, the usual way to have several of them: averaged, or by Custom Diffusion's merge.

Both are what the paper's fusion is compared with: one U-Net, one prompt with every token, no masks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence

import torch

from weaver.concepts.changes import Delta, change_shape
from weaver.concepts.concept import Concept
from weaver.concepts.encoding import encode, encode_readings, read
from weaver.concepts.prompts import tokenize
from weaver.embedded.captions import caption_of
from weaver.errors import WeaverError, raise_if
from weaver_kernels import LowRank

__all__ = ["averaged", "closed_form", "merge", "merged_unet", "target_features", "regularising_features", "with_tokens"]

_CAPTIONS = 200  # enough that every direction of the text's 96 is in their few thousand features
_OF_TEXT = (".attn2.to_k", ".attn2.to_v")


def with_tokens(pipe, concepts: Sequence[Concept]):
    """A pipeline whose tokenizer and text encoder know the concepts' tokens; its other parts are those of `pipe`.

    Raises `WeaverError` for concepts that change the text encoder, or have several vectors a token: their prompts can't
    be read by one model.
    """
    reasons = [f"{c.name} changes the text encoder" for c in concepts if c.text_deltas]
    reasons += [f"{c.name} has {c.vectors} vectors" for c in concepts if c.modifier and c.vectors != 1]
    raise_if(reasons, "One prompt can't name these concepts")
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    named = {concept.token: concept for concept in concepts if concept.modifier}
    tokenizer.add_tokens(list(named))
    rows = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
    encoder.resize_token_embeddings(rows, mean_resizing=False)  # those that are new are written below
    with torch.no_grad():
        vectors = encoder.get_input_embeddings().weight
        for token, concept in named.items():
            vectors[tokenizer.convert_tokens_to_ids(token)] = concept.embeddings["text_encoder"][0].to(vectors)
    found = type(pipe)(
        **{**pipe.components, "tokenizer": tokenizer, "text_encoder": encoder}, requires_safety_checker=False
    )
    found.set_progress_bar_config(disable=True)
    return found


def merge(pipe, prompts: Mapping[str, str], concepts: Sequence[Concept], how: str):
    """The pipeline with all concepts merged, tokens among them.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`, only read
    prompts : of each concept by its name, with its own token: where `closed_form` reads the features of its words
    concepts : each once
    how : "averaged", every change divided by the number of concepts; or "closed-form", keys and values by
        `closed_form`, and what else a concept changes averaged
    """
    if how not in ("averaged", "closed-form"):
        raise WeaverError(f"merge is {how!r}, expected averaged or closed-form")
    changes = averaged(concepts)
    if how == "closed-form":
        regular = regularising_features(pipe)
        targets = [target_features(pipe, prompts[concept.name], concept) for concept in concepts]
        for path in [path for path in changes if path.endswith(_OF_TEXT)]:
            weight = pipe.unet.get_submodule(path).weight.detach().double()
            own = [weight + matrix_of(c.deltas[path]).double() if path in c.deltas else weight for c in concepts]
            changes[path] = (closed_form(weight, own, targets, regular) - weight).float()
    found = with_tokens(pipe, concepts)
    found.register_modules(unet=merged_unet(pipe.unet, changes))
    return found


def merged_unet(unet, changes: Mapping[str, torch.Tensor]):
    """A U-Net of its own with changes by path added to its weights, a path that ends in ".bias" to a bias."""
    own = copy.deepcopy(unet)
    with torch.no_grad():
        for path, change in changes.items():
            module, _, name = path.rpartition(".") if path.endswith(".bias") else (path, "", "weight")
            parameter = getattr(own.get_submodule(module), name)
            parameter += change.to(parameter)
    return own


def averaged(concepts: Sequence[Concept]) -> dict[str, torch.Tensor]:
    """The mean change of every weight, by its path; a concept that leaves it as it is counts as none."""
    total: dict[str, torch.Tensor] = {}
    for concept in concepts:
        for path, change in {**concept.deltas, **concept.outside}.items():
            total[path] = total.get(path, 0) + matrix_of(change) / len(concepts)
    return total


def closed_form(
    weight: torch.Tensor, own: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], regular: torch.Tensor
) -> torch.Tensor:
    """The weight nearest to the base model's that gives every concept's words what its own weight gives them.

    `argmin_W |W X - W_0 X|` for features X of other prompts, where `W c_i = W_i c_i` (Multi-Concept Customization of
    Text-to-Image Diffusion, arXiv 2212.04488, section 3.3). By Lagrange's multipliers W = W_0 + (V - W_0 C) (D C)^-1 D
    with D = C^T (X X^T)^-1, where C holds the c_i as columns and V the W_i c_i.

    Parameters
    ----------
    weight : W_0 [out, C]
    own : each concept's W_i [out, C]
    targets : of each concept, the features c_i [n, C] of its token and word, in text
    regular : X^T [m, C]

    Returns W [out, C] in float64.
    """
    weight, regular = weight.double(), regular.double()
    target = torch.cat([features.double() for features in targets])  # C^T [s, C]
    values = torch.cat([features.double() @ w.double().T for w, features in zip(own, targets, strict=True)])  # [s, out]
    towards = target @ torch.linalg.pinv(regular.T @ regular, hermitian=True)  # D [s, C]
    share = torch.linalg.pinv(towards @ target.T)  # concepts of one token twice have one row twice
    return weight + (values - target @ weight.T).T @ share @ towards


def target_features(pipe, prompt: str, concept: Concept) -> torch.Tensor:
    """The text features [n, C] of a concept's token and class word in its own prompt."""
    _, positions, _ = tokenize(pipe, prompt, concept.modifier or None, max(concept.vectors, 1))
    if not positions:
        raise WeaverError(f"concept {concept.name!r} has no token in {prompt!r}: a merge needs to know its words")
    return encode(pipe, prompt, concept).text[0, [*positions, positions[-1] + 1]]


def regularising_features(pipe, count: int = _CAPTIONS) -> torch.Tensor:
    """The text features [m, C] of captions of the embedded world, from the first token to the end of the text."""
    from weaver.embedded.backgrounds import BACKGROUNDS
    from weaver.embedded.drawings import ANIMALS
    from weaver.embedded.repaint import PALETTE

    rng, captions = random.Random(0), []
    for _ in range(count):
        animals = [
            f"a {rng.choice(list(PALETTE))} {animal}" if rng.random() < 0.5 else f"a {animal}"
            for animal in rng.choices(ANIMALS, k=rng.randint(1, 4))
        ]
        captions.append(caption_of(animals, rng.choice(list(BACKGROUNDS))))
    features = encode_readings(pipe, [read(pipe, caption) for caption in captions]).text
    return torch.cat([row[: tokenize(pipe, caption)[2]] for row, caption in zip(features, captions, strict=True)])


def matrix_of(change: Delta) -> torch.Tensor:
    """A change [out, ...] as one tensor, in float32."""
    if not isinstance(change, LowRank):
        return change.float()
    return (change.up.float().flatten(1) @ change.down.float().flatten(1)).view(change_shape(change))
