"""KL(best of n || base) is at most log n - (n - 1) / n, with equality without ties; and the unbiased estimate."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, product
from math import comb, prod

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


def chosen(law: list[Fraction], rewards: list[int], n: int, first: bool) -> list[Fraction]:
    """The law of the best of n draws by going through all draws; of several best the first, or one at random."""
    found = [Fraction(0)] * len(law)
    for draws in product(range(len(law)), repeat=n):
        top = max(rewards[x] for x in draws)
        best_draws = [x for x in draws if rewards[x] == top]
        for x in best_draws[:1] if first else best_draws:
            found[x] += prod((law[y] for y in draws), start=Fraction(1)) / (1 if first else len(best_draws))
    return found


def with_ties(law: list[Fraction], rewards: list[int], n: int) -> list[Fraction]:
    """The same from the masses of the smaller rewards and of the rewards up to a point's own."""
    found = []
    for mass, reward in zip(law, rewards, strict=True):
        below = sum((m for m, r in zip(law, rewards, strict=True) if r < reward), Fraction(0))
        upto = sum((m for m, r in zip(law, rewards, strict=True) if r <= reward), Fraction(0))
        found.append(mass * (upto**n - below**n) / (upto - below))
    return found


def bound(n: int, missing: int = 1) -> arb:
    return ball(n).log() - ball(Fraction(n - missing, n))


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
                bool(cost <= bound(n, missing)),
                "ball arithmetic",
                f"{float(cost):.4f} <= {float(bound(n, missing)):.4f}",
            )
    tied, values = normalised([2, 1, 4, 3]), [1, 0, 1, 2]
    for n in (1, 2, 4):
        closed = with_ties(tied, values, n)
        for first in (True, False):
            rule = "the first" if first else "at random"
            yield Claim(f"ties, {rule}, n = {n}: the law", chosen(tied, values, n, first) == closed, "exact")
        cost = kl(closed, tied)
        yield Claim(
            f"ties, n = {n}: below the bound",
            bool(cost <= bound(n, missing)),
            "ball arithmetic",
            f"{float(cost):.4f} <= {float(bound(n, missing)):.4f}",
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
