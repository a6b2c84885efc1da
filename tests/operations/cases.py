"""Inputs of `context_attention`, its truth in float64, and how far from it eager attention is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from weaver_kernels import context_attention_reference


def hard_weights(b, s, t, rng, suppression=0.5):
    """One concept a token, and base everywhere with `-suppression`; rows after the first attend to one context."""
    weights = torch.zeros(b, s, t)
    weights[1:, -1] = 1
    label = torch.randint(0, max(s - 1, 1), (t,), generator=rng)
    weights[0] = (label == torch.arange(s)[:, None]) * (1 + suppression)
    weights[0, -1] = -suppression if s > 1 else 1.0
    return weights


def soft_weights(b, s, t, rng):
    """Any sign and size, a third of them zero."""
    weights = torch.randn(b, s, t, generator=rng)
    return weights * (torch.rand(b, s, t, generator=rng) > 1 / 3)


def make_case(
    *, b=1, t=40, h=1, d=16, s=3, length=20, contexts=None, dtype=torch.float32, q_each=False, ragged=False,
    weights=hard_weights, indexed=None, strided=False, amplitude=1.0, seed=0,
):  # fmt: skip
    """Keyword arguments of `context_attention`. `strided`: q, k, v are parts of wider tensors that are NaN beside."""
    rng = torch.Generator().manual_seed(seed)
    contexts = contexts or s
    shapes = {"q": (b, s, t, h, d) if q_each else (b, t, h, d), "k": (contexts, length, h, d)}
    shapes["v"] = shapes["k"]
    case = {name: torch.randn(shape, generator=rng) * amplitude for name, shape in shapes.items()}
    case = {name: (part(x) if strided else x).to(dtype) for name, x in case.items()}
    if strided:
        case = {name: part(x) for name, x in case.items()}
    case["weights"] = weights(b, s, t, rng)
    if contexts != s or indexed:
        case["context_index"] = torch.randint(0, contexts, (b, s), generator=rng)
    if ragged:
        lengths = torch.randint(0, length + 1, (contexts,), generator=rng)
        lengths[0] = 0
        case["key_lengths"] = lengths
    return case


def part(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a tensor that is wider in every head and token, NaN around them."""
    *front, heads, dim = x.shape
    wide = torch.full((*front, heads + 1, dim + 8), torch.nan, dtype=x.dtype)
    wide[..., :heads, :dim] = x
    return wide[..., :heads, :dim]


def assert_compiled_once(compiled, arguments: dict, case: dict, index: str, assert_right) -> None:
    """A compiled operation is right for a case of 2 rows, 3 contexts and 50 tokens, `arguments` being those or with a
    plan, and for other masks, without being compiled again; `index` is what its argument is called."""
    with torch.no_grad():
        assert_right(compiled(**arguments), case)
        with torch.compiler.set_stance("fail_on_recompile"):
            changed = case | {"weights": soft_weights(2, 3, 50, torch.Generator().manual_seed(1))}
            if "plan" in arguments:
                arguments["plan"].update(changed["weights"], changed[index])
            else:
                arguments = changed
            assert_right(compiled(**arguments), changed)


def on_gpu(case: dict) -> dict:
    """The case on the GPU, strides kept."""

    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        return moved.copy_(x)

    return {name: move(value) for name, value in case.items()}


def truth(case: dict) -> torch.Tensor:
    """The reference in float64, on the numbers that the case has in its own type."""
    doubles = {name: case[name].double() for name in ("q", "k", "v", "weights")}
    return context_attention_reference(**case | doubles)


def eager(case: dict) -> torch.Tensor:
    """What a loop over contexts gives in the case's own type: one attention each, weighted and added."""
    q, k, v, weights = (case[name] for name in ("q", "k", "v", "weights"))
    b, s, t = weights.shape
    index = case.get("context_index", torch.arange(s).expand(b, s))
    lengths = case.get("key_lengths", torch.full((len(k),), k.shape[1]))
    out = torch.zeros(b, t, *q.shape[-2:], dtype=q.dtype)
    for row, slot in torch.cartesian_prod(torch.arange(b), torch.arange(s)).tolist():
        context = int(index[row, slot])
        length = int(lengths[context])
        if length:
            query = q[row] if q.ndim == 4 else q[row, slot]
            one = (x.transpose(0, 1)[None] for x in (query, k[context, :length], v[context, :length]))
            attended = F.scaled_dot_product_attention(*one, scale=case.get("scale"))[0].transpose(0, 1)
            out[row] += weights[row, slot, :, None, None].to(q.dtype) * attended
    return out


def eager_errors(case: dict, true: torch.Tensor) -> tuple[float, float]:
    """Largest and mean error of the eager loop, the worst over PyTorch's two attentions and orders of summing `q . k`.

    One order alone is a matter of luck: where two logits are close, a rounding of one of them is the whole error, and
    one of 60 interpreted cases would fail. The fewer numbers there are, the more orders are tried.
    """
    orders = min(max(2000 // max(true.numel(), 1), 4), 64)
    rng = torch.Generator().manual_seed(0)
    dim = case["q"].shape[-1]
    found = []
    for i in range(orders):
        order = torch.randperm(dim, generator=rng) if i > 1 else torch.arange(dim)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if i % 2 == 0 else SDPBackend.MATH):
            error = (eager(case | {name: case[name][..., order] for name in ("q", "k")}).double() - true).abs()
        found.append((float(error.max()), float(error.mean())))
    return tuple(max(column) for column in zip(*found, strict=True))


def assert_within_twice_eager(out: torch.Tensor, case: dict) -> None:
    """The error against float64 is at most twice that of the eager loop, in the largest and in the mean.

    Where eager happens to be exact, a rounding of the result is allowed, and in float32 one of each context's part.
    """
    true = truth(case)
    error = (out.double() - true).abs()
    largest, mean = eager_errors(case, true)
    parts = case["weights"].abs().sum(1).max() * case["v"].float().nan_to_num().abs().max()
    rounding = torch.finfo(out.dtype).eps * true.abs().max() + torch.finfo(torch.float32).eps * parts
    assert out.dtype == case["q"].dtype and out.shape == true.shape
    assert torch.isfinite(out).all()
    assert error.max() <= 2 * largest + rounding, (float(error.max()), largest)
    assert error.mean() <= 2 * mean + rounding / 4, (float(error.mean()), mean)
