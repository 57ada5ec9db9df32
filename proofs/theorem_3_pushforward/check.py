"""Theorem 3, part 1: g_# p0* = p*, with one and the same Z*."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from finite import BASE_OUT, GENERATOR, NOISE, WEIGHTS_IN, WEIGHTS_OUT, push, tilted
from flint import acb, arb
from harness import Claim, integrate


def claims(power: int = 1) -> Iterator[Claim]:
    noise_star, z_noise = tilted(NOISE, [w**power for w in WEIGHTS_IN])
    out_star, z_out = tilted(BASE_OUT, WEIGHTS_OUT)
    yield Claim("Z* of the noise equals Z* of the output", z_noise == z_out, "exact", f"{z_noise} = {z_out}")
    yield Claim("the pushforward of p0* is p*", push(noise_star, GENERATOR, 3) == out_star, "exact")
    # a folding generator on the line: g(x) = |x|, r(y)/alpha = -y: P(g(X) <= 1) under p0* and under p*
    gauss = lambda z: (-(z**2) / 2).exp() / (2 * acb.pi()).sqrt()  # noqa: E731
    weight = lambda z: (-power * z).exp()  # noqa: E731
    mass_noise = 2 * integrate(lambda z: gauss(z) * weight(z), 0, 40)
    below_noise = 2 * integrate(lambda z: gauss(z) * weight(z), 0, 1) / mass_noise
    folded = lambda z: 2 * gauss(z) * (-z).exp()  # noqa: E731
    below_out = integrate(folded, 0, 1) / integrate(folded, 0, 40)
    yield Claim(
        "g(x) = |x|: P(g <= 1) agrees", bool(abs(below_noise - below_out) < arb("1e-30")), "quadrature", str(below_out)
    )


def counterexamples() -> Iterator[Claim]:
    # the tilt has to depend on x through g(x) alone: otherwise the pushforward is tilted by E[w | g], not by w
    weights = [Fraction(w) for w in (4, 1, 2, 3, 1, 5)]
    star, _ = tilted(NOISE, weights)
    for choice in ((0, 2, 5), (1, 2, 5), (0, 3, 5), (1, 4, 5)):
        by_output, _ = tilted(BASE_OUT, [weights[x] for x in choice])
        yield Claim(
            f"a tilt not of the form w(g(x)), outputs weighted as at {choice}",
            push(star, GENERATOR, 3) != by_output,
            "exact",
        )


def false_claims() -> Iterator[Claim]:
    yield from claims(power=2)
