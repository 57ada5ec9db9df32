"""Tensors, and functions of which torch can compute some derivatives only, for the tests."""

from __future__ import annotations

import torch
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
