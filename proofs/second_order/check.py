"""Second order: |E(A) - tr(A^2)/2| <= (|A|_F^2 / L^2) (h(L) - L^2/2)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
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


def _half_trace_of_square(matrix: list[list[Fraction]]) -> Fraction:
    n = len(matrix)
    return sum((matrix[i][j] * matrix[j][i] for i in range(n) for j in range(n)), Fraction(0)) / 2


def _product(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
    columns = list(zip(*b, strict=True))
    return [[sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in columns] for row in a]


def _beyond_third(matrix: list[list[Fraction]], norm: Fraction, sign: int) -> tuple[arb, arb]:
    """What the first three orders leave of E(A), and its bound by `|A^2|_F`, `|A^3|_F` and the norm."""
    square = _product(matrix, matrix)
    cube = _product(square, matrix)
    traces = sign * _half_trace_of_square(matrix) - sum((cube[i][i] for i in range(len(cube))), Fraction(0)) / 3
    bound = frobenius_squared(square) * (Fraction(1, 4) + norm / 10)
    bound += frobenius_squared(cube) * (1 / (10 * norm) + 1 / (6 * (1 - norm)))
    return abs(log_det_error(matrix) - ball(traces)), ball(bound)


def claims(sign: int = 1) -> Iterator[Claim]:
    for kind in KINDS:
        for dim in (1, 3, 5):
            for norm in (Fraction(1, 1000), Fraction(1, 2), Fraction(95, 100)):
                matrix = with_norm_below(random_rational_matrix(dim, seed=11 * dim, kind=kind), norm)
                limit = ball(norm)
                remainder = log_det_error(matrix) - sign * ball(_half_trace_of_square(matrix))
                bound = ball(frobenius_squared(matrix)) / limit**2 * (h(limit) - limit**2 / 2)
                yield Claim(
                    f"{kind}, d = {dim}, L = {norm}", surely_le(abs(remainder), bound + arb("1e-34")), "ball arithmetic"
                )
                left, right = _beyond_third(matrix, norm, sign)
                yield Claim(
                    f"three orders, {kind}, d = {dim}, L = {norm}",
                    surely_le(left, right + arb("1e-34")),
                    "ball arithmetic",
                )
    norm = Fraction(4, 5)
    one = [[-norm]]
    remainder = log_det_error(one) - sign * ball(_half_trace_of_square(one))
    yield Claim("attained by -L", bool(remainder.overlaps(h(ball(norm)) - ball(norm * norm) / 2)), "ball arithmetic")
    # E_v[(J'v).(Jv)] = tr(J^2) for independent entries of variance one: sum over v in {-1, 1}^3, exactly
    j = random_rational_matrix(3, 5)
    total = Fraction(0)
    for bits in range(8):
        v = [Fraction(1 if bits >> k & 1 else -1) for k in range(3)]
        jv = [sum((j[a][b] * v[b] for b in range(3)), Fraction(0)) for a in range(3)]
        jtv = [sum((j[b][a] * v[b] for b in range(3)), Fraction(0)) for a in range(3)]
        total += sum((a * b for a, b in zip(jv, jtv, strict=True)), Fraction(0)) / 8
    yield Claim(
        "one VJP and one JVP per probe give tr(J^2) without bias", total == sign * 2 * _half_trace_of_square(j), "exact"
    )
    r = sympy.Symbol("r", positive=True)
    modulus = sympy.series(-sympy.log(1 - r) - r - r**2 / 2, r, 0, 8).removeO()
    yield Claim(
        "h(r) - r^2/2 = sum_{k>=3} r^k/k",
        sympy.expand(modulus - sum(r**k / sympy.Integer(k) for k in range(3, 8))) == 0,
        "symbolic",
    )


def counterexamples() -> Iterator[Claim]:
    # near norm 1 the second order is far off: it is the L < 1 that keeps the remainder finite
    matrix = [[Fraction(-999, 1000)]]
    off = log_det_error(matrix) - ball(_half_trace_of_square(matrix))
    yield Claim("A = -0.999: off by more than 5 nats", bool(off > 5), "ball arithmetic", f"{float(off):.3f}")


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
