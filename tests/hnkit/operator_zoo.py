"""Matrices of known structure and an operator made of them, shared by the tests of the estimators."""

import math

import mpmath
import numpy as np
import torch
from scipy.linalg import logm
from torch import Tensor


class MatrixOperator:
    """The same matrix, or one matrix per row, as an operator; counts its products."""

    def __init__(self, A: Tensor, rows: int) -> None:
        self.A = A.expand(rows, *A.shape[-2:])
        self.rows, self.dim = rows, A.shape[-1]
        self.num_jvp = self.num_vjp = 0

    def vjp(self, u: Tensor) -> Tensor:
        self.num_vjp += self.rows
        return torch.einsum("rij,ri->rj", self.A, u)

    def jvp(self, v: Tensor) -> Tensor:
        self.num_jvp += self.rows
        return torch.einsum("rij,rj->ri", self.A, v)


def _gaussian(dim: int, seed: int) -> Tensor:
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rotations(dim: int) -> Tensor:
    """A normal matrix with the complex spectrum `r exp(+-i a)`, in a random orthonormal basis."""
    blocks = []
    for k in range(dim // 2):
        radius, angle = 1 - k / dim, 0.3 + 5.1 * k / dim
        c, s = radius * math.cos(angle), radius * math.sin(angle)
        blocks.append(torch.tensor([[c, s], [-s, c]], dtype=torch.float64))
    Q = torch.linalg.qr(_gaussian(dim, 5)).Q
    return Q @ torch.block_diag(*blocks) @ Q.T


def _shift(dim: int) -> Tensor:
    return torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1)


def _unscaled(kind: str, dim: int) -> Tensor:
    if kind == "normal":
        return _rotations(dim)
    G = _gaussian(dim, 0)
    return {
        "gaussian": G,
        "symmetric": G + G.T,
        "skew": G - G.T,
        "nilpotent": G.triu(1),
        "low-rank": G[:, :2] @ G[:2],
        "jordan": 0.7 * torch.eye(dim, dtype=torch.float64) + _shift(dim),
        "negative": -torch.eye(dim, dtype=torch.float64),
    }[kind]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, in a random orthonormal basis."""
    Q = torch.linalg.qr(_gaussian(len(values), seed + 7)).Q
    return (Q * values.double()) @ Q.T


def hard_spectra(dim: int = 120) -> dict[str, Tensor]:
    """Matrices on which convergence is easily misjudged: gapped, two-sided, clustered, and of a period; norms below 1.

    Where the spectrum is symmetric about 0 every second step of a Krylov process changes nothing; a cluster is resolved
    at once and hides what comes after; an outlier shows late.
    """
    half, span = dim // 2, torch.linspace
    generator = torch.Generator().manual_seed(3)
    upper = torch.randn(dim, dim, generator=generator, dtype=torch.float64).triu(1) / dim**0.5
    wide = torch.cat([span(0.7, 0.9, half), -span(0.7, 0.9, dim - half)]).double()
    basis = torch.linalg.qr(_gaussian(dim, 9)).Q
    nonnormal = basis @ (torch.diag(wide) + 0.2 * upper) @ basis.T
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    circle = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    turns = torch.block_diag(*[float(a) * turn for a in span(0.9, 0.99, half)])
    circles = torch.block_diag(*[float(a) * circle for a in span(0.9, 0.98, dim // 3)])
    rest = torch.eye(dim, dtype=torch.float64)[:, : dim // 3 * 3]
    powers = torch.arange(dim)
    return {
        "gap at 0.97": with_spectrum(torch.cat([span(0.97, 0.999, half), -span(0.97, 0.999, dim - half)])),
        "gap at 0.5": with_spectrum(torch.cat([span(0.5, 0.9, half), -span(0.5, 0.9, dim - half)])),
        "two-sided to 0.9": with_spectrum(span(-0.9, 0.9, dim)),
        "two-sided to 0.999": with_spectrum(span(-0.999, 0.999, dim)),
        "lopsided": with_spectrum(torch.cat([span(0.3, 0.5, dim - dim // 6), -span(0.9, 0.99, dim // 6)])),
        "lopsided the other way": with_spectrum(
            torch.cat([-span(0.3, 0.5, dim - dim // 6), span(0.9, 0.99, dim // 6)])
        ),
        "three clusters": with_spectrum(
            torch.cat([span(-0.95, -0.949, dim // 4), span(0.1, 0.101, half), span(0.7, 0.701, dim - half - dim // 4)])
        ),
        "a small cluster": with_spectrum(torch.cat([span(-0.99, -0.98, 3), span(0.1, 0.101, dim - 3)])),
        "an outlier": with_spectrum(torch.cat([torch.tensor([-0.99]), span(-0.3, 0.3, dim - 1)])),
        "decay": with_spectrum(0.9 * 0.8**powers),
        "decay below 0": with_spectrum(-0.9 * 0.8**powers),
        "decay on both sides": with_spectrum(0.9 * (-0.8) ** powers),
        "gap, not normal": nonnormal / torch.linalg.matrix_norm(nonnormal, ord=2) * 0.95,
        "skew gap": basis[:, : 2 * half] @ turns @ basis[:, : 2 * half].T,
        "period 3": basis @ rest @ circles @ rest.T @ basis.T,
    }


KINDS = ("gaussian", "symmetric", "skew", "normal", "nilpotent", "low-rank", "jordan", "negative")
NORMS = (0.0, 1e-9, 0.3, 0.9, 0.99)


def matrix(kind: str, norm: float, dim: int = 12) -> Tensor:
    """A member of the zoo, scaled to the spectral norm `norm`."""
    A = _unscaled(kind, dim)
    return A / torch.linalg.matrix_norm(A, ord=2) * norm


def exact_error(A: Tensor) -> float:
    """`tr A - log|det(I + A)|` in 250 digits."""
    with mpmath.workdps(250):
        M = mpmath.matrix(A.tolist())
        identity = mpmath.eye(M.rows)
        return float(sum(M[i, i] for i in range(M.rows)) - mpmath.log(abs(mpmath.det(identity + M))))


def phi_matrix(A: Tensor) -> Tensor:
    """`phi(A) = A - log(I + A)` for norm below 1: scipy's logarithm, or three terms of the series for tiny A."""
    if float(torch.linalg.matrix_norm(A, ord=2)) < 1e-3:
        A2 = A @ A
        return A2 / 2 - A2 @ A / 3 + A2 @ A2 / 4
    return A - torch.as_tensor(np.real(logm(np.eye(A.shape[0]) + A.numpy())), dtype=torch.float64)


def form(M: Tensor, v: Tensor) -> Tensor:
    """`v^T M v` for every row of v."""
    return torch.einsum("ri,ij,rj->r", v, M, v)
