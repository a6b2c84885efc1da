"""Ways to run a job, from the fastest to the slowest, which take less and less of the device's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weaver.errors import raise_if, told
from weaver.values import is_whole

__all__ = ["FEATURE_HOMES", "MemoryPlan", "plans_for"]

# Where the template's features are kept, and what is said of that.
FEATURE_HOMES = {
    "device": "features on the device",
    "host": "features in the host's memory",
    "replayed": "features computed again at every step",
}


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses the device's memory. The picture is the same in every way, but for rounding.

    Parameters
    ----------
    features : "device" keeps the template's features there, where they fit (`collect_features`); "host" in the host's
        memory, from where they are brought a step at a time; "replayed" keeps none (`weaver.features`)
    offload : text encoders, autoencoder and the template's model are on the host while they have nothing to do
    at_once : how many pictures training makes or encodes in one pass; None is 4 and 8

    Raises `WeaverError` for anything else.
    """

    features: str = "device"
    offload: bool = False
    at_once: int | None = None

    def __post_init__(self):
        reasons, homes, count = [], ", ".join(FEATURE_HOMES), self.at_once
        if not isinstance(self.features, str) or self.features not in FEATURE_HOMES:
            reasons.append(f"features is {told(self.features)}, expected one of {homes}")
        if not isinstance(self.offload, bool):
            reasons.append(f"offload is {told(self.offload)}, expected True or False")
        if count is not None and not is_whole(count, 1):
            reasons.append(f"at_once is {told(count)}, expected a whole number, 1 or more, or None")
        raise_if(reasons, "Cannot plan the memory")

    @property
    def storage(self) -> str | None:
        """As `collect_features` takes it."""
        return "cpu" if self.features == "host" else None

    def kind_of(self, wished: str) -> str:
        """As `collect_features` takes it, where a job wishes for features of a kind: an approximation stays one."""
        return "replayed" if wished == "stored" and self.features == "replayed" else wished

    def __str__(self) -> str:
        where = FEATURE_HOMES[self.features]
        where += ", parts not in use off the device" if self.offload else ""
        return where + (f", training pictures {self.at_once} at a time" if self.at_once else "")


def plans_for(device: str) -> tuple[MemoryPlan, ...]:
    """The plans of a kind of device, the fastest first. On the CPU host and device are one: nothing is moved."""
    moves = [MemoryPlan()]
    if device != "cpu":
        moves += [
            MemoryPlan(features="host"),  # some copies a step
            MemoryPlan(offload=True),  # a few seconds a run
            MemoryPlan(features="host", offload=True),
        ]
    moves.append(MemoryPlan(features="replayed", offload=device != "cpu"))  # a part of a forward a step
    return tuple(replace(move, at_once=at_once) for move in moves for at_once in (None, 1))
