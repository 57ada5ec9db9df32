"""Finite probability spaces with exact weights, for the statements about laws and their tilts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from flint import arb
from harness import ball

Law = Sequence[Fraction]


def normalised(weights: Sequence[Fraction | int]) -> list[Fraction]:
    """Weights divided by their sum."""
    total = sum((Fraction(w) for w in weights), Fraction(0))
    return [Fraction(w) / total for w in weights]


def tilted(law: Law, weights: Law) -> tuple[list[Fraction], Fraction]:
    """The law times `exp(r / alpha)` (given as exact weights), normalised, and `Z*`."""
    z = sum((p * w for p, w in zip(law, weights, strict=True)), Fraction(0))
    return [p * w / z for p, w in zip(law, weights, strict=True)], z


def push(law: Law, g: Sequence[int], size: int) -> list[Fraction]:
    """The law of `g(X)`."""
    result = [Fraction(0)] * size
    for p, y in zip(law, g, strict=True):
        result[y] += p
    return result


def kl(q: Law, p: Law) -> arb:
    """`KL(q || p)`, with `0 log 0 = 0`; `q` must vanish where `p` does."""
    total = arb(0)
    for a, b in zip(q, p, strict=True):
        assert a == 0 or b > 0
        if a:
            total += ball(a) * ball(a / b).log()
    return total


def mean(law: Law, values: Sequence[arb]) -> arb:
    """The expectation of `values` under `law`."""
    return sum((ball(p) * v for p, v in zip(law, values, strict=True)), arb(0))


def tiny(value: arb) -> bool:
    """Whether the ball contains zero and is too small to hide anything else."""
    return bool(value.contains(0)) and bool(abs(value) < arb("1e-25"))


# A generator that is not injective: two noises give output 0, three give output 1, one gives output 2.
NOISE = normalised([3, 1, 4, 1, 5, 9])
GENERATOR = (0, 0, 1, 1, 1, 2)
WEIGHTS_OUT = [Fraction(2), Fraction(1, 3), Fraction(5, 2)]  # exp(r(y) / alpha)
WEIGHTS_IN = [WEIGHTS_OUT[y] for y in GENERATOR]  # exp(r(g(x)) / alpha)
BASE_OUT = push(NOISE, GENERATOR, 3)
LAWS = [
    normalised(weights)
    for weights in ([1, 1, 1, 1, 1, 1], [5, 2, 1, 1, 1, 7], [1, 20, 3, 1, 1, 2], [0, 1, 2, 0, 3, 1], [1, 0, 0, 0, 0, 0])
]
