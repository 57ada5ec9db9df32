"""E(A) and its bounds in ball arithmetic: verdicts that are theorems about the floating-point matrix.

Every entry of a float matrix is a dyadic rational. python-flint (Arb) carries each number as a midpoint with a proved
radius, so an inequality between two balls that do not overlap is proved for that very matrix, whatever was rounded on
the way. Where they overlap, the precision is doubled; where that does not help (an inequality that is attained) the
verdict is "undecided", never "holds". Needs the extra `certify`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hnkit.bounds import BOUNDS
from hnkit.errors import InputError
from hnkit.internal.values import number

Verdict = Literal["holds", "fails", "undecided", "not applicable"]

MAX_DIM = 256
_BITS = 128
_MAX_BITS = 1024


@dataclass(frozen=True)
class Enclosure:
    """A real number that is proved to lie in `[lower, upper]`, endpoints rounded outward to floats.

    Attributes:
        lower: float at most the number.
        upper: float at least the number.
        ball: the Arb ball at full precision.
    """

    lower: float
    upper: float
    ball: Any = field(repr=False, compare=False)

    @classmethod
    def of(cls, ball: Any) -> Enclosure:
        """The float interval of an Arb ball."""
        if not ball.is_finite():
            return cls(-math.inf, math.inf, ball)
        return cls(
            0.0 if ball == 0 else math.nextafter(float(ball.lower()), -math.inf),
            0.0 if ball == 0 else math.nextafter(float(ball.upper()), math.inf),
            ball,
        )

    def __str__(self) -> str:
        return str(self.ball.str(20))


@dataclass(frozen=True)
class CertifiedBound:
    """One inequality `value <= bound` and what is proved about it.

    Attributes:
        name: which bound.
        value: the left side.
        bound: the right side.
        verdict: "holds" and "fails" are proved; "undecided": the two agree to the last bit tried; "not applicable":
            a hypothesis is not met, and `note` names it.
        note: a remark, or empty.
    """

    name: str
    value: Enclosure | None
    bound: Enclosure | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class BallCertificate:
    """Enclosures of the quantities of a matrix A, and the bounds on E(A) with their verdicts.

    Attributes:
        dim: d.
        precision: bits of the arithmetic that decided.
        error: `E(A) = tr A - log|det(I + A)|`, nats.
        trace: `tr A`.
        log_abs_det: `log|det(I + A)|`.
        frobenius_norm: `|A|_F`.
        spectral_norm: `|A|_2`.
        lambda_min: least eigenvalue of `(A + A')/2`.
        bounds: the inequalities, by name.
    """

    dim: int
    precision: int
    error: Enclosure
    trace: Enclosure
    log_abs_det: Enclosure
    frobenius_norm: Enclosure
    spectral_norm: Enclosure
    lambda_min: Enclosure
    bounds: Mapping[str, CertifiedBound]

    @property
    def ok(self) -> bool:
        """No inequality is proved false."""
        return all(bound.verdict != "fails" for bound in self.bounds.values())


def certify_bounds(
    A: Tensor,
    *,
    lipschitz: float | None = None,
    reported: Mapping[str, float] | None = None,
    max_precision: int = _MAX_BITS,
) -> BallCertificate:
    """Enclose E(A) and the bounds on it, and prove or refute each inequality for this very matrix.

    The inequalities are those of `hnkit.bounds.BOUNDS`, by their names there: `left <= right`. L is `|A|_2`, or
    `lipschitz`, and then "norm" `|A|_2 <= L` is one more.

    Args:
        A: `(d, d)`, float32 or float64, `d <= 256`: a linear map, or a dense Jacobian. Taken as exact.
        lipschitz: a claimed constant, taken as exact.
        reported: right sides stated elsewhere, by the names above; each float is taken as exact and replaces the
            enclosure of the bound, so that `theorem7_bound(...)`, say, is itself put to the proof.
        max_precision: bits at which an undecided inequality is left undecided.

    Returns:
        The certificate at the first precision that decides every inequality, else at the last.

    Raises:
        InputError: no square finite matrix, too large, an unknown name, or python-flint is missing.
    """
    matrix = _checked(A)
    claims = dict(reported or {})
    names = (*BOUNDS, "norm")
    if unknown := sorted(set(claims) - set(names)):
        raise InputError(f"unknown bound {unknown[0]!r}: accepted are {', '.join(names)}")
    for name, claim in (*claims.items(), ("lipschitz", 0.0 if lipschitz is None else lipschitz)):
        if not math.isfinite(number(claim, f"{name} = {claim!r}")):
            raise InputError(f"{name} = {claim}: give a finite number")
    flint = _flint()
    bits = min(_BITS, max_precision)
    while True:
        with flint.ctx.workprec(bits):
            certificate = _certify(flint, matrix, lipschitz, claims, bits)
        open_ = any(bound.verdict == "undecided" for bound in certificate.bounds.values())
        if not open_ or 2 * bits > max_precision:
            return certificate
        bits *= 2


@dataclass(frozen=True)
class _Numbers:
    """What bounds are formulas in, as `hnkit.linalg.matrices.MatrixNumbers`, in balls."""

    dim: int
    error: Any
    trace_square: Any
    frobenius_square: Any
    norm: Any
    h: Any
    ratio: Any
    excess: Any
    singular_sum: Any
    symmetric_error: Any
    skew_square: Any
    least: Any


def _flint() -> Any:
    try:
        import flint
    except ImportError:
        raise InputError("ball arithmetic needs python-flint: pip install 'hnkit[certify]'") from None
    return flint


def _checked(A: Tensor) -> Tensor:
    if not isinstance(A, Tensor) or A.dtype not in (torch.float32, torch.float64):
        kind = str(A.dtype) if isinstance(A, Tensor) else type(A).__name__
        raise InputError(f"A is {kind}: give a float32 or float64 tensor of shape (d, d)")
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not 1 <= A.shape[0] <= MAX_DIM:
        raise InputError(f"A has shape {tuple(A.shape)}: give one square matrix with 1 <= d <= {MAX_DIM}")
    if A.is_meta or A.layout != torch.strided:
        raise InputError(f"A is on device {A.device}, {A.layout}: give a dense tensor with values")
    if not bool(torch.isfinite(A).all()):
        raise InputError("A has an entry that is not finite: give a finite matrix")
    return A.detach().double().cpu()


def _certify(
    flint: Any, matrix: Tensor, lipschitz: float | None, claims: Mapping[str, float], bits: int
) -> BallCertificate:
    arb, d = flint.arb, matrix.shape[0]
    A = flint.arb_mat(matrix.tolist())
    symmetric = (A + A.transpose()) / 2
    skew_square = _square_sum((A - A.transpose()) / 2)
    trace, frobenius_square = A.trace(), _square_sum(A)
    log_det, log_det_symmetric = _log_abs_det(flint, A), _log_abs_det(flint, symmetric)
    error, error_symmetric = trace - log_det, trace - log_det_symmetric

    # In units of a power of two near the largest entry, exactly: squares of squares neither overflow nor vanish.
    unit = arb(2) ** math.frexp(float(matrix.abs().max()))[1]
    gram = _eigenvalues(flint, (A / unit).transpose() * (A / unit))
    sigma = [unit * _root(arb, value) for value in reversed(gram)]
    least = unit * _eigenvalues(flint, symmetric / unit)[0]
    L = sigma[0] if lipschitz is None else arb(lipschitz)
    largest = "the spectral norm" if lipschitz is None else "the larger of |A|_2 and the claimed constant"
    below = _hypothesis(arb.max(sigma[0], L) < 1, arb.max(sigma[0], L) >= 1, f"{largest} below 1")
    if L < 0:
        below = "not applicable", "the claimed constant is negative"
    cone = _hypothesis(least > -1, least <= -1, "lambda_min of the symmetric part above -1")

    def judge(name: str, value: Any, bound: Any, needs: tuple[Verdict, str], *, equal: bool = False) -> CertifiedBound:
        if needs[0] != "holds":
            return CertifiedBound(name, None, None, *needs)
        if equal and name not in claims:
            return CertifiedBound(name, Enclosure.of(value), Enclosure.of(bound), "holds", "A is symmetric: equality")
        right = arb(claims[name]) if name in claims else bound
        verdict: Verdict = "holds" if value <= right else "fails" if value > right else "undecided"
        return CertifiedBound(
            name, Enclosure.of(value), Enclosure.of(right), verdict, "against the reported float" * (name in claims)
        )

    ratio, plain = _ratio(arb, L), bool(torch.equal(matrix, matrix.T))
    numbers = _Numbers(
        dim=d,
        error=error,
        trace_square=(A * A).trace(),
        frobenius_square=frobenius_square,
        norm=L,
        h=ratio * L * L,
        ratio=ratio,
        excess=ratio - arb(0.5),
        singular_sum=sum((_ratio(arb, s) * s * s for s in sigma), arb(0)),
        symmetric_error=error_symmetric,
        skew_square=skew_square,
        least=least,
    )
    records = [
        judge(
            name,
            bound.left(numbers),
            bound.right(numbers),
            below if bound.hypothesis == "norm" else cone,
            equal=plain and bound.equal_if_symmetric,
        )
        for name, bound in BOUNDS.items()
    ]
    if lipschitz is not None:
        records.append(judge("norm", sigma[0], L, ("holds", "")))
    return BallCertificate(
        dim=d,
        precision=bits,
        error=Enclosure.of(error),
        trace=Enclosure.of(trace),
        log_abs_det=Enclosure.of(log_det),
        frobenius_norm=Enclosure.of(_root(arb, frobenius_square)),
        spectral_norm=Enclosure.of(sigma[0]),
        lambda_min=Enclosure.of(least),
        bounds={record.name: record for record in records},
    )


def _hypothesis(proved: bool, refuted: bool, what: str) -> tuple[Verdict, str]:
    """What is known of a hypothesis, and the note for the bounds that need it."""
    if proved:
        return "holds", ""
    return ("not applicable", f"needs {what}") if refuted else ("undecided", f"needs {what}, which is not decided")


def _root(arb: Any, square: Any) -> Any:
    """The square root of a non-negative number whose ball may reach below 0."""
    if not square.is_finite() or square > 0:
        return square.sqrt()
    top = square.upper()
    return arb(0).union(top.sqrt()) if top > 0 else arb(0)


def _square_sum(M: Any) -> Any:
    """`|M|_F^2` as the trace of `M'M`."""
    return (M.transpose() * M).trace()


def _log_abs_det(flint: Any, A: Any) -> Any:
    d = A.nrows()
    identity = flint.arb_mat(d, d, [int(i == j) for i in range(d) for j in range(d)])
    return abs((identity + A).det()).log()


def _ratio(arb: Any, s: Any) -> Any:
    """`h(s)/s^2 = sum_{k>=2} s^(k-2)/k` for `0 <= s < 1`: an enclosure also where the ball of s reaches down to 0."""
    if s == 0:
        return arb(0.5)
    if s > arb(2) ** -20:
        return (-(-s).log1p() - s) / (s * s)
    total, terms = arb(0), 64
    for k in reversed(range(2, terms)):
        total = total * s + arb(1) / k
    tail = s.nonnegative_part() ** (terms - 2) / (terms * (1 - s))
    return total + tail.union(arb(0))


def _eigenvalues(flint: Any, M: Any) -> list[Any]:
    """Proved enclosures of the eigenvalues of a symmetric matrix of balls, ascending.

    Arb encloses them in the plane, each isolated or a cluster in as many copies of one enclosure as it has members.
    Every enclosure holds a real number, so that disjoint ones have disjoint real parts, which sort. Multiple
    eigenvalues of an exact matrix can make Arb's approximate eigenvectors parallel, so that it gives up; those of
    `Q^-1 M Q` with a random Q are not. Where that fails too, or enclosures overlap without being the same, nothing is
    known at this precision.

    Source:
        S. Rump, Acta Numerica 19 (2010), DOI 10.1017/S096249291000005X, section 13; `acb_mat_eig_multiple` of Arb.
    """
    d = M.nrows()
    for seed, precision in ((None, 1), (0, 1), (1, 1), (0, 2)):
        with flint.ctx.workprec(precision * flint.ctx.prec):
            try:
                similar = M if seed is None else _similar(flint, M, seed)
                found = [value.real for value in flint.acb_mat(similar).eig(multiple=True)]
            except ValueError:
                continue
        found.sort(key=lambda ball: ball.mid())
        if all(value.is_finite() for value in found) and _apart_or_identical(found):
            return found
    return [flint.arb("nan")] * d


def _similar(flint: Any, M: Any, seed: int) -> Any:
    """`Q^-1 M Q` with a nearly orthogonal Q of floats."""
    d, generator = M.nrows(), torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    basis = flint.arb_mat(Q.tolist())
    return basis.inv() * M * basis


def _apart_or_identical(balls: list[Any]) -> bool:
    """Whether sorted balls overlap only where they are the same, as copies that hold a cluster are."""
    return all(
        not one.overlaps(other) or (one.mid() == other.mid() and one.rad() == other.rad())
        for one, other in itertools.pairwise(balls)
    )
