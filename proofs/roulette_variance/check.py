"""The roulette estimator is unbiased, and its second moment is finite exactly when L^2 <= q at A = -L."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import arb
from harness import Claim, ball, h

FREE = 4  # terms without randomness


def _survival(k: int, q: Fraction) -> Fraction:
    return q ** max(0, k - FREE)


def claims(weight_power: int = 1) -> Iterator[Claim]:
    # the mean, exactly: N cut off at K (all that is left of the law sits at K), terms of z = -2/3
    for q in (Fraction(1, 2), Fraction(2, 3), Fraction(9, 10)):
        last, norm = 24, Fraction(2, 3)
        terms = {k: norm**k / k for k in range(2, last + 1)}
        mean = Fraction(0)
        for n in range(FREE, last + 1):
            probability = _survival(n, q) - (_survival(n + 1, q) if n < last else Fraction(0))
            mean += probability * sum(
                (terms[k] / _survival(k, q) ** weight_power for k in range(2, n + 1)), Fraction(0)
            )
        yield Claim(f"the mean is the sum of the terms, q = {q}", mean == sum(terms.values()), "exact")
    # the second moment at A = -L: sum_j a_j^2 / P_j + 2 sum_{j<k} a_j a_k / P_j, and the bound of the derivation
    norm = Fraction(4, 5)
    for q in (norm**2, norm):
        partial = sum((ball(norm) ** (2 * j) / (j**2 * ball(_survival(j, q))) for j in range(2, 2000)), arb(0))
        bound = 2 / (1 - ball(norm)) * partial
        exact = arb(0)
        tails = h(ball(norm))
        for j in range(2, 400):
            a = ball(norm) ** j / j
            tails -= a
            exact += (a**2 + 2 * a * tails) / ball(_survival(j, q)) ** weight_power
        yield Claim(
            f"second moment below the bound, q = {q}",
            bool(exact <= bound),
            "ball arithmetic",
            f"{float(exact):.4f} <= {float(bound):.4f}",
        )
        variance = exact - h(ball(norm)) ** 2
        yield Claim(
            f"and above the squared mean, q = {q}",
            bool(variance > 0),
            "ball arithmetic",
            f"variance {float(variance):.4f}",
        )


def counterexamples() -> Iterator[Claim]:
    norm, q = ball(Fraction(9, 10)), Fraction(1, 2)
    for last, least in ((30, 10), (60, 10**6), (120, 10**18)):
        partial = sum((norm ** (2 * j) / (j**2 * ball(_survival(j, q))) for j in range(2, last)), arb(0))
        yield Claim(
            f"L = 0.9, q = 0.5: {last} terms of the second moment exceed {least}",
            bool(partial > least),
            "ball arithmetic",
        )


def false_claims() -> Iterator[Claim]:
    yield from claims(weight_power=0)
