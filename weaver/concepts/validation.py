"""Pictures drawn while a concept is learned, to see how far it is; what is learned is the same without them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from weaver.concepts.encoding import Encoding, encode, encode_ids
from weaver.concepts.learned import Learned
from weaver.concepts.optimise import Step
from weaver.concepts.prior import DRAWN_AT_ONCE
from weaver.concepts.prompts import read_prompts
from weaver.conditioning import text_encoders
from weaver.defaults import defaults_for
from weaver.errors import WeaverError
from weaver.folder import make_folder, whole_file
from weaver.pictures import grid

__all__ = ["Validation", "Validator"]


@dataclass(frozen=True)
class Validation:
    """What is drawn while a concept is learned, and when: `folder`/step-000100.png, a strip of pictures a prompt.

    Parameters
    ----------
    prompts : with the concept's token in each
    folder : for the pictures' files
    every : steps from one to the next; the last step has one in any case
    pictures : in a strip, each with noise of its own, which is the same in every strip and at every step
    steps, guidance : of the pipeline's own scheduler; None is the model's default
    seed : of the first picture of a strip, and those after it count on
    """

    prompts: Sequence[str]
    folder: str | os.PathLike
    every: int = 100
    pictures: int = 4
    steps: int = 25
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("every", "pictures", "steps")}
        reasons = [f"{name} is {value!r}, expected 1 or more" for name, value in counts.items() if not value >= 1]
        if isinstance(self.prompts, str) or not self.prompts:
            reasons.append(f"prompts is {self.prompts!r}, expected a list of one or more")
        if reasons:
            raise WeaverError("validation: " + "; ".join(reasons))


class Validator:
    """Draws the pictures of a `Validation` with what is learned, as it is at that step.

    Parameters
    ----------
    pipe : whose U-Net has the changes of `learned` on it while pictures are drawn
    settings : what to draw, and when
    token : that the prompts have
    steps : of the whole training
    show : is called with each strip: (prompt, strip, steps done)
    at_once : how many pictures are drawn in one pass; None is 4

    Raises `PromptError` for a prompt without the token, `WeaverError` for a folder that can't be made.
    """

    def __init__(
        self,
        pipe,
        settings: Validation,
        learned: Learned,
        token: str,
        steps: int,
        show: Callable[[str, Image.Image, int], None] | None = None,
        at_once: int | None = None,
    ):
        self._settings, self._learned, self._steps, self._show = settings, learned, steps, show
        self._encoders, self._at_once = text_encoders(pipe), at_once or DRAWN_AT_ONCE
        vectors = len(next(iter(learned.vectors.values())))
        read = read_prompts(pipe, settings.prompts, token, vectors)
        self._read = {name: ids.to(pipe._execution_device) for name, ids in read.items()}
        self._nothing = encode(pipe, None)
        own = defaults_for(pipe).template_guidance
        self._guidance = own if settings.guidance is None else settings.guidance
        self._pipe = copy.copy(pipe)  # its schedule and bar are its own, its modules are shared
        self._pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self._pipe.set_progress_bar_config(disable=True)
        make_folder("validation", settings.folder)

    def __call__(self, step: Step) -> None:
        """Draw, if it is time."""
        if step.done % self._settings.every and step.done != self._steps:
            return
        strips = self._strips()
        sheet = grid(strips)
        with whole_file(Path(self._settings.folder) / f"step-{step.done:06}.png") as partial:
            sheet.save(partial, format="PNG")
        if self._show:
            for prompt, strip in zip(self._settings.prompts, strips, strict=True):
                self._show(prompt, grid([strip]), step.done)

    @torch.no_grad()
    def _strips(self) -> list[list[Image.Image]]:
        """The pictures of each prompt. No generator but those made here moves."""
        device = self._pipe._execution_device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            prompts = encode_ids(self._encoders, self._read, self._learned.vectors)
            rows = (prompts.rows(torch.tensor([number])) for number in range(len(self._settings.prompts)))
            return [self._draw(prompt) for prompt in rows]

    def _draw(self, prompt: Encoding) -> list[Image.Image]:
        settings, images = self._settings, []
        for first in range(0, settings.pictures, self._at_once):
            numbers = range(first, min(first + self._at_once, settings.pictures))
            images += self._pipe(
                **_arguments(prompt, self._nothing, len(numbers)),
                num_inference_steps=settings.steps,
                guidance_scale=self._guidance,
                generator=[torch.Generator("cpu").manual_seed(settings.seed + number) for number in numbers],
            ).images
        return images


def _arguments(prompt: Encoding, nothing: Encoding, rows: int) -> dict[str, torch.Tensor]:
    """Encoded prompts as a pipeline's call takes them, each `rows` times."""
    found = {}
    for name, encoding in {"": prompt, "negative_": nothing}.items():
        found[f"{name}prompt_embeds"] = encoding.text.expand(rows, -1, -1)
        if encoding.pooled is not None:
            found[f"{name}pooled_prompt_embeds"] = encoding.pooled.expand(rows, -1)
    return found
