"""Low rank plus remainder: for Jacobians with a few large singular values, above 1 even, and a small rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hnkit.errors import ExpansiveMapError, NonFiniteError
from hnkit.kl.estimators import QuadraticForm, arnoldi, dot, draw_probes
from hnkit.kl.method import Adaptive, Run
from hnkit.linalg.krylov import Operator, spectral_norm
from hnkit.logdet import log_det_error


@dataclass(frozen=True)
class LowRank(Adaptive):
    """The determinant of a small matrix, exactly and with its sign, and Arnoldi's process on what is left.

    With orthonormal Q of `rank` columns, `W = J^T Q` and `S = I + Q^T J Q`,
    `log|det(I + J)| = log|det S| + log|det(I + A)|`, `A = (I + Q W^T)^-1 (I - Q Q^T) J`. A randomised range finder
    makes half of Q, which nearly spans the range of J, by one block of products with J; their products with `J^T` are
    the other half, so that W adds nothing outside and `W^T (I - Q Q^T) J` is small: without it A would be as large as J
    where J is not normal. All probes of a sample share Q; a product with `A^T` costs one with `J^T`. Local norms may
    exceed 1; that of A may not, which more rank mends.

    Attributes:
        probes: probes per sample.
        rank: columns of Q, rounded up to a multiple of twice `probes`, at most d.

    Source: `proofs/low_rank_remainder`; N. Halko, P. Martinsson, J. Tropp, arXiv 0909.4061, for the range finder.
    """

    name: ClassVar[str] = "low-rank"
    probes: int = 4
    rank: int = 16

    @property
    def group(self) -> int:
        """See `Probed`: the probes of a sample share its Q."""
        return self.probes

    @property
    def least_probes(self) -> int:
        """See `Probed`."""
        return self.probes

    def products_of(self, steps: int) -> int:
        """See `Probed`: three half blocks of `rank` products for all probes, three products and a space for each."""
        return 3 * -(-self.rank // (2 * self.probes)) + 3 + steps

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        return low_rank(operator, vectors, self, run)


class _Remainder:
    """`A` as an operator: transposed products alone."""

    def __init__(self, operator: Operator, Q: Tensor, W: Tensor, group: int) -> None:
        self.rows, self.dim = operator.rows, operator.dim
        self._operator, self._Q, self._W, self._group = operator, Q, W, group
        self._small = Q.mT @ W
        self._small.diagonal(dim1=-2, dim2=-1).add_(1)

    def vjp(self, u: Tensor) -> Tensor:
        """`A^T u = J^T (I - Q Q^T) (u - W S^-T Q^T u)`."""
        columns = u.reshape(-1, self._group, self.dim).mT
        return self._operator.vjp(self.outside(columns - self.through(columns)))

    def through(self, columns: Tensor) -> Tensor:
        """`W S^-T Q^T u`, for u as columns of their points."""
        reached: Tensor = self._W @ torch.linalg.solve(self._small, self._Q.mT @ columns)
        return reached

    def outside(self, columns: Tensor) -> Tensor:
        """`(I - Q Q^T) u` as rows, for u as columns of their points."""
        kept = columns - self._Q @ (self._Q.mT @ columns)
        return kept.mT.reshape(self.rows, self.dim)

    def jvp(self, v: Tensor) -> Tensor:
        """Not needed."""
        raise NotImplementedError("the remainder is used through its transpose")


def low_rank(operator: Operator, probe: Tensor, settings: LowRank, run: Run) -> QuadraticForm:
    """The form of `LowRank` for the probes `(rows, d)`, `settings.probes` consecutive rows of which are one point.

    Raises:
        InputError: the remainder has a norm of at least 1.
        NonFiniteError: the small matrix is singular.
    """
    rows, dim = probe.shape
    group = settings.probes
    points = rows // group
    blocks = -(-min(settings.rank, 2 * dim) // (2 * group))
    Q, W = _two_sided_basis(operator, points, group, blocks, run.generator, probe)
    rank = Q.shape[2]
    small = Q.mT @ W
    sign, log_det = torch.linalg.slogdet(torch.eye(rank, dtype=small.dtype, device=small.device) + small)
    if not bool(torch.isfinite(log_det).all()):
        raise NonFiniteError("the small matrix of method low-rank is singular: use another rank, or exact")
    remainder = _Remainder(operator, Q, W, group)
    try:
        rest = arnoldi(remainder, probe, **settings.lengths)
    except ExpansiveMapError as error:
        raise ExpansiveMapError(
            f"method low-rank left a remainder of norm 1 or more at rank {rank}: give more rank, or use lanczos"
        ) from error
    columns = probe.reshape(points, group, dim).mT
    outside = operator.vjp(remainder.outside(columns))  # R^T v, R = (I - Q Q^T) J
    pulled = outside + (W @ (Q.mT @ columns)).mT.reshape(rows, dim)  # J^T v
    again = operator.vjp(pulled)

    def spread(figure: Tensor) -> Tensor:
        return figure.repeat_interleave(group)

    trace = small.diagonal(dim1=-2, dim2=-1).sum(1)
    # tr J - tr A is tr(R - A), of second order: made as such, for a difference would leave rounding of the first.
    between = dot(probe, operator.vjp(remainder.outside(remainder.through(columns))))
    largest = torch.maximum(spectral_norm(W), (pulled.norm(dim=1) / probe.norm(dim=1)).reshape(points, group).amax(1))
    return QuadraticForm(
        value=spread(log_det_error(small)) + between + rest.value,
        trace=spread(trace) + dot(probe, outside),
        square=dot(probe, again),
        frobenius=spread(W.square().sum((1, 2))) + outside.square().sum(1),
        norm=spread(largest),
        truncation=rest.truncation,
        bound=torch.full_like(rest.value, 0.0 if run.lipschitz == 0 else torch.nan),
        products=rest.products + 3 * blocks + 3,
        steps=rest.steps,
        sign=spread(sign),
    )


def _two_sided_basis(
    operator: Operator, points: int, group: int, blocks: int, generator: torch.Generator | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Orthonormal Q of J's leading range and what `J^T` makes of it, and `J^T Q`; each `(points, d, rank)`."""
    rows, dim = like.shape

    def pulled(columns: Tensor) -> Tensor:
        missing = blocks * group - columns.shape[2]
        padded = torch.nn.functional.pad(columns.mT, (0, 0, 0, missing))
        parts = [operator.vjp(part.reshape(rows, dim)) for part in torch.split(padded, group, 1)]
        return torch.cat([part.reshape(points, group, dim) for part in parts], 1)[:, : columns.shape[2]].mT

    seeds = [draw_probes(rows, dim, "gaussian", generator, like.device) for _ in range(blocks)]
    image = torch.cat([operator.jvp(seed).reshape(points, group, dim) for seed in seeds], 1)
    first = torch.linalg.qr(image.mT)[0]
    back = pulled(first)
    half = first.shape[2]
    # The first columns of this Q are those of `first`, up to sign; the others are orthonormal whatever the rank.
    Q, R = torch.linalg.qr(torch.cat([first, back], 2))
    signs = R.diagonal(dim1=1, dim2=2)[:, None, :half].sign()
    return Q, torch.cat([back * signs, pulled(Q[:, :, half:])], 2)
