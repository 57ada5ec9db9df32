"""XTrace: leave-one-out estimates of `tr phi(J)` from several probes of one point."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.kl.estimators import MAX_STEPS, QuadraticForm, arnoldi_form, arnoldi_process, form_size, refuse_norm
from hnkit.linalg.krylov import ArnoldiProcess, Operator, phi_column, spectral_norm


def xtrace(
    operator: Operator,
    probe: Tensor,
    *,
    group: int,
    steps: int | None = None,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
) -> QuadraticForm:
    """Leave-one-out estimates of `tr phi(J)`, from `group` probes of one point, two Krylov spaces per probe.

    With `Y = phi(J^T) V` and an orthonormal basis Q of the range of Y without its i-th column, the i-th estimate is
    `tr(Q^T phi(J^T) Q) + u^T phi(J^T) u`, `u = (I - Q Q^T) v_i`. Unbiased but for the truncation of the Krylov spaces,
    and exact once phi(J) has rank below `group`. The estimates of one point share their information: their spread
    measures the error, as in the source, without being that of independent draws.

    Args:
        operator: J; consecutive `group` rows are one point.
        probe: `(rows, d)`.
        group: probes per point, 2 or more, at most d.
        steps: Krylov steps of each product with phi; `None`: adaptive.
        tolerance: the tolerance of the adaptive choice.
        max_steps: the most adaptive steps.

    Returns:
        One estimate per row; the mean over the rows of a point is XTrace. No bound is proved for it.

    Source: arXiv 2301.07825, section 2.1.
    """
    rows, dim = probe.shape
    points = rows // group
    if group < 2 or group > dim or rows % group:
        raise InputError(f"xtrace with {group} probes at dimension {dim}: give 2 or more probes, at most the dimension")
    # Vectors, not forms, are made here, and a vector is known less well than a form of it. About group / dim of a probe
    # lies in the basis, and every estimate of a point holds the errors of all vectors of the basis.
    share = (group / dim) ** 0.5
    process = partial(arnoldi_process, operator, steps=steps, tolerance=tolerance, max_steps=max_steps)
    first = process(probe, rest=lambda p: share * p.scale * p.vector_truncation())
    form = arnoldi_form(first, None)
    Y = _apply_phi(first).reshape(points, group, dim).mT
    V = probe.reshape(points, group, dim).mT
    Q, R = torch.linalg.qr(Y)
    second = process(Q.mT.reshape(rows, dim), rest=lambda p: group * p.vector_truncation(), size=form_size(first))
    truncation = share * first.scale * first.vector_truncation()
    truncation = truncation + second.vector_truncation().reshape(points, group).sum(1).repeat_interleave(group)
    Z = _apply_phi(second).reshape(points, group, dim).mT
    T = Q.mT @ Z
    estimates = []
    for i in range(group):
        # s: the direction of range(Q) that the other columns of Y do not need; U[:, :, -1] spans it.
        others = torch.cat([R[:, :, :i], R[:, :, i + 1 :]], 2)
        s = torch.linalg.svd(others, full_matrices=True).U[:, :, -1:]
        kept = Q.mT @ V[:, :, i : i + 1]
        kept = kept - s @ (s.mT @ kept)
        u = V[:, :, i : i + 1] - Q @ kept
        applied = Y[:, :, i : i + 1] - Z @ kept
        inside = T.diagonal(dim1=1, dim2=2).sum(1) - (s.mT @ T @ s)[:, 0, 0]
        estimates.append(inside + (u * applied).sum((1, 2)))
    value = torch.stack(estimates, 1).reshape(rows)
    return QuadraticForm(
        value=value,
        trace=form.trace,
        square=form.square,
        frobenius=form.frobenius,
        norm=form.norm,
        truncation=truncation,
        bound=torch.full_like(value, torch.nan),
        products=form.products + second.work,
        steps=max(first.steps, second.steps),
    )


def _apply_phi(process: ArnoldiProcess) -> Tensor:
    """`phi(J^T) v` in the Krylov space of v, `(rows, d)`."""
    space = process.space
    norm = spectral_norm(space.hessenberg)
    refuse_norm(norm, "arnoldi")
    column = phi_column(space.hessenberg[:, :-1], float(norm.max())) * space.scale[:, None]
    return torch.bmm(column[:, None, :], space.basis[:, :-1])[:, 0]
