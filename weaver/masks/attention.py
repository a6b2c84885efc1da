"""Masks from the cross-attention of the model itself: where in the template does it look for a word?

Needs no other model and works for every word the model knows. It says where a word would be, not whether it is: of
what the prompt names every word is found somewhere. Its maps are coarse, so they are drawn along the edges of the
picture. `python -m benchmarks.mask_sources` measures it beside the embedded segmenter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image

from weaver.compiled import hooks_run
from weaver.concepts.encoding import encode
from weaver.concepts.prompts import tokenize
from weaver.conditioning import make_time_ids, unet_arguments
from weaver.latents import encode_image, vae_scale_factor
from weaver.layers import cross_attention_paths, layer_size
from weaver.masks.assign import Found, Wish, assigned_masks
from weaver.masks.components import found_in, tidy
from weaver.masks.compose import MaskError
from weaver.masks.edges import follow_edges
from weaver.schedule import ddim_scheduler

__all__ = ["attention_maps", "attention_masks", "attention_objects", "capture_cross_attention", "word_positions"]

_REACH = 2  # cells of latents, about which maps are drawn along the picture's edges


def attention_masks(pipe, image: Image.Image, prompt: str, words: Sequence[str], **options) -> torch.Tensor:
    """Find the object of every class word in a picture that `prompt` describes.

    A word that stands k times in `words` gets k objects, left to right; they are found as `attention_objects` says,
    whose `options` are noise_levels, seed and progress.

    Returns [N, height, width] bool, one for each of `words`. Raises `MaskError` when a word is not in the prompt, and,
    showing what was found, when there are too few objects of it. A word that the picture lacks is not told: no
    threshold of its map parts such words from those that are there.
    """
    wishes = [Wish(word) for word in words]
    return assigned_masks(attention_objects(pipe, image, prompt, wishes, **options), wishes)


def attention_objects(pipe, image: Image.Image, prompt: str, wishes: Sequence[Wish], **options) -> list[Found]:
    """Find every object that wishes may mean in a picture that `prompt` describes; `weaver.masks.assign` tells which is
    whose.

    Maps follow the edges of the picture (`follow_edges`). A pixel belongs to the word whose map is highest there, if
    that map is above the threshold which best parts it in two (Otsu's). Specks are dropped, holes filled, and a mask is
    cut into objects where several are asked for (`found_in`).

    Parameters
    ----------
    wishes : each with a word; `MaskError` where the prompt does not have it
    options : noise_levels, seed and progress of `attention_maps`
    """
    words = list(dict.fromkeys(wish.word for wish in wishes))
    maps = attention_maps(pipe, image, prompt, words, **options)
    size = (image.height, image.width)
    maps = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0][: len(words)]
    maps = follow_edges(maps, image, _REACH * vae_scale_factor(pipe.vae)).float()
    leading = maps.argmax(0)
    masks = torch.stack([tidy((leading == k) & (maps[k] > _otsu(maps[k]))) for k in range(len(words))])
    return found_in(masks, words, wishes)


@torch.no_grad()
def attention_maps(
    pipe,
    image: Image.Image,
    prompt: str,
    words: Sequence[str],
    *,
    noise_levels: Sequence[float] = (0.1, 0.25, 0.4, 0.55),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Average the attention to every word over heads, layers and noise levels.

    Each layer's map is divided by its mean over the plane. Layers count by how well they tell the words apart: the
    part of the maps' mass that two of the words, or a word and the rest of the prompt, do not share.

    Parameters
    ----------
    noise_levels : parts of the training timesteps at which noise is added to the picture and attention is read.
    progress : called after each of them with (done, total)

    Returns [N + 1, h, w] float32 at the size of the latents, mean one each; the last is of the rest of the prompt.
    """
    places = word_positions(pipe, prompt, words)
    latents = encode_image(pipe.vae, image).to(pipe.unet.dtype)
    text, pooled = encode(pipe, prompt)
    time_ids = make_time_ids(pipe, (image.height, image.width), text)
    arguments = unet_arguments(text.to(latents), pooled, time_ids)
    scheduler = ddim_scheduler(pipe.scheduler)  # the user's may scale its noise otherwise
    total = scheduler.config.num_train_timesteps
    generator = torch.Generator("cpu").manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    with capture_cross_attention(pipe.unet) as captured:
        for done, level in enumerate(noise_levels, start=1):
            t = torch.tensor([min(int(level * total), total - 1)], device=latents.device)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            pipe.unet(scheduler.add_noise(latents, noise, t), t, **arguments)
            for path, attention in captured.items():
                sums[path] = sums.get(path, 0) + torch.stack([attention[0][:, place].mean(1) for place in places])
            if progress:
                progress(done, len(noise_levels))
    size = tuple(latents.shape[-2:])
    mean, weights = 0, 0
    for path in sorted(sums):
        maps = sums[path] / sums[path].mean(1, keepdim=True)  # [N + 1, T], each with mean one
        weight = 1 - _shared(maps)
        maps = maps.unflatten(1, layer_size(path, len(pipe.unet.config.block_out_channels), size))
        mean = mean + weight * F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
        weights += weight
    return (mean / weights).float().cpu()


@contextmanager
def capture_cross_attention(unet: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the attention of every attn2 in each forward pass, leaving its processor and its result as they are.

    Yields ``{"<path>.attn2": [B, T, L] float32, mean of the heads}``, replaced at every pass.
    """
    captured: dict[str, torch.Tensor] = {}
    handles = []

    def recorder(path: str):
        def record(attn, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            # The map itself is wanted, which no operation of weaver_kernels returns.
            q, k = (x.unflatten(-1, (attn.heads, -1)).float() for x in (attn.to_q(hidden), attn.to_k(text)))
            scores = torch.einsum("bthd,blhd->bhtl", q, k) * attn.scale
            captured[path] = scores.softmax(-1).mean(1)

        return record

    try:
        for path in cross_attention_paths(unet):
            handles.append(unet.get_submodule(path).register_forward_pre_hook(recorder(path), with_kwargs=True))
        with hooks_run(unet):
            yield captured
    finally:
        for handle in handles:
            handle.remove()


def word_positions(pipe, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """The positions in the encoded prompt of every word, then of all other words.

    Both tokenizers of SDXL give a word the same positions.

    Raises `MaskError` for a word that is not in the prompt.
    """
    ids, _, length = tokenize(pipe, prompt)
    ids = ids[0, :length].tolist()
    places = []
    for word in words:
        wanted = pipe.tokenizer(word, add_special_tokens=False).input_ids
        starts = [i for i in range(1, length - len(wanted)) if ids[i : i + len(wanted)] == wanted]
        if not wanted or not starts:
            raise MaskError(f"no attention map for {word!r}: it is not in the prompt {prompt!r}")
        places.append([start + i for start in starts for i in range(len(wanted))])
    named = {place for group in places for place in group}
    rest = [i for i in range(1, length - 1) if i not in named] or [length - 1]
    return [*places, rest]


def _shared(maps: torch.Tensor) -> float:
    """The mass that two of maps [N, T] with mean one have in common, 0..1, averaged over the pairs."""
    pairs = [torch.minimum(maps[i], maps[j]).mean() for i in range(len(maps)) for j in range(i)]
    return float(torch.stack(pairs).mean())


def _otsu(values: torch.Tensor) -> torch.Tensor:
    """The threshold with the greatest variance between the two sides (Otsu, 1979)."""
    ordered = values.flatten().double().sort().values
    count = torch.arange(1, len(ordered))
    sums = ordered.cumsum(0)
    low = sums[:-1] / count
    high = (sums[-1] - sums[:-1]) / (len(ordered) - count)
    return ordered[(count * (len(ordered) - count) * (low - high) ** 2).argmax()].to(values.dtype)
