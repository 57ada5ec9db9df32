"""No law within K nats of p gains more than min_beta (K + psi(beta)) / beta, and the tilted law gains that."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from finite import kl, normalised, tilted, tiny
from flint import arb
from harness import Claim, ball

P = normalised([5, 3, 1, 1])
REWARD = [0, 1, 2, 5]
OTHER, OTHER_REWARD = normalised([1, 1, 4, 2]), [3, 3, 0, 1]
LAWS = [normalised(w) for w in ([1, 1, 1, 1], [4, 3, 2, 1], [0, 1, 1, 0], [0, 0, 0, 1], [50, 31, 12, 15])]


def mean(law: list[Fraction], reward: list[int]) -> Fraction:
    return sum((p * r for p, r in zip(law, reward, strict=True)), Fraction(0))


def tilt(law: list[Fraction], reward: list[int], t: Fraction) -> tuple[list[Fraction], arb]:
    """The tilted law and psi at `beta = log t`, which makes every weight `t^r` rational."""
    q, z = tilted(law, [t**r for r in reward])
    return q, ball(z).log() - ball(t).log() * ball(mean(law, reward))


def claims(sign: int = 1) -> Iterator[Claim]:
    for t in (Fraction(11, 10), Fraction(3, 2), Fraction(3)):
        beta = ball(t).log()
        star, psi = tilt(P, REWARD, t)
        spent = kl(star, P)
        gain = ball(mean(star, REWARD) - mean(P, REWARD))
        yield Claim(
            f"attained by the tilted law, e^beta = {t}", tiny(beta * gain - spent - sign * psi), "ball arithmetic"
        )
        for q in LAWS:
            slack = (kl(q, P) + sign * psi) / beta - ball(mean(q, REWARD) - mean(P, REWARD))
            yield Claim(
                f"no law gains more, e^beta = {t}", bool(slack >= 0), "ball arithmetic", f"slack {float(slack):.4f}"
            )
            yield Claim(
                "and what is missing is KL(q || q_beta) / beta", tiny(slack - kl(q, star) / beta), "ball arithmetic"
            )
        # two prompts, one beta: the mean gain of the two tilted laws is the bound at their mean budget
        second, psi2 = tilt(OTHER, OTHER_REWARD, t)
        both = (spent + kl(second, OTHER)) / 2
        gains = ball(mean(star, REWARD) - mean(P, REWARD) + mean(second, OTHER_REWARD) - mean(OTHER, OTHER_REWARD)) / 2
        yield Claim("one beta for two prompts", tiny(beta * gains - both - sign * (psi + psi2) / 2), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    # equal budgets: prompt 2 has a reward of hundredth size; both spend the mean of what one beta spends
    t = Fraction(3, 2)
    star, _ = tilt(P, REWARD, t)
    budget = kl(star, P) / 2  # the second prompt's reward is constant: one beta spends nothing there
    equal = next(
        ball(mean(q, REWARD) - mean(P, REWARD)) / 2
        for k in range(1, 500)
        for q in [tilt(P, REWARD, t - Fraction(k, 1000))[0]]
        if bool(kl(q, P) <= budget)
    )
    one_beta = ball(mean(star, REWARD) - mean(P, REWARD)) / 2
    yield Claim(
        "equal budgets earn less than one beta",
        bool(equal < one_beta),
        "ball arithmetic",
        f"{float(equal):.4f} < {float(one_beta):.4f}",
    )
    # beta < 0: the inequality fails for the law of the largest reward
    t = Fraction(1, 2)
    _, psi = tilt(P, REWARD, t)
    q = LAWS[3]
    slack = (kl(q, P) + psi) / ball(t).log() - ball(mean(q, REWARD) - mean(P, REWARD))
    yield Claim("beta must be positive", bool(slack < 0), "ball arithmetic", f"slack {float(slack):.4f}")


def false_claims() -> Iterator[Claim]:
    yield from claims(sign=-1)
