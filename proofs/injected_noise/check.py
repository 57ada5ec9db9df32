"""KL(law of a (x + f) + sqrt(1 - a^2) eps || N(0, I)) <= a^2 E|f|^2 / (2 (1 - a^2)), on maps whose law is known."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, integrate
from line import phi

SHARES = (Fraction(1, 10), Fraction(1, 2), Fraction(9, 10))  # a^2


def gaussian(mean_square: arb, variance: arb) -> arb:
    return (variance + mean_square - 1 - variance.log()) / 2


def bound(share: Fraction, mean_f_square: arb, power: int = 1) -> arb:
    return ball(share) * mean_f_square / (2 * ball(1 - share) ** power)


def two_point(share: Fraction) -> tuple[arb, arb]:
    """f(x) = sgn(x) - x: the law is that of a sgn(x) + sqrt(1 - a^2) eps, two bumps. Its KL and E f^2."""
    a, variance = ball(share).sqrt(), ball(1 - share)

    def density(z: acb) -> acb:
        bumps = sum(((-((z - s * a) ** 2) / (2 * variance)).exp() for s in (-1, 1)), acb(0))
        return bumps / (2 * (2 * acb.pi() * variance).sqrt())

    cost = integrate(lambda z: density(z) * (density(z) / phi(z)).log(), -6, 6)
    return cost, 2 - 2 * (2 / arb.pi()).sqrt()


def claims(power: int = 1) -> Iterator[Claim]:
    for share in SHARES:
        for shift in (Fraction(1, 10), Fraction(2)):
            cost = gaussian(ball(share * shift**2), arb(1))
            limit = bound(share, ball(shift**2), power)
            yield Claim(f"shift by {shift}, a^2 = {share}", bool(cost <= limit), "ball arithmetic")
        for k in (Fraction(-2), Fraction(-1), Fraction(1, 2), Fraction(3)):
            cost = gaussian(arb(0), ball(share * (1 + k) ** 2 + 1 - share))
            limit = bound(share, ball(k**2), power)
            yield Claim(
                f"f = {k} x, a^2 = {share}",
                bool(cost <= limit),
                "ball arithmetic",
                f"{float(cost):.4f} <= {float(limit):.4f}",
            )
    for share in SHARES[:2]:
        cost, mean_square = two_point(share)
        limit = bound(share, mean_square, power)
        yield Claim(
            f"f = sgn x - x, neither continuous nor injective, a^2 = {share}",
            bool(cost <= limit) and bool(cost > 0),
            "quadrature",
            f"{float(cost):.4f} <= {float(limit):.4f}",
        )


def counterexamples() -> Iterator[Claim]:
    # near a = 1 the collapse f = -x exceeds every fixed multiple of E|f|^2 / 2
    for share, factor in ((1 - Fraction(1, 10**6), 5), (1 - Fraction(1, 10**12), 12)):
        cost = gaussian(arb(0), ball(1 - share))
        yield Claim(
            f"1 - a^2 = {float(1 - share):.0e}: over {factor} times the L2 term",
            bool(cost > factor / arb(2)),
            "ball arithmetic",
        )
    cost = gaussian(arb(0), ball(Fraction(1, 2) + 1))
    yield Claim("coefficients with a^2 + b^2 > 1: f = 0 costs nats", bool(cost > 0), "ball arithmetic")


def false_claims() -> Iterator[Claim]:
    yield from claims(power=0)
