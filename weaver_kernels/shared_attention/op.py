"""`shared_attention`: scores and exponentials once for all rows, their values side by side.

On an NVIDIA GPU with Triton that is FlexAttention, whose documentation has a value width Ev apart from the key width
E; `scaled_dot_product_attention` falls back to the whole map there. Elsewhere, in float32, and for heads too narrow or
too wide for it, attention is written out over blocks of queries.
"""

from __future__ import annotations

from functools import cache

import torch

from weaver_kernels.checks import gradient_reasons, own_precision, require
from weaver_kernels.devices import kernel_arch
from weaver_kernels.shared_attention.checks import shape_reasons
from weaver_kernels.tuning import config_table

__all__ = ["shared_attention"]

_SETTINGS = config_table("shared_attention")  # read here, because a compiled caller can't open files
_FLEX_DIMS = range(16, 257)  # compiled FlexAttention takes no narrower heads, and of wider ones a block does not fit
# Each size of map and number of rows is compiled by itself, and after 8 of them PyTorch would go on uncompiled without
# a word: with all scores in memory, 1.7 GB of them at 96 x 96 tokens and 5 heads.
_MOST_COMPILED = 64


def shared_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Attention of several rows that have their queries and keys in common: `softmax(scale Q K^T) V_r`.

    For layers whose queries and keys are injected (arXiv 2404.03913, section 3.3, after Plug-and-Play): guidance rows
    and source row attend alike and differ in their values. Rows R, tokens T, keys L, heads H, head dimension D, value
    dimension E. Inference only.

    Parameters
    ----------
    q : [1, T, H, D], any strides
    k : [1, L, H, D]
    v : [R, L, H, E]
    scale : positive; None is `1 / sqrt(D)`

    Returns
    -------
    [R, T, H, E] in q's dtype, with logits and sums in float32 (float64 for float64)

    Raises
    ------
    ValueError with every reason, when shapes or dtypes do not fit or gradients are asked for.
    """
    require("shared_attention", shape_reasons(q, k, v, scale) + gradient_reasons(q=q, k=k, v=v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arch, half = kernel_arch(q.device), q.dtype in (torch.float16, torch.bfloat16)
    if arch and half and q.shape[-1] in _FLEX_DIMS and v.shape[-1] in _FLEX_DIMS:
        at_a_time = _SETTINGS["value_width"] // v.shape[-1]
        return torch.cat([_flex(q, k, rows, scale, flex_blocks(arch)) for rows in v.split(at_a_time)])
    return _by_blocks(q, k, v, scale, _SETTINGS["scores"])


def flex_blocks(arch: int) -> dict[str, int]:
    """FlexAttention's `kernel_options` for a compute capability (90 is 9.0).

    Its own choice follows the key width alone, and does not fit values side by side. A device that is not in
    `configs/shared_attention.json` has the blocks that fit all of them.
    """
    row = next((row for row in _SETTINGS["rows"] if arch in row["arch"]), _SETTINGS["default"])
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    # Without this, fewer than 128 queries take another kernel, with blocks of its own.
    return {name: row[name] for name in names} | {"FORCE_USE_FLEX_ATTENTION": True}


def _flex(q, k, v, scale, blocks) -> torch.Tensor:
    """FlexAttention on values side by side, compiled unless the caller is being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    beside = v.permute(2, 1, 0, 3).flatten(2)[None]  # [1, H, L, R * E]
    arguments = {"scale": scale, "kernel_options": blocks}
    if torch.compiler.is_compiling():
        out = flex_attention(q.transpose(1, 2), k.transpose(1, 2), beside, **arguments)
    else:
        with torch.compiler.config.patch(recompile_limit=_MOST_COMPILED):
            out = _compiled_flex()(q.transpose(1, 2), k.transpose(1, 2), beside, **arguments)
    return out[0].unflatten(-1, (len(v), -1)).permute(2, 1, 0, 3)  # from [H, T, R * E]


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@own_precision
def _by_blocks(q, k, v, scale, most_scores) -> torch.Tensor:
    """The map in blocks of queries, so that at most so many scores exist at a time."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, n_keys, heads, width = v.shape
    keys = k[0].to(work).permute(1, 2, 0)  # [H, D, L]
    beside = v.to(work).permute(2, 1, 0, 3).reshape(heads, n_keys, rows * width)  # [H, L, R * E]
    out = torch.empty(rows, q.shape[1], heads, width, dtype=q.dtype, device=q.device)
    block = max(1, most_scores // (heads * n_keys))
    for start in range(0, q.shape[1], block):
        query = q[0, start : start + block].to(work).transpose(0, 1)  # [H, t, D]
        scores = torch.baddbmm(keys.new_empty(()), query, keys, beta=0, alpha=scale).softmax(-1)
        found = torch.bmm(scores, beside).unflatten(-1, (rows, width))  # [H, t, R, E]
        out[:, start : start + block] = found.permute(2, 1, 0, 3)
    return out
