"""Expectations of analytic functions under N(0, 1), enclosed; the scalar map the examples share."""

from __future__ import annotations

from collections.abc import Callable

from flint import acb, arb
from harness import integrate

REACH = 14  # P(|X| > 14) < 2e-44


def phi(x: acb) -> acb:
    """The standard normal density."""
    return (-(x**2) / 2).exp() / (2 * acb.pi()).sqrt()


def expectation(f: Callable[[acb], acb], reach: int = REACH) -> arb:
    """`E f(X)` over |X| <= reach, in two halves; the rest is below 1e-40 for functions of polynomial growth."""
    left = integrate(lambda z: f(z) * phi(z), -reach, 0)
    right = integrate(lambda z: f(z) * phi(z), 0, reach)
    return left + right


AMPLITUDE, FREQUENCY = arb(1) / 5, 3


def f(x: acb) -> acb:
    """`f(x) = 0.2 sin 3x`, of Lipschitz constant 0.6."""
    return AMPLITUDE * (FREQUENCY * x).sin()


def df(x: acb) -> acb:
    """Its derivative."""
    return AMPLITUDE * FREQUENCY * (FREQUENCY * x).cos()


def near(a: arb, b: arb, tolerance: str = "1e-25") -> bool:
    """Whether two enclosures are proved to be within `tolerance`."""
    return bool(abs(a - b) < arb(tolerance))
