"""What an executable proof check is, and the rigorous arithmetic the checks share.

Each statement has a folder with a derivation (`README.md`) and a `check.py` that defines

    claims() -> Iterator[Claim]            what the statement says; every claim must hold
    counterexamples() -> Iterator[Claim]   a hypothesis dropped, and the conclusion seen to fail; every claim must hold
    false_claims() -> Iterator[Claim]      a deliberately false variant of the statement; at least one must fail

A claim is decided by algebra (SymPy, exact rationals), by ball arithmetic (python-flint: the truth of an inequality
between enclosures is a theorem) or by quadrature with an error bound, never by sampling alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Literal

from flint import acb, arb, arb_mat, ctx

ctx.prec = 128

Method = Literal["symbolic", "exact", "ball arithmetic", "quadrature"]
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Claim:
    """One decided sentence: what was claimed, whether it holds, how that was decided, and the figures."""

    text: str
    holds: bool
    method: Method
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """The executable check of one statement."""

    name: str
    claims: Callable[[], Iterator[Claim]]
    counterexamples: Callable[[], Iterator[Claim]]
    false_claims: Callable[[], Iterator[Claim]]


def load(name: str) -> Check:
    """The check of the statement in `proofs/<name>/`."""
    path = ROOT / name / "check.py"
    spec = importlib.util.spec_from_file_location(f"proofs_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Check(name, module.claims, getattr(module, "counterexamples", lambda: iter(())), module.false_claims)


def ball(value: Fraction | int | str | arb) -> arb:
    """A ball that contains the exact value; floats are not accepted, because 0.1 is not a tenth."""
    if isinstance(value, Fraction):
        return arb(value.numerator) / arb(value.denominator)
    assert not isinstance(value, float)
    return arb(value)


def surely_le(a: arb, b: arb) -> bool:
    """Whether `a <= b` is proved: the whole ball `a` lies at or below the whole ball `b`."""
    return bool(a <= b)


def h(s: arb) -> arb:
    """`h(s) = -log(1 - s) - s`, for `0 <= s < 1`."""
    return -(-s).log1p() - s


def log_det_error(matrix: list[list[Fraction]]) -> arb:
    """`E(A) = tr A - log|det(I + A)|` of a rational matrix: the determinant exactly, the logarithm enclosed."""
    d = len(matrix)
    trace = sum((matrix[i][i] for i in range(d)), Fraction(0))
    shifted = [[matrix[i][j] + (i == j) for j in range(d)] for i in range(d)]
    return ball(trace) - ball(abs(determinant(shifted))).log()


def determinant(matrix: list[list[Fraction]]) -> Fraction:
    """The determinant of a rational matrix, exactly (fraction-free would be faster; this is small)."""
    rows = [list(row) for row in matrix]
    size, result = len(rows), Fraction(1)
    for k in range(size):
        pivot = next((i for i in range(k, size) if rows[i][k] != 0), None)
        if pivot is None:
            return Fraction(0)
        if pivot != k:
            rows[k], rows[pivot], result = rows[pivot], rows[k], -result
        result *= rows[k][k]
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            if factor:
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return result


def frobenius_squared(matrix: list[list[Fraction]]) -> Fraction:
    """`|A|_F^2`, exactly."""
    return sum((entry * entry for row in matrix for entry in row), Fraction(0))


def spectral_norm_upper(matrix: list[list[Fraction]], powers: int = 6) -> arb:
    """A proved upper bound of `|A|_2`, tight to about `d^(2^-powers / 2)`.

    For `M = A'A` and `k = 2^powers`, `|A|_2^2 = rho(M) <= |M^k|_F^(1/k)`.
    """
    a = arb_mat([[ball(x) for x in row] for row in matrix])
    gram = a.transpose() * a
    for _ in range(powers):
        gram = gram * gram
    total = sum((gram[i, j] * gram[i, j] for i in range(gram.nrows()) for j in range(gram.ncols())), arb(0))
    if total == 0:
        return arb(0)
    return (total.log() / (4 * 2**powers)).exp()


def random_rational_matrix(
    dim: int, seed: int, *, kind: str = "general", scale: Fraction = Fraction(1)
) -> list[list[Fraction]]:
    """A reproducible rational matrix of one of the kinds general, symmetric, skew, nilpotent, low-rank."""
    state = seed * 2654435761 + 12345

    def draw() -> Fraction:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return Fraction((state >> 40) % 2001 - 1000, 1000)

    m = [[draw() for _ in range(dim)] for _ in range(dim)]
    if kind == "symmetric":
        m = [[(m[i][j] + m[j][i]) / 2 for j in range(dim)] for i in range(dim)]
    elif kind == "skew":
        m = [[(m[i][j] - m[j][i]) / 2 for j in range(dim)] for i in range(dim)]
    elif kind == "nilpotent":
        m = [[m[i][j] if j > i else Fraction(0) for j in range(dim)] for i in range(dim)]
    elif kind == "low-rank":
        m = [[m[0][i] * m[1 % dim][j] for j in range(dim)] for i in range(dim)]
    return [[scale * x for x in row] for row in m]


KINDS = ("general", "symmetric", "skew", "nilpotent", "low-rank")


def with_norm_below(matrix: list[list[Fraction]], norm: Fraction) -> list[list[Fraction]]:
    """The matrix scaled so that its spectral norm is provably at most `norm` (and close to it)."""
    upper = spectral_norm_upper(matrix)
    if upper == 0:
        return matrix
    # a rational at most norm / upper: 40 bits of the ball's lower end, rounded down
    factor = Fraction(int((ball(norm) / upper * 2**40).lower().floor().unique_fmpz()) - 1, 2**40)
    return [[factor * x for x in row] for row in matrix]


def integrate(f: Callable[[acb], acb], a: arb | int, b: arb | int) -> arb:
    """A rigorous enclosure of the integral of a function analytic near [a, b] (Arb's adaptive Gauss-Legendre)."""
    value = acb.integral(lambda z, _: f(z), acb(a), acb(b))
    return value.real
