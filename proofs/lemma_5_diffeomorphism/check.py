"""Lemma 5: f L-Lipschitz, L < 1, makes T = id + f bi-Lipschitz and bijective; the inverse is a fixed point."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from flint import arb
from harness import Claim, ball, random_rational_matrix, with_norm_below

Vector = list[Fraction]


def _relu_map(seed: int, norm: Fraction) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """`f(x) = W relu(V x)` with `|V| <= 1` and `|W| <= norm`, exactly rational."""
    inner = with_norm_below(random_rational_matrix(3, seed), Fraction(1))
    return inner, with_norm_below(random_rational_matrix(3, seed + 50), norm)


def _apply(maps: tuple[list[list[Fraction]], list[list[Fraction]]], x: Vector) -> Vector:
    inner, outer = maps
    hidden = [max(Fraction(0), sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0))) for row in inner]
    return [sum((a * b for a, b in zip(row, hidden, strict=True)), Fraction(0)) for row in outer]


def _square(x: Vector) -> Fraction:
    return sum((a * a for a in x), Fraction(0))


def claims(slack: Fraction = Fraction(0)) -> Iterator[Claim]:
    for norm in (Fraction(1, 5), Fraction(9, 10)):
        maps = _relu_map(3, norm)
        points = [[Fraction(7 * i % 11 - 5), Fraction(3 * i % 7 - 3), Fraction(i % 5 - 2, 2)] for i in range(8)]
        low, high = (1 - norm + slack) ** 2, (1 + norm) ** 2
        for x, y in pairwise(points):
            image = [a + b - c - e for a, b, c, e in zip(x, _apply(maps, x), y, _apply(maps, y), strict=True)]
            gap = _square([a - b for a, b in zip(x, y, strict=True)])
            holds = low * gap <= _square(image) <= high * gap
            yield Claim(f"(1-L)|x-y| <= |Tx-Ty| <= (1+L)|x-y|, L = {norm}", holds, "exact")
        attained = [[-norm if i == j else Fraction(0) for j in range(2)] for i in range(2)]
        shrunk = [(1 + attained[i][i]) * c for i, c in enumerate((Fraction(3), Fraction(4)))]
        yield Claim("f = -L x attains the lower bound", _square(shrunk) == (1 - norm + slack) ** 2 * 25, "exact")
    # surjectivity, constructively: z <- y - sin(z)/2 converges, with the a-priori error L^k / (1 - L) |z1 - z0|
    for target in (Fraction(0), Fraction(17, 10), Fraction(-250, 3)):
        y, z = ball(target), ball(target)
        first = abs((y - z.sin() / 2) - z)
        steps = 120
        for _ in range(steps):
            z = (y - z.sin() / 2).mid()
        error = first * (arb(1) / 2) ** steps * 2 + arb("1e-34")  # rounding of mid, damped by the contraction
        root = arb(z.mid(), error)
        yield Claim(
            f"the iteration solves T z = {target}", bool((root + root.sin() / 2 - y).contains(0)), "ball arithmetic"
        )


def counterexamples() -> Iterator[Claim]:
    yield Claim("L = 1: f(x) = -x maps everything to 0", all(x + -x == 0 for x in (Fraction(1), Fraction(2))), "exact")
    fold = lambda x: x - 3 * x.sin() / 2  # noqa: E731
    signs = (bool(fold(arb(1)) < 0), bool(fold(arb(2)) > 0), bool(fold(arb(0)) == 0))
    yield Claim("L = 3/2: x - 1.5 sin x vanishes at 0 and again in (1, 2)", all(signs), "ball arithmetic")
    limit = arb.pi() / 2
    tops = [arb(10**k).atan() for k in (2, 6, 12)]
    yield Claim(
        "L = 1 not attained: T = arctan (f = arctan x - x) is injective but misses 2",
        all(bool(top < limit) for top in tops) and bool(limit < 2),
        "ball arithmetic",
    )
    kink = [Fraction(1) + Fraction(1, 2), Fraction(1)]  # one-sided slopes of x + relu(x)/2 at 0
    yield Claim("f = relu(x)/2 is not C1: T is bi-Lipschitz, not a diffeomorphism", kink[0] != kink[1], "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(slack=Fraction(1, 100))
