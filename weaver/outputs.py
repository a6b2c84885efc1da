"""What a run leaves behind: pictures, concept files, manifest and report; all of them or none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from weaver.concepts.concept import Concept
from weaver.errors import WeaverError
from weaver.folder import all_or_nothing
from weaver.job import SAME_MODEL, BackgroundSpec, Job, TemplateSpec
from weaver.job.inputs import InputFile, shipped_name, training_pictures
from weaver.manifest import make_manifest, save_png
from weaver.masks import draw_masks
from weaver.pictures import open_rgb
from weaver.pipeline import WeaveResult
from weaver.sheet import Card, contact_sheet
from weaver.version import __version__

__all__ = ["CONCEPTS", "STAGES", "TrainedKeptWarning", "make_report", "result_files", "trained_kept", "write_outputs"]

CONCEPTS = Path("concepts")  # of those that a run trained, in its folder
STAGES = ("bank", "template", "inversion", "masks", "fusion")
_FILES = ("template.png", "masks.png", "fused.png", "sheet.png", "manifest.json", "report.json")
_CARD_PICTURES = 9  # more do not fit on the sheet


class TrainedKeptWarning(UserWarning):
    """A run came to nothing, and the concepts that it trained are there."""


def make_report(job: Job, result: WeaveResult, seconds: dict[str, float]) -> dict:
    """Seconds of every stage, quality of the reconstruction, contexts a token, and how much each region shows its
    concept.

    Similarity is measured for concepts that ship with the embedded model, by its identity classifier; for others the
    three values are None, since no measure of theirs ships. "cached" says what was not computed, if anything.
    """
    concepts, quality = {}, result.reconstruction_psnr
    for number, spec in enumerate(job.everyone):
        name = shipped_name(spec)
        if name is None:
            concepts[spec.name] = {"own": None, "base": None, "others": None}
            continue
        from weaver.embedded.identity import score

        scores = score(result.image, result.masks[number].numpy(), name)
        concepts[spec.name] = {key: round(value, 4) for key, value in scores.items()}
    return {
        "stages": {stage: round(seconds.get(stage, 0.0), 2) for stage in STAGES},
        "total_seconds": 0.0,
        "reconstruction_psnr": None if quality is None else round(quality, 2),
        "live_contexts": result.live_contexts,
        "concepts": concepts,
        **({"cached": list(result.cached)} if result.cached else {}),
    }


def result_files(job: Job) -> list[Path]:
    """What a run of the job writes, relative to its folder."""
    return [*map(Path, _FILES), *(_concept_file(spec) for spec in job.everyone if spec.train)]


def write_outputs(
    folder: Path,
    job: Job,
    result: WeaveResult,
    concepts: Sequence[Concept],
    record: dict,
    report: dict,
    inputs: tuple[InputFile, ...],
    elapsed: Callable[[], float],
) -> None:
    """Write everything into `folder`, or leave it as it was. Concept files of earlier runs stay, the rest is replaced.

    `elapsed` gives the run's seconds so far, for the report, which comes last.
    """
    with all_or_nothing(folder) as partial:
        overlay = draw_masks(result.template, result.masks, [spec.name for spec in job.everyone])
        save_png(result.template, partial / "template.png")
        save_png(overlay, partial / "masks.png")
        save_png(result.image, partial / "fused.png", record)
        save_png(_sheet(job, result, concepts, overlay), partial / "sheet.png")
        for spec, concept in zip(job.everyone, concepts, strict=True):
            if spec.train:
                concept.save(partial / _concept_file(spec))
        _write_json(partial / "manifest.json", make_manifest(job, folder.resolve(), record, inputs))
        report["total_seconds"] = round(elapsed(), 2)
        _write_json(partial / "report.json", report)


@contextmanager
def trained_kept(folder: Path, job: Job, concepts: Sequence[Concept]) -> Iterator[None]:
    """Where the block fails or is stopped, concepts trained before it are written into `folder` and named in a warning,
    as far as they can be."""
    try:
        yield
    except BaseException:
        kept = []
        with suppress(OSError, WeaverError):
            for spec, concept in zip(job.everyone, concepts, strict=True):
                if spec.train:
                    path = folder / _concept_file(spec)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    kept.append(str(concept.save(path)))
        if kept:
            message = f"trained, and kept: {', '.join(kept)}; as file in the place of train they are taken as they are"
            warnings.warn(message, TrainedKeptWarning, stacklevel=3)
        raise


def _concept_file(spec: BackgroundSpec) -> Path:
    return CONCEPTS / f"{spec.name}.safetensors"


def _sheet(job: Job, result: WeaveResult, concepts: Sequence[Concept], overlay: Image.Image) -> Image.Image:
    cards = [
        Card(spec.name, _card_caption(spec, concept), _card_pictures(spec), background=spec is job.background)
        for spec, concept in zip(job.everyone, concepts, strict=True)
    ]
    settings = result.settings
    sources = dict.fromkeys(source.split(":")[0] for source in settings["masks"]["sources"])
    dilation = settings["masks"]["dilation"]
    grown = f"{dilation:.0%} of each" if 0 < dilation < 1 else f"{dilation} px"
    panels = [
        ("Template", _template_source(job.template), result.template),
        ("Masks", f"{' and '.join(sources)}, grown by {grown}", overlay),
        ("Result", f"{settings['steps']} steps, guidance {settings['guidance']:g}, lambda {settings['lambda']:g}"
         + (f", eta {settings['eta']:g}" if settings["eta"] else "")
         + ", the template's background kept" * settings["keep_background"], result.image),
    ]  # fmt: skip
    quality = result.reconstruction_psnr
    told = "features of the inversion" if quality is None else f"template drawn again at {quality:.1f} dB"
    footnote = f"Concept Weaver {__version__}, seed {job.seed}, {told}"
    return contact_sheet(cards, panels, title=job.prompt, footnote=footnote)


def _template_source(spec: TemplateSpec) -> str:
    """Where a template is from; a folder's model by the folder's name."""
    if spec.image:
        return "from a picture"
    names = {SAME_MODEL: "the base model", "embedded": "the embedded model"}
    model = names.get(spec.model) or (Path(spec.model).name if Path(spec.model).is_dir() else spec.model)
    return f"from the prompt, by {model}"


def _card_caption(spec: BackgroundSpec, concept: Concept) -> str:
    steps = concept.settings.get("steps")
    how = "trained now" if spec.train else "from its file"
    return f"{concept.token} {concept.word}, {how}" + (f", {steps} steps" if steps else "")


def _card_pictures(spec: BackgroundSpec) -> list[Image.Image]:
    name = shipped_name(spec)
    if name is not None:
        from weaver import embedded
        from weaver.concepts.picture_folder import picture_files

        return [open_rgb(path) for path in picture_files(embedded.concept_images(name))[:_CARD_PICTURES]]
    return [open_rgb(path) for path in training_pictures(spec)[:_CARD_PICTURES]]


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
