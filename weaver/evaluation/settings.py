"""What a picture is drawn with, besides its prompt, its seed and the concepts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything that one picture is drawn with besides its prompt, seed and concepts.

    Parameters
    ----------
    kind : "merged", all concepts' weights in one model; "prompt", the base model; "mixed", a pass of the U-Net for
        each concept; "fused", one pass
    merge : of "merged": "averaged" or "closed-form"
    guidance, suppression, eta : omega, lambda and DDIM's eta (`weaver.defaults`)
    resnet_window, attention_window : parts of the steps in which features are injected
    dilation : pixels that masks grow by
    injected : whether the template's features are injected at all
    shared_prompt : every concept reads one prompt with all tokens, in the place of its own
    parts : "whole" or "cross-attention", see `weaver.ConceptUse`

    What a kind does not use is None, so that equal settings are equal pictures.
    """

    kind: str
    guidance: float
    merge: str | None = None
    suppression: float | None = None
    eta: float | None = None
    resnet_window: float | None = None
    attention_window: float | None = None
    dilation: int | None = None
    injected: bool | None = None
    shared_prompt: bool | None = None
    parts: str | None = None

    @property
    def has_template(self) -> bool:
        """Whether the picture is to keep a template's composition."""
        return self.kind in ("mixed", "fused")

    @property
    def swept_values(self) -> str:
        """For a reader: "omega 3, lambda 0, windows 0.5 and 1, dilation 1, eta 0"; what is not used is left out."""
        told = [f"omega {self.guidance:.3g}"]
        if self.suppression is not None:
            told.append(f"lambda {self.suppression:g}")
        if self.resnet_window is not None:
            told.append(f"windows {self.resnet_window:g} and {self.attention_window:g}")
        if self.dilation is not None:
            told.append(f"dilation {self.dilation}")
        if self.eta is not None:
            told.append(f"eta {self.eta:g}")
        return ", ".join(told)

    def as_mapping(self) -> dict:
        """Plain values, without what is not used."""
        return {name: value for name, value in asdict(self).items() if value is not None}
