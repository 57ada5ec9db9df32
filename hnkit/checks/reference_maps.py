"""Maps whose figures are known or certified, which `verify-bound` measures beside the closed-form problems."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hnkit.internal.seeds import generator_for
from hnkit.maps import NoiseMap


def reference_maps() -> dict[str, tuple[NoiseMap, int, str]]:
    """Maps whose figures are known or certified: name -> (map, dimension, what it shows)."""
    turn = torch.tensor([[0.0, 0.5, 0.0, 0.0], [-0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3], [0.0, 0.0, -0.3, 0.0]])
    affine = nn.Linear(4, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    affine.weight.copy_(turn.double())
    shrink = nn.Linear(5, 5, bias=False, dtype=torch.float64).requires_grad_(False)
    shrink.weight.copy_(-0.6 * torch.eye(5, dtype=torch.float64))
    return {
        "gradient-field": (_Sine(), 1, "f(x) = 0.2 sin 3x: L < 1, and the L2 term is a tenth of the KL"),
        "contraction": (contraction(6, 0.6), 6, "two layers around tanh, certified L = 0.6: L2 is accurate"),
        "rotation": (affine, 4, "f(x) = Kx, K skew: E(J) < 0, the L2 term overcounts"),
        "extremal": (shrink, 5, "f(x) = -0.6 x: attains Theorem 7 and the Frobenius bound"),
        "fold": (_Fold(), 1, "f(x) = -1.2 tanh 2x folds the middle of the line: eq. 53 0.058 nats, KL 0.927"),
    }


class _Sine(nn.Module):
    """`f(x) = 0.2 sin 3x`, whose constant is 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * torch.sin(3 * x)

    def lipschitz_upper(self) -> float:
        """`sup |f'| = 0.6`."""
        return 0.6


class _Fold(nn.Module):
    """`f(x) = -1.2 tanh 2x`, whose slope is -2.4 in the middle: x + f(x) takes some values three times."""

    def forward(self, x: Tensor) -> Tensor:
        return -1.2 * torch.tanh(2 * x)

    def lipschitz_upper(self) -> float:
        """`sup |f'| = 2.4`."""
        return 2.4

    def bounded(self) -> bool:
        """`|f| <= 1.2`."""
        return True


def contraction(dim: int, lipschitz: float = 0.5, *, width: int = 16, seed: int = 0) -> nn.Sequential:
    """A smooth map with a certified constant: two linear layers of spectral norm `sqrt(L)` around tanh, in float64."""
    generator = generator_for(seed, "verify/contraction", dim)
    sizes = ((dim, width), (width, dim))
    layers = [nn.utils.skip_init(nn.Linear, *size, dtype=torch.float64) for size in sizes]  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in layers:
            weight = torch.randn(layer.weight.shape, dtype=torch.float64, generator=generator)
            layer.weight.copy_(weight * (math.sqrt(lipschitz) / torch.linalg.matrix_norm(weight, 2)))
            layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, dtype=torch.float64, generator=generator))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).requires_grad_(False)
