"""|E(A)| <= sum h(sigma_i), its truncation after r singular values, and how they compare."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from flint import acb_mat, arb
from harness import (
    Claim,
    ball,
    frobenius_squared,
    h,
    log_det_error,
    random_rational_matrix,
    surely_le,
    with_norm_below,
)


def _singular_values(matrix: list[list[Fraction]]) -> list[arb]:
    """Enclosures of the singular values, in descending order."""
    n = len(matrix)
    gram = [[sum((matrix[k][i] * matrix[k][j] for k in range(n)), Fraction(0)) for j in range(n)] for i in range(n)]
    squares = [value.real for value in acb_mat([[ball(x) for x in row] for row in gram]).eig()]
    return sorted((abs(square).sqrt() for square in squares), key=float, reverse=True)


def _rho(s: arb) -> arb:
    return h(s) / s**2


def _truncated(values: list[arb], frobenius: arb, r: int) -> arb:
    """`B(s, F)` of part 2."""
    c = _rho(values[r - 1])
    return sum((s**2 * (_rho(s) - c) for s in values[:r]), arb(0)) + c * frobenius


def claims(factor: Fraction = Fraction(1)) -> Iterator[Claim]:
    slack = arb("1e-30")
    for kind in ("general", "symmetric"):
        for dim in (2, 3, 5):
            for norm in (Fraction(1, 10), Fraction(9, 10)):
                matrix = with_norm_below(random_rational_matrix(dim, seed=3 * dim, kind=kind), norm)
                sigma, squared = _singular_values(matrix), ball(frobenius_squared(matrix))
                error = abs(log_det_error(matrix))
                bounds = [ball(factor) * _truncated(sigma, squared, r) for r in range(1, dim + 1)]
                label = f"{kind}, d = {dim}, norm {norm}"
                yield Claim(f"|E(A)| <= sum h(sigma), {label}", surely_le(error, bounds[-1] + slack), "ball arithmetic")
                ordered = all(surely_le(after, before + slack) for before, after in pairwise(bounds))
                yield Claim(f"B does not increase with r, {label}", ordered, "ball arithmetic")
                whole = sum((h(s) for s in sigma), arb(0))
                yield Claim(
                    f"r = d is sum h(sigma), {label}",
                    bool(abs(bounds[-1] - ball(factor) * whole) < slack),
                    "ball arithmetic",
                )
                frobenius = squared * _rho(sigma[0])
                yield Claim(
                    f"r = 1 is the Frobenius bound, {label}",
                    bool(abs(bounds[0] - ball(factor) * frobenius) < slack),
                    "ball arithmetic",
                )
    matrix = [[Fraction(-9, 10), Fraction(0)], [Fraction(0), Fraction(-1, 5)]]
    reached = sum((h(s) for s in _singular_values(matrix)), arb(0))
    yield Claim(
        "attained by a negative diagonal matrix",
        bool(abs(log_det_error(matrix) - ball(factor) * reached) < slack),
        "ball arithmetic",
    )


def counterexamples() -> Iterator[Claim]:
    half = [[Fraction(-1, 2), Fraction(0)], [Fraction(0), Fraction(-1, 2)]]
    low = ball(Fraction(1, 10))
    too_small = _truncated([low], ball(frobenius_squared(half)), 1)
    yield Claim(
        "s = 1/10 below sigma_1 = 1/2: the bound fails", bool(too_small < abs(log_det_error(half))), "ball arithmetic"
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(factor=Fraction(1, 2))
