"""Tensors, functions of which torch can compute some derivatives only, and a small network, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def f64(*rows):
    """A float64 tensor of these rows."""
    return torch.tensor(rows, dtype=torch.float64)


def noise(*shape, seed=0):
    """Standard normal float64 entries of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d, seed):
    """A random orthogonal matrix."""
    return torch.linalg.qr(noise(d, d, seed=seed))[0]


def with_values(values, seed=0):
    U, V = orthogonal(len(values), seed), orthogonal(len(values), seed + 100)
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T, U, V


class NoForwardMode(torch.autograd.Function):
    """x^2 with derivatives of every order backward, and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Once(torch.autograd.Function):
    """sin with a forward mode, and a gradient that torch will not differentiate again."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


SHAPE = (2, 3, 3)
DIM = 18


class Attention(nn.Module):
    """Attention, layer normalisation and a convolution: what real hypernetworks are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mix = nn.Linear(4, 12)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        q, k, v = self.mix(nn.functional.layer_norm(tokens, (4,))).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return 0.3 * self.out(tokens + mixed).mT.reshape(x.shape)


def attention() -> nn.Module:
    return Attention().double().eval()


def points(n: int = 5, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return noise(n, *shape, seed=seed)


SHEAR = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0], [0.5, 0.0, 1.0]], dtype=torch.float64)


def rows(n: int = 4, d: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(n, d).to(dtype)


class Slopes:
    """`f(x) = s x` with a slope of its own for each row."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def __call__(self, x: Tensor) -> Tensor:
        return self.slopes[:, None] * x

    def select(self, index: Tensor) -> Slopes:
        return Slopes(self.slopes[index])


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


class Linear:
    """`f(x) = A x + b` on the flattened row."""

    def __init__(self, A, b=None):
        self.A, self.b = A, torch.zeros(A.shape[0], dtype=A.dtype) if b is None else b

    def __call__(self, x):
        return (x.flatten(1) @ self.A.T.to(x.dtype) + self.b.to(x.dtype)).reshape(x.shape)


def network(d=6, width=16, scale=0.5):
    """A small float64 network with a local norm below 1."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.Tanh(), torch.nn.Linear(width, d)).double()
    with torch.no_grad():
        net[2].weight.mul_(scale * 3)
    return net
