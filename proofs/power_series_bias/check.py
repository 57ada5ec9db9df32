"""The truncation error of the power series, of the trace and of one quadratic form."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import arb
from harness import (
    KINDS,
    Claim,
    ball,
    frobenius_squared,
    h,
    log_det_error,
    random_rational_matrix,
    surely_le,
    with_norm_below,
)

Matrix = list[list[Fraction]]


def _times(a: Matrix, b: Matrix) -> Matrix:
    return [[sum((x * b[k][j] for k, x in enumerate(row)), Fraction(0)) for j in range(len(b))] for row in a]


def _apply(a: Matrix, v: list[Fraction]) -> list[Fraction]:
    return [sum((x * y for x, y in zip(row, v, strict=True)), Fraction(0)) for row in a]


def _partial_trace(a: Matrix, n: int) -> Fraction:
    power, total = a, Fraction(0)
    for k in range(2, n + 1):
        power = _times(power, a)
        total += Fraction((-1) ** k, k) * sum((power[i][i] for i in range(len(a))), Fraction(0))
    return total


def claims(shrink: int = 1) -> Iterator[Claim]:
    for kind in KINDS:
        for norm in (Fraction(1, 100), Fraction(3, 5)):
            matrix = with_norm_below(random_rational_matrix(3, 4, kind=kind), norm)
            limit = ball(norm)
            for n in (2, 4, 7):
                remainder = abs(log_det_error(matrix) - ball(_partial_trace(matrix, n)))
                bound = ball(frobenius_squared(matrix)) * limit ** (n - 1) / ((n + 1) * (1 - limit)) / shrink
                yield Claim(
                    f"trace, {kind}, L = {norm}, n = {n}", surely_le(remainder, bound + arb("1e-33")), "ball arithmetic"
                )
    for norm in (Fraction(1, 10), Fraction(9, 10)):
        # A = -L I: every term of the tail has one sign, and the tail is at least 1 - L of the bound
        for n in (2, 5, 9):
            limit = ball(norm)
            tail = h(limit) - sum((limit**k / k for k in range(2, n + 1)), arb(0))
            bound = limit**2 * limit ** (n - 1) / ((n + 1) * (1 - limit)) / shrink
            yield Claim(
                f"right size at -L, L = {norm}, n = {n}",
                bool((1 - limit) * bound <= tail) and bool(tail <= bound),
                "ball arithmetic",
            )
    # one quadratic form: v'A^k v to 90 terms exactly, the rest below 1e-18 |v|^2 at L = 3/5
    norm = Fraction(3, 5)
    matrix = with_norm_below(random_rational_matrix(3, 8), norm)
    v = [Fraction(1), Fraction(-1), Fraction(1)]
    powers = [v]
    transposed = [list(column) for column in zip(*matrix, strict=True)]
    for _ in range(90):
        powers.append(_apply(transposed, powers[-1]))
    terms = [
        Fraction((-1) ** k, max(k, 1)) * sum((a * b for a, b in zip(v, powers[k], strict=True)), Fraction(0))
        for k in range(91)
    ]
    limit = ball(norm)
    rest = 3 * limit**91 / (91 * (1 - limit))
    for n in (2, 3, 6):
        error = abs(ball(sum(terms[n + 1 :], Fraction(0)))) + rest
        length = ball(sum((x * x for x in powers[n]), Fraction(0))).sqrt()
        factor = limit / ((n + 1) * (1 - limit))
        yield Claim(
            f"quadratic form, n = {n}", surely_le(error, arb(3).sqrt() * length * factor / shrink), "ball arithmetic"
        )
        if n == 2:
            sharp = (h(limit) - limit**2 / 2) / limit**2
            yield Claim(
                "n = 2, the sharper factor",
                surely_le(error, arb(3).sqrt() * length * sharp / shrink),
                "ball arithmetic",
            )


def counterexamples() -> Iterator[Claim]:
    sums = [abs(_partial_trace([[Fraction(2)]], n)) for n in (10, 20, 40)]
    yield Claim("A = 2: the partial sums grow without limit", sums[0] < sums[1] < sums[2] and sums[2] > 10**9, "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(shrink=20)
