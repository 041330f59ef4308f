"""Muon: momentum with orthogonalised updates (Jordan et al. 2024), for the matrices inside a network.

torch.optim.Muon takes 2-D parameters only. A U-Net is mostly convolutions, whose kernels are treated here as matrices
(out, in * height * width). AdamW trains the other parameters.

Notebook: 03
"""

from collections.abc import Iterable

import torch
from torch import nn


def orthogonalise(matrices: torch.Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return nearly the nearest (semi-)orthogonal matrices (..., M, N): singular values lie between .7 and 1.2.

    A quintic Newton-Schulz iteration on the smaller Gram matrix. It tolerates bfloat16, which is fast on devices with
    bfloat16 arithmetic and very slow where it is emulated.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT, iterations, dtype).mT
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b G + c G^2) x
    return x.reshape(matrices.shape).to(matrices)


class Muon(torch.optim.Optimizer):
    """Muon with updates of spectral norm lr * .2 * sqrt(larger side), AdamW's size (Liu et al. 2025).

    Weight decay is decoupled. dtype: precision of the orthogonalisation.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike = {}  # shape of a matrix: parameters and updates of this shape, orthogonalised together
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                nesterov = p.grad.lerp(state["momentum"], momentum).flatten(1)
                alike.setdefault(nesterov.shape, []).append((p, nesterov))
            for shape, pairs in alike.items():
                updates = orthogonalise(torch.stack([nesterov for _, nesterov in pairs]), dtype=self.dtype)
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-lr * 0.2 * max(shape) ** 0.5)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices for Muon, the rest for AdamW); the rest includes embeddings, `conv_in` and `conv_out`."""
    matrices, rest = [], []
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, p in module.named_parameters():
        inner = p.ndim >= 2 and not name.startswith(("conv_in", "conv_out")) and id(p) not in tables
        (matrices if inner else rest).append(p)
    return matrices, rest
