"""Write ``MODEL_CARD.md`` from the recorded curves and gates, so that the card says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from weaver.concepts.concept import Concept
from weaver.embedded.backgrounds import BACKGROUNDS, HELD_OUT_BACKGROUNDS
from weaver.embedded.catalog import CONCEPTS, concept_path
from weaver.embedded.drawings import ANIMALS, HELD_OUT_VENDORS, LINE_DRAWINGS, TRAINING_VENDORS
from weaver.embedded.model import MODEL_DIR, model_hash
from weaver.embedded.segmenter import Segmenter
from weaver.embedded.training.gates import Gate
from weaver.embedded.training.segmenter import held_out_scenes, segmentation_iou

__all__ = ["draw_curve", "write_card"]

_ROOT = Path(__file__).parent.parent
CARD_FILE = _ROOT / "MODEL_CARD.md"
CURVE_FILE = _ROOT / "curve.png"

# Iconify set -> (author, licence, origin)
SOURCES = {
    "noto": ("Google", "Apache-2.0", "googlefonts/noto-emoji"),
    "noto-v1": ("Google", "Apache-2.0", "googlefonts/noto-emoji, first design"),
    "twemoji": ("Twitter and contributors", "CC BY 4.0", "jdecked/twemoji"),
    "fxemoji": ("Mozilla", "Apache-2.0", "mozilla/fxemoji"),
    "streamline-emojis": ("Streamline", "CC BY 4.0", "webalys-hq/streamline-vectors"),
    "boxicons": ("Boxicons", "MIT", "box-icons/boxicons-core"),
    "griddy-icons": ("Zuzana Benova", "MIT", "griddy-icons/griddy-icons"),
    "hugeicons": ("Hugeicons", "MIT", "hugeicons"),
    "icon-park-outline": ("ByteDance", "Apache-2.0", "bytedance/IconPark"),
    "lucide": ("Lucide contributors", "ISC", "lucide-icons/lucide"),
    "lucide-lab": ("Lucide contributors", "ISC", "lucide-icons/lucide-lab"),
    "mdi": ("Pictogrammers", "Apache-2.0", "Templarian/MaterialDesign"),
    "ph": ("Phosphor Icons", "MIT", "phosphor-icons/core"),
    "streamline-flex": ("Streamline", "CC BY 4.0", "webalys-hq/streamline-vectors"),
    "tabler": ("Paweł Kuna", "MIT", "tabler/tabler-icons"),
    "emojione": ("Emoji One", "CC BY 4.0", "EmojiTwo/emojitwo"),
    "fluent-emoji-flat": ("Microsoft", "MIT", "microsoft/fluentui-emoji"),
}


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _joined(file: Path) -> list[tuple[int, float]]:
    """(samples seen in all trainings so far, held-out loss) of a curve to which several trainings were appended."""
    points, before, last = [], 0, 0
    for row in _rows(file):
        if "settings" in row:
            continue
        if row["samples"] <= last:
            before += last
        last = row["samples"]
        points.append((before + last, row["held_out"]))
    return points


def draw_curve(points: list[tuple[int, float]], size: tuple[int, int] = (640, 320)) -> Image.Image:
    """The held-out loss against samples seen."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, size[0] - 20, size[1] - 40
    most, highest = points[-1][0], max(loss for _, loss in points[3:] or points)
    for tenth in range(0, 11, 2):
        y = bottom - (bottom - top) * tenth / 10
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f"{highest * tenth / 10:.3f}", fill=(90, 90, 90))
        x = left + (right - left) * tenth / 10
        draw.text((x - 14, bottom + 6), f"{most * tenth / 10 / 1000:.0f}k", fill=(90, 90, 90))
    path = [
        (left + (right - left) * samples / most, bottom - (bottom - top) * min(loss / highest, 1))
        for samples, loss in points
    ]
    draw.line(path, fill=(30, 90, 200), width=2)
    draw.text((left, size[1] - 18), "samples seen; held-out loss of the velocity", fill=(60, 60, 60))
    return image


def _trainings(file: Path, figure: str) -> list[str]:
    """A table row for each training recorded in a curve: its settings, samples seen and last figure."""
    lines, settings = [], None
    rows = _rows(file)
    for row, following in zip(rows, [*rows[1:], {"settings": None}], strict=True):
        if "settings" in row:
            settings = row["settings"]
        elif "settings" in following:
            cells = (
                f"{settings['minutes']:g}",
                f"{settings['processes']} x {settings['batch']}",
                f"{settings['learning_rate']:g}",
                f"{row['samples']:,}",
                f"{row[figure]:.4g}",
                "all" if "code" in settings else "these",
            )
            lines.append(f"| {file.stem.removeprefix('curve_')} | {settings['device']} | {' | '.join(cells)} |")
    return lines


def _learned(name: str) -> str:
    """How a shipped concept was learned, as its file tells."""
    told = Concept.load(concept_path(name)).settings
    what = "keys and values" if told["layers"] == "keys-values" else "all layers"
    form = f"LoRA of rank {told['rank']}" if told["rank"] else "whole matrices"
    how = f"{told['steps']} steps of {told['optimiser']} at {told['learning_rate']:g}"
    return f"token and {form} of {what}: {how}, {told['pictures']} pictures, {told['woven']} woven scenes"


def _verdict(gate: Gate) -> str:
    return "yes" if gate.passed else "**no**"


def _use(vendor: str) -> str:
    if vendor in HELD_OUT_VENDORS:
        return "held out"
    if vendor in LINE_DRAWINGS:
        return "segmenter trained on, painted"
    return "trained on" if vendor in TRAINING_VENDORS else "helpers trained on"


