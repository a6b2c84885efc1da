"""The demonstration's job: the file that ships, with other concepts or another seed on request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from weaver.errors import WeaverError
from weaver.job import BackgroundSpec, Job
from weaver.job.file import read_mapping
from weaver.job.inputs import shipped_name
from weaver.job.parse import job_from_mapping

__all__ = ["DEMO_JOB", "demo_job", "with_shipped_concepts"]

DEMO_JOB = Path(__file__).parent / "jobs" / "demo.yaml"


def demo_job(concepts: str | None = None, background: str | None = None) -> Job:
    """Read the job that ships, with other subjects on request.

    Parameters
    ----------
    concepts : how many animals, "1" to as many as ship, or their names with commas between
    background : name of a background concept, or "none" for one that the base model draws

    Raises `WeaverError` for what does not ship.
    """
    mapping = read_mapping(DEMO_JOB)
    if concepts is not None or background is not None:
        animals, ground = _chosen(mapping, concepts, background)
        mapping["concepts"] = [_entry(card) for card in animals]
        mapping["background"] = _entry(ground) if ground else None
        scene = ground.word if ground else _word(mapping["prompt"])
        mapping["prompt"] = f"{_listing([card.word for card in animals])}, {scene} background"
    return job_from_mapping(mapping, folder=DEMO_JOB.parent, source=DEMO_JOB.name)


def with_shipped_concepts(job: Job) -> Job:
    """The same job with the concept files that ship, for every concept whose pictures ship too."""

    def untrained(spec: BackgroundSpec) -> BackgroundSpec:
        name = shipped_name(spec)
        return replace(spec, file=f"embedded:{name}", train=None) if spec.train and name else spec

    background = job.background and untrained(job.background)
    return replace(job, concepts=tuple(untrained(spec) for spec in job.concepts), background=background)


def _chosen(mapping: dict, concepts: str | None, background: str | None):
    from weaver.embedded import CONCEPTS

    animals = [card for card in CONCEPTS.values() if card.kind == "animal"]
    grounds = {card.name: card for card in CONCEPTS.values() if card.kind == "background"}
    names = ",".join(entry["name"] for entry in mapping["concepts"]) if concepts is None else concepts
    if names.strip().isdecimal():
        count = int(names)
        if not 1 <= count <= len(animals):
            raise WeaverError(f"--concepts: {count} asked for, 1 to {len(animals)} ship")
        chosen = animals[:count]
    else:
        known = {card.name: card for card in animals}
        asked = [name.strip() for name in names.split(",")]
        if unknown := [name for name in asked if name not in known]:
            raise WeaverError(f"--concepts: no animal {unknown[0]!r} ships; choose of {', '.join(known)}, or a number")
        if len(set(asked)) < len(asked):
            raise WeaverError("--concepts: the same concept twice; name different ones")
        chosen = [known[name] for name in asked]
    name = mapping["background"]["name"] if background is None else background
    if name != "none" and name not in grounds:
        raise WeaverError(f"--background: no background {name!r} ships; choose of {', '.join(grounds)}, or none")
    return chosen, grounds.get(name)


def _entry(card) -> dict:
    train = {"images": f"embedded:{card.name}", "token": card.token} | card.training
    return {"name": card.name, "word": card.word, "train": train}


def _listing(words: list[str]) -> str:
    phrases = [f"a {word}" for word in words]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _word(prompt: str) -> str:
    """The scene's word in "..., mountain background"."""
    return prompt.rsplit(", ", 1)[1].removesuffix(" background")
