"""E(A) as an integral of resolvents, the error of its quadrature, its differential, and the block recursion."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
from flint import acb, acb_mat, arb
from harness import KINDS, Claim, ball, h, integrate, log_det_error, random_rational_matrix, with_norm_below

Matrix = list[list[Fraction]]


def claims(power: int = 1) -> Iterator[Claim]:
    for kind in KINDS:
        matrix = with_norm_below(random_rational_matrix(3, 5, kind=kind), Fraction(4, 5))
        a = acb_mat([[acb(ball(x)) for x in row] for row in matrix])

        def integrand(t: acb, a: acb_mat = a) -> acb:
            eye = acb_mat([[acb(1 if i == j else 0) for j in range(3)] for i in range(3)])
            try:
                inside = (eye + a * t).solve(a)
            except ZeroDivisionError:  # the ball of t is still too wide to solve for: unknown, so it is halved
                return acb(arb("nan"))
            product = a * inside
            return t**power * (product[0, 0] + product[1, 1] + product[2, 2])

        gap = integrate(integrand, 0, 1) - log_det_error(matrix)
        yield Claim(f"integral of resolvents, {kind}", bool(abs(gap) < arb("1e-25")), "quadrature")
    z, t = sympy.symbols("z t", positive=True)
    scalar = sympy.integrate(t**power * z**2 / (1 + t * z), (t, 0, 1))
    yield Claim("scalar identity", sympy.simplify(scalar - (z - sympy.log(1 + z))) == 0, "symbolic")
    yield from _quadrature()
    yield from _differential()
    yield from _blocks()


def _quadrature() -> Iterator[Claim]:
    for norm in (Fraction(1, 2), Fraction(4, 5), Fraction(19, 20)):
        limit = ball(norm)
        s = 2 / limit - 1
        rho_max = s + (s**2 - 1).sqrt()
        rho = 1 + (rho_max - 1) * ball(Fraction(4, 5))
        tau = ball(Fraction(1, 2)) + (rho + 1 / rho) / 4
        for nodes in (4, 12):
            total = arb(0)
            for k in range(nodes):
                x, w = arb.legendre_p_root(nodes, k, weight=True)
                point = (x + 1) / 2
                total += w / 2 * point * limit**2 / (1 - point * limit)  # z = -L, the extreme case
            error = abs(total - h(limit))
            bound = ball(Fraction(32, 15)) * rho ** (-2 * nodes) / (1 - rho**-2) * tau * limit**2 / (1 - tau * limit)
            yield Claim(
                f"{nodes} Gauss nodes, L = {norm}",
                bool(error <= bound),
                "ball arithmetic",
                f"{float(error):.1e} <= {float(bound):.1e}",
            )


def _differential() -> Iterator[Claim]:
    a, b, c, d, u = sympy.symbols("a b c d u", positive=True)
    matrix = sympy.Matrix([[a, b], [c * u, d * u]])
    eye = sympy.eye(2)
    error = matrix.trace() - sympy.log((eye + matrix).det())
    formula = (matrix * (eye + matrix).inv() * sympy.diff(matrix, u)).trace()
    yield Claim("dE = tr[A (I+A)^-1 dA], d = 2", sympy.simplify(sympy.diff(error, u) - formula) == 0, "symbolic")


def _blocks() -> Iterator[Claim]:
    for seed in (1, 2, 3):
        m = with_norm_below(random_rational_matrix(2, seed), Fraction(9, 10))
        p, q, r, s = m[0][0], m[0][1], m[1][0], m[1][1]
        complement = s - r * q / (1 + p)
        scalar = lambda x: ball(x) - abs(ball(1 + x)).log()  # noqa: E731
        total = scalar(p) + ball(q * r / (1 + p)) + scalar(complement)
        yield Claim("block recursion, 1 + 1", bool(abs(total - log_det_error(m)) < arb("1e-30")), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    # A = -2: 1 - 2t vanishes at 1/2; the integral up to 1/2 - e grows as log(1/e)
    for digits, least in ((3, 2), (9, 8), (15, 15)):
        edge = ball(Fraction(1, 2) - Fraction(1, 10**digits))
        part = integrate(lambda t: 4 * t / (1 - 2 * t), arb(0), edge)
        yield Claim(f"A = -2: the integral to 1/2 - 1e-{digits} exceeds {least}", bool(part > least), "quadrature")


def false_claims() -> Iterator[Claim]:
    yield from claims(power=2)
