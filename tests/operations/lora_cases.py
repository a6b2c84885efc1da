"""Inputs of `routed_lora`, its truth in float64, and how far from it eager PyTorch is."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from operations.cases import hard_weights, on_gpu
from weaver_kernels import AdapterStack, ContextPlan, LowRank, routed_lora_reference
from weaver_kernels.routed_lora.checks import output_size

MIXED = (4, 0, 16, 1, 33)  # ranks, over and over


def make_lora(
    *, b=1, t=40, c=24, o=20, s=3, ranks=MIXED, adapters=None, indexed=False, dtype=torch.float32,
    weights=hard_weights, strided=False, amplitude=1.0, seed=0,
    size=None, taps=1, stride=1, padding=0, dilation=1, channels_last=False,
):  # fmt: skip
    """Keyword arguments of `routed_lora`: of a Linear, or of a convolution of a map of `size` (H, W).

    `strided`: x and y are parts of wider tensors that are NaN beside.
    """
    rng = torch.Generator().manual_seed(seed)
    adapters = adapters or s
    shapes, kernel = ((b, t, c), (b, t, o)), ()
    if size:
        h, w = (output_size(side, taps, stride, padding, dilation) for side in size)
        t, kernel = h * w, (taps, taps)
        shapes = (b, c, *size), (b, o, h, w)
    x, y = (torch.randn(shape, generator=rng) * amplitude for shape in shapes)
    fan = (c * taps**2) ** 0.5
    factors = [
        LowRank(torch.randn(rank, c, *kernel, generator=rng) / fan, torch.randn(o, rank, generator=rng) / rank**0.5)
        if rank
        else None
        for rank in (ranks[i % len(ranks)] for i in range(adapters))
    ]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, y = ((part(one) if strided else one.contiguous(memory_format=layout)).to(dtype) for one in (x, y))
    case = {"y": part(y) if strided else y, "x": part(x) if strided else x}
    case |= {"adapters": AdapterStack.of(factors).to(dtype=dtype), "weights": weights(b, s, t, rng)}
    if adapters != s or indexed:
        case["adapter_index"] = torch.randint(0, adapters, (b, s), generator=rng)
    return case | ({"stride": stride, "padding": padding, "dilation": dilation} if size else {})


def part(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a tensor that is wider in its last two axes, NaN around them."""
    *front, height, width = x.shape
    wide = torch.full((*front, height + 1, width + 8), torch.nan, dtype=x.dtype)
    wide[..., :height, :width] = x
    return wide[..., :height, :width]


def planned(case: dict, **options) -> dict:
    """The same case with a plan."""
    plan = ContextPlan(case["weights"], case.get("adapter_index"), **options)
    return case | {"weights": plan.weights, "adapter_index": plan.context_index, "plan": plan}


def lora_on_gpu(case: dict) -> dict:
    """The case on the GPU, strides kept."""
    return on_gpu(case) | {"adapters": case["adapters"].to("cuda")}


def fresh(case: dict) -> dict:
    """The same case with a y of its own."""
    y = torch.empty_strided(case["y"].shape, case["y"].stride(), dtype=case["y"].dtype, device=case["y"].device)
    return case | {"y": y.copy_(case["y"])}


def poison_dead(case: dict) -> torch.Tensor:
    """Put NaN into y, and into x of a Linear, where no adapter is alive, and into all of x's last row, which has none;
    returns where that is, [B, T]."""
    dead = (case["weights"] == 0).all(1)
    _by_tokens(case["y"])[dead] = torch.nan
    if case["x"].ndim == 3:
        case["x"][dead] = torch.nan
    case["x"][-1] = torch.nan
    return dead


def assert_dead_untouched(out: torch.Tensor, dead: torch.Tensor) -> None:
    """What `poison_dead` put there still is, and nothing else is."""
    out = _by_tokens(out)
    assert out[dead].isnan().all() and torch.isfinite(out[~dead]).all()


def _by_tokens(y: torch.Tensor) -> torch.Tensor:
    """[B, T, O], also of a map."""
    return y.flatten(2).transpose(1, 2) if y.ndim == 4 else y


def truth(case: dict) -> torch.Tensor:
    """The reference in float64, on the numbers that the case has in its own type."""
    doubles = {name: case[name].double() for name in ("y", "x", "weights")}
    return routed_lora_reference(**case | doubles | {"adapters": case["adapters"].to(dtype=torch.float64)})


