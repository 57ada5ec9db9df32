"""What the L2 term misses: at least half if J is symmetric, less than nothing if skew, no second order at s = 0."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import arb
from harness import (
    Claim,
    ball,
    frobenius_squared,
    h,
    log_det_error,
    random_rational_matrix,
    with_norm_below,
)
from line import df, expectation, f, near


def _index(matrix: list[list[Fraction]]) -> Fraction:
    n = len(matrix)
    return sum((matrix[i][j] * matrix[j][i] for i in range(n) for j in range(n)), Fraction(0)) / frobenius_squared(
        matrix
    )


def claims(sign: int = 1) -> Iterator[Claim]:
    norm = Fraction(4, 5)
    for dim in (2, 4, 5):
        symmetric = with_norm_below(random_rational_matrix(dim, 3, kind="symmetric"), norm)
        skew = with_norm_below(random_rational_matrix(dim, 3, kind="skew"), norm)
        nilpotent = with_norm_below(random_rational_matrix(dim, 3, kind="nilpotent"), norm)
        general = random_rational_matrix(dim, 9)
        yield Claim(
            f"symmetric, d = {dim}: s = 1 and E >= 0",
            _index(symmetric) == 1 and bool(sign * log_det_error(symmetric) > 0),
            "ball arithmetic",
        )
        yield Claim(
            f"skew, d = {dim}: s = -1 and E <= 0",
            _index(skew) == -1 and bool(sign * log_det_error(skew) < 0),
            "ball arithmetic",
        )
        yield Claim(
            f"nilpotent, d = {dim}: s = 0 and E = 0 exactly",
            _index(nilpotent) == 0 and log_det_error(nilpotent).contains(0),
            "exact",
        )
        yield Claim(f"any, d = {dim}: -1 <= s <= 1", -1 <= _index(general) <= 1, "exact")
    # Gaussian Poincare, and the share the L2 term misses, on the line
    variance = expectation(lambda x: f(x) ** 2)
    energy = expectation(lambda x: df(x) ** 2)
    yield Claim(
        "Var f <= E f'^2", bool(variance <= energy), "quadrature", f"{float(variance):.4f} <= {float(energy):.4f}"
    )
    missed = expectation(lambda x: df(x) - (1 + df(x)).log())
    l2 = variance / 2
    yield Claim(
        "the L2 term misses at least half of the KL of 0.2 sin 3x",
        bool(sign * missed >= l2),
        "quadrature",
        f"KL {float(l2 + missed):.6f}, L2 {float(l2):.6f}",
    )
    linear = arb(1) / 10  # f(x) = 0.1 x: Var f = E f'^2, the boundary of Poincare
    half = linear - linear.log1p()
    yield Claim(
        "f = 0.1 x: E(J) within h(0.1) - 0.005 of the L2 term",
        bool(abs(half - linear**2 / 2) <= h(linear) - linear**2 / 2),
        "ball arithmetic",
    )
    # a rotation by theta is x -> R x, f = (R - I) x: KL 0, L2 term 1 - cos theta per plane
    theta = arb(1) / 3
    cosine, sine = theta.cos(), theta.sin()
    trace = 2 * (cosine - 1)
    determinant = cosine**2 + sine**2
    square = 2 * ((cosine - 1) ** 2 + sine**2)
    kl = square / 2 + sign * (trace - determinant.log())
    yield Claim(
        "a rotation costs nothing: the L2 term is cancelled by E(J)",
        near(kl, arb(0)),
        "ball arithmetic",
        f"L2 {float(square / 2):.4f}",
    )


def counterexamples() -> Iterator[Claim]:
    # E >= 0 for symmetric A needs 1 + lambda > 0 (norm below 1): lambda = -4 gives E = -4 - log 3 < 0
    matrix = [[Fraction(-4)]]
    yield Claim("symmetric of norm 4: E < 0", bool(log_det_error(matrix) < 0), "ball arithmetic")
    # "at least half" is about the fluctuation: a constant f has J = 0, and the L2 term is exact
    yield Claim("a constant shift: E(J) = 0 while |f|^2/2 > 0", bool(log_det_error([[Fraction(0)]]) == 0), "exact")
    # and it is about the second order: beyond it, E(J) of 0.6 x alone is below Var/2
    k = ball(Fraction(3, 5))
    yield Claim(
        "f = 0.6 x: E(J) < Var f / 2, by third order",
        bool(k - k.log1p() < k**2 / 2),
        "ball arithmetic",
        f"{float(k - k.log1p()):.4f} < 0.18",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
