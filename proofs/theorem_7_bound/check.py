"""Theorem 7: |E(A)| <= d h(|A|_2) for |A|_2 <= L < 1, and why L < 1 is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import sympy
from flint import arb
from harness import (
    KINDS,
    Claim,
    ball,
    h,
    log_det_error,
    random_rational_matrix,
    surely_le,
    with_norm_below,
)

Bound = Callable[[int, arb], arb]


def _theorem_7(dim: int, lipschitz: arb) -> arb:
    return dim * h(lipschitz)


def claims(bound: Bound = _theorem_7) -> Iterator[Claim]:
    yield from _scalar_lemma()
    for kind in KINDS:
        for dim in (1, 2, 5):
            for norm in (Fraction(1, 1000), Fraction(1, 2), Fraction(97, 100)):
                matrix = with_norm_below(random_rational_matrix(dim, seed=dim, kind=kind), norm)
                error, limit = abs(log_det_error(matrix)), bound(dim, ball(norm))
                yield Claim(
                    f"|E(A)| <= d h(L), {kind}, d = {dim}, L = {norm}",
                    surely_le(error, limit),
                    "ball arithmetic",
                    f"{float(error.mid()):.3e} <= {float(limit.mid()):.3e}",
                )
    for norm in (Fraction(1, 10), Fraction(9, 10)):
        attained = [[-norm if i == j else Fraction(0) for j in range(3)] for i in range(3)]
        error, limit = log_det_error(attained), bound(3, ball(norm))
        yield Claim(f"A = -L I attains the bound, L = {norm}", bool(error.overlaps(limit)), "ball arithmetic")


def _scalar_lemma() -> Iterator[Claim]:
    """The three facts the scalar lemma rests on, by algebra."""
    x, r = sympy.symbols("x r", real=True)
    u = sympy.log(1 + 2 * x + r**2) / 2 - x  # ln|1+z| - Re z at Re z = x, |z| = r
    second = sympy.simplify(sympy.diff(u, x, 2) + 2 / (1 + 2 * x + r**2) ** 2)
    yield Claim("u(x) = ln(1+2x+r^2)/2 - x has u'' = -2/(1+2x+r^2)^2 < 0", second == 0, "symbolic")
    stationary = sympy.simplify(sympy.diff(u, x).subs(x, -(r**2) / 2))
    yield Claim("u is stationary at x = -r^2/2", stationary == 0, "symbolic")
    top = sympy.simplify(u.subs(x, -(r**2) / 2) - r**2 / 2)
    yield Claim("its maximum there is r^2/2", top == 0, "symbolic")
    k = sympy.Symbol("k", integer=True, positive=True)
    # h(r) - r^2/2 = sum_{k>=3} r^k/k, and (h(r) - (r - ln(1+r))) = 2 sum_{k>=2} r^{2k-1}/(2k-1): all terms >= 0
    series = sympy.series(-sympy.log(1 - r) - r, r, 0, 9).removeO()
    terms = sum(r**j / sympy.Integer(j) for j in range(2, 9))
    yield Claim("h(r) = sum_{k>=2} r^k/k >= r^2/2", sympy.expand(series - terms) == 0, "symbolic")
    odd = sympy.series((-sympy.log(1 - r) - r) - (r - sympy.log(1 + r)), r, 0, 10).removeO()
    expected = sympy.summation(2 * r ** (2 * k + 1) / (2 * k + 1), (k, 1, 4)).doit()
    yield Claim("h(r) - (r - ln(1+r)) = 2 sum r^(2k+1)/(2k+1) >= 0", sympy.expand(odd - expected) == 0, "symbolic")


def counterexamples() -> Iterator[Claim]:
    for norm in (Fraction(3, 2), Fraction(2)):
        # |A|_2 = L >= 1 with det(I + A) arbitrarily near 0: E(A) exceeds any bound in d and L alone
        for exponent in (3, 30, 300):
            near = -1 + Fraction(1, 10**exponent)
            matrix = [[norm, Fraction(0)], [Fraction(0), near]]
            error = log_det_error(matrix)
            yield Claim(
                f"L = {norm}: E(A) > {exponent} ln 10 - 1, unbounded",
                bool(error > exponent * arb(10).log() - 1),
                "ball arithmetic",
            )


def false_claims() -> Iterator[Claim]:
    yield from claims(lambda dim, lipschitz: dim * (lipschitz.log1p() - lipschitz) * -1)  # log(1+L) for -log(1-L)
