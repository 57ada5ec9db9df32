"""Coverage of both certificates, computed outcome by outcome, or from the chi-square law."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, surely_le

DELTA = Fraction(1, 20)
COINS = (
    [Fraction(1, 2)] * 8,
    [Fraction(1, 10)] * 9,
    [Fraction(1, 5)] * 14,
    [Fraction(9, 10), Fraction(1, 10), Fraction(1, 2), Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)],
)


def coin_divergence(p: Fraction, q: Fraction) -> arb:
    heads = ball(p) * (ball(p) / ball(q)).log() if p > 0 else arb(0)
    tails = ball(1 - p) * (ball(1 - p) / ball(1 - q)).log() if p < 1 else arb(0)
    return heads + tails


def missed(coins: list[Fraction], delta: Fraction, factor: int = 1) -> Fraction:
    """The probability that the bound of the mean of these coins lies below it; `factor` 1 is the statement's."""
    count = len(coins)
    mean = sum(coins, Fraction(0)) / count
    law = [Fraction(1)]  # of the sum
    for coin in coins:
        law = [(1 - coin) * none + coin * one for none, one in zip([*law, 0], [0, *law], strict=True)]
    return sum(
        (
            probability
            for heads, probability in enumerate(law)
            if (seen := Fraction(heads, count)) < mean
            and bool(factor * count * coin_divergence(seen, mean) > (1 / ball(delta)).log())
        ),
        Fraction(0),
    )


def chi_square_below(count: int, level: arb) -> arb:
    """P(chi-square of `count` degrees of freedom < level)."""
    if not bool(level > 0):
        return arb(0)
    return acb(level / 2).gamma_lower(acb(count) / 2, regularized=1).real


def missed_by_slope(count: int, delta: Fraction, share: Fraction = Fraction(1)) -> arb:
    """For f(x) = x in one dimension, L = share: how often the certificate of E x^2 = 1 is below 1."""
    L = ball(share)
    room = 1 - L**2 / count
    edge = room.sqrt() - L * (2 * (1 / ball(delta)).log() / count).sqrt()
    return chi_square_below(count, count * edge**2) if bool(edge > 0) else arb(0)


def claims(factor: int = 1) -> Iterator[Claim]:
    for coins in COINS:
        for delta in (DELTA, Fraction(1, 4)):
            found = missed(coins, delta, factor)
            yield Claim(
                f"{len(coins)} independent coins of mean {sum(coins) / len(coins)}: missed at most {delta}",
                found <= delta,
                "exact",
                f"{float(found):.4f}",
            )
    # the convexity step, for laws on three points of [0, 1]
    for law in ((Fraction(1, 3),) * 3, (Fraction(1, 8), Fraction(3, 4), Fraction(1, 8))):
        points = (Fraction(0), Fraction(2, 5), Fraction(1))
        mean = sum((p * y for p, y in zip(law, points, strict=True)), Fraction(0))
        for slope in (Fraction(-1, 2), Fraction(-3)):
            moment = sum((ball(p) * (ball(slope * y)).exp() for p, y in zip(law, points, strict=True)), arb(0))
            bound = 1 + ball(mean) * (ball(slope).exp() - 1)
            yield Claim(f"E exp({slope} Y) below that of a coin", surely_le(moment, bound), "ball arithmetic")
    for count in (16, 64, 200):
        for delta in (DELTA, Fraction(1, 4)):
            found = missed_by_slope(count, delta)
            yield Claim(
                f"f(x) = x, n = {count}: missed at most {delta}",
                surely_le(found, ball(delta)),
                "ball arithmetic",
                f"{float(found.mid()):.4f}",
            )


def counterexamples() -> Iterator[Claim]:
    # values up to 10 that are said to be at most 1: ten samples miss the rare one with probability 0.9^10
    rare, count = Fraction(1, 10), 10
    unseen = (1 - rare) ** count
    bound_of_nothing = 1 - (ball(DELTA).log() / count).exp()
    yield Claim(
        "a bound of the values that is too small: the mean 1 is missed with probability 0.35",
        bool(bound_of_nothing < 1) and unseen > DELTA,
        "exact",
        f"{float(unseen):.4f}",
    )
    found = missed_by_slope(64, DELTA, Fraction(1, 20))
    yield Claim(
        "a Lipschitz constant that is too small: missed too often", bool(found > ball(DELTA)), "ball arithmetic"
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(factor=4)