def write_card(gates: list[Gate], segmenter: Segmenter) -> None:
    """Write the card and the picture of the curve."""
    points = _joined(MODEL_DIR / "curve_unet.jsonl")
    draw_curve(points).save(CURVE_FILE, optimize=True)
    gate_rows = "\n".join(
        f"| {gate.name} | {gate.value:.3f} {gate.unit} | {gate.least} {gate.unit} | {_verdict(gate)} |"
        for gate in gates
    )
    source_rows = "\n".join(
        f"| {vendor} | {_use(vendor)} | {author} | {licence} | {origin} |"
        for vendor, (author, licence, origin) in SOURCES.items()
    )
    trainings = _trainings(MODEL_DIR / "curve_vae.jsonl", "psnr")
    trainings += _trainings(MODEL_DIR / "curve_unet.jsonl", "held_out")
    concept_rows = "\n".join(
        f"| `{card.name}` | {card.word} | {card.kind} | {card.source} | {_learned(card.name)} |"
        for card in CONCEPTS.values()
    )
    size = sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) / 2**20
    CARD_FILE.write_text(
        _TEMPLATE.format(
            animals=", ".join(ANIMALS),
            backgrounds=", ".join(BACKGROUNDS),
            held_out_backgrounds=", ".join(HELD_OUT_BACKGROUNDS),
            held_out_vendors=", ".join(HELD_OUT_VENDORS),
            size=size,
            hash=model_hash(),
            samples=points[-1][0],
            loss=points[-1][1],
            gates=gate_rows,
            alone=segmentation_iou(segmenter, held_out_scenes(), described=False),
            own=segmentation_iou(segmenter, held_out_scenes(vendors=TRAINING_VENDORS)),
            sources=source_rows,
            concepts=concept_rows,
            trainings="\n".join(trainings),
        ),
        encoding="utf-8",
    )


_TEMPLATE = """\
# The embedded model

A small text-to-image latent diffusion model of Stable Diffusion's own classes, trained on drawn scenes, so that the
whole method runs offline on two CPU cores. It knows its own small world and nothing else. This card is written by
`python -m weaver.embedded.training gates`; nothing in it is typed by hand.

| | |
|---|---|
| pictures | 64x64 pixels, one to four animals before a background |
| animals | {animals} |
| backgrounds | {backgrounds} |
| words besides | eleven colours before an animal or a background |
| classes | `AutoencoderTiny` (f=4, latents [8, 16, 16]), `UNet2DConditionModel` (four levels), `CLIPTextModel` |
| prediction | v, Stable Diffusion's scaled-linear schedule |
| size | {size:.1f} MiB in float16 |
| SHA-256 of the weights | `{hash}` |
| samples seen | {samples:,} (held-out loss {loss:.4f}) |

## Gates

| gate | measured | at least | passed |
|---|---|---|---|
{gates}

Singles and pairs are sampled in 30 DDIM steps at guidance 3 and read by the helpers below. The inversion's PSNR is
against the autoencoder's own rendering, without guidance, under the true caption.

![samples](samples.png)

Rows: singles (two), singles with a colour, pairs (two), three animals, four animals.

![held-out loss](curve.png)

## Training

`make train-embedded` draws the scenes, trains the autoencoder, then denoiser and text encoder together, and rebuilds
everything derived from them. Half of the drawings are repainted (palette colours moved to eleven named ones, a tenth of
them not told in the caption), and a fifth of the backgrounds, so that a word stands for more than one look. A third of
the captions leave animals or the background out: in fusion a concept's prompt does not name its neighbours, and must
not paint them over. The curves lie beside the weights (`weights/curve_*.jsonl`).
These trainings, each from where the one before ended, made the weights. Under settings kept, "all" is everything that a
training follows from; of those with "these" only what this table shows, and perhaps the loop's own numbers, was written
down: no scenes, seeds, optimisers or version of the code.

| part | device | minutes | processes x batch | peak learning rate | samples | PSNR in dB, or loss | settings kept |
|---|---|---|---|---|---|---|---|
{trainings}

## Helpers

- `segmenter.py`: a word-conditioned U-Net trained on the generator's masks, with drawings mixed, bent and marked anew,
  and line drawings painted. Its gate is measured on scenes in the held-out vendors' drawings, described by their
  captions as templates are by their prompts; without a description it reaches {alone:.3f} there, and with one
  {own:.3f} in the drawings the model paints.
- `identity.py`: a classifier of drawings, the one measure of identity; similarities are cosines.

## Concepts held out

Never seen in training: the drawings of {held_out_vendors} and the backgrounds {held_out_backgrounds}.
A background is learned in the layers of Custom Diffusion, keys, values and one token, an animal as a LoRA of all
Linears of attention and feed-forward; both with settings of this model's own, which are not the paper's
(`TrainSettings.embedded`), and beside their pictures from scenes into which what is cut out of these is woven.

| concept | class word | kind | drawing or background | learned as |
|---|---|---|---|---|
{concepts}

## Drawings and licences

Rendered from Iconify's npm packages `@iconify-json/<set>`; sprites in `sprites/`, pictures in `concepts/pictures/`.
Changes made: rendered to pixels, cropped, scaled, tilted, mirrored, and in training recoloured. The licences' texts and
notices are in [sprites/LICENSES](sprites/LICENSES/NOTICE.md).

| set | use | author | licence | origin |
|---|---|---|---|---|
{sources}

The backgrounds are drawn by this package's own code. The weights are released under the package's licence.
"""
