"""The mean of the estimator from exact Gaussian moments for polynomials, and in closed form for a step."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import comb

from flint import arb
from harness import Claim, ball, integrate
from line import phi

POLYNOMIALS = (
    [Fraction(5), Fraction(1)],
    [Fraction(1), Fraction(-2), Fraction(3)],
    [Fraction(0), 1, 0, Fraction(1, 3)],
)
POINTS = ((Fraction(2, 5), Fraction(1, 2)), (Fraction(-3, 2), Fraction(3, 4)))  # mu and b


def moment(power: int) -> Fraction:
    """E eps^power."""
    result = Fraction(1)
    for factor in range(power - 1, 0, -2):
        result *= factor
    return result if power % 2 == 0 else Fraction(0)


def mean_with(coefficients: list[Fraction], mu: Fraction, b: Fraction, power: int) -> Fraction:
    """E[r(mu + b eps) eps^power], exactly."""
    total = Fraction(0)
    for degree, c in enumerate(coefficients):
        for k in range(degree + 1):
            total += Fraction(c) * comb(degree, k) * mu ** (degree - k) * b**k * moment(k + power)
    return total


def derivative(coefficients: list[Fraction]) -> list[Fraction]:
    return [degree * Fraction(c) for degree, c in enumerate(coefficients)][1:]


def mean_of_estimate(coefficients: list[Fraction], mu: Fraction, b: Fraction, m: int, *, own: bool) -> Fraction:
    """The mean of G: a draw's own reward, less the baseline's part that it sees itself (`own`: the mean of all m)."""
    itself = mean_with(coefficients, mu, b, 1) / b
    others = mean_with(coefficients, mu, b, 0) * moment(1) / b  # a baseline of other draws, which eps does not enter
    baseline = (itself + (m - 1) * others) / m if own else others
    return itself - baseline


def claims(own: bool = False) -> Iterator[Claim]:
    for coefficients in POLYNOMIALS:
        for mu, b in POINTS:
            expected = mean_with(derivative(coefficients), mu, b, 0)  # d/dmu E r(mu + b eps) = E r'(mu + b eps)
            for m in (2, 3, 8):
                found = mean_of_estimate(coefficients, mu, b, m, own=own)
                degree = len(coefficients) - 1
                yield Claim(f"degree {degree}, mu = {mu}, b = {b}, m = {m}: unbiased", found == expected, "exact")
    for mu, b in POINTS:
        # r = 1{z > 0}: E r = Phi(mu / b), whose derivative is phi(mu / b) / b; E[r eps] / b by quadrature
        edge = -ball(mu) / ball(b)
        expected = phi(edge).real / ball(b)
        found = integrate(lambda e: e * phi(e), edge, 12) / ball(b)
        yield Claim(
            f"a step, mu = {mu}, b = {b}: unbiased",
            bool(abs(found - expected) < arb("1e-12")) != own,
            "quadrature",
            f"{float(expected.mid()):.6f}",
        )


def counterexamples() -> Iterator[Claim]:
    coefficients, (mu, b) = POLYNOMIALS[0], POINTS[0]
    expected = mean_with(derivative(coefficients), mu, b, 0)
    for m in (2, 4):
        found = mean_of_estimate(coefficients, mu, b, m, own=True)
        yield Claim(
            f"the mean of all {m} draws as baseline: {m - 1} / {m} of it", found == expected * (m - 1) / m, "exact"
        )
    # antithetic draws and r(z) = z: (r(z_1) - r(z_2)) eps_1 / b = 2 eps_1^2
    yield Claim("antithetic draws: twice the gradient of a linear reward", 2 * moment(2) == 2 * expected, "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(own=True)
