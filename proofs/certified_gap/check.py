"""E prod Zhat_c / Z_c = 1, so that Markov bounds mean log Z_c from below; every outcome is enumerated exactly."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

from finite import normalised
from harness import Claim

LAWS = (normalised([5, 3, 1]), normalised([1, 1, 8]), normalised([1, 6, 1]))
WEIGHTS = (
    [Fraction(1), Fraction(3), Fraction(100)],
    [Fraction(1, 2), Fraction(2), Fraction(7)],
    [Fraction(1), Fraction(1, 9), Fraction(20)],
)


def outcomes(prompts: int, samples: int) -> Iterator[tuple[Fraction, Fraction]]:
    """(probability, product of Zhat_c / Z_c) of every outcome of all draws."""
    single = []
    for law, weights in zip(LAWS[:prompts], WEIGHTS[:prompts], strict=True):
        z = sum((p * w for p, w in zip(law, weights, strict=True)), Fraction(0))
        table = []
        for draw in product(range(len(law)), repeat=samples):
            probability = Fraction(1)
            for index in draw:
                probability *= law[index]
            table.append((probability, sum((weights[i] for i in draw), Fraction(0)) / samples / z))
        single.append(table)
    for combination in product(*single):
        probability = ratio = Fraction(1)
        for p, value in combination:
            probability, ratio = probability * p, ratio * value
        yield probability, ratio


def claims(penalised: bool = True) -> Iterator[Claim]:
    for prompts, samples in ((1, 4), (2, 2), (2, 3), (3, 2)):
        table = list(outcomes(prompts, samples))
        mean = sum((p * value for p, value in table), Fraction(0))
        yield Claim(f"C = {prompts}, n = {samples}: the product has mean one", mean == 1, "exact")
        for delta in (Fraction(1, 20), Fraction(1, 4)):
            level = 1 / delta if penalised else Fraction(1)
            exceeds = sum((p for p, value in table if value >= level), Fraction(0))
            yield Claim(
                f"C = {prompts}, n = {samples}: the bound fails with probability at most {delta}",
                exceeds <= delta,
                "exact",
                f"{float(exceeds):.4f}",
            )


def counterexamples() -> Iterator[Claim]:
    law, weights = LAWS[0], WEIGHTS[0]
    z = sum((p * w for p, w in zip(law, weights, strict=True)), Fraction(0))
    dependent = sum((p * (w / z) ** 2 for p, w in zip(law, weights, strict=True)), Fraction(0))
    yield Claim(
        "the same draw for two prompts: the product's mean exceeds one",
        dependent > 1,
        "exact",
        f"{float(dependent):.2f}",
    )
    coin, pair = normalised([1, 1]), [Fraction(1), Fraction(2)]
    z = Fraction(3, 2)
    above = sum((p for p, w in zip(coin, pair, strict=True) if w > z), Fraction(0))
    yield Claim("without the penalty a coin's Zhat is above Z half of the time", above == Fraction(1, 2), "exact")


def false_claims() -> Iterator[Claim]:
    yield from claims(penalised=False)
