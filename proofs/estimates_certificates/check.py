"""Sampled norms bound the Lipschitz constant from below, certificates from above; the words are not exchangeable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, random_rational_matrix, spectral_norm_upper, surely_le
from line import df


def _product(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
    return [[sum((x * b[k][j] for k, x in enumerate(row)), Fraction(0)) for j in range(len(b[0]))] for row in a]


def _padded_convolution(kernel: list[Fraction], size: int) -> list[list[Fraction]]:
    half = len(kernel) // 2
    return [
        [kernel[j - i + half] if 0 <= j - i + half < len(kernel) else Fraction(0) for j in range(size)]
        for i in range(size)
    ]


def _symbol_maximum(kernel: list[Fraction], points: int) -> arb:
    """An upper bound of `max |sum_k kernel_k e^{ikt}|`: a grid, and Bernstein's inequality between its points."""
    best = arb(0)
    for p in range(points):
        angle = 2 * arb.pi() * p / points
        value = sum((acb(ball(c)) * acb(0, k * angle).exp() for k, c in enumerate(kernel)), acb(0))
        best = max(best, abs(value).upper(), key=float)
    degree = len(kernel) // 2
    return best / (1 - degree * arb.pi() / points)


def _reshaped_norm(kernel: list[Fraction], points: int) -> arb:  # noqa: ARG001 (the same signature)
    return ball(sum((c * c for c in kernel), Fraction(0))).sqrt()


def claims(convolution_bound: Callable[[list[Fraction], int], arb] = _symbol_maximum) -> Iterator[Claim]:
    constant = arb(3) / 5
    for count in (1, 3, 17):
        sampled = max((abs(df(acb(ball(Fraction(k, 7)))).real) for k in range(count)), key=lambda v: float(v))
        yield Claim(
            f"the largest of {count} sampled slopes <= L",
            bool(constant >= sampled) or sampled.overlaps(constant),
            "ball arithmetic",
        )
    for seed in range(4):
        a, b = random_rational_matrix(4, seed), random_rational_matrix(4, seed + 9)
        product = _product(a, b)
        unit = [Fraction(1)] + [Fraction(0)] * 3
        column = [row[0] for row in product]  # |AB e1| is a lower bound of |AB|
        lower = ball(sum((c * c for c in column), Fraction(0))).sqrt() / ball(sum(unit, Fraction(0)))
        upper = spectral_norm_upper(a) * spectral_norm_upper(b)
        yield Claim("composition: |AB| <= |A| |B|", surely_le(lower, upper), "ball arithmetic")
        sums = [[x + y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]
        column = [row[0] for row in sums]
        lower = ball(sum((c * c for c in column), Fraction(0))).sqrt()
        yield Claim(
            "residual sum: |A + B| <= |A| + |B|",
            surely_le(lower, spectral_norm_upper(a) + spectral_norm_upper(b)),
            "ball arithmetic",
        )
    kernel = [Fraction(1), Fraction(-2), Fraction(3)]
    bound = convolution_bound(kernel, 64)
    for size in (3, 8, 20):
        matrix = _padded_convolution(kernel, size)
        ones = [sum((x * (-1) ** j for j, x in enumerate(row)), Fraction(0)) for row in matrix]
        lower = (ball(sum((c * c for c in ones), Fraction(0))) / size).sqrt()
        yield Claim(
            f"zero-padded convolution of length {size}: norm <= max |symbol|",
            surely_le(lower, bound),
            "ball arithmetic",
            f"{float(lower):.3f} <= {float(bound):.3f}",
        )


def counterexamples() -> Iterator[Claim]:
    # a spike of slope 10 between the samples 0 and 1: f(x) = sin(20 pi x) / (2 pi) has slope 10 cos(20 pi x), and
    # g(x) = f(x)^2 has slope 0 at every multiple of 1/20
    slope = lambda x: 2 * (20 * arb.pi() * x).sin() / (2 * arb.pi()) * 10 * (20 * arb.pi() * x).cos()  # noqa: E731
    seen = all(bool(abs(slope(arb(k) / 20)) < arb("1e-25")) for k in range(20))
    missed = bool(abs(slope(arb(1) / 80)) > 1)
    yield Claim("20 samples see slope 0 where the constant exceeds 1", seen and missed, "ball arithmetic")
    # the reshaped kernel of a convolution is not its operator: [1, 1, 1] has norm sqrt(3), the convolution nearly 3
    matrix = _padded_convolution([Fraction(1)] * 3, 20)
    ones = [sum(row, Fraction(0)) for row in matrix]
    lower = (ball(sum((c * c for c in ones), Fraction(0))) / 20).sqrt()
    yield Claim(
        "the norm of the reshaped kernel is no bound",
        bool(lower > arb(3).sqrt()),
        "ball arithmetic",
        f"{float(lower):.3f} > 1.732",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(_reshaped_norm)
