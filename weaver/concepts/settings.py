"""How a concept is learned, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from weaver.choices import LAYERS, OPTIMISERS
from weaver.errors import WeaverError
from weaver.values import is_number, is_whole

__all__ = ["CHOICES", "FACTORS_RATE", "WHOLE_RATE", "TrainSettings"]

CHOICES = {"layers": LAYERS, "optimiser": OPTIMISERS}
WHOLE_RATE, FACTORS_RATE = 1e-5, 1e-4
_LEAST = dict.fromkeys(("steps", "vectors", "prior_images", "prior_steps", "accumulate"), 1)
_LEAST |= dict.fromkeys(("rank", "batch", "woven_batch", "prior_batch", "warmup", "views", "seed"), 0)
_POSITIVE, _NOT_NEGATIVE = ("learning_rate", "token_learning_rate"), ("prior_weight", "prior_guidance")


@dataclass(frozen=True)
class TrainSettings:
    """How a concept is learned. The defaults are for Stable Diffusion; steps and learning rate are the paper's.

    Parameters
    ----------
    steps : optimisation steps.
    rank : 0 learns whole changes of `to_k` and `to_v`, as Custom Diffusion does; more learns a LoRA's two factors
        of each, which have this rank (arXiv 2106.09685): a smaller file.
    layers : "keys-values" of cross-attention, as Custom Diffusion has it; or "all" Linears of attention and
        feed-forward, for which there must be a rank: a LoRA that a fusion uses whole.
    optimiser : of the changes of weights: "adamw", as Custom Diffusion has it, or "muon", whose steps are
        orthogonal matrices (arXiv 2502.16982) and learn small details in fewer. The token's vectors are AdamW's.
    learning_rate : of the changes of weights; None for 1e-5, the paper's, of whole changes, and 1e-4, that of
        diffusers' LoRA examples, of factors, whose product starts from zero.
    token_learning_rate : of the token's vectors; None for `learning_rate`.
    batch : pictures of the concept in a step.
    woven_batch : scenes in a step that show the concept in the place of another of its class, where such are passed in;
        more pictures of the concept where not.
    prior_batch : other pictures in a step, which hold the class in place (prior preservation); 0 for none.
    prior_weight : of their loss against the concept's.
    prior_images : how many of them the base model makes, when none are passed in.
    prior_steps, prior_guidance : how it makes them.
    accumulate : batches in a step, each of as many pictures as above, worked through one after another: the step is
        that of one batch of all their pictures, to rounding, in the memory of one of them.
    vectors : the number V of vectors that the token stands for.
    warmup : steps over which the learning rates rise from zero.
    final_rate : part of the learning rates left at the last step; they fall linearly. 1 keeps them.
    views : how many more views of every picture there are, at other scales and places on a canvas that the loss leaves
        out, with captions that tell so (Custom Diffusion's augmentation).
    flip : mirror the concept's pictures half of the time; not for what has a left and a right.
    checkpointing : compute the U-Net's activations again in the backward pass instead of keeping them: the same
        concept in less memory and more time.
    seed : of pictures, timesteps and noise, all drawn on the CPU.
    """

    steps: int = 500
    rank: int = 0
    layers: str = "keys-values"
    optimiser: str = "adamw"
    learning_rate: float | None = None
    token_learning_rate: float | None = None
    batch: int = 2
    woven_batch: int = 0
    prior_batch: int = 2
    prior_weight: float = 1.0
    prior_images: int = 100
    prior_steps: int = 50
    prior_guidance: float = 6.0
    accumulate: int = 1
    vectors: int = 1
    warmup: int = 0
    final_rate: float = 1.0
    views: int = 0
    flip: bool = False
    checkpointing: bool = False
    seed: int = 0

    @classmethod
    def embedded(cls, **changes) -> TrainSettings:
        """The defaults for the embedded model, `changes` applied; found by trial on drawings held out from it.

        Woven scenes are what keeps small animals whole beside each other. Its maps have few tokens for an ear or an
        eye, which keys and values of texts reach badly: a LoRA of all layers draws them after fewer steps.
        """
        defaults = {
            "steps": 450,
            "optimiser": "muon",
            "learning_rate": 1e-2,
            "token_learning_rate": 1e-2,
            "batch": 1,
            "woven_batch": 2,
            "prior_batch": 1,
            "prior_weight": 0.5,
            "prior_images": 48,
            "prior_steps": 25,
            "prior_guidance": 3.0,
            "warmup": 20,
            "final_rate": 0.1,
        }
        if changes.get("layers") == "all":
            defaults |= {"rank": 8, "steps": 280, "learning_rate": 5e-3}
        return cls(**defaults | changes)

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", FACTORS_RATE if self.rank else WHOLE_RATE)
        reasons = [
            f"{key} is {getattr(self, key)!r}, expected a whole number, {least} or more"
            for key, least in _LEAST.items()
            if not is_whole(getattr(self, key), least)
        ]
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and not (is_number(value) and value > 0):
                reasons.append(f"{key} is {value!r}, expected a finite number, more than 0")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                reasons.append(f"{key} is {getattr(self, key)!r}, expected {' or '.join(choices)}")
        if self.layers == "all" and not self.rank:
            reasons.append("layers is 'all' and rank is 0: whole matrices of all layers would be a model, take a rank")
        if self.batch + self.woven_batch < 1:
            reasons.append("batch and woven_batch are both 0, expected a picture in a step")
        for key in _NOT_NEGATIVE:
            value = getattr(self, key)
            if not (is_number(value) and value >= 0):
                reasons.append(f"{key} is {value!r}, expected a finite number, 0 or more")
        if not (is_number(self.final_rate) and 0 <= self.final_rate <= 1):
            reasons.append(f"final_rate is {self.final_rate!r}, expected a number in 0..1")
        if reasons:
            raise WeaverError("training settings: " + "; ".join(reasons))
