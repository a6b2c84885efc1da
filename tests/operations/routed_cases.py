"""Inputs of `routed_lora`, its truth in float64, and how far from it eager products are."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from operations.cases import hard_weights
from weaver_kernels import AdapterStack, LowRank, routed_lora_reference


def make_routed(
    *, b=2, t=40, c=24, o=40, ranks=(4, 0, 9), s=None, dtype=torch.float32, weights=hard_weights, indexed=None,
    strided=False, convolution=None, channels_last=False, seed=0,
):  # fmt: skip
    """Keyword arguments of `routed_lora`, y first. `convolution` is (sides of x, kernel, stride, padding, dilation);
    `strided`: y and x are parts of wider tensors that are NaN beside."""
    rng = torch.Generator().manual_seed(seed)
    s = s or len(ranks)

    def random(*shape):
        return torch.randn(shape, generator=rng)

    case, window = {"y": None}, ()
    if convolution is None:
        y, x = random(b, t, o), random(b, t, c)
    else:
        (height, width), taps, stride, padding, dilation = convolution
        window = (taps, taps)
        x = random(b, c, height, width)
        y = F.conv2d(x, random(o, c, *window), None, stride, padding, dilation)
        t = y.shape[2] * y.shape[3]
        case |= {"stride": stride, "padding": padding, "dilation": dilation}
    factors = [
        LowRank(random(r, c, *window) * (c * len(window) ** 2 or c) ** -0.5, random(o, r) * r**-0.5) if r else None
        for r in ranks
    ]
    y, x = (part(z) if strided else z for z in (y.to(dtype), x.to(dtype)))
    if channels_last:
        y, x = (z.to(memory_format=torch.channels_last) for z in (y, x))
    case |= {"y": y, "x": x, "adapters": AdapterStack.of(factors).to("cpu", dtype), "weights": weights(b, s, t, rng)}
    if s != len(ranks) or indexed:
        case["adapter_index"] = torch.randint(0, len(ranks), (b, s), generator=rng)
    return case


def part(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a tensor that is wider on every side, NaN around them."""
    wide = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
    found = wide[tuple(slice(1, n + 1) for n in x.shape)]
    return found.copy_(x)


def routed_truth(case: dict) -> torch.Tensor:
    """The reference in float64, on the numbers that the case has in its own type."""
    doubles = {name: case[name].double() for name in ("y", "x", "weights")}
    return routed_lora_reference(**case | doubles | {"adapters": case["adapters"].to("cpu", torch.float64)})


def eager_error(case: dict, true: torch.Tensor) -> float:
    """Largest error of a loop over adapters in the case's own type, over a few orders of summing."""
    found, rng = [], torch.Generator().manual_seed(0)
    for i in range(4):
        order = torch.randperm(case["x"].shape[1 if case["x"].ndim == 4 else 2], generator=rng)
        order = order if i else order.sort().values
        found.append(float((_eager(case, order).double() - true).abs().max()))
    return max(found)


def _eager(case: dict, order: torch.Tensor) -> torch.Tensor:
    y, x, stack, weights = (case[name] for name in ("y", "x", "adapters", "weights"))
    x = x[:, order] if x.ndim == 4 else x[..., order]
    stack = replace(stack, down=stack.down[:, order])
    b, s, _ = weights.shape
    index = case.get("adapter_index", torch.arange(s).expand(b, s))
    out = y.clone()
    geometry = [case.get(name) for name in ("stride", "padding", "dilation")]
    for row, slot in torch.cartesian_prod(torch.arange(b), torch.arange(s)).tolist():
        which = slice(*stack.starts[int(index[row, slot]) :][:2])
        if which.start == which.stop:
            continue
        weight = weights[row, slot].to(y.dtype)
        if x.ndim == 4:
            inner = F.conv2d(x[row : row + 1], stack.down[which], None, *geometry)
            added = F.conv2d(inner, stack.up[which].T[..., None, None])[0]
            out[row] += weight.view_as(added[0]) * added
        else:
            out[row] += weight[:, None] * (x[row] @ stack.down[which].T @ stack.up[which])
    return out


def assert_routed(out: torch.Tensor, case: dict) -> None:
    """The error against float64 is at most twice that of the eager loop; a rounding of the result is allowed."""
    true = routed_truth(case)
    error = (out.double() - true).abs()
    rounding = torch.finfo(out.dtype).eps * true.abs().max() * 2
    assert out.dtype == case["y"].dtype and out.shape == true.shape and torch.isfinite(out).all()
    assert error.max() <= 2 * eager_error(case, true) + rounding, (float(error.max()), eager_error(case, true))
