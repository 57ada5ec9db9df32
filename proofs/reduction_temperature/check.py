"""A mean over the d entries of |f|^2 in place of the sum is the sum loss at temperature alpha / d."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from harness import Claim


def claims(power: int = 1) -> Iterator[Claim]:
    square, reward = sympy.symbols("F r", real=True)
    d, alpha = sympy.symbols("d alpha", positive=True)
    mean_loss = square / (2 * d) - reward / alpha
    sum_loss = square / 2 - reward / (alpha / d**power)
    yield Claim(
        "d * (mean loss at alpha) = sum loss at alpha / d", sympy.simplify(d * mean_loss - sum_loss) == 0, "symbolic"
    )
    for name, dimension in (
        ("SANA-Sprint, 1024 px", 32 * 32 * 32),
        ("SD-Turbo, 512 px", 4 * 64 * 64),
        ("FLUX, 512 px", 16 * 64 * 64),
    ):
        effective = sympy.Rational(1, dimension) ** power
        yield Claim(f"{name}: effective alpha 1/{dimension} at alpha = 1", effective * dimension == 1, "exact")
    # on the line r(g(x))/alpha = -h x^2/2 becomes -d h x^2/2, and the tilted variance 1/(1+h) becomes 1/(1+dh)
    hh = sympy.Symbol("h", positive=True)
    tempered = 1 / (1 + hh * d**power)
    yield Claim("the target's variance", sympy.simplify(tempered - 1 / (1 + d * hh)) == 0, "symbolic")


def counterexamples() -> Iterator[Claim]:
    # it is not a change of step size: the two targets differ at every d > 1
    hh = sympy.Rational(1)
    yield Claim("d = 2: variances 1/2 and 1/3", 1 / (1 + hh) != 1 / (1 + 2 * hh), "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(power=2)
