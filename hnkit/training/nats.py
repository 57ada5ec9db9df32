"""Reward per nat at the end of a run: from the rewards of the last validation, and as many further outputs at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.figures import Measurement
from hnkit.frontier import (
    Frontier,
    GapBound,
    MethodGain,
    frontier_document,
    gap_lower_bound,
    nats_lower_bound,
    no_frontier,
)
from hnkit.frontier.curve import LEAST_EFFECTIVE, LEAST_SAMPLES
from hnkit.frontier.measured import FAITHFUL
from hnkit.internal.stats import Estimate
from hnkit.prompts import spread
from hnkit.training.validate import Evaluator, Validation
from hnkit.training.view import effective_alpha

_MOST_BASE = 32
"""Base samples a prompt, at most: more prompts are worth more than more samples of each."""
_SPARE = 1.3
"""How many more effective samples than the curve needs are planned for."""


@dataclass(frozen=True)
class Sizes:
    """What the frontier of a run is drawn from.

    Attributes:
        prompts: prompts, from all over their order.
        base: further base outputs of each.
        steered: how many of their noises are steered as well.
    """

    prompts: int
    base: int
    steered: int

    @property
    def outputs(self) -> int:
        """Further outputs in all."""
        return self.prompts * (self.base + self.steered)


def sizes(budget: int, available: int, have: int, nats: float | None) -> Sizes:
    """Prompts and samples that a budget of outputs pays for.

    The effective sample size at a budget of K nats is about `n exp(-2 K)` (exact where the reward is Gaussian), so
    that the nats of the map say how many base samples a prompt needs; what is left goes into prompts.

    Args:
        budget: further outputs, at most.
        available: prompts there are.
        have: base outputs of each that there are already.
        nats: nats of the map; `None`: not known.

    Raises:
        InputError: the budget does not pay for two prompts of `LEAST_SAMPLES` (or for the only one).
    """
    wanted = LEAST_EFFECTIVE * _SPARE * math.exp(min(2 * max(nats, 0.0), 10.0)) if nats is not None else _MOST_BASE
    base = min(max(math.ceil(wanted), LEAST_SAMPLES), _MOST_BASE)
    least = min(2, available)
    while True:
        further = max(0, base - have)
        found = Sizes(least, further, min(further, max(2, base // 4)))
        if found.outputs <= budget:
            break
        base -= 1
        if base < LEAST_SAMPLES:
            raise InputError(
                f"{budget} validation samples pay for no frontier of reward per nat: it needs {LEAST_SAMPLES} base "
                f"outputs of {least} prompts; train.validate_samples = {found.outputs} or more gives one"
            )
    each = found.base + found.steered
    return Sizes(min(available, budget // each) if each else available, found.base, found.steered)


def reward_per_nat(evaluator: Evaluator, validation: Validation, measurement: Measurement | None) -> dict[str, Any]:
    """What the trained network gains for its nats, beside the most that they could buy.

    The gain is that of the whole validation; the frontier is that of prompts from all over their order. Nats are those
    of the measurement, or where noise is injected their proved bound: then the efficiency is that at least, and how far
    the law is from its target has no certificate, which needs nats from below.

    Args:
        evaluator: what makes the further outputs.
        validation: the last validation.
        measurement: the last measurement; `None`: there is none, and the nats are not known.

    Returns:
        The document of `hnkit.frontier.frontier_document`, with `extra_outputs`; where there can be no frontier an
        empty one whose `remark` says why.
    """
    settings = evaluator.settings
    kl = None if measurement is None else measurement.kl
    if settings.deployment is not None:
        kl, measurement = Estimate.of(validation.nats), None
    kl_prompts = evaluator.measured_prompts
    prompts = list(dict.fromkeys(kl_prompts if measurement is not None else validation.prompts))
    have = min(validation.prompts.count(prompt) for prompt in prompts)
    try:
        size = sizes(settings.validate_samples, len(prompts), have, None if kl is None else kl.value)
        prompts = [prompts[place] for place in spread(len(prompts), size.prompts)]
        base, steered = _rewards(evaluator, validation, prompts, size)
        frontier = Frontier(base, seed=settings.seed)
        gap = None
        if measurement is not None and measurement.method in FAITHFUL and len(prompts) > 1:
            values = _by_prompt(measurement.per_sample, kl_prompts, prompts)
            alpha = effective_alpha(settings, math.prod(evaluator.backend.noise_shape))
            gap = gap_lower_bound(values, steered, base, alpha, paired=False)
        found = _method(frontier, validation, steered, kl, gap)
        method = replace(found, nats_at_most=settings.deployment is not None)
    except InputError as reason:
        return no_frontier(f"No frontier: {reason}.")
    name = "hypernetwork" if settings.objective == "hypernoise" else "fine-tuned generator"
    return frontier_document(frontier, {name: method}) | {"extra_outputs": size.outputs}


def _rewards(
    evaluator: Evaluator, validation: Validation, prompts: Sequence[str], size: Sizes
) -> tuple[list[Tensor], list[Tensor]]:
    """Base and steered rewards of each prompt: those of the validation, and those of further noises."""
    base = _by_prompt(validation.base, validation.prompts, prompts)
    steered = _by_prompt(validation.steered, validation.prompts, prompts)
    if not size.base:
        return base, steered
    noise = evaluator.noise(size.prompts * size.base, "frontier")
    firsts = [len(validation.prompts) + size.base * place for place in range(size.prompts)]
    moved = noise.view(size.prompts, size.base, *noise.shape[1:])[:, : size.steered].flatten(0, 1)
    further, gained = (
        evaluator.rewards_of(
            [prompt for prompt in prompts for _ in range(count)],
            [first + row for first in firsts for row in range(count)],
            x,
            steered=steered_too,
        ).view(size.prompts, count)
        for count, x, steered_too in ((size.base, noise, False), (size.steered, moved, True))
    )
    return (
        [torch.cat(pair) for pair in zip(base, further, strict=True)],
        [torch.cat(pair) for pair in zip(steered, gained, strict=True)],
    )


def _by_prompt(values: Tensor, of: Sequence[str], prompts: Sequence[str]) -> list[Tensor]:
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(of):
        rows.setdefault(prompt, []).append(row)
    return [values[rows[prompt]] for prompt in prompts]


def _method(
    frontier: Frontier,
    validation: Validation,
    steered: Sequence[Tensor],
    kl: Estimate | None,
    gap: GapBound | None,
) -> MethodGain:
    score = validation.record["scores"]["reward"]
    gain, stderr = score["gain"], score["gain_stderr"]
    bound = nats_lower_bound(frontier.base, steered)
    if kl is None:
        return MethodGain(gain, stderr, bound, None, None)
    efficiency = spread = None
    if frontier.carries(kl.value):
        point = frontier.point(kl.value)
        efficiency = gain / point.gain
        # independent errors of the gain, of the frontier, and of the nats, by the frontier's slope dR*/dK = 1 / beta
        slope = efficiency / point.beta
        spread = math.hypot(stderr, efficiency * point.stderr, slope * kl.stderr) / point.gain
    return MethodGain(gain, stderr, bound, kl.value, efficiency, kl.stderr, spread, gap)
