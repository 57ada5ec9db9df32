"""x f - f' has mean zero and lowers the variance; exactly, for polynomials on the line."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

from harness import Claim

Polynomial = list[Fraction]


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    result = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, j in product(range(len(a)), range(len(b))):
        result[i + j] += a[i] * b[j]
    return result


def plus(a: Polynomial, b: Polynomial, factor: Fraction = Fraction(1)) -> Polynomial:
    size = max(len(a), len(b))
    padded = [list(p) + [Fraction(0)] * (size - len(p)) for p in (a, b)]
    return [x + factor * y for x, y in zip(*padded, strict=True)]


def mean(p: Polynomial) -> Fraction:
    """E p(X): the even moments of N(0, 1) are double factorials."""
    total, moment = Fraction(0), Fraction(1)
    for k in range(0, len(p), 2):
        total += p[k] * moment
        moment *= k + 1
    return total


def variance(p: Polynomial) -> Fraction:
    return mean(times(p, p)) - mean(p) ** 2


def covariance(a: Polynomial, b: Polynomial) -> Fraction:
    return mean(times(a, b)) - mean(a) * mean(b)


def derivative(p: Polynomial) -> Polynomial:
    return [k * c for k, c in enumerate(p)][1:] or [Fraction(0)]


MAPS = [[Fraction(v, 10) for v in values] for values in ([3, 1], [0, 2, 0, -1], [1, 0, 4], [0, -5, 1, 1, 2])]


def parts(f: Polynomial, sign: int) -> tuple[Polynomial, Polynomial]:
    """The second-order integrand of eq. 55, and s; with sign = -1 the trace is added instead."""
    slope = derivative(f)
    s = plus(times([Fraction(0), Fraction(1)], f), slope, Fraction(-sign))
    ell = plus([c / 2 for c in times(f, f)], [c / 2 for c in times(slope, slope)])
    return ell, s


def claims(sign: int = 1) -> Iterator[Claim]:
    for f in MAPS:
        ell, s = parts(f, sign)
        yield Claim("mean zero", mean(s) == 0, "exact", str(mean(s)))
        best = -covariance(ell, s) / variance(s)
        least = variance(plus(ell, s, best))
        yield Claim("the mean stays", mean(plus(ell, s, best)) == mean(ell), "exact")
        expected = variance(ell) - covariance(ell, s) ** 2 / variance(s)
        yield Claim("the variance is the stated one", least == expected, "exact")
        for c in (Fraction(0), Fraction(1), Fraction(-1), best + Fraction(1, 9)):
            yield Claim("and the least", variance(plus(ell, s, c)) >= least, "exact")


def counterexamples() -> Iterator[Claim]:
    f = MAPS[1]
    ell, _ = parts(f, 1)
    square = times(f, f)
    moved = mean(plus(ell, square, Fraction(-1, 2)))
    yield Claim("a control variate whose mean is not zero moves the mean", moved != mean(ell), "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
