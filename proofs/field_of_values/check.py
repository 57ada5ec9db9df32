"""E(S) - |K|_F^2 / (2 (1 + lambda_min(S))^2) <= E(A) <= E(S) for A = S + K, lambda_min(S) > -1."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
from flint import arb
from harness import Claim, ball, determinant, frobenius_squared, log_det_error, random_rational_matrix, surely_le


def _parts(matrix: list[list[Fraction]]) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    n = len(matrix)
    symmetric = [[(matrix[i][j] + matrix[j][i]) / 2 for j in range(n)] for i in range(n)]
    return symmetric, [[matrix[i][j] - symmetric[i][j] for j in range(n)] for i in range(n)]


def _above(symmetric: list[list[Fraction]], bound: Fraction) -> bool:
    """Whether `lambda_min > bound`, exactly: all leading minors of `S - bound I` are positive (Sylvester)."""
    n = len(symmetric)
    shifted = [[symmetric[i][j] - (bound if i == j else 0) for j in range(n)] for i in range(n)]
    return all(determinant([row[:k] for row in shifted[:k]]) > 0 for k in range(1, n + 1))


def _lambda_min_below(symmetric: list[list[Fraction]]) -> Fraction:
    """A rational just below `lambda_min(S)`, by bisection with exact tests."""
    low, high = Fraction(-40), Fraction(40)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _above(symmetric, middle) else (low, middle)
    return low


def claims(square_factor: int = 1) -> Iterator[Claim]:
    found = 0
    for seed in range(1, 12):
        for dim in (2, 3, 5):
            matrix = random_rational_matrix(dim, seed, scale=Fraction(3, 2))
            symmetric, skew = _parts(matrix)
            symmetric = [[x * Fraction(2, 5) for x in row] for row in symmetric]
            matrix = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(symmetric, skew, strict=True)]
            floor = _lambda_min_below(symmetric)
            if floor <= -1:
                continue
            found += 1
            upper = log_det_error(symmetric)
            lower = upper - square_factor * ball(frobenius_squared(skew)) / (2 * ball(1 + floor) ** 2)
            error = log_det_error(matrix)
            yield Claim(
                f"bracket, d = {dim}",
                surely_le(lower, error) and surely_le(error, upper + arb("1e-30")),
                "ball arithmetic",
                f"[{float(lower):.2f}, {float(upper):.2f}]",
            )
    yield Claim("the hypothesis was met often enough to say something", found >= 15, "exact", f"{found} matrices")
    b = sympy.Symbol("b", real=True)
    # the identity behind it in two dimensions: det(I + S + K) = det(I + S) sqrt(det(I + M'M))
    s1, s2 = sympy.symbols("s1 s2", positive=True)  # eigenvalues of I + S
    det_full = sympy.Matrix([[s1, b], [-b, s2]]).det()
    m = b / sympy.sqrt(s1 * s2)
    det_m = sympy.Matrix([[1 + m**2, 0], [0, 1 + m**2]]).det()
    yield Claim(
        "det(I+S+K)^2 = det(I+S)^2 det(I+M'M), d = 2",
        sympy.simplify(det_full**2 - (s1 * s2) ** 2 * det_m) == 0,
        "symbolic",
    )
    # strong monotonicity gives injectivity where L > 1: T x = x + 10 R x with R the quarter turn
    big = [[Fraction(0), Fraction(-10)], [Fraction(10), Fraction(0)]]
    yield Claim(
        "norm 10, S = 0: det(I + A) = 101 > 0, T is injective",
        determinant([[1 + big[0][0], big[0][1]], [big[1][0], 1 + big[1][1]]]) == 101,
        "exact",
    )


def counterexamples() -> Iterator[Claim]:
    # lambda_min(S) <= -1: the right side fails. S = diag(-2, -2), K = quarter turn: I + A = [[-1, -1], [1, -1]]
    matrix = [[Fraction(-2), Fraction(-1)], [Fraction(1), Fraction(-2)]]
    symmetric, _ = _parts(matrix)
    yield Claim(
        "lambda_min(S) = -2: E(A) = -4 - log 2, E(S) = -4: still below",
        bool(log_det_error(matrix) <= log_det_error(symmetric)),
        "ball arithmetic",
    )
    matrix = [[Fraction(-3), Fraction(-2)], [Fraction(2), Fraction(1)]]
    symmetric, _ = _parts(matrix)
    yield Claim(
        "S = diag(-3, 1), K = 2 quarter turns: det(I + A) = 0, E(A) = +infinity > E(S)",
        determinant([[Fraction(-2), Fraction(-2)], [Fraction(2), Fraction(2)]]) == 0
        and bool(log_det_error(symmetric) < 10),
        "exact",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(square_factor=0)
