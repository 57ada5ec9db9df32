"""Proposition 2: KL(q || p*) = KL(q || p) - E_q[r]/alpha + log Z*, so both have the same minimisers."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from finite import BASE_OUT, GENERATOR, LAWS, WEIGHTS_OUT, kl, mean, push, tilted, tiny
from flint import acb, arb
from harness import Claim, ball, integrate


def claims(sign: int = 1) -> Iterator[Claim]:
    p, q, z = (sympy.symbols(f"{name}0:3", positive=True) for name in ("p", "q", "w"))
    w = z
    total = sum(a * b for a, b in zip(p, w, strict=True))
    divergence = sum(b * sympy.log(b * total / (a * c)) for a, b, c in zip(p, q, w, strict=True))
    objective = sum(b * (sympy.log(b / a) - sympy.log(c)) for a, b, c in zip(p, q, w, strict=True))
    difference = sympy.expand_log(divergence - objective - sign * sum(q) * sympy.log(total), force=True)
    yield Claim("the identity, for any three-point laws", sympy.simplify(difference) == 0, "symbolic")

    target, normaliser = tilted(BASE_OUT, WEIGHTS_OUT)
    rewards = [ball(w).log() for w in WEIGHTS_OUT]
    for law in LAWS:
        out = push(law, GENERATOR, 3)
        gap = kl(out, target) - (kl(out, BASE_OUT) - mean(out, rewards) + sign * ball(normaliser).log())
        yield Claim("KL to p* minus the objective is log Z*", tiny(gap), "ball arithmetic")

    # the continuous case: p = N(0, 1), r(y)/alpha = y/2, so Z* = e^(1/8), p* = N(1/2, 1); q = N(1/4, 1)
    density = lambda z, m: (-((z - m) ** 2) / 2).exp() / (2 * acb.pi()).sqrt()  # noqa: E731
    quarter, half = acb(1) / 4, acb(1) / 2
    to_target = integrate(lambda z: density(z, quarter) * ((z - half) ** 2 - (z - quarter) ** 2) / 2, -20, 20)
    to_base = integrate(lambda z: density(z, quarter) * (z**2 - (z - quarter) ** 2) / 2, -20, 20)
    reward = integrate(lambda z: density(z, quarter) * z / 2, -20, 20)
    residual = to_target - (to_base - reward + sign * arb(1) / 8)
    yield Claim("Gaussian laws, tails beyond 20 below 1e-80", bool(abs(residual) < arb("1e-30")), "quadrature")


def counterexamples() -> Iterator[Claim]:
    # Z* < infinity is a hypothesis: with r(y)/alpha = y^2 under N(0, 1), the normaliser diverges
    for radius, least in ((3, 10), (5, 10**4), (8, 10**12)):
        part = integrate(lambda z: (z**2 / 2).exp() / (2 * acb.pi()).sqrt(), -radius, radius)
        yield Claim(
            f"r = y^2: the part of Z* in [-{radius}, {radius}] exceeds {least}", bool(part > least), "quadrature"
        )


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
