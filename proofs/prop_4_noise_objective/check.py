"""Proposition 4: KL(q || p0*) = J_noise(q) + log Z*, with J_noise = KL(q || p0) - E_q[r o g]/alpha."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from finite import LAWS, NOISE, WEIGHTS_IN, kl, mean, tilted, tiny
from harness import Claim, ball


def claims(reward_factor: int = 1) -> Iterator[Claim]:
    star, z = tilted(NOISE, WEIGHTS_IN)
    rewards = [ball(w).log() for w in WEIGHTS_IN]
    objectives = []
    for law in LAWS:
        objective = kl(law, NOISE) - reward_factor * mean(law, rewards)
        objectives.append((objective, kl(law, star)))
        yield Claim(
            "KL(q || p0*) - J_noise(q) = log Z*", tiny(kl(law, star) - objective - ball(z).log()), "ball arithmetic"
        )
    by_objective = sorted(range(len(LAWS)), key=lambda i: float(objectives[i][0]))
    by_divergence = sorted(range(len(LAWS)), key=lambda i: float(objectives[i][1]))
    yield Claim("both order the laws alike", by_objective == by_divergence, "ball arithmetic")
    best = kl(star, NOISE) - reward_factor * mean(star, rewards)
    yield Claim("at p0* the objective is -log Z*", tiny(best + ball(z).log()), "ball arithmetic")
    # a Gaussian family, symbolically: q = N(m, s^2), p0 = N(0, 1), r(g(x))/alpha = b x - h x^2 / 2
    m, b = sympy.symbols("m b", real=True)
    s, hh = sympy.symbols("s h", positive=True)
    variance = 1 / (1 + hh)
    to_star = (
        sympy.log(sympy.sqrt(variance) / s) + (s**2 + (m - b * variance) ** 2) / (2 * variance) - sympy.Rational(1, 2)
    )
    to_base = sympy.log(1 / s) + (s**2 + m**2) / 2 - sympy.Rational(1, 2)
    reward = b * m - hh * (s**2 + m**2) / 2
    log_z = b**2 * variance / 2 + sympy.log(variance) / 2
    residual = sympy.simplify(sympy.expand_log(to_star - (to_base - reward_factor * reward) - log_z, force=True))
    yield Claim("Gaussian laws with a quadratic reward", residual == 0, "symbolic")


def counterexamples() -> Iterator[Claim]:
    # with the reward taken at the unmoved noise it is a constant, and the best law is p0 itself
    star, _ = tilted(NOISE, WEIGHTS_IN)
    candidates = [*LAWS, NOISE, star]
    without = min(range(len(candidates)), key=lambda i: float(kl(candidates[i], NOISE)))
    within = min(range(len(candidates)), key=lambda i: float(kl(candidates[i], star)))
    moved = candidates[without] == NOISE and candidates[within] == star and star != NOISE
    yield Claim("with the reward at the unmoved noise the minimiser is p0, not p0*", moved, "ball arithmetic")


def false_claims() -> Iterator[Claim]:
    yield from claims(reward_factor=-1)
