"""Data processing: KL(g_# q || g_# p) <= KL(q || p), with equality iff dq/dp depends on x through g(x)."""

from __future__ import annotations

from collections.abc import Iterator

from finite import BASE_OUT, GENERATOR, LAWS, NOISE, WEIGHTS_IN, kl, push, tilted, tiny
from flint import arb
from harness import Claim, integrate


def claims(direction: int = 1) -> Iterator[Claim]:
    star, _ = tilted(NOISE, WEIGHTS_IN)
    for law in LAWS:
        loss = kl(law, NOISE) - kl(push(law, GENERATOR, 3), BASE_OUT)
        yield Claim(
            "KL of outputs <= KL of noises",
            bool(direction * loss >= 0) or tiny(loss),
            "ball arithmetic",
            f"loss {float(loss):.4f}",
        )
    loss = kl(star, NOISE) - kl(push(star, GENERATOR, 3), BASE_OUT)
    yield Claim("equality at the tilted law, whose density depends on g(x) alone", tiny(loss), "ball arithmetic")
    # N(m, 1) against N(0, 1), folded by |x|: 2 cosh(m y) phi(y) e^(-m^2/2) against 2 phi(y)
    m = arb(1)
    density = lambda y: 2 * (-(y**2) / 2).exp() / (2 * y.pi()).sqrt() * (m * y).cosh() * (-m * m / 2).exp()  # noqa: E731
    folded = integrate(lambda y: density(y) * ((m * y).cosh().log() - m * m / 2), 0, 30)
    noise = m * m / 2
    yield Claim(
        "folding N(1, 1)",
        bool(direction * (noise - folded) > 0),
        "quadrature",
        f"{float(folded):.4f} < {float(noise):.4f}",
    )


def counterexamples() -> Iterator[Claim]:
    # the same channel must act on both laws
    q = LAWS[1]
    same_outputs = push(q, GENERATOR, 3)
    other = push(NOISE, (2, 1, 0, 1, 1, 0), 3)
    yield Claim(
        "with two different generators it fails: q = p0 has KL 0, outputs differ",
        bool(kl(BASE_OUT, other) > 0),
        "ball arithmetic",
    )
    yield Claim("a law away from p0 loses strictly", bool(kl(q, NOISE) > kl(same_outputs, BASE_OUT)), "ball arithmetic")


def false_claims() -> Iterator[Claim]:
    yield from claims(direction=-1)
