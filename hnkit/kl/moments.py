"""Per-sample figures of a map and its Jacobian, by dense matrices or by probes, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hnkit.errors import NonFiniteError
from hnkit.jacobian import RowJacobian, check_finite, evaluate, fill_dense_jacobian, rows_per_pass
from hnkit.kl.estimators import (
    Probe,
    QuadraticForm,
    arnoldi,
    draw_probes,
    lanczos,
    power_series,
    roulette,
    second_order,
    xtrace,
)
from hnkit.logdet import log_det_errors_
from hnkit.maps import NoiseMap, select_rows

Progress = Callable[[int, int], None]
VarianceReduction = Literal["none", "xtrace"]

# Jacobians with more entries than this are made and factored one sample at a time, in place.
_IN_PLACE_ENTRIES = 2**23


@dataclass(frozen=True)
class Moments:
    """What a batch of samples gave; tensors are `(n,)` float64, means over the probes of a sample.

    Attributes:
        l2: `|f|^2 / 2`.
        alignment: `x . f`.
        error: `E(J)`.
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
    """The moments that need no Jacobian; the others are NaN, and `error` is 0."""
    l2, alignment = _values(f, x, chunk)
    zero, unknown = torch.zeros_like(l2), torch.full_like(l2, torch.nan)
    return Moments(l2, alignment, zero, zero, unknown, unknown, unknown, unknown, unknown, zero, None, 0, 0, 0, 0)


def _values(f: NoiseMap, x: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`|f|^2 / 2` and `x . f` of every row."""
    n, dim = x.shape[0], x[0].numel()
    width = chunk or rows_per_pass(dim, x.device)
    l2, alignment = [], []
    for start in range(0, n, width):
        index = torch.arange(start, min(n, start + width), device=x.device)
        with torch.no_grad():
            value = evaluate(select_rows(f, index), x[index]).flatten(1).double()
        check_finite(value, "f(x)", index)
        l2.append(value.square().sum(1) / 2)
        alignment.append((value * x[index].flatten(1).double()).sum(1))
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
    for start in range(0, n, group):
        index = torch.arange(start, min(n, start + group), device=x.device)
        J = matrices[: index.numel()]
        fill_dense_jacobian(J, select_rows(f, index), x[index], chunk=chunk, samples=index, progress=report)
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
    """`tr(J^2)` and `|J|_F^2` of `(b, d, d)` matrices, a block of rows at a time."""
    square = J.new_zeros(J.shape[0])
    frobenius = J.new_zeros(J.shape[0])
    block = max(1, _IN_PLACE_ENTRIES // (4 * J.shape[0] * J.shape[2]))
    for start in range(0, J.shape[1], block):
        rows = J[:, start : start + block]
        square += (rows * J[:, :, start : start + block].mT).sum((1, 2))
        frobenius += rows.square().sum((1, 2))
    return square, frobenius


@dataclass(frozen=True)
class ProbeSettings:
    """How E(J) is estimated from probes.

    Attributes:
        method: "arnoldi", "lanczos", "power", "roulette" or "second-order".
        probes: probes per sample.
        steps: Krylov or series length; `None`: adaptive, to `tolerance`.
        tolerance: relative truncation error that adaptive steps aim at.
        probe: law of the probes.
        lipschitz: proved Lipschitz constant of the map, or `None`.
        variance_reduction: "none", or "xtrace" (Arnoldi only): leave-one-out estimates from all probes of a sample.
        chunk: rows per pass through the network; `None`: chosen from d and the device.
    """

    method: str
    probes: int = 1
    steps: int | None = None
    tolerance: float = 1e-3
    probe: Probe = "rademacher"
    lipschitz: float | None = None
    variance_reduction: VarianceReduction = "none"
    chunk: int | None = None


def probe_moments(
    f: NoiseMap,
    x: Tensor,
    settings: ProbeSettings,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Moments from quadratic forms of random probes; (sample, probe) rows go through the network in chunks."""
    n, dim = x.shape[0], x[0].numel()
    probes = settings.probes
    width = settings.chunk or rows_per_pass(dim, x.device)
    if settings.variance_reduction == "xtrace":
        width = probes * max(1, width // probes)
    rows = torch.arange(n, device=x.device).repeat_interleave(probes)
    forms: list[QuadraticForm] = []
    values: list[tuple[Tensor, Tensor]] = []
    num_jvp = num_vjp = 0
    for start in range(0, rows.numel(), width):
        index = rows[start : start + width]
        points = x[index]
        operator = RowJacobian(select_rows(f, index), points, samples=index)
        vectors = draw_probes(index.numel(), dim, settings.probe, generator, x.device)
        forms.append(quadratic_form(operator, vectors, settings, generator))
        values.append((operator.value.square().sum(1) / 2, (operator.value * points.flatten(1).double()).sum(1)))
        num_jvp += operator.num_jvp
        num_vjp += operator.num_vjp
        if progress is not None:
            progress(start + index.numel(), rows.numel())

    def gather(name: str) -> Tensor:
        return torch.cat([getattr(form, name) for form in forms]).reshape(n, probes)

    l2, alignment = (torch.cat(column).reshape(n, probes)[:, 0] for column in zip(*values, strict=True))
    error = gather("value")
    check_finite(error, "the estimate of E(J)")
    return Moments(
        l2=l2,
        alignment=alignment,
        error=error.mean(1),
        trace=gather("trace").mean(1),
        square=gather("square").mean(1),
        frobenius=gather("frobenius").mean(1),
        norm=gather("norm").amax(1),
        truncation=gather("truncation").mean(1),
        bound=gather("bound").mean(1),
        spread=error.var(1) if probes > 1 else torch.full_like(l2, torch.nan),
        sign=None,
        num_jvp=num_jvp,
        num_vjp=num_vjp,
        probes=probes,
        steps=max(form.steps for form in forms),
    )


def quadratic_form(
    operator: RowJacobian, vectors: Tensor, settings: ProbeSettings, generator: torch.Generator | None
) -> QuadraticForm:
    """The estimator that the settings name, on one chunk of rows."""
    steps, tolerance, lipschitz = settings.steps, settings.tolerance, settings.lipschitz
    if settings.variance_reduction == "xtrace":
        return xtrace(operator, vectors, group=settings.probes, steps=steps, tolerance=tolerance)
    if settings.method == "second-order":
        return second_order(operator, vectors, lipschitz=lipschitz)
    if settings.method == "roulette":
        return roulette(operator, vectors, generator=generator, lipschitz=lipschitz)
    estimator = {"arnoldi": arnoldi, "lanczos": lanczos, "power": power_series}[settings.method]
    return estimator(operator, vectors, steps=steps, tolerance=tolerance, lipschitz=lipschitz)
