"""Arnoldi's quadratic form in ball arithmetic: exact to degree m, and its error below the bound."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import arb, arb_mat
from harness import Claim, ball, log_det_error, random_rational_matrix, surely_le, with_norm_below

TERMS = 260  # the rest of the series is below 3 L^261 < 1e-25 at L = 4/5


def _arnoldi(matrix: arb_mat, v: arb_mat, steps: int) -> tuple[arb_mat, arb]:
    """`H` (m x m) of Arnoldi's process on `A'` from `v`, and `|(A')^m v|`."""
    n = v.nrows()
    transposed = matrix.transpose()
    basis = [v / _length(v)]
    entries = [[arb(0)] * steps for _ in range(steps + 1)]
    for j in range(steps):
        w = transposed * basis[j]
        for i in range(j + 1):
            entries[i][j] = _dot(basis[i], w)
            w = w - basis[i] * entries[i][j]
        entries[j + 1][j] = _length(w)
        if j + 1 < steps:
            basis.append(w / entries[j + 1][j])
    power = v
    for _ in range(steps):
        power = transposed * power
    assert n == matrix.nrows()
    return arb_mat([row[:steps] for row in entries[:steps]]), _length(power)


def _dot(a: arb_mat, b: arb_mat) -> arb:
    return (a.transpose() * b)[0, 0]


def _length(a: arb_mat) -> arb:
    return _dot(a, a).nonnegative_part().sqrt()  # a ball around 0 reaches below it


def _form(matrix: arb_mat, left: arb_mat, right: arb_mat) -> tuple[arb, list[arb]]:
    """`left' phi(M) right` by its series, and the moments `left' M^k right`."""
    power, total, moments = right, arb(0), [_dot(left, right)]
    for k in range(1, TERMS + 1):
        power = matrix * power
        moments.append(_dot(left, power))
        if k >= 2:
            total += moments[-1] * (-1) ** k / k
    return total, moments


def claims(shrink: int = 1) -> Iterator[Claim]:
    norm = Fraction(4, 5)
    limit = ball(norm)
    for kind in ("general", "symmetric", "skew"):
        for seed in (2, 6):
            rational = with_norm_below(random_rational_matrix(6, seed, kind=kind), norm)
            matrix = arb_mat([[ball(x) for x in row] for row in rational])
            v = arb_mat([[arb(1 if (seed >> i) % 2 else -1)] for i in range(6)])
            squared = _dot(v, v)
            truth, moments = _form(matrix, v, v)
            rest = squared * limit ** (TERMS + 1) / (1 - limit)
            for m in (1, 2, 4):
                hessenberg, last = _arnoldi(matrix, v, m)
                e1 = arb_mat([[arb(1 if i == 0 else 0)] for i in range(m)])
                form, small = _form(hessenberg, e1, e1)
                exact = all(bool((squared * small[k] - moments[k]).contains(0)) for k in range(m + 1))
                yield Claim(f"{kind}, m = {m}: exact for degree <= m", exact, "ball arithmetic")
                power = e1
                for _ in range(m):
                    power = hessenberg * power
                bound = squared.sqrt() * (last + squared.sqrt() * _length(power)) * limit / ((m + 1) * (1 - limit))
                error = abs(truth - squared * form) + 2 * rest
                loose = 2 * squared * limit ** (m + 1) / ((m + 1) * (1 - limit))
                yield Claim(
                    f"{kind}, m = {m}: error <= bound",
                    surely_le(error, bound / shrink),
                    "ball arithmetic",
                    f"{float(error):.1e} <= {float(bound):.1e}",
                )
                yield Claim(
                    f"{kind}, m = {m}: <= 2|v|^2 L^(m+1)/((m+1)(1-L))",
                    surely_le(bound, loose + arb("1e-25")),
                    "ball arithmetic",
                )


def counterexamples() -> Iterator[Claim]:
    matrix = [[Fraction(-3), Fraction(0)], [Fraction(0), Fraction(1)]]
    ritz = Fraction(-3 + 1, 2)  # v = (1, 1): H = v'Av / |v|^2
    finite = bool(abs(log_det_error(matrix)) < 4)
    yield Claim("norm 3: H = -1, phi(H) is infinite, E(A) is finite", ritz == -1 and finite, "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(shrink=10**4)
