"""Muon (arXiv 2502.16982) for a concept's changes: momentum whose steps are orthogonal matrices.

What is no matrix of a layer, a token's vectors, is left to AdamW, by the same optimiser: one has one loss scale.

PyTorch has a Muon, too. It works in bfloat16, which CPUs without instructions for it take ten times as long over, and
matrix by matrix; this one works in float32, on all matrices of a shape in one pass.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.optim.adamw import adamw

__all__ = ["Muon", "orthogonalised"]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero, so that five rounds bring singular values of 0.01 near one
_ROUNDS = 5
_RMS = 0.2  # of a step, relative to the learning rate: what AdamW's has (arXiv 2502.16982, section 2.2)


class Muon(torch.optim.Optimizer):
    """Matrices [m, n] moved along orthogonalised momentum, in steps as large as AdamW's at the same learning rate.

    Parameters
    ----------
    params : matrices, or groups of them; `ValueError` for tensors of other than two dimensions. A group with
        `"adamw": True` may have any, which AdamW moves.
    lr : learning rate.
    momentum : part of the running mean that a step keeps; the step looks ahead by as much (Nesterov).
    betas, eps, weight_decay : of AdamW's groups, as `torch.optim.AdamW` has them.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"adamw": False})
        matrices = [p for group in self.param_groups if not group["adamw"] for p in group["params"]]
        if odd := [tuple(p.shape) for p in matrices if p.ndim != 2]:
            raise ValueError(f"Muon moves matrices; a tensor of shape {odd[0]} is none")

    @torch.no_grad()
    def step(self, closure=None):
        """Move everything that has a gradient by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            (self._step_of_adamw if group["adamw"] else self._step_of_muon)(moved, group)
        return loss

    def _step_of_muon(self, moved: list[torch.Tensor], group: dict) -> None:
        alike = defaultdict(list)
        for matrix in moved:
            alike[matrix.shape, matrix.device, matrix.dtype].append(matrix)
        for (shape, *_), matrices in alike.items():
            ahead = orthogonalised(torch.stack([self._momentum(p, group["momentum"]) for p in matrices]))
            length = -group["lr"] * _RMS * max(shape) ** 0.5
            torch._foreach_add_(matrices, list(ahead.to(matrices[0].dtype)), alpha=length)

    def _step_of_adamw(self, moved: list[torch.Tensor], group: dict) -> None:
        for p in moved:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.tensor(0.0), **zeros)
        kept = {name: [self.state[p][name] for p in moved] for name in ("exp_avg", "exp_avg_sq", "step")}
        adamw(
            moved,
            [p.grad for p in moved],
            kept["exp_avg"],
            kept["exp_avg_sq"],
            [],
            kept["step"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _momentum(self, matrix: torch.Tensor, keep: float) -> torch.Tensor:
        """The running mean of a matrix' gradients, moved by the present one and looked ahead from."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        return matrix.grad.lerp(state["momentum"].lerp_(matrix.grad, 1 - keep), keep)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices of a stack [k, m, n], roughly: singular values of about 0.7 to 1.2, in float32.

    Five rounds of a Newton-Schulz iteration. A matrix of zeros stays one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
