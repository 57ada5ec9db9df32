"""A.3.1: with a deterministic generator the control problem is solved by nu* = p0* and u = 0, value r o g."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from finite import GENERATOR, LAWS, NOISE, WEIGHTS_IN, kl, mean, tilted, tiny
from flint import arb
from harness import Claim, ball


def claims(scale: Fraction = Fraction(1)) -> Iterator[Claim]:
    star, z = tilted(NOISE, WEIGHTS_IN)
    rewards = [ball(w).log() for w in WEIGHTS_IN]  # r(g(x)) / alpha
    # the value function: exp(v/alpha) = E[exp(r(X_T)/alpha) | x_0]; given x_0 the output is one point
    for x, y in enumerate(GENERATOR):
        kernel = [Fraction(1) if out == y else Fraction(0) for out in range(3)]
        weights = [Fraction(2), Fraction(1, 3), Fraction(5, 2)]
        value = sum((a * b for a, b in zip(kernel, weights, strict=True)), Fraction(0))
        yield Claim(f"exp(v(x{x})/alpha) = exp(r(g(x{x}))/alpha)", value == WEIGHTS_IN[x] * scale, "exact")
    for law in LAWS:
        score = mean(law, rewards) - kl(law, NOISE)
        yield Claim(
            "objective(nu) = log Z* - KL(nu || p0*)",
            tiny(score - ball(z * scale).log() + kl(law, star)),
            "ball arithmetic",
        )
        yield Claim("so nu* = p0* is best", bool(score <= ball(z).log() + arb("1e-30")), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    # a stochastic generator: exp(v/alpha) = E[exp(r/alpha) | x] exceeds exp(E[r | x]/alpha), so v is not E[r | x]
    kernel = [Fraction(1, 2), Fraction(1, 2)]
    weights = [Fraction(4), Fraction(1)]
    value = ball(sum((a * b for a, b in zip(kernel, weights, strict=True)), Fraction(0))).log()
    plain = mean(kernel, [ball(w).log() for w in weights])
    yield Claim(
        "with a random output, v(x) > E[r | x]: the reduction needs determinism", bool(value > plain), "ball arithmetic"
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(scale=Fraction(2))
