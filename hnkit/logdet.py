"""The log-det error term `E(A) = tr A - log|det(I + A)| = tr phi(A)`, `phi(z) = z - log(1 + z)`, of dense matrices.

For small A the trace and the log-determinant agree to first order, so that their difference loses all its digits:
at `|A| = 1e-9` it is below the rounding error of either. Here the first order is never formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hnkit.bounds import log_gap
from hnkit.errors import InputError, NonFiniteError

# Below this Frobenius norm every leading block of I + A is well conditioned, so that elimination needs no pivoting.
_SMALL = 0.5
# From this dimension on a loop over matrices costs nothing beside their factorisation.
_IN_PLACE_DIM = 64


def log_det_error(A: Tensor) -> Tensor:
    """The log-det error term of real square matrices, accurate for tiny and for large `A`.

    `E(A) = tr A - log|det(I + A)|`; its differential is `dE = tr[A (I + A)^-1 dA]`. It is not always non-negative: a
    skew-symmetric `A` has `E(A) <= 0`. Where `|A|_F < 1/2`, the Schur complement of a leading block gives

        E([[P, Q], [R, S]]) = E(P) + tr[(I + P)^-1 Q R] + E(S - R (I + P)^-1 Q),

    in which every term is of second order, so no digits cancel; elsewhere the difference itself is taken.

    Args:
        A: `(..., d, d)`, real floating point.

    Returns:
        `(...)` in the type of `A` (at least float32), computed in float64; `+inf` where `I + A` is singular.
        Differentiable any number of times where `I + A` is invertible.

    Raises:
        InputError: `A` is no batch of real square matrices.
        NonFiniteError: an entry is NaN or infinite.

    Source: arXiv 2508.09968, eq. 55 and Theorem 7; `proofs/resolvent` for the differential.
    """
    if not isinstance(A, Tensor) or not A.is_floating_point():
        kind = str(A.dtype) if isinstance(A, Tensor) else type(A).__name__
        raise InputError(f"A is {kind}: give a real floating-point tensor of shape (..., d, d)")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise InputError(f"A has shape {tuple(A.shape)}: give square matrices, shape (..., d, d), d >= 1")
    if not bool(torch.isfinite(A).all()):
        raise NonFiniteError("A has a NaN or infinite entry: E(A) is defined for finite matrices")
    value: Tensor = _LogDetError.apply(A.double())  # type: ignore[no-untyped-call]
    return value.to(torch.promote_types(A.dtype, torch.float32))


class _LogDetError(torch.autograd.Function):
    """E(A) with the closed-form gradient `(I + A)^-T A^T`, which has no cancellation either."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        ctx.save_for_backward(A)
        return _error_and_sign(A.reshape(-1, *A.shape[-2:]))[0].reshape(A.shape[:-2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (A,) = ctx.saved_tensors
        gradient: Tensor = grads[0][..., None, None] * torch.linalg.solve(_plus_identity(A).mT, A.mT)
        return gradient


def _error_and_sign(A: Tensor) -> tuple[Tensor, Tensor]:
    """`E(A)` and the sign of `det(I + A)` of `(b, d, d)` matrices."""
    small = torch.linalg.matrix_norm(A) < _SMALL
    value, sign = A.new_empty(A.shape[0]), A.new_ones(A.shape[0])
    if bool(small.any()):
        value[small] = _by_elimination(A[small])  # of norm below 1: the determinant is positive
    if not bool(small.all()):
        large = A[~small]
        sign[~small], log_det = torch.linalg.slogdet(_plus_identity(large))
        value[~small] = large.diagonal(dim1=-2, dim2=-1).sum(-1) - log_det
    return value, sign


def log_det_errors_(A: Tensor) -> tuple[Tensor, Tensor]:
    """`E(A)` and the sign of `det(I + A)` of `(b, d, d)` float64 matrices, which may be overwritten.

    Large matrices are factored in place, one after the other, so that no copy is made.
    """
    if A.shape[-1] < _IN_PLACE_DIM:
        return _error_and_sign(A)
    small = torch.linalg.matrix_norm(A) < _SMALL
    pairs = [_error_and_sign(A[i : i + 1]) if small[i] else log_det_error_(A[i]) for i in range(A.shape[0])]
    return torch.stack([value.reshape(()) for value, _ in pairs]), torch.stack([sign.reshape(()) for _, sign in pairs])


def _plus_identity(A: Tensor) -> Tensor:
    result = A.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def _by_elimination(A: Tensor) -> Tensor:
    """E(A) of `(b, d, d)` matrices of Frobenius norm below 1/2, by the recursion of `log_det_error`."""
    pivots: list[Tensor] = []
    cross = A.new_zeros(A.shape[0])
    pending = [A]
    while pending:
        block = pending.pop()
        dim = block.shape[-1]
        if dim == 1:
            pivots.append(block[:, 0, 0])
            continue
        half = dim // 2
        P, Q = block[:, :half, :half], block[:, :half, half:]
        R, S = block[:, half:, :half], block[:, half:, half:]
        solved = torch.linalg.solve(_plus_identity(P), Q)
        cross += (solved.mT * R).sum((-2, -1))
        pending += [S - R @ solved, P]
    # E of a number is phi(z) = z - log(1 + z) = h(-z).
    return cross + log_gap(-torch.stack(pivots)).sum(0)


def log_det_error_(A: Tensor) -> tuple[Tensor, Tensor]:
    """`E(A)` and the sign of `det(I + A)` of one large matrix, overwriting it: no second matrix is allocated.

    The factorisation `I + A = P L U` is made in place, so the peak is the matrix itself plus the vendor library's
    workspace: `8 d^2` bytes in float64, 8.6 GB at d = 32,768. The value is the difference of trace and
    log-determinant; it carries an absolute rounding error of about `d eps (1 + |A|)`.

    Args:
        A: `(d, d)`, float32 or float64, contiguous; destroyed.

    Returns:
        `(E(A), sign)`, both `()` in float64.
    """
    dim = A.shape[-1]
    trace = A.diagonal().double().sum()
    A.diagonal().add_(1)
    # det(A^T) = det A, and the transposed view is what the column-major library factors without a copy.
    factor = A.mT
    pivots = torch.empty(dim, dtype=torch.int32, device=A.device)
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.lu_factor_ex(factor, out=(factor, pivots, info))
    diagonal = factor.diagonal().double()
    swaps = (pivots != torch.arange(1, dim + 1, dtype=torch.int32, device=A.device)).sum()
    sign = diagonal.sign().prod() * (1 - 2 * (swaps % 2))
    return trace - diagonal.abs().log().sum(), sign
