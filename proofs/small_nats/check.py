"""The gain of eps grad r is eps E|grad r|^2 to first order, and E|grad r|^2 >= Var r; exactly, for polynomials."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from flint import acb
from harness import Claim
from line import expectation

_SPEC = importlib.util.spec_from_file_location(
    "polynomials", Path(__file__).parents[1] / "stein_control_variate" / "check.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
poly = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(poly)

REWARDS = [[Fraction(v) for v in values] for values in ([1, 2], [0, 1, 1], [0, 0, 0, 1], [2, -1, 3, 0, 1])]


def composed(r: list[Fraction], inner: list[Fraction]) -> list[Fraction]:
    result, power = [Fraction(0)], [Fraction(1)]
    for c in r:
        result = poly.plus(result, power, c)
        power = poly.times(power, inner)
    return result


def claims(order: int = 1) -> Iterator[Claim]:
    for r in REWARDS:
        slope = poly.derivative(r)
        square = poly.mean(poly.times(slope, slope))
        # the coefficient of eps in E r(x + eps r') by exact differences of a polynomial in eps, extrapolated to 0
        values = []
        for eps in (Fraction(1, 10**6), Fraction(1, 2 * 10**6)):
            moved = composed(r, poly.plus([Fraction(0), Fraction(1)], slope, eps))
            values.append((poly.mean(moved) - poly.mean(r)) / eps)
        first = 2 * values[1] - values[0]
        yield Claim(
            "the gain's first order", abs(first - order * square) < Fraction(1, 10**6), "exact", f"{float(first):.6f}"
        )
        yield Claim("Poincare", poly.variance(r) <= square, "exact", f"{poly.variance(r)} <= {square}")
        yield Claim("equality for linear rewards alone", (poly.variance(r) == square) == (len(r) == 2), "exact")
        second = poly.derivative(slope)
        total = square + poly.mean(poly.times(second, second))
        yield Claim("second-order nats are above the L2 nats", (total > square) == (len(r) > 2), "exact")


def counterexamples() -> Iterator[Claim]:
    # r = cos 10x, r' = -10 sin 10x: steps of size up to 10 eps
    for eps in (Fraction(3, 100), Fraction(1, 5)):
        step = acb(10 * eps.numerator) / eps.denominator
        gain = expectation(lambda x, step=step: (10 * (x - step * (10 * x).sin())).cos() - (10 * x).cos())
        first = step * 10 * expectation(lambda x: (10 * x).sin() ** 2)
        yield Claim(
            f"eps = {eps}: a long step gains less than its first order says",
            bool(gain < first.real),
            "quadrature",
            f"{float(gain):.3f} < {float(first.real):.3f}",
        )


def false_claims() -> Iterator[Claim]:
    yield from claims(order=2)
