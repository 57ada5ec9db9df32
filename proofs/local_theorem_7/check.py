"""Theorem 7 holds pointwise: |E(J(x))| <= d h(|J(x)|), so its mean needs no global constant."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, h, integrate
from line import df, expectation, phi


def claims(factor: Fraction = Fraction(1)) -> Iterator[Claim]:
    # in one dimension E(J) = phi(J) = J - log(1 + J) >= 0, and h(|J|) is its larger branch
    error = expectation(lambda x: df(x) - (1 + df(x)).log())
    # |J| = 0.6 |cos 3x|, integrated between its zeros (odd multiples of pi/6), where the modulus is analytic
    local = arb(0)
    for k in range(27):
        a = arb(0) if k == 0 else (2 * k - 1) * arb.pi() / 6
        b = (2 * k + 1) * arb.pi() / 6
        sign = 1 if k % 2 == 0 else -1
        local += 2 * integrate(lambda x, s=sign: (-(1 - s * df(x)).log() - s * df(x)) * phi(x), a, b)
    uniform = h(arb(3) / 5)
    local = ball(factor) * local
    yield Claim("E|E(J)| <= E h(|J|)", bool(error <= local), "quadrature", f"{float(error):.5f} <= {float(local):.5f}")
    yield Claim("E h(|J|) <= h(L)", bool(local <= uniform), "quadrature", f"{float(local):.5f} <= {float(uniform):.5f}")
    for numerator in range(0, 100, 9):
        x = ball(Fraction(numerator, 30))
        slope = df(acb(x)).real
        pointwise = slope - slope.log1p()
        limit = h(abs(slope))
        yield Claim(f"at x = {numerator}/30", bool(pointwise <= ball(factor) * limit + arb("1e-30")), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    # a pointwise norm below 1 where one looks does not make T injective: T = x - 1.5 sin x has |f'(pi/2)| = 0
    slope_here = abs(-3 * (arb.pi() / 2).cos() / 2)
    fold = lambda x: x - 3 * x.sin() / 2  # noqa: E731
    folds = bool(fold(arb(1)) < 0) and bool(fold(arb(2)) > 0)
    yield Claim(
        "local norm 0 at pi/2, yet T folds: injectivity still needs a certificate",
        bool(slope_here < arb("1e-30")) and folds,
        "ball arithmetic",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(factor=Fraction(1, 4))
