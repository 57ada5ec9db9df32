"""Per-sample figures of a map and its Jacobian, by dense matrices, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hnkit.errors import NonFiniteError
from hnkit.jacobian import check_finite, evaluate, fill_dense_jacobian, rows_per_pass
from hnkit.logdet import log_det_errors_
from hnkit.maps import NoiseMap, chunked, slices

Progress = Callable[[int, int], None]

# Jacobians with more entries than this are made and factored one sample at a time, in place.
_IN_PLACE_ENTRIES = 2**23
# Up to this dimension a loop over matrices costs more than it saves; above it, this many entries are read at a time.
_SMALL_DIM = 32
_CACHE_ENTRIES = 2**16


@dataclass(frozen=True)
class Moments:
    """What a batch of samples gave; tensors are `(n,)` float64, means over the probes of a sample.

    Attributes:
        l2: `|f|^2 / 2`.
        alignment: `x . f`.
        error: `E(J)` (NaN where J was not looked at, as the figures of J below).
        trace: `tr J`.
        square: `tr J^2`.
        frobenius: `|J|_F^2`.
        norm: lower bound of `|J|_2` (NaN where not looked at).
        truncation: estimated truncation error of `error`.
        bound: proved bound of the same (NaN where none is known).
        spread: variance of `error` over single probes; 0 without probes, NaN for one probe per sample.
        sign: sign of `det(I + J)` where a dense Jacobian gave it.
        num_jvp: Jacobian-vector products in all.
        num_vjp: vector-Jacobian products in all.
        probes: probes per sample.
        steps: largest Krylov or series length (0 without).
    """

    l2: Tensor
    alignment: Tensor
    error: Tensor
    trace: Tensor
    square: Tensor
    frobenius: Tensor
    norm: Tensor
    truncation: Tensor
    bound: Tensor
    spread: Tensor
    sign: Tensor | None
    num_jvp: int
    num_vjp: int
    probes: int
    steps: int


def plain_moments(f: NoiseMap, x: Tensor, chunk: int | None) -> Moments:
    """The moments that need no Jacobian; the others are NaN, the error among them."""
    l2, alignment = _values(f, x, chunk)
    zero, unknown = torch.zeros_like(l2), torch.full_like(l2, torch.nan)
    return Moments(l2, alignment, unknown, unknown, unknown, unknown, unknown, unknown, unknown, zero, None, 0, 0, 0, 0)


def _values(f: NoiseMap, x: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`|f|^2 / 2` and `x . f` of every row."""
    width = chunk or rows_per_pass(x[0].numel(), x.device)
    l2, alignment = [], []
    for index, inner, points in chunked(f, x, width):
        with torch.no_grad():
            value = evaluate(inner, points).flatten(1).double()
        check_finite(value, "f(x)", index)
        l2.append(value.square().sum(1) / 2)
        alignment.append((value * points.flatten(1).double()).sum(1))
    return torch.cat(l2), torch.cat(alignment)


def dense_moments(f: NoiseMap, x: Tensor, chunk: int | None, progress: Progress | None = None) -> Moments:
    """The exact moments, from dense Jacobians in float64.

    Samples are taken in groups whose matrices stay below about 2^23 entries; a single larger Jacobian is streamed into
    one preallocated matrix and factored in place (peak `8 d^2` bytes beside the network: 8.6 GB at d = 32,768).
    """
    n, dim = x.shape[0], x[0].numel()
    l2, alignment = _values(f, x, chunk)
    group = max(1, _IN_PLACE_ENTRIES // dim**2)
    matrices = torch.empty(min(n, group), dim, dim, dtype=torch.float64, device=x.device)
    done = 0

    def report(products: int) -> None:
        nonlocal done
        done += products
        if progress is not None:
            progress(done, n * dim)

    columns: list[tuple[Tensor, ...]] = []
    for index, inner, points in chunked(f, x, group):
        J = matrices[: index.numel()]
        fill_dense_jacobian(J, inner, points, chunk=chunk, samples=index, progress=report)
        trace = J.diagonal(dim1=-2, dim2=-1).sum(-1)
        square, frobenius = _square_and_frobenius(J)
        error, sign = log_det_errors_(J)
        if not bool(torch.isfinite(error).all()):
            sample = int(index[~torch.isfinite(error)][0])
            raise NonFiniteError(f"I + J is singular at sample {sample}: its log-determinant is minus infinity there")
        columns.append((trace, square, frobenius, error, sign))
    trace, square, frobenius, error, sign = (torch.cat(column) for column in zip(*columns, strict=True))
    zero = torch.zeros_like(l2)
    unknown = torch.full_like(l2, torch.nan)
    return Moments(l2, alignment, error, trace, square, frobenius, unknown, zero, zero, zero, sign, 0, n * dim, 0, 0)


def _square_and_frobenius(J: Tensor) -> tuple[Tensor, Tensor]:
    """`tr(J^2)` and `|J|_F^2` of `(b, d, d)` matrices; of large ones singly, as many rows at once as a cache holds."""
    dim = J.shape[-1]
    if dim <= _SMALL_DIM:
        return (J * J.mT).sum((1, 2)), J.square().sum((1, 2))
    block = max(1, _CACHE_ENTRIES // dim)
    square, frobenius = J.new_zeros(J.shape[0]), J.new_zeros(J.shape[0])
    for i, matrix in enumerate(J):
        for part in slices(dim, block):
            rows, columns = matrix[part], matrix[:, part]
            flat = rows.reshape(-1)
            square[i] += torch.dot(flat, columns.mT.reshape(-1))
            frobenius[i] += torch.dot(flat, flat)
    return square, frobenius
