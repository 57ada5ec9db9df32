"""KL(best of n || base) is at most log n - (n - 1) / n, with equality without ties; and the unbiased estimate."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations
from math import comb

import sympy
from finite import kl, normalised
from flint import arb
from harness import Claim, ball


def best(law: list[Fraction], n: int) -> list[Fraction]:
    """The law of the best of n draws when the points are in the order of their rewards, exactly."""
    total, before, found = Fraction(0), Fraction(0), []
    for mass in law:
        total += mass
        found.append(total**n - before**n)
        before = total
    return found


def bound(n: int) -> arb:
    return ball(n).log() - ball(Fraction(n - 1, n))


def claims(missing: int = 1) -> Iterator[Claim]:
    u = sympy.Symbol("u", positive=True)
    for n in (2, 3, 4, 8):
        density = n * u ** (n - 1)
        spent = sympy.integrate(sympy.expand_log(density * sympy.log(density), force=True), (u, 0, 1))
        stated = sympy.log(n) - sympy.Rational(n - missing, n)
        yield Claim(f"without ties, n = {n}", sympy.simplify(spent - stated) == 0, "symbolic")
    for weights in ([1, 1], [1, 9], [5, 3, 1, 1], [1] * 64):
        law = normalised(weights)
        for n in (2, 4, 50):
            cost = kl(best(law, n), law)
            yield Claim(
                f"{len(law)} values, n = {n}: below the bound",
                bool(cost <= bound(n)),
                "ball arithmetic",
                f"{float(cost):.4f} <= {float(bound(n)):.4f}",
            )
    rewards = [Fraction(v) for v in (3, -1, 4, 1, 5, 9, -2)]
    ordered, count = sorted(rewards), len(rewards)
    for n in (1, 2, 3, 7):
        over_sets = sum((max(s) for s in combinations(rewards, n)), Fraction(0)) / comb(count, n)
        by_rank = sum((Fraction(comb(k, n - 1), comb(count, n)) * r for k, r in enumerate(ordered)), Fraction(0))
        yield Claim(f"order statistics give the mean over all sets, n = {n}", over_sets == by_rank, "exact")


def counterexamples() -> Iterator[Claim]:
    antithetic = ball(2).log()  # density 2 on the upper half
    yield Claim("antithetic candidates cost more", bool(antithetic > bound(2)), "ball arithmetic")
    coin = normalised([1, 1])
    cost = kl(best(coin, 2), coin)
    yield Claim("ties make it strictly cheaper", bool(cost < bound(2)), "ball arithmetic", f"{float(cost):.4f}")


def false_claims() -> Iterator[Claim]:
    yield from claims(missing=0)
