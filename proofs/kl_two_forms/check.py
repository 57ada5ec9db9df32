"""The exact KL: both forms equal the integral of log(density ratio), computed from the density of T itself."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
from flint import acb, arb
from harness import Claim
from line import df, expectation, f, near


def claims(half: Fraction = Fraction(1, 2)) -> Iterator[Claim]:
    weight = arb(half.numerator) / half.denominator
    log_det = expectation(lambda x: (1 + df(x)).log())
    change = expectation(lambda x: x * f(x) + weight * f(x) ** 2) - log_det
    stein = expectation(lambda x: weight * f(x) ** 2 + df(x)) - log_det
    # independent of both: log p0(x) - log|T'(x)| - log p0(T x), from the densities
    direct = expectation(lambda x: -(x**2) / 2 + (x + f(x)) ** 2 / 2) - log_det
    yield Claim("change of variables equals the integral of the log ratio", near(change, direct), "quadrature")
    yield Claim("Stein form equals it too", near(stein, direct), "quadrature", f"KL = {float(direct):.6f} nats")
    yield Claim("0.2 sin 3x: 0.114620 nats", bool(abs(direct - arb("0.114620")) < arb("5e-7")), "quadrature")
    l2 = expectation(lambda x: weight * f(x) ** 2)
    # E sin^2(3x) = (1 - e^-18) / 2
    yield Claim(
        "its L2 term is 0.01 (1 - e^-18)", near(l2, (1 - arb(-18).exp()) / 100), "quadrature", f"{float(l2):.7f}"
    )

    # affine maps, against the closed form for Gaussians: T x = k x + c
    k, c = sympy.symbols("k c", real=True)
    x2, e = 1, (k - 1)
    half_s = sympy.Rational(half.numerator, half.denominator)
    stein_affine = half_s * (e**2 * x2 + c**2) + e - sympy.log(sympy.Abs(k))
    closed = (k**2 + c**2 - 1) / 2 - sympy.log(sympy.Abs(k))
    yield Claim(
        "T x = k x + c, any k != 0: KL(N(c, k^2) || N(0, 1))", sympy.simplify(stein_affine - closed) == 0, "symbolic"
    )


def counterexamples() -> Iterator[Claim]:
    # |det| matters: T x = -2 x has det(I + J) = -2 < 0 and is injective; without the modulus the logarithm is not real
    value = acb(-2).log()
    yield Claim("T x = -2x: log det(I + J) is not real", bool(abs(value.imag) > 3), "ball arithmetic")
    exact = (arb(4) - 1) / 2 - arb(2).log()
    yield Claim(
        "with the modulus, KL(N(0, 4) || N(0, 1)) = 3/2 - log 2", near(exact, arb(3) / 2 - arb(2).log()), "exact"
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(half=Fraction(1))
