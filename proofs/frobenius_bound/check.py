"""The Frobenius bound: |E(A)| <= |A|_F^2 h(L) / L^2 for |A|_2 <= L < 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import sympy
from flint import acb_mat, arb
from harness import (
    KINDS,
    Claim,
    ball,
    frobenius_squared,
    h,
    log_det_error,
    random_rational_matrix,
    surely_le,
    with_norm_below,
)

NORMS = (Fraction(1, 1000), Fraction(1, 2), Fraction(97, 100))


def _bound(squared: arb, lipschitz: arb) -> arb:
    return squared * h(lipschitz) / lipschitz**2


def claims(bound: Callable[[arb, arb], arb] = _bound) -> Iterator[Claim]:
    s = sympy.Symbol("s", positive=True)
    ratio = sympy.series((-sympy.log(1 - s) - s) / s**2, s, 0, 7).removeO()
    increasing = all(coefficient > 0 for coefficient in sympy.Poly(sympy.diff(ratio, s), s).coeffs())
    expected = sum(s ** (k - 2) / sympy.Integer(k) for k in range(2, 9))
    yield Claim(
        "h(s)/s^2 = sum_{k>=2} s^(k-2)/k, increasing", increasing and sympy.expand(ratio - expected) == 0, "symbolic"
    )
    for kind in KINDS:
        for dim in (1, 2, 5):
            for norm in NORMS:
                matrix = with_norm_below(random_rational_matrix(dim, seed=7 * dim, kind=kind), norm)
                squared, limit = ball(frobenius_squared(matrix)), ball(norm)
                yield Claim(
                    f"{kind}, d = {dim}, L = {norm}",
                    surely_le(abs(log_det_error(matrix)), bound(squared, limit)),
                    "ball arithmetic",
                )
                yield Claim(
                    "never above Theorem 7",
                    surely_le(bound(squared, limit), dim * h(limit) + arb("1e-30")),
                    "ball arithmetic",
                )
    for norm in NORMS:
        matrix = [[-norm if i == j and i < 2 else Fraction(0) for j in range(5)] for i in range(5)]
        reached = bound(ball(frobenius_squared(matrix)), ball(norm))
        yield Claim("attained by -L I_2 (+) 0", bool(log_det_error(matrix).overlaps(reached)), "ball arithmetic")
    for seed in range(3):
        matrix = random_rational_matrix(5, seed)
        eigenvalues = acb_mat([[ball(x) for x in row] for row in matrix]).eig()
        total = sum((abs(value) ** 2 for value in eigenvalues), arb(0))
        yield Claim(
            "Schur: sum |lambda|^2 <= |A|_F^2", surely_le(total, ball(frobenius_squared(matrix))), "ball arithmetic"
        )


def counterexamples() -> Iterator[Claim]:
    # L has to dominate the norm: with the spectral radius of a nilpotent matrix in its place the bound would be 0/0,
    # and with a Frobenius norm alone (L = 1/10 under a norm of 1/2) it fails
    matrix = [[Fraction(-1, 2)]]
    yield Claim(
        "L below |A|_2: fails",
        not surely_le(abs(log_det_error(matrix)), _bound(ball(Fraction(1, 4)), ball(Fraction(1, 10)))),
        "ball arithmetic",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(lambda squared, lipschitz: squared * (h(lipschitz) - lipschitz**3 / 3) / lipschitz**2)
