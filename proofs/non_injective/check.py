"""Without injectivity the change-of-variables figure is a lower bound of the KL, equal iff T is injective a.e."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from flint import acb, arb
from harness import Claim, ball, integrate
from line import near, phi


def claims(sign: int = 1) -> Iterator[Claim]:
    # T x = |x| (f = |x| - x): x f + f^2/2 = x|x| - x^2 + x^2 - x|x| = 0 and |det| = 1, so the figure is 0
    positive = integrate(lambda x: (x * (x - x) + (x - x) ** 2 / 2) * phi(x), 0, 20)
    negative = integrate(lambda x: (x * (-2 * x) + 4 * x**2 / 2) * phi(x), -20, 0)
    figure = positive + negative
    truth = integrate(lambda y: 2 * phi(y) * acb(2).log(), 0, 20)  # KL(half-normal || N(0, 1))
    yield Claim("folding |x|: figure 0, KL log 2", near(figure, arb(0)) and near(truth, arb(2).log()), "quadrature")
    yield Claim(
        "a lower bound", bool(sign * (truth - figure) > 0), "quadrature", f"{float(figure):.4f} < {float(truth):.4f}"
    )
    # T x = |x| - 1: the figure adds E[(|x| - 1)^2/2 - x^2/2], the KL the same plus log 2
    shift = lambda x: (x - 1) ** 2 / 2 - x**2 / 2  # noqa: E731
    figure = 2 * integrate(lambda x: shift(x) * phi(x), 0, 20)
    truth = integrate(lambda y: 2 * phi(y + 1) * (acb(2).log() + y**2 / 2 - (y + 1) ** 2 / 2), -1, 20)
    yield Claim(
        "|x| - 1: short by the log 2 of its two preimages", near(truth - sign * figure, arb(2).log()), "quadrature"
    )
    # finite analogue, exactly: n points folded onto fewer; the figure sums q(x) log(q(x)/p(Tx)) over preimages apart
    weights = [Fraction(1, 8), Fraction(3, 8), Fraction(1, 4), Fraction(1, 4)]
    image = [0, 0, 1, 2]
    merged = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    base = [Fraction(1, 3)] * 3
    apart = sum((ball(w) * ball(w / base[i]).log() for w, i in zip(weights, image, strict=True)), arb(0))
    together = sum((ball(w) * ball(w / p).log() for w, p in zip(merged, base, strict=True)), arb(0))
    entropy = sum((ball(w) * ball(merged[i] / w).log() for w, i in zip(weights, image, strict=True)), arb(0))
    yield Claim(
        "the shortfall is the conditional entropy of the preimage",
        near(together - sign * apart, entropy),
        "ball arithmetic",
    )


def counterexamples() -> Iterator[Claim]:
    # T injective with negative determinant everywhere is fine: -x has figure 0 = KL
    figure = integrate(lambda x: (-2 * x**2 + 4 * x**2 / 2) * phi(x), -20, 20)
    yield Claim("T x = -x: equality, the sign of the determinant is not the point", near(figure, arb(0)), "quadrature")
    # a change of sign of det(I + J) proves that T is not injective: |x| has slopes -1 and +1
    yield Claim("|x| changes orientation", Fraction(-1) * Fraction(1) < 0, "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
