"""LoRA files, of diffusers, PEFT and kohya's scripts: names differ, the mathematics is one.

A LoRA adds `alpha / r * up @ down` to a weight (arXiv 2106.09685). Names are turned into diffusers' module paths by its
own converters; what is left here is to scale, to pair factors and to refuse what is no plain LoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import torch

from weaver.concepts.changes import ranks_of
from weaver.concepts.concept_checks import parted
from weaver.concepts.formats.bundled import bundled_tokens, is_bundled
from weaver.concepts.formats.opening import OpenedFile
from weaver.concepts.formats.parsed import ParsedFile
from weaver.concepts.formats.refused import OTHER_BASE
from weaver.concepts.formats.token_file import token_beside
from weaver.concepts.formats.untrusted import Refusal
from weaver.errors import told
from weaver.values import is_number
from weaver_kernels import LowRank

__all__ = ["parse", "recognises"]

_DOWN = re.compile(r"(\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)(\.\w+)?\.weight$")
_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.\w+)?\.weight$")
_NOTES = ("ss_base_model_version", "ss_sd_model_name", "ss_steps", "ss_learning_rate", "ss_network_alpha")
_MOST_ALPHA = 1e6  # a thousand times what anybody trains with
_PEFT_PREFIX, _PEFT_CONFIG = "base_model.model.", "adapter_config.json"
_LARGEST_CONFIG = 1 << 20  # bytes; one that names every module of SDXL has 60 kB
_PLAIN_NAME = re.compile(r"^[\w.]+$")  # what of a pattern is taken: anything more could take for ever to match
_OLD_TEXT = re.compile(r"\.(?:to_(q|k|v|out)_lora|lora_linear_layer|lora)\.(down|up)\.")  # diffusers' without PEFT
_OLD_PROJECTIONS = {"q": ".q_proj", "k": ".k_proj", "v": ".v_proj", "out": ".out_proj"}
_TEXT_MODULES = ("text_model.", "encoder.layers.")  # which of the two depends on the version of transformers
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_SGM = ("input_blocks", "middle_block", "output_blocks")
# Of those 12 blocks at most, as any U-Net of SD 1, 2 and SDXL has: the converter looks through all keys once a number.
_SGM_BLOCK = re.compile(r"^lora_unet_(?:input_blocks|middle_block|output_blocks)_(?:[0-9]|1[01])_")
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_UNET_MODULES = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.")
_LAYERS_PER_BLOCK = SimpleNamespace(layers_per_block=2)  # of SDXL's U-Net, whose blocks kohya's scripts count otherwise


def recognises(opened: OpenedFile) -> bool:
    """Whether a file is a LoRA of any dialect, by names: it need not be loaded."""
    return any(isinstance(value, torch.Tensor) and _DOWN.search(str(key)) for key, value in opened.tensors.items())


def parse(opened: OpenedFile) -> ParsedFile | None:
    """Read a LoRA of any dialect; None for files of another kind. Raises `ConceptError` for one that can't be used.

    Alphas are tensors in kohya's files, in the metadata of diffusers' and in the `adapter_config.json` beside PEFT's,
    without which one of PEFT's is refused: nobody can tell its scale. A token is in the file beside it that `convert`
    left there, or in the file itself where that is a bundle.
    """
    if not recognises(opened):
        return None
    tensors = {
        key: value for key, value in opened.tensors.items() if isinstance(value, torch.Tensor) and not is_bundled(key)
    }
    try:
        config, config_file = _config(opened)
        parsed = replace(_parsed(tensors, config, opened.metadata), config_file=config_file)
    except Refusal as refusal:
        raise opened.error(str(refusal)) from refusal
    beside = token_beside(opened)
    return replace(parsed, **beside._asdict() | {"embeddings": bundled_tokens(opened) | dict(beside.embeddings)})


def _config(opened: OpenedFile) -> tuple[dict, str]:
    """How a LoRA was made, of all its parts ("unet.r", ...) or of its one ("r"); empty where nothing tells.

    And the name of the file beside it that told, if one did.
    """
    beside, text = opened.path.with_name(_PEFT_CONFIG), opened.metadata.get("lora_adapter_metadata")
    of_peft = any(key.startswith(_PEFT_PREFIX) for key in opened.tensors)
    if of_peft and not text and not beside.is_file():
        raise opened.error(f"a LoRA of PEFT's, whose scale is in its {_PEFT_CONFIG}: put that beside it")
    try:
        content = text or (_content(beside) if of_peft else "{}")
        if len(content) > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG} bytes")
        config = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise opened.error(f"how it was made can't be read ({told(str(error))}): save it again") from error
    if not isinstance(config, dict):
        raise opened.error(f"how it was made is {told(config)}, expected settings by name: save it again")
    return config, beside.name if of_peft and not text else ""


def _content(path: Path) -> bytes:
    """The start of a file, one byte longer than it may be."""
    with path.open("rb") as file:
        return file.read(_LARGEST_CONFIG + 1)


def _parsed(tensors: Mapping[str, torch.Tensor], config: Mapping, metadata: Mapping[str, str]) -> ParsedFile:
    if odd := [key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key]:
        raise Refusal(f"a DoRA ({told(odd[0])}): its magnitudes can't be added to weights; train a plain LoRA")
    kohya = all(key.startswith(_KOHYA) for key in tensors)
    parts = _by_part(_from_kohya(tensors) if kohya else tensors)
    scales = {part: _Scales(config, part) for part in parts}
    changes = {part: _pairs(part, entries, scales[part]) for part, entries in parts.items()}
    unet = changes.pop("unet", {})
    text = {
        f"{part}.{path.removeprefix('text_model.')}": _flat(change)
        for part, found in changes.items()
        for path, change in found.items()
    }
    deltas, outside = parted(unet)
    return ParsedFile(
        format="kohya LoRA" if kohya else "diffusers LoRA",
        deltas={path: _flat(change) for path, change in deltas.items()},
        outside=outside,
        text_deltas=text,
        settings=_settings(metadata, [*unet.values(), *text.values()]),
    )


def _from_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under diffusers' names, each up factor times its alpha / r, and LoCon's middle factor taken into its down."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        up = f"{name}.lora_up.weight"
        if up not in tensors:
            raise Refusal(f"{key} has no {up}: the file is not whole, fetch it again")
        if odd := [part for part in (key, up) if tensors[part].ndim not in (2, 4)]:
            raise Refusal(f"{odd[0]} has shape {tuple(tensors[odd[0]].shape)}, expected [r, in] or [out, r]")
        alpha, rank = tensors.pop(f"{name}.alpha", None), len(tensors[key])
        if alpha is not None:
            if alpha.numel() != 1:
                raise Refusal(f"{name}.alpha has shape {tuple(alpha.shape)}, expected a number: fetch the file again")
            tensors[up] = _times(tensors[up], _checked(alpha.float().item()) / rank)
        middle = tensors.pop(f"{name}.lora_mid.weight", None)
        if middle is not None:
            if middle.ndim != 4 or middle.shape[1] != rank:
                raise Refusal(f"{name}.lora_mid has shape {tuple(middle.shape)}, expected [r, {rank}, h, w]")
            tensors[key] = torch.einsum("ijhw,jc->ichw", middle.float(), tensors[key].flatten(1).float())
    if odd := [key for key in tensors if any(name in key for name in _SGM) and not _SGM_BLOCK.match(key)]:
        raise Refusal(f"{told(odd[0])} is of a block that no Stable Diffusion has: {OTHER_BASE}")
    from weaver.models import quietly

    count = len(tensors)
    try:
        with quietly():
            from diffusers import StableDiffusionXLPipeline  # seconds, which no file that can't be opened waits for

            named = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=_LAYERS_PER_BLOCK)[0]
    except (KeyError, ValueError, IndexError, AttributeError) as error:  # a converter's, led there by odd names
        raise Refusal(
            f"its layers are not Stable Diffusion's, or not LoRA's ({told(str(error))}): {OTHER_BASE}"
        ) from error
    if len(named) != count:  # the converter drops what is under names of both kinds, and lets one overwrite another
        raise Refusal(
            f"{count - len(named)} of its {count} factors are lost among names of two kinds (input_blocks and "
            "down_blocks): save it under those of one"
        )
    return named


def _by_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of the U-Net and of each text encoder, named by paths in it as PEFT does."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        part, _, rest = name.partition(".")
        if part not in _PARTS:
            part, rest = ("unet" if name.startswith(_UNET_MODULES) else "text_encoder"), name
            if part == "text_encoder" and not name.startswith(_TEXT_MODULES):
                raise Refusal(f"a LoRA of another model than Stable Diffusion (it has {told(key)}): {OTHER_BASE}")
        parts.setdefault(part, {})[rest] = tensor
    found = {}
    for part, entries in parts.items():
        if part == "unet":
            found[part] = convert_unet_state_dict_to_peft(entries)
        else:
            found[part] = {_OLD_TEXT.sub(_as_pefts, key): tensor for key, tensor in entries.items()}
            if lost := len(entries) - len(found[part]):
                raise Refusal(f"{lost} factors of {part} are there under two names: save it under those of one")
    return found


def _as_pefts(old: re.Match) -> str:
    """What PEFT calls a factor of a text encoder that diffusers called otherwise."""
    projection, factor = old.groups()
    return f"{_OLD_PROJECTIONS.get(projection, '')}.lora_{'A' if factor == 'down' else 'B'}."


def _pairs(part: str, entries: Mapping[str, torch.Tensor], scales: _Scales) -> dict[str, LowRank]:
    """Path of a module -> its two factors, scaled."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in entries.items():
        match = _FACTOR.match(key)
        if match is None:
            raise Refusal(f"{part}.{key} is no factor of a LoRA: this file has more in it than is read")
        factors.setdefault(match[1], {})[match[2]] = tensor
    found = {}
    for path, pair in factors.items():
        if len(pair) < 2:
            lacking = "B" if "A" in pair else "A"
            raise Refusal(f"{part}.{path} has no lora_{lacking}: the file is not whole, fetch it again")
        down, up = pair["A"], pair["B"]
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != len(down) or up[0, 0].numel() != 1:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise Refusal(f"{part}.{path} has factors {shapes}, expected [r, in] and [out, r]: fetch the file again")
        found[path] = LowRank(down, _times(up, scales.of(path, len(down))))
    return found


