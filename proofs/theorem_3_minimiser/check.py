"""Theorem 3, part 2: among all q with g_# q = p*, the tilted noise law alone has the least KL(q || p0)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from finite import BASE_OUT, GENERATOR, NOISE, WEIGHTS_IN, WEIGHTS_OUT, kl, normalised, push, tilted, tiny
from flint import acb, arb
from harness import Claim, ball, integrate

FIBRES = [[x for x, y in enumerate(GENERATOR) if y == out] for out in range(3)]
CONDITIONALS = [  # other ways of spreading the mass of each fibre
    ([1, 1], [1, 1, 1], [1]), ([3, 1], [4, 1, 5], [1]), ([1, 9], [1, 0, 0], [1]), ([0, 1], [0, 1, 1], [1]),
]  # fmt: skip


def _with_pushforward(target: list[Fraction], conditional: tuple[list[int], ...]) -> list[Fraction]:
    law = [Fraction(0)] * len(NOISE)
    for fibre, mass, weights in zip(FIBRES, target, conditional, strict=True):
        for x, share in zip(fibre, normalised(weights), strict=True):
            law[x] = mass * share
    return law


def claims(sign: int = 1) -> Iterator[Claim]:
    star, _ = tilted(NOISE, WEIGHTS_IN)
    target, _ = tilted(BASE_OUT, WEIGHTS_OUT)
    least = kl(star, NOISE)
    yield Claim("KL(p0* || p0) = KL(p* || p)", tiny(least - sign * kl(target, BASE_OUT)), "ball arithmetic")
    for conditional in CONDITIONALS:
        law = _with_pushforward(target, conditional)
        assert push(law, GENERATOR, 3) == target
        divergence = kl(law, NOISE)
        conditional_part = kl(law, star)
        yield Claim(
            "chain rule: KL(q || p0) = KL(p* || p) + KL(q || p0*)",
            tiny(divergence - least - sign * conditional_part), "ball arithmetic",
        )  # fmt: skip
        same = law == star
        yield Claim(
            "least at p0*" if same else f"strictly above the least, by {float(divergence - least):.4f}",
            tiny(divergence - least) if same else bool(divergence > least), "ball arithmetic",
        )  # fmt: skip
    # the line, g(x) = |x|, r = 0: q = the law of |X| has the pushforward of p0 and KL exactly log 2
    gauss = lambda z: (-(z**2) / 2).exp() / (2 * acb.pi()).sqrt()  # noqa: E731
    folded = integrate(lambda z: 2 * gauss(z) * acb(2).log(), 0, 40)
    yield Claim(
        "g(x) = |x|: the half-normal costs log 2 more", bool(abs(folded - arb(2).log()) < arb("1e-30")), "quadrature"
    )


def counterexamples() -> Iterator[Claim]:
    target, _ = tilted(BASE_OUT, WEIGHTS_OUT)
    others = [_with_pushforward(target, conditional) for conditional in CONDITIONALS]
    distinct = {tuple(law) for law in others}
    yield Claim(
        "with g not injective the constraint leaves a choice", len(distinct) > 1, "exact", f"{len(distinct)} laws"
    )
    # with g injective nothing is left to choose: the fibre of each output is one point
    one_to_one = list(range(len(NOISE)))
    star, _ = tilted(NOISE, WEIGHTS_IN)
    yield Claim("with g injective the pushforward fixes the law", push(star, one_to_one, len(NOISE)) == star, "exact")
    # uniqueness is lost where the least KL is infinite: p* charges what p0 cannot reach
    unreachable = [p if y != 2 else Fraction(0) for p, y in zip(NOISE, GENERATOR, strict=True)]
    reach = push(normalised(unreachable), GENERATOR, 3)
    yield Claim(
        "if p* is not << g_# p0, every q has KL infinity",
        reach[2] == 0 and target[2] > 0,
        "exact",
        str(ball(target[2])),
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
