"""KL = E[eq. 53] + H(X | TX), and the degree statistic of a bounded f is one, on folds of the line."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, integrate
from line import expectation, near, phi


def degree(amplitude: Fraction, unsigned: bool = False) -> arb:
    """`E[sgn(T') exp(-ell)]` for T = x - A tanh 2x, whose integrand is T' p0(Tx)."""
    A = ball(amplitude)

    def integrand(z: acb) -> acb:
        t = (2 * z).tanh()
        return (1 - 2 * A * (1 - t**2)) * phi(z - A * t)

    if not unsigned:
        return integrate(integrand, -20, 0) + integrate(integrand, 0, 20)
    turn = (1 / (2 * A) if bool(2 * A > 1) else arb(1)).sqrt()  # T' = 0 where 1 - tanh^2 2x = 1 / (2A)
    root = ((1 + (1 - turn**2).sqrt()) / (1 - (1 - turn**2).sqrt())).log() / 4
    outer = integrate(integrand, root, 20)
    inner = integrate(integrand, 0, root)
    return 2 * (outer - inner)


def claims(unsigned: bool = False) -> Iterator[Claim]:
    for amplitude in (Fraction(2, 5), Fraction(6, 5), Fraction(3)):
        found = degree(amplitude, unsigned and amplitude > Fraction(1, 2))
        yield Claim(f"degree one, A = {amplitude}", near(found, arb(1), "1e-15"), "quadrature", f"{float(found):.6f}")
    # T = |x|: ell = 0 on both sides, H(X | TX) = log 2, and KL = log 2 by the density 2 phi on the half-line
    divergence = integrate(lambda z: 2 * phi(z) * acb(2).log(), 0, 14)
    yield Claim("T = |x|: KL = 0 + log 2", near(divergence, arb(2).log()), "quadrature")
    # T = |x| - 1: the preimages y + 1 and -(y + 1) have equal mass; ell = x f + f^2 / 2 with f = |x| - 1 - x
    ell = expectation_of_fold()
    density = integrate(lambda z: 2 * phi(z + 1) * (2 * phi(z + 1) / phi(z)).log(), -1, 14)
    yield Claim(
        "T = |x| - 1: KL = E[ell] + log 2", near(density, ell + arb(2).log()), "quadrature", f"{float(density):.6f}"
    )


def expectation_of_fold() -> arb:
    right = integrate(lambda z: phi(z) * (-z + acb(1) / 2), 0, 14)
    left = integrate(lambda z: phi(z) * (z * (-2 * z - 1) + (-2 * z - 1) ** 2 / 2), -14, 0)
    return right + left


def counterexamples() -> Iterator[Claim]:
    # unbounded: T = |x| has the statistic E[sgn T'] = 0
    statistic = expectation(lambda _: acb(1)) / 2 - expectation(lambda _: acb(1)) / 2
    yield Claim("T = |x|, f unbounded: the statistic is 0", near(statistic, arb(0)), "quadrature")


def false_claims() -> Iterator[Claim]:
    yield from claims(unsigned=True)
