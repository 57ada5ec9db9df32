"""J_noise(f) + log Z* = KL(T_# p0 || p0*) >= 0, zero only at the optimum."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from flint import acb, arb
from harness import Claim
from line import df, expectation, f


def claims(log_z_sign: int = 1) -> Iterator[Claim]:
    k, c, b = sympy.symbols("k c b", real=True)
    hh = sympy.Symbol("h", positive=True)
    variance = 1 / (1 + hh)
    log_z = b**2 * variance / 2 + sympy.log(variance) / 2
    objective = ((k - 1) ** 2 + c**2) / 2 + (k - 1) - sympy.log(sympy.Abs(k)) - (-hh * (k**2 + c**2) / 2 + b * c)
    divergence = (
        (k**2 + (c - variance * b) ** 2) / (2 * variance)
        - sympy.Rational(1, 2)
        + sympy.log(sympy.sqrt(variance) / sympy.Abs(k))
    )
    residual = sympy.simplify(sympy.expand_log(objective + log_z_sign * log_z - divergence, force=True))
    yield Claim("affine maps, quadratic reward", residual == 0, "symbolic")
    at_optimum = sympy.simplify(
        sympy.expand_log((objective + log_z_sign * log_z).subs({k: sympy.sqrt(variance), c: variance * b}), force=True)
    )
    yield Claim("zero at the optimum", at_optimum == 0, "symbolic")

    # a nonlinear map on a nonlinear reward: r(g(x))/alpha = cos x, Z* and the density of T by quadrature
    reward = lambda x: x.cos()  # noqa: E731
    log_z_line = expectation(lambda x: reward(x).exp()).log()
    moved = expectation(lambda x: f(x) ** 2 / 2 + df(x) - (1 + df(x)).log() - reward(x + f(x)))
    gap = moved + log_z_sign * log_z_line
    direct = expectation(
        lambda x: -(x**2) / 2 + (x + f(x)) ** 2 / 2 - (1 + df(x)).log() - reward(x + f(x)) + acb(log_z_line)
    )
    yield Claim(
        "0.2 sin 3x under r = cos x",
        bool(abs(gap - direct) < arb("1e-20")) and bool(gap > 0),
        "quadrature",
        f"gap {float(gap):.6f} nats",
    )


def counterexamples() -> Iterator[Claim]:
    # with the L2 term in place of the KL the "gap" goes below zero: it is no distance
    hh, b = arb(3), arb(0)
    variance = 1 / (1 + hh)
    log_z = variance.log() / 2 + b * 0
    l2_only = (variance - 1) ** 2 / 2 + hh * variance**2 / 2 + log_z
    yield Claim(
        "J with the L2 term alone, at its own optimum, is below -log Z*",
        bool(l2_only < 0),
        "ball arithmetic",
        f"{float(l2_only):.4f}",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(log_z_sign=-1)