def eager(case: dict) -> torch.Tensor:
    """What a loop over adapters gives in the case's own type: two layers each, weighted and added."""
    y, x, adapters, weights = (case[name] for name in ("y", "x", "adapters", "weights"))
    b, s, _ = weights.shape
    index = case.get("adapter_index", torch.arange(s).expand(b, s))
    around = [case.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    out = y.clone()
    for row, slot in torch.cartesian_prod(torch.arange(b), torch.arange(s)).tolist():
        rank = slice(*adapters.starts[int(index[row, slot]) : int(index[row, slot]) + 2])
        down, up, weight = adapters.down[rank], adapters.up[rank].T, weights[row, slot].to(y.dtype)
        if not len(down):
            continue
        if down.ndim == 2:
            out[row] += weight[:, None] * F.linear(F.linear(x[row], down), up)
        else:
            inner = F.conv2d(x[row : row + 1], down, None, *around)
            out[row] += weight.view(inner.shape[2:]) * F.conv2d(inner, up[:, :, None, None])[0]
    return out


def _in_turn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] times weight [O, K] in float32, each product added to the sum of those before it in one rounding."""
    total = torch.zeros(*x.shape[:-1], len(weight))
    for k in range(x.shape[-1]):
        total = torch.addcmul(total.double(), x[..., k, None].double(), weight[:, k].double()).float()
    return total


def eager_in_turn(case: dict) -> torch.Tensor:
    """`eager` in float32 with every sum taken one product after another, as a processor without wide sums does it."""
    y, x, adapters, weights = (case[name] for name in ("y", "x", "adapters", "weights"))
    b, s, _ = weights.shape
    index = case.get("adapter_index", torch.arange(s).expand(b, s))
    out, down = _by_tokens(y).clone(), adapters.down
    if x.ndim == 4:
        around = {name: case.get(name, default) for name, default in (("dilation", 1), ("padding", 0), ("stride", 1))}
        places = F.unfold(x, down.shape[2:], **around)  # [b, C kh kw, T]
        x = places.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1, 2).mT  # [b, T, kh kw C]
        down = down.flatten(2).mT.flatten(1)  # [R, kh kw C]
    for row, slot in torch.cartesian_prod(torch.arange(b), torch.arange(s)).tolist():
        rank = slice(*adapters.starts[int(index[row, slot]) : int(index[row, slot]) + 2])
        inner = _in_turn(x[row], down[rank])
        out[row] += weights[row, slot].to(y.dtype)[:, None] * _in_turn(inner, adapters.up[rank].T)
    return out if y.ndim == 3 else out.mT.reshape(y.shape)


def eager_errors(case: dict, true: torch.Tensor) -> tuple[float, float]:
    """Largest and mean error of the eager loop, the worst over orders of summing, and over PyTorch's convolutions.

    These are several: with the zeros around the map written out it takes another one, of up to three times the error.
    One order alone is a matter of luck; the fewer numbers there are, the more are tried. In float32 the plainest is one
    of them: a processor that sums sixteen products side by side has a quarter of its error, another has not.
    """
    orders = min(max(2000 // true.numel(), 2), 16)
    rng = torch.Generator().manual_seed(0)
    results = []
    for i in range(orders):
        x, adapters = case["x"], case["adapters"]
        axis = 2 if x.ndim == 3 else 1
        order = torch.randperm(x.shape[axis], generator=rng) if i > 1 else torch.arange(x.shape[axis])
        ranks = torch.randperm(len(adapters.up), generator=rng) if i > 1 else torch.arange(len(adapters.up))
        ranks = ranks[torch.bucketize(ranks, adapters.offsets[1:-1].long(), right=True).argsort(stable=True)]
        changed = replace(adapters, down=adapters.down[ranks][:, order], up=adapters.up[ranks])
        tried = case | {"x": x.index_select(axis, order), "adapters": changed}
        if i % 2 and x.ndim == 4:
            tried |= {"x": F.pad(tried["x"], (case["padding"],) * 4), "padding": 0}
        results.append(eager(tried))
    if true.numel() and case["y"].dtype == torch.float32:
        results.append(eager_in_turn(case))
    found = []
    for result in results:
        error = (result.double() - true).abs()
        found.append((float(error.max()), float(error.mean())))
    return tuple(max(column) for column in zip(*found, strict=True))


def assert_within_twice_eager(out: torch.Tensor, case: dict) -> None:
    """The error against float64 is at most twice that of the eager loop, in the largest and in the mean.

    Where eager happens to be exact, a rounding of the result is allowed.
    """
    true = truth(case)
    error = (out.double() - true).abs()
    assert out.dtype == case["y"].dtype and out.shape == true.shape
    if not true.numel():
        return
    largest, mean = eager_errors(case, true)
    rounding = torch.finfo(out.dtype).eps * true.abs().max()
    assert torch.isfinite(out).all()
    assert error.max() <= 2 * largest + rounding, (float(error.max()), largest)
    assert error.mean() <= 2 * mean + rounding / 4, (float(error.mean()), mean)
