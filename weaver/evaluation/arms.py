"""The ways to draw that are compared: the full method, what it is without each of its parts, and its rivals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from weaver.defaults import default_dilation, embedded_defaults
from weaver.embedded.world import IMAGE_SIZE
from weaver.errors import WeaverError
from weaver.evaluation.settings import Settings

__all__ = ["ARMS", "CHOSEN_FILE", "FULL", "PARTS", "Arm", "arm_of", "default_settings"]

CHOSEN_FILE = Path(__file__).with_name("chosen.json")
"""What the recorded sweep chose: {arm: {setting: value}}. The full method's are the embedded model's defaults."""


@dataclass(frozen=True)
class Arm:
    """One way to draw.

    Parameters
    ----------
    name : of the arm, and of its pictures
    letter : in tables
    what : one line for a reader
    changes : what it changes of the full method's `Settings`, "kind" among it
    fixed : drawn with the full method's settings but for `changes`, in the place of its own best
    """

    name: str
    letter: str
    what: str
    changes: dict = field(default_factory=dict)
    fixed: bool = False

    def settings(self, full: Settings) -> Settings:
        """This arm's settings beside those of the full method."""
        return _fitting(replace(full, **self.changes))

    @property
    def chosen(self) -> Settings:
        """What it is drawn with: its best settings by the recorded sweep, in which every arm had the same budget."""
        begun = self.settings(default_settings())
        return begun if self.fixed else replace(begun, **_chosen()[self.name])

    @property
    def swept(self) -> tuple[str, ...]:
        """Which settings can be chosen for it, see `weaver.evaluation.sweep`; none where they are fixed."""
        if self.fixed:
            return ()
        taken = self.settings(default_settings()).as_mapping()
        return tuple(name for name in _SWEPT if name in taken and name not in self.changes)


_SWEPT = ("guidance", "suppression", "eta", "resnet_window", "attention_window", "dilation")
_WITHOUT_TEMPLATE = ("suppression", "eta", "resnet_window", "attention_window", "dilation", "injected")
_OF_FUSION = ("suppression", "shared_prompt", "parts")

FULL = "full"
ARMS: tuple[Arm, ...] = (
    Arm("averaged", "a1", "plain prompt, all concepts' changes averaged in one model", {"kind": "merged"}),
    Arm(
        "closed-form",
        "a2",
        "plain prompt, keys and values merged by Custom Diffusion's closed form, other changes averaged",
        {"kind": "merged", "merge": "closed-form"},
    ),
    Arm("prompt-only", "b", "plain prompt, no concept at all: what identity is found by chance", {"kind": "prompt"}),
    Arm("score-mix", "c", "a U-Net pass for each concept, their outputs mixed by the masks", {"kind": "mixed"}),
    Arm("no-injection", "d", "the full method without the template's features", {"injected": False}),
    Arm("no-suppression", "e", "the full method with lambda 0", {"suppression": 0.0}),
    Arm(
        "shared-prompt", "f", "the full method, all contexts under one prompt with all tokens", {"shared_prompt": True}
    ),
    Arm("dense-masks", "g", "the full method with masks that are not dilated", {"dilation": 0}),
    Arm(FULL, "h", "the full method: each concept whole in its region, injection, dilated masks, its own prompt"),
    Arm(
        "cross-attention",
        "i",
        "the full method with the cross-attention alone of concepts that were learned whole",
        {"parts": "cross-attention"},
    ),
)
"""Each at its best settings, so that none is judged by what suits another."""

_CHANGED = (
    ("full-no-injection", "without the template's features", {"injected": False}),
    ("full-shared-prompt", "all contexts under one prompt with all tokens", {"shared_prompt": True}),
    ("full-dense-masks", "masks that are not dilated", {"dilation": 0}),
    ("full-no-suppression", "lambda 0", {"suppression": 0.0}),
    ("full-deterministic", "DDIM steps without noise (eta 0), the paper's", {"eta": 0.0}),
    (
        "full-cross-attention",
        "the cross-attention alone of concepts that were learned whole",
        {"parts": "cross-attention"},
    ),
)
PARTS: tuple[Arm, ...] = tuple(
    Arm(name, f"h{number}", what, changes, fixed=True) for number, (name, what, changes) in enumerate(_CHANGED, start=1)
)
"""The full method with one part changed, all else as it is."""


def default_settings() -> Settings:
    """The full method with the embedded model's committed defaults."""
    known = embedded_defaults()
    return Settings(
        kind="fused",
        guidance=known.guidance,
        suppression=known.suppression,
        eta=known.eta,
        resnet_window=known.sites.resnet_window,
        attention_window=known.sites.attention_window,
        dilation=default_dilation((IMAGE_SIZE, IMAGE_SIZE), known.dilation),
        injected=True,
        shared_prompt=False,
        parts="whole",
    )


def arm_of(name: str) -> Arm:
    """The arm called `name`; a `WeaverError` names those there are."""
    for arm in (*ARMS, *PARTS):
        if arm.name == name:
            return arm
    raise WeaverError(f"there is no arm {name!r}: choose of {', '.join(arm.name for arm in (*ARMS, *PARTS))}")


@cache
def _chosen() -> Mapping[str, Mapping]:
    return json.loads(CHOSEN_FILE.read_text(encoding="utf-8"))


def _fitting(settings: Settings) -> Settings:
    """Without what this kind does not use."""
    unused = () if settings.kind == "fused" else _OF_FUSION
    if not settings.has_template:
        unused += _WITHOUT_TEMPLATE
    if not settings.injected:
        unused += ("resnet_window", "attention_window")
    merge = (settings.merge or "averaged") if settings.kind == "merged" else None
    return replace(settings, **dict.fromkeys(unused), merge=merge)
