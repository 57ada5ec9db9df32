"""Gauss rules lie above v' log(B'B) v, Gauss-Radau rules with the node (1-L)^2 below; any measure, few nodes."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import arb
from harness import Claim, ball

# A diagonal M realises any spectral measure: nodes 1 + mu_i = (1 + a_i)^2, masses v_i^2
CASES = [
    ([Fraction(-1, 2), Fraction(1, 2), Fraction(1, 10)], [1, 1, 1]),
    ([Fraction(-7, 10), Fraction(-3, 5), Fraction(4, 5), Fraction(0)], [1, 2, 3, 1]),
    ([Fraction(1, 100), Fraction(-1, 100), Fraction(1, 50)], [1, 3, 2]),
    ([Fraction(-9, 10), Fraction(9, 10)], [1, 1]),
]


def _recurrence(mu: list[Fraction], mass: list[int]) -> tuple[Fraction, Fraction, Fraction]:
    """`alpha_1, beta_1^2, alpha_2` of the orthogonal polynomials of the measure, exactly."""
    total = sum(mass)
    a1 = sum((m * w for m, w in zip(mu, mass, strict=True)), Fraction(0)) / total
    b1 = sum(((m - a1) ** 2 * w for m, w in zip(mu, mass, strict=True)), Fraction(0)) / total
    a2 = sum(((m - a1) ** 2 * m * w for m, w in zip(mu, mass, strict=True)), Fraction(0)) / (b1 * total)
    return a1, b1, a2


def _two_nodes(a1: Fraction, b1: Fraction, corner: Fraction) -> arb:
    """`e1' log(I + T) e1` for the 2 x 2 matrix with diagonal `(a1, corner)` and squared off-diagonal `b1`."""
    half = ball((a1 - corner) / 2)
    root = (half**2 + ball(b1)).sqrt()
    middle = ball((a1 + corner) / 2)
    low, high = middle - root, middle + root
    weight_high = (ball(a1) - low) / (high - low)
    return weight_high * (1 + high).log() + (1 - weight_high) * (1 + low).log()


def claims(node_of: int = 1) -> Iterator[Claim]:
    for values, mass in CASES:
        mu = [(1 + a) ** 2 - 1 for a in values]
        norm = max(abs(a) for a in values)
        total = sum(mass)
        truth = sum((w * ball(1 + m).log() for m, w in zip(mu, mass, strict=True)), arb(0)) / total
        a1, b1, a2 = _recurrence(mu, mass)
        node = (1 - norm) ** 2 - 1 if node_of == 1 else max(mu)
        one, two = ball(1 + a1).log(), _two_nodes(a1, b1, a2)
        radau = _two_nodes(a1, b1, node + b1 / (a1 - node)) if a1 != node else one
        slack = arb("1e-30")
        yield Claim(f"Gauss, 1 node, is above, |A| = {norm}", bool(one >= truth - slack), "ball arithmetic")
        yield Claim(
            f"Gauss, 2 nodes, is above and closer, |A| = {norm}",
            bool(two >= truth - slack) and bool(two <= one + slack),
            "ball arithmetic",
        )
        yield Claim(
            f"Gauss-Radau is below, |A| = {norm}",
            bool(radau <= truth + slack),
            "ball arithmetic",
            f"[{float(radau):.4f}, {float(two):.4f}]",
        )
        # E by the form: the mean of v'Av - v'log(B'B)v/2 over signs of v is tr A - log|det B| for a diagonal A
        if len(set(mass)) == 1:
            error = sum((ball(a) - abs(ball(1 + a)).log() for a in values), arb(0))
            form = sum((ball(a) for a in values), arb(0)) - total * truth / 2
            yield Claim("its mean over probes is E(A)", bool(abs(error - form) < slack), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    values, mass = [Fraction(-1, 2), Fraction(1, 2)], [1, 1]
    mu = [(1 + a) ** 2 - 1 for a in values]
    a1, b1, _ = _recurrence(mu, mass)
    node = (1 - Fraction(1, 10)) ** 2 - 1
    radau = _two_nodes(a1, b1, node + b1 / (a1 - node))
    truth = sum((ball(1 + m).log() for m in mu), arb(0)) / 2
    yield Claim(
        "a node above the spectrum (L taken as 0.1) is no lower bound",
        bool(radau > truth),
        "ball arithmetic",
        f"{float(radau):.4f} > {float(truth):.4f}",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(node_of=-1)
