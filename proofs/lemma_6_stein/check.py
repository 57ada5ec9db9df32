"""Stein's identity E[x . f] = E[tr J], where it holds and where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, integrate
from line import df, expectation, f, near, phi


def _moment(power: int) -> Fraction:
    """`E X^power` for a standard normal, exactly."""
    if power % 2:
        return Fraction(0)
    result = Fraction(1)
    for k in range(1, power, 2):
        result *= k
    return result


def claims(factor: int = 1) -> Iterator[Claim]:
    smooth: list[tuple[str, Callable[[acb], acb], Callable[[acb], acb]]] = [
        ("0.2 sin 3x", f, df),
        ("x / (4 + x^2)", lambda x: x / (4 + x**2), lambda x: (4 - x**2) / (4 + x**2) ** 2),
        ("x^3 + x", lambda x: x**3 + x, lambda x: 3 * x**2 + 1),
        ("x / sqrt(400 + x^2)", lambda x: x / (400 + x**2).sqrt(), lambda x: 400 / (400 + x**2) / (400 + x**2).sqrt()),
    ]  # fmt: skip
    for name, function, derivative in smooth:
        left = expectation(lambda x, g=function: x * g(x))
        right = expectation(derivative)
        yield Claim(f"E[x f] = E[f'], f = {name}", near(left, factor * right), "quadrature", f"{float(left):.10f}")
    left = integrate(lambda x: x * x * phi(x), 0, 20)
    right = integrate(phi, 0, 20)
    yield Claim(
        "f = relu, differentiable almost everywhere", near(left, factor * right), "quadrature", f"{float(left):.10f}"
    )
    # vector fields with polynomial entries, exactly: f = (x^a y^b, x^c y^e)
    for a, b, c, e in ((2, 1, 1, 2), (3, 2, 0, 3), (1, 4, 2, 1), (1, 0, 0, 1)):
        inner = _moment(a + 1) * _moment(b) + _moment(c) * _moment(e + 1)
        trace = (a * _moment(a - 1) * _moment(b) if a else 0) + (e * _moment(c) * _moment(e - 1) if e else 0)
        yield Claim(f"f = (x^{a} y^{b}, x^{c} y^{e})", inner == factor * trace, "exact", str(inner))


def counterexamples() -> Iterator[Claim]:
    # a jump: f = sign(x) is bounded and differentiable almost everywhere with f' = 0
    left = 2 * integrate(lambda x: x * phi(x), 0, 20)
    yield Claim(
        "f = sign: E[x f] = sqrt(2/pi), E[f'] = 0",
        near(left, (2 / arb.pi()).sqrt()),
        "quadrature",
        f"{float(left):.6f}",
    )

    # f = sin(exp(x^2)) meets both stated moment conditions (it is bounded), but E|f'| is infinite. Between the points
    # where exp(x^2) = (k + 1/2) pi it varies by 2, and the density is at least (2 pi)^(-1/2) ((k + 3/2) pi)^(-1/2).
    def variation(terms: int) -> arb:
        total = arb(0)
        for k in range(terms):
            total += 2 / (2 * arb.pi()).sqrt() / ((k + arb(3) / 2) * arb.pi()).sqrt()
        return total

    for terms, least in ((100, 8), (400, 17), (1600, 35)):
        yield Claim(
            f"f = sin(exp(x^2)): E|f'| exceeds {least} already over {terms} swings, and grows as their square root",
            bool(variation(terms) > least), "ball arithmetic",
        )  # fmt: skip


def false_claims() -> Iterator[Claim]:
    yield from claims(factor=-1)
