"""I + V D W has a positive determinant over the whole box of slopes where I + D W V is diagonally dominant."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

from harness import Claim, determinant, random_rational_matrix

Matrix = list[list[Fraction]]


def _times(a: Matrix, b: Matrix) -> Matrix:
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in zip(*b, strict=True)]
        for row in a
    ]


def dominant(M: Matrix, low: Fraction, high: Fraction, upper_only: bool = False) -> bool:
    """The condition of the statement, with weights u = 1."""
    ends = (high,) if upper_only else (low, high)
    most = max(abs(end) for end in ends)
    return all(
        min(1 + end * row[i] for end in ends) > most * sum((abs(x) for j, x in enumerate(row) if j != i), Fraction(0))
        for i, row in enumerate(M)
    )


def moved(W: Matrix, V: Matrix, slopes: tuple[Fraction, ...]) -> Fraction:
    """`det(I + V D W)`, exactly."""
    J = _times(V, [[d * x for x in row] for d, row in zip(slopes, W, strict=True)])
    return determinant([[x + (i == j) for j, x in enumerate(row)] for i, row in enumerate(J)])


def claims(upper_only: bool = False) -> Iterator[Claim]:
    boxes = {"tanh": (Fraction(0), Fraction(1)), "GELU": (Fraction(-13, 100), Fraction(113, 100))}
    for name, (low, high) in boxes.items():
        steps = [low + (high - low) * Fraction(i, 4) for i in range(5)]
        cases = [([[Fraction(20), Fraction(0)]], [[Fraction(1)], [Fraction(7)]])]
        for seed in range(6):
            W = random_rational_matrix(3, 3 * seed + 1)[:2]
            V = [row[:2] for row in random_rational_matrix(3, 3 * seed + 2)]
            cases.append((W, V))
        tried = 0
        for W, V in cases:
            for shrink in (Fraction(1), Fraction(1, 4), Fraction(1, 16)):
                small = [[shrink * x for x in row] for row in W]
                if not dominant(_times(small, V), low, high, upper_only):
                    continue
                tried += 1
                holds = all(moved(small, V, slopes) > 0 for slopes in product(steps, repeat=len(W)))
                yield Claim(f"{name}, case {tried}: positive over the box", holds, "exact")
        yield Claim(f"{name}: the condition is met somewhere", tried > 0, "exact")


def counterexamples() -> Iterator[Claim]:
    fold = moved([[Fraction(2)]], [[Fraction(-6, 5)]], (Fraction(1),))
    yield Claim("x - 1.2 tanh 2x: not dominant, and the determinant is negative at 0", fold < 0, "exact")
    wide = moved([[Fraction(20), Fraction(0)]], [[Fraction(1)], [Fraction(7)]], (Fraction(-13, 100),))
    yield Claim("M = 20 with a slope of -0.13: negative", wide < 0, "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(upper_only=True)
