"""On Gaussians: the monotone map costs W2^2, Talagrand's inequality, and the L2 loss's value below -log Z*."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
from flint import arb
from harness import Claim, ball

PAIRS = [
    (Fraction(m), Fraction(s))
    for m, s in ((0, 1), (1, 2), (-3, Fraction(1, 2)), (0, Fraction(1, 100)), (Fraction(1, 7), 5))
]


def transport(m: Fraction, s: Fraction) -> Fraction:
    """W2^2(N(m, s^2), N(0, 1)), by the closed form for Gaussians."""
    return m**2 + (s - 1) ** 2


def claims(factor: int = 1) -> Iterator[Claim]:
    for m, s in PAIRS:
        # E|f|^2 of f = (s - 1) x + m, by the moments of x
        yield Claim(f"N({m}, {s}^2): the monotone map costs W2^2", m**2 + (s - 1) ** 2 == transport(m, s), "exact")
        divergence = (ball(s**2 + m**2 - 1) - ball(s**2).log()) / 2
        slack = divergence - factor * ball(transport(m, s)) / 2
        yield Claim(
            "Talagrand", bool(slack >= 0) or bool(slack.contains(0)), "ball arithmetic", f"slack {float(slack):.4f}"
        )
    # quadratic rewards r(x) / alpha = -h x^2 / 2 + b x: the minimum over Gaussians of the right side, symbolically
    h, b = sympy.symbols("h b", positive=True)
    m, s = sympy.symbols("m s", real=True)
    value = (m**2 + (s - 1) ** 2) / 2 + h * (m**2 + s**2) / 2 - b * m
    at = sympy.solve([sympy.diff(value, m), sympy.diff(value, s)], [m, s], dict=True)[0]
    yield Claim(
        "the minimiser is N(Sb, S^2)",
        sympy.simplify(at[s] - 1 / (1 + h)) == 0 and sympy.simplify(at[m] - b / (1 + h)) == 0,
        "symbolic",
    )
    least = sympy.simplify(value.subs(at))
    for hh, bb in ((Fraction(1, 2), Fraction(0)), (Fraction(3), Fraction(1)), (Fraction(1, 9), Fraction(4))):
        log_z = ball(bb**2 / (2 * (1 + hh))) - ball(1 + hh).log() / 2
        found = ball(
            Fraction(
                sympy.Rational(least.subs({h: sympy.Rational(hh), b: sympy.Rational(bb)})).p,
                sympy.Rational(least.subs({h: sympy.Rational(hh), b: sympy.Rational(bb)})).q,
            )
        )
        yield Claim(
            f"h = {hh}, b = {bb}: below -log Z*",
            bool(found <= -log_z),
            "ball arithmetic",
            f"{float(found):.4f} <= {float(-log_z):.4f}",
        )


def counterexamples() -> Iterator[Claim]:
    for m, s in PAIRS[1:]:
        roundabout = m**2 + (1 + s) ** 2  # f = m - s x - x
        yield Claim("the decreasing map with the same law costs more", roundabout > transport(m, s), "exact")
    twice = 2 * ball(transport(Fraction(0), Fraction(2))) / 2 - (ball(Fraction(3)) - ball(Fraction(4)).log()) / 2
    yield Claim("Talagrand's constant cannot be doubled", bool(twice > arb(0)), "ball arithmetic")


def false_claims() -> Iterator[Claim]:
    yield from claims(factor=2)
