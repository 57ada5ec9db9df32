"""A noise hypernetwork and a loss that know nothing of hnkit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Steering(nn.Module):
    """`f(x) = scale * (mix(tanh(x)) + shift)`, with `scale = 0` at first, so that nothing is steered."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.mix(torch.tanh(x))

    def lipschitz_upper(self) -> float:
        """`|scale| |mix|_2`, since tanh has slope at most 1; hnkit asks for it under this name."""
        norm = torch.linalg.matrix_norm(self.mix.weight.detach().double(), 2)
        return float(self.scale.detach().abs() * norm * (1 + 1e-12))


def gaussian_kl(f: nn.Module, dim: int) -> float:
    """KL of the steered law for the affine map `f(x) = K x + c`, from the formula for two Gaussians."""
    c = f(torch.zeros(1, dim, dtype=torch.float64))[0]
    T = torch.eye(dim, dtype=torch.float64) + (f(torch.eye(dim, dtype=torch.float64)) - c).T
    trace, mean = (T @ T.T).trace(), c @ c
    return float((trace + mean - dim) / 2 - torch.linalg.slogdet(T).logabsdet)