class _Scales:
    """What a LoRA's product is multiplied by, from the settings that diffusers and PEFT keep; 1 without any."""

    def __init__(self, config: Mapping, part: str):
        own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
        self._config = own or config
        if self._config.get("use_dora"):
            raise Refusal("a DoRA: its magnitudes can't be added to weights; train a plain LoRA")

    def of(self, path: str, rank: int) -> float:
        """The scale of one module's product; names with alphas of their own are ends of its path, as in PEFT."""
        patterns = self._config.get("alpha_pattern") or {}
        try:
            matches = (value for key, value in patterns.items() if _ends(path, key))
            alpha = next(matches, self._config.get("lora_alpha", rank))
        except (TypeError, AttributeError) as error:
            raise Refusal(f"its alphas are not by names of modules ({told(str(error))})") from error
        return _checked(alpha) / (sqrt(rank) if self._config.get("use_rslora") else rank)


def _checked(alpha: object) -> float:
    if not is_number(alpha) or abs(alpha) > _MOST_ALPHA:
        raise Refusal(f"its alpha is {told(alpha)}, expected a number up to {_MOST_ALPHA:g}: save it again")
    return alpha


def _ends(path: str, pattern: str) -> bool:
    """Whether a path is what a pattern names, or ends with it."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not _PLAIN_NAME.match(name):
        raise Refusal(f"its alpha_pattern names modules by {told(pattern)}: save it with names, such as attn2.to_k")
    return path == name or (not pattern.startswith("^") and path.endswith(f".{name}"))


def _times(factor: torch.Tensor, scale: float) -> torch.Tensor:
    """A factor times `scale`, in 32 bits where 16 would round it."""
    return factor if scale == 1 else factor.float() * scale


def _flat(change: LowRank) -> LowRank:
    """The same for a Linear, where it is kept as a convolution of one pixel."""
    return LowRank(*(part.flatten(1) if part.ndim == 4 and part.shape[2:] == (1, 1) else part for part in change))


def _settings(metadata: Mapping[str, str], changes: list[LowRank]) -> dict[str, object]:
    """What is known of how it was trained: ranks, and a few of the notes that kohya's scripts leave."""
    ranks = ranks_of(changes)
    notes = {key.removeprefix("ss_"): metadata[key] for key in _NOTES if metadata.get(key) not in (None, "", "None")}
    return {"rank": ranks[0] if len(ranks) == 1 else ranks} | notes
