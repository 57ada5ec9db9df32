"""The surrogate <w, A v>, w = (I+A')^-1 A' v fixed, has the gradient of E on average; its value is another number."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import sympy
from flint import arb
from harness import Claim, ball, log_det_error


def claims(solve: bool = True) -> Iterator[Claim]:
    a, b, c, d, u = sympy.symbols("a b c d u", positive=True)
    matrix = sympy.Matrix([[a * u, b], [c * u**2, d]])
    eye = sympy.eye(2)
    slope = sympy.diff(matrix, u)
    error = matrix.trace() - sympy.log((eye + matrix).det())
    mean, half_trace = sympy.Integer(0), sympy.Integer(0)
    for signs in product((-1, 1), repeat=2):
        v = sympy.Matrix(signs)
        cotangent = (eye + matrix.T).inv() * matrix.T * v if solve else matrix.T * v
        mean += (cotangent.T * slope * v)[0] / 4
        half_trace += ((matrix.T * v).T * slope * v)[0] / 4
    yield Claim(
        "the mean surrogate gradient is dE, d = 2", sympy.simplify(mean - sympy.diff(error, u)) == 0, "symbolic"
    )
    second = sympy.diff((matrix * matrix).trace(), u) / 2
    yield Claim("with w = A'v it is the gradient of tr(A^2)/2", sympy.simplify(half_trace - second) == 0, "symbolic")
    # the a-posteriori error of the solve: |w~ - w| <= |r| / (1 - L), exactly, for A = L R (R a quarter turn)
    norm = Fraction(3, 5)
    square = 1 + norm**2
    v = (Fraction(1), Fraction(0))
    rhs = (norm * v[1], -norm * v[0])  # A' v with A = L [[0, -1], [1, 0]]
    inverse = lambda y: ((y[0] - norm * y[1]) / square, (y[1] + norm * y[0]) / square)  # noqa: E731
    exact = inverse(rhs)
    for rough in ((Fraction(0), Fraction(0)), rhs, (Fraction(1, 7), Fraction(-1, 3))):
        applied = (rough[0] + norm * rough[1], rough[1] - norm * rough[0])  # (I + A') w~
        residual = [x - y for x, y in zip(rhs, applied, strict=True)]
        distance = [x - y for x, y in zip(rough, exact, strict=True)]
        lengths = [sum(x * x for x in vector) for vector in (distance, residual)]
        yield Claim("|w~ - w| <= |r| / (1 - L)", lengths[0] * (1 - norm) ** 2 <= lengths[1], "exact")


def counterexamples() -> Iterator[Claim]:
    # the surrogate's value is not the estimator's: at A = -1/2, <w, A v> = A^2 / (1 + A) = 1/2, E = log 2 - 1/2
    value, error = Fraction(1, 2), log_det_error([[Fraction(-1, 2)]])
    yield Claim(
        "value 0.5 against E = 0.193: they must be returned apart",
        bool(ball(value) - error > arb("0.3")),
        "ball arithmetic",
    )
    # per-row weights: rows -1/2 and 1/2 with weights 1 and 3; using the first row's w for both gives another gradient
    w = [Fraction(-1, 2) / Fraction(1, 2), Fraction(1, 2) / Fraction(3, 2)]
    yield Claim("one row's w for the whole batch is wrong", w[0] * 1 + w[1] * 3 != w[0] * (1 + 3), "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(solve=False)
