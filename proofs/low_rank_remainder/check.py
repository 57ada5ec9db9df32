"""det(I + J) = det(I_k + Q'JQ) det(I + A) with A = (I + QQ'J)^-1 (I - QQ') J, exactly, for rational Q."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from harness import KINDS, Claim, determinant, random_rational_matrix

Matrix = list[list[Fraction]]


def product(a: Matrix, b: Matrix) -> Matrix:
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in zip(*b, strict=True)]
        for row in a
    ]


def plus(a: Matrix, b: Matrix, factor: int = 1) -> Matrix:
    return [[x + factor * y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def identity(size: int) -> Matrix:
    return [[Fraction(i == j) for j in range(size)] for i in range(size)]


def transpose(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def inverse(a: Matrix) -> Matrix:
    """By cofactors: the matrices are small."""
    size, whole = len(a), determinant(a)
    minor = lambda i, j: [[a[r][c] for c in range(size) if c != j] for r in range(size) if r != i]  # noqa: E731
    return [
        [(-1) ** (i + j) * (determinant(minor(j, i)) if size > 1 else Fraction(1)) / whole for j in range(size)]
        for i in range(size)
    ]


def orthonormal(dim: int, columns: int) -> Matrix:
    """Columns of a rational rotation: products of (3, 4, 5) and (5, 12, 13) turns."""
    q = identity(dim)
    for k in range(dim - 1):
        c, s = (Fraction(3, 5), Fraction(4, 5)) if k % 2 else (Fraction(5, 13), Fraction(12, 13))
        turn = identity(dim)
        turn[k][k], turn[k][k + 1], turn[k + 1][k], turn[k + 1][k + 1] = c, -s, s, c
        q = product(q, turn)
    return [row[:columns] for row in q]


def remainder(J: Matrix, q: Matrix, corrected: bool = True) -> Matrix:
    dim = len(J)
    projected = product(product(q, transpose(q)), J)
    rest = plus(J, projected, -1)
    return product(inverse(plus(identity(dim), projected)), rest) if corrected else rest


def claims(corrected: bool = True) -> Iterator[Claim]:
    dim = 5
    for kind in KINDS:
        for scale in (Fraction(1, 3), Fraction(4)):
            J = random_rational_matrix(dim, 7, kind=kind, scale=scale)
            whole = determinant(plus(identity(dim), J))
            for columns in (1, 3):
                q = orthonormal(dim, columns)
                inner = product(product(transpose(q), J), q)
                small = determinant(plus(identity(columns), inner))
                rest = determinant(plus(identity(dim), remainder(J, q, corrected)))
                yield Claim(f"{kind}, scale {scale}, k = {columns}", whole == small * rest, "exact")
    # J = Q M spans its own range
    q = orthonormal(dim, 2)
    J = product(q, random_rational_matrix(dim, 3)[:2])
    zero = all(entry == 0 for row in remainder(J, q) for entry in row)
    small = determinant(plus(identity(2), product(product(transpose(q), J), q)))
    yield Claim("J in the range of Q: nothing is left", zero and small == determinant(plus(identity(dim), J)), "exact")
    woodbury = plus(
        identity(dim),
        product(product(q, inverse(plus(identity(2), product(product(transpose(q), J), q)))), product(transpose(q), J)),
        -1,
    )
    direct = inverse(plus(identity(dim), product(product(q, transpose(q)), J)))
    yield Claim("the inverse of size k", woodbury == direct, "exact")


def counterexamples() -> Iterator[Claim]:
    J = [[Fraction(-1), Fraction(0)], [Fraction(0), Fraction(0)]]
    q = [[Fraction(1)], [Fraction(0)]]
    yield Claim(
        "a singular small matrix is a singular I + J here",
        determinant(plus(identity(2), J)) == 0 and 1 + J[0][0] == 0,
        "exact",
        str(len(q)),
    )
    J = random_rational_matrix(4, 11)
    rest = remainder(J, orthonormal(4, 1))
    trace = sum((rest[i][i] for i in range(4)), Fraction(0))
    yield Claim(
        "the remainder's determinant is not 1 + its trace", determinant(plus(identity(4), rest)) != 1 + trace, "exact"
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(corrected=False)
