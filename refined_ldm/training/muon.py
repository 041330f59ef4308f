"""Muon: momentum whose every update is made orthogonal (Jordan et al. 2024), for the matrices inside a network.

torch.optim.Muon takes 2-D parameters only; a U-Net is mostly convolutions, so kernels are seen here as matrices
(out, in * height * width). Vectors, and whatever else is no matrix, are left to AdamW.
"""

import torch
from torch import nn


def orthogonalise(matrix, iterations=5, dtype=torch.bfloat16):
    """The nearest (semi-)orthogonal matrix, nearly: singular values between .7 and 1.2, by a quintic Newton-Schulz.

    The iteration works on the smaller Gram matrix, which for wide kernels is most of the cost. It forgives bfloat16,
    which is quick where a device multiplies it and very slow where it is emulated.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T, iterations, dtype).T
    x = matrix.to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrix)


class Muon(torch.optim.Optimizer):
    """Updates of spectral norm lr * .2 * sqrt(larger side), AdamW's size (Liu et al. 2025), with decoupled decay.

    dtype: in which updates are made orthogonal.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonalise(nesterov, dtype=self.dtype) * 0.2 * max(nesterov.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


def split_parameters(module):
    """(matrices for Muon, the rest for AdamW): kernels and linear weights, but embeddings and the outer layers not."""
    matrices, rest = [], []
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, p in module.named_parameters():
        inner = p.ndim >= 2 and not name.startswith(("conv_in", "conv_out")) and id(p) not in tables
        (matrices if inner else rest).append(p)
    return matrices, rest
