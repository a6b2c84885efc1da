"""Options of `weaver train` that are its settings: one for each of `TrainSettings`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from weaver.concepts.settings import CHOICES, FACTORS_RATE, WHOLE_RATE, TrainSettings
from weaver.errors import WeaverError

__all__ = ["METHODS", "add_settings", "chosen_settings"]

METHODS = ("custom-diffusion", "lora")
_RANK = 16  # of a LoRA where none is asked for
_OF_MADE_PICTURES = ("prior_images", "prior_steps", "prior_guidance")
_KINDS = {"int": int, "float": float, "float | None": float}
_HELP = {
    "steps": "steps of the optimisation",
    "rank": "of a LoRA's factors, with --method lora",
    "layers": "a LoRA's, all: of attention and feed-forward, used whole in its region",
    "optimiser": "of the changes of weights; the token's vectors are AdamW's",
    "learning_rate": "of the changes of weights",
    "token_learning_rate": "of the token's vectors",
    "batch": "pictures of the concept in a step",
    "woven_batch": "scenes with it among others in a step; on other models more pictures of it",
    "prior_batch": "pictures of its class in a step, 0 for none",
    "prior_weight": "of their loss, where the concept's is 1",
    "prior_images": "how many of them the model makes, without --class-images; not the embedded one",
    "prior_steps": "sampling steps in which it makes one",
    "prior_guidance": "guidance with which it makes them",
    "accumulate": "batches in a step, one after another in the memory of one",
    "vectors": "vectors that the token stands for",
    "warmup": "steps over which the learning rates rise from 0",
    "final_rate": "part of the learning rates left at the last step, 0 to 1",
    "views": "more views of each picture, at other scales and places",
    "flip": "mirror its pictures half of the time; not for what has a left and a right",
    "checkpointing": "less memory, more time: activations are computed twice",
    "seed": "of pictures, timesteps and noise",
}
_SAID = {  # in the place of a default
    "rank": f"{_RANK}; embedded {_RANK}",
    "learning_rate": f"{WHOLE_RATE}, a LoRA's {FACTORS_RATE}",
    "token_learning_rate": "as --learning-rate",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, under the name that it has in `TrainSettings`."""
    group = parser.add_argument_group(
        "settings", "in brackets what they are for Stable Diffusion, and where it differs"
    )
    for field in fields(TrainSettings):
        name, told = f"--{field.name.replace('_', '-')}", f"{_HELP[field.name]} ({_default(field.name)})"
        if field.type == "bool":
            group.add_argument(name, action="store_true", default=None, help=_HELP[field.name])
        elif field.name in CHOICES:
            group.add_argument(name, choices=CHOICES[field.name], help=told)
        else:
            kind, metavar = _KINDS[field.type], field.name.rpartition("_")[2].upper()
            group.add_argument(name, type=kind, metavar=metavar, help=told)


def chosen_settings(args: argparse.Namespace, pipe) -> TrainSettings:
    """The model's own settings with those that were asked for; raises `WeaverError` for a rank without its method."""
    from weaver.models import is_embedded

    changes = {f.name: getattr(args, f.name) for f in fields(TrainSettings) if getattr(args, f.name) is not None}
    own = is_embedded(pipe)
    if args.method == "lora" and not (own and changes.get("layers") == "all"):  # which brings a rank of its own
        changes.setdefault("rank", _RANK)
    rank = changes.get("rank")
    if rank is not None and bool(rank) != (args.method == "lora"):
        fix = "add --method lora" if rank else "give 1 or more"
        raise WeaverError(f"--rank: is {rank} with --method {args.method}; {fix}")
    if changes.get("layers") == "all" and args.method != "lora":
        raise WeaverError(f"--layers: is all with --method {args.method}; add --method lora")
    if own and (odd := [name for name in _OF_MADE_PICTURES if name in changes]):
        name = odd[0].replace("_", "-")
        raise WeaverError(f"--{name}: the embedded model makes no class pictures, it has its world; leave it out")
    return TrainSettings.embedded(**changes) if own else TrainSettings(**changes)


def _default(name: str) -> str:
    """What a setting is where nobody asks: for Stable Diffusion, and for the embedded model where it differs."""
    embedded, whole = TrainSettings.embedded(), TrainSettings.embedded(layers="all")
    usual, embedded, whole = (getattr(settings, name) for settings in (TrainSettings(), embedded, whole))
    differs = embedded != usual and name not in _OF_MADE_PICTURES
    told = _SAID.get(name, str(usual)) + (f"; embedded {embedded}" if differs else "")
    return told + (f", {whole} with --layers all" if whole not in (embedded, "all") else "")
