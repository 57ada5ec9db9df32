"""KL(q || p) >= E_q T - log E_p exp T for every T, clipped or not, with equality at the log-density ratio."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from finite import kl, normalised, tiny
from flint import arb
from harness import Claim, ball

P = normalised([5, 3, 1, 1])
LAWS = [normalised(w) for w in ([1, 1, 1, 1], [4, 3, 2, 1], [0, 1, 1, 0], [0, 0, 0, 1], [5, 3, 1, 1])]
EXPONENTIALS = [  # e^T, exactly; the last is clipped to [1/2, 2]
    [Fraction(1), Fraction(2), Fraction(4), Fraction(32)],
    [Fraction(1, 3), Fraction(1), Fraction(1), Fraction(5)],
    [Fraction(1, 2), Fraction(1), Fraction(2), Fraction(2)],
]


def right_side(q: list[Fraction], weights: list[Fraction], sign: int = 1) -> arb:
    first = sum((ball(a) * ball(w).log() for a, w in zip(q, weights, strict=True)), arb(0))
    return first - sign * ball(sum((p * w for p, w in zip(P, weights, strict=True)), Fraction(0))).log()


def claims(sign: int = 1) -> Iterator[Claim]:
    for q in LAWS:
        for weights in EXPONENTIALS:
            slack = kl(q, P) - right_side(q, weights, sign)
            yield Claim(
                "the bound holds", bool(slack >= 0) or tiny(slack), "ball arithmetic", f"slack {float(slack):.4f}"
            )
        if all(q):
            ratio = [a / b for a, b in zip(q, P, strict=True)]
            yield Claim("attained at log dq/dp", tiny(kl(q, P) - right_side(q, ratio, sign)), "ball arithmetic")
    # two prompts: the log of the mean is above the mean of the logs
    a, b = Fraction(3), Fraction(7, 5)
    yield Claim(
        "Jensen over prompts",
        bool((ball(a).log() + ball(b).log()) / 2 <= ball((a + b) / 2).log()),
        "ball arithmetic",
    )
    # betting: variables on {0, v} of means mu_i, unlike, whose average is m: E prod(1 - c + c Y / m) is 1 at most
    means = [Fraction(1, 4), Fraction(3), Fraction(1)]
    for share in (Fraction(1, 10), Fraction(1, 2), Fraction(1)):
        m = sum(means) / len(means)
        product = Fraction(1)
        for mean, likely in zip(means, (Fraction(1, 2), Fraction(1, 3), Fraction(9, 10)), strict=True):
            bets = [1 - share, 1 - share + share * (mean / likely) / m]
            product *= (1 - likely) * bets[0] + likely * bets[1]
        yield Claim("the mean bet is 1 at most", product <= 1, "rational arithmetic")


def counterexamples() -> Iterator[Claim]:
    # a sample of the base that misses the last point: its mean of e^T is too small, and q = p is charged nats
    weights = EXPONENTIALS[0]
    seen = [Fraction(1, 2), Fraction(1, 2), Fraction(0), Fraction(0)]
    first = sum((ball(a) * ball(w).log() for a, w in zip(P, weights, strict=True)), arb(0))
    plugged = first - ball(sum((s * w for s, w in zip(seen, weights, strict=True)), Fraction(0))).log()
    yield Claim("a sample mean for log Z overstates", bool(plugged > 0), "ball arithmetic", f"{float(plugged):.4f} > 0")


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
