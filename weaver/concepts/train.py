"""Learn a concept in the cross-attention's keys and values and one token: Custom Diffusion (arXiv 2212.04488), or LoRA.

Concept Weaver, section 3.1, learns each concept by itself this way. The base model is never written to: while
training runs, hooks add the deltas' share to the outputs of `to_k` and `to_v`, or of whatever layers are learned.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from weaver.concepts.accelerated import process_reasons
from weaver.concepts.changes import moved
from weaver.concepts.checkpoints import Checkpoint, data_hash
from weaver.concepts.concept import Concept, attn2_hash
from weaver.concepts.concept_checks import parted
from weaver.concepts.examples import prepare
from weaver.concepts.images import TrainingSet
from weaver.concepts.learned import start
from weaver.concepts.optimise import optimise
from weaver.concepts.prior import class_pictures
from weaver.concepts.prompts import names_token, naming_reasons
from weaver.concepts.settings import TrainSettings
from weaver.concepts.training_log import TrainingLog
from weaver.concepts.training_progress import reporter
from weaver.concepts.training_state import checkpointed, frozen
from weaver.concepts.validation import Validation, Validator
from weaver.concepts.views import with_views
from weaver.concepts.woven import WovenSet, prepare_woven
from weaver.conditioning import added_reasons, text_encoders
from weaver.defaults import default_sites, model_size
from weaver.errors import WeaverError, raise_if
from weaver.limits import step_reasons
from weaver.version import __version__

__all__ = ["train_concept"]

_LEAST_SIDE = 8  # times smaller than the model's pictures may those be that a concept is learned from


def train_concept(
    pipe,
    images: Sequence[Image.Image] | TrainingSet,
    captions: Sequence[str] | None = None,
    *,
    token: str,
    word: str,
    name: str | None = None,
    prior: TrainingSet | None = None,
    woven: WovenSet | None = None,
    settings: TrainSettings | None = None,
    base_hash: str | None = None,
    at_once: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    keep_checkpoint: bool = False,
    log_dir: str | os.PathLike | None = None,
    validation: Validation | None = None,
    progress: bool | Callable = True,
) -> Concept:
    """Learn a concept from a few pictures by Custom Diffusion, or the same with a LoRA's factors (`settings.rank`).

    Only deltas of attn2's `to_k` and `to_v` (or of all Linears of attention and feed-forward, `settings.layers`) and
    the vectors of one modifier token, for each of the text encoders, receive gradients; the token starts as its class
    word. The model is left as it was, also after an exception. On the CPU the same seed and number of threads give the
    same concept.

    SDXL is told what part of a photograph each picture is (`weaver.concepts.framing`): its size before it was resized,
    top and left of what was cut away afterwards, and the model's size. A view on a canvas is a whole picture; so are
    those that the model makes of the class, at its own size.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline` or SDXL's, its base model, that predicts noise (epsilon) or velocity (v).
    images : pictures of the concept, cut about their centres and resized by Lanczos to the model's size; or a
        `TrainingSet`, as `load_images` returns it.
    captions : one a picture, with the token in each; None for "a <token> <word>".
    token, word : the modifier token, such as "<v1>", and the class word it stands before.
    name : of the concept; None for the token without its brackets.
    prior : pictures and captions without the token; None lets the base model make pictures of the class word.
    woven : scenes with the concept in the place of another of its class, on which it is learned as a fusion shows it
        (`weaver.concepts.woven`), `settings.woven_batch` of them in a step; None learns from `images` alone.
    settings : None for the defaults for Stable Diffusion.
    base_hash : the concept's (`Concept`); None is the `attn2_hash` of the U-Net. A model in bfloat16 has a hash of its
        own: give that of the model before it was rounded, and the concept fits it in float16 and float32.
    at_once : how many pictures are made or encoded in one pass, which takes memory; None is 4 and 8.
    checkpoint : a file that is written every `checkpoint_every` steps. Where it is there, a training of the same
        arguments goes on from it, and on the CPU ends with the same concept as in one go. Class pictures that the model
        makes are kept in a folder beside it. At the end both are removed, or kept until the concept is saved
        (`keep_checkpoint`).
    log_dir : a folder to which TensorBoard's files are written: losses and learning rate of every step, and validation
        pictures. It needs the package tensorboard.
    validation : pictures to draw with the concept while it is learned, which changes nothing of it; None draws none.
    progress : True shows a bar with the time left and the running mean of the loss, unless the output is piped; a
        function is called with (done, total) instead, and with that mean as `loss` where it has such a parameter.

    Raises `WeaverError` for settings, captions and pictures that can't be used, `ConceptError` if training diverges.
    """
    settings = settings or TrainSettings()
    if woven is not None and not settings.woven_batch:
        raise WeaverError("woven scenes are given, but none is in a step: set woven_batch, or leave them out")
    if woven is not None:
        default_sites(pipe)  # under which they are learned: a U-Net that none are known for is told now
    if not isinstance(images, TrainingSet):
        captions = [f"a {token} {word}"] * len(images) if captions is None else captions
        images = TrainingSet(tuple(images), tuple(captions))
    _check(pipe, images, prior, token, word, settings)
    base_hash = base_hash or attn2_hash(pipe.unet)
    kept, pictures = None, None
    if checkpoint is not None:
        identity = _identity(base_hash, images, prior, woven)
        told = {"token": token, "word": word, "precision": str(pipe.unet.dtype).removeprefix("torch.")}
        told |= asdict(settings)
        kept = Checkpoint(Path(checkpoint), checkpoint_every, identity, told)
        kept.read()  # that of another training is told before anything is made
        made = {key: getattr(settings, key) for key in ("prior_steps", "prior_guidance", "seed")}
        pictures = kept.class_pictures(**{"base model": base_hash, "class word": word}, **made)
    learned = start(pipe, word, settings)
    log = TrainingLog(log_dir) if log_dir is not None else None
    watching = [] if log is None else [log]
    if validation is not None:
        show = log and log.add_picture
        watching.append(Validator(pipe, validation, learned, token, settings.steps, show, at_once))
    shown = with_views(images, token, model_size(pipe), settings.views, settings.seed) if settings.views else images
    own = prepare(pipe, shown, token, vectors=settings.vectors, flip=settings.flip, at_once=at_once)
    to_make = settings.prior_images if settings.prior_batch and prior is None else 0
    with reporter(progress, to_make + settings.steps, f"learning {token} {word}") as report:
        if to_make:
            prior = class_pictures(pipe, word, settings, report, at_once=at_once, kept=pictures)
        other = prepare(pipe, prior, at_once=at_once) if settings.prior_batch else None
        scenes = None
        if woven is not None:
            scenes = prepare_woven(pipe, woven, token, settings.vectors, at_once=at_once)
        with (
            frozen(pipe.unet, *text_encoders(pipe).values()),
            checkpointed(pipe.unet, settings.checkpointing),
            torch.enable_grad(),
            log or nullcontext(),
        ):
            optimise(
                pipe,
                learned,
                settings,
                own,
                other,
                scenes,
                report=lambda done, loss: report(to_make + done, loss),
                observe=lambda step: [watch(step) for watch in watching],
                checkpoint=kept,
            )
    with torch.no_grad():  # half precision keeps three digits of a small correction, in a file of half the size
        changes = {path: moved(delta, torch.device("cpu"), torch.float16) for path, delta in learned.deltas.items()}
    deltas, outside = parted(changes)
    concept = Concept(
        name=name or token.strip("<>"),
        token=token,
        word=word,
        base_hash=base_hash,
        embeddings={encoder: vectors.detach().cpu() for encoder, vectors in learned.vectors.items()},
        deltas=deltas,
        outside=outside,
        settings=asdict(settings)
        | {"pictures": len(images.images), "captions": sorted(set(images.captions))}
        | {"woven": len(woven.images) if scenes else 0}
        | {"prior": "made by the base model" if to_make else "given" if settings.prior_batch else "none"},
        versions=_versions(),
    )
    if kept and not keep_checkpoint:
        kept.remove(kept.path)
    return concept


def _identity(base_hash: str, images: TrainingSet, prior: TrainingSet | None, woven: WovenSet | None) -> dict[str, str]:
    """What a training is of."""
    pairs = (woven.images + woven.templates, woven.captions + woven.base_captions) if woven else None
    return {
        "base model": base_hash,
        "pictures or captions": data_hash(images),
        "prior pictures": data_hash(prior),
        "woven scenes": data_hash(TrainingSet(*pairs) if pairs else None),
    }


def _check(
    pipe, images: TrainingSet, prior: TrainingSet | None, token: str, word: str, settings: TrainSettings
) -> None:
    reasons = naming_reasons(token, word) + process_reasons()
    least = min(model_size(pipe)) // _LEAST_SIDE
    if small := [number for number, image in enumerate(images.images) if min(image.size) < least]:
        width, height = images.images[small[0]].size
        found = f"{width} x {height} pixels" + (f" (as {len(small) - 1} more)" if small[1:] else "")
        reasons.append(f"{images.called(small[0])} has {found}, too few to learn from; take some of {least} and more")
    kind = getattr(pipe.scheduler.config, "prediction_type", None)
    if kind not in ("epsilon", "v_prediction") or not hasattr(pipe.scheduler, "alphas_cumprod"):
        reasons.append(f"the scheduler predicts {kind!r}; expected 'epsilon' or 'v_prediction'")
    reasons += added_reasons(pipe)
    if prior is None and settings.prior_batch:
        reasons += [f"prior_{reason}" for reason in step_reasons(pipe, settings.prior_steps)]
    captions = prior.captions if prior is not None and settings.prior_batch else ()
    if named := [caption for caption in captions if names_token(caption, token)]:
        reasons.append(f"token {token!r} stands in {named[0]!r}, a caption of others; take one that is no word: '<v1>'")
    raise_if(reasons, f"cannot train {token} {word}")


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "accelerate", "diffusers", "transformers")}
    return {"concept-weaver": __version__, "python": platform.python_version()} | libraries
