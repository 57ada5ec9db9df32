"""Every method of a comparison on the frontier of reward per nat, from images that the comparison has made already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hnkit.errors import InputError
from hnkit.frontier import Rewards, frontier_document, methods_on_frontier
from hnkit.frontier.curve import LEAST_SAMPLES
from hnkit.scaled.compare.evaluation import Evaluation, Row

REWARD = "reward"


def frontier_part(
    base: Evaluation, methods: Sequence[Evaluation], pool: Evaluation | None, nats: Mapping[str, float]
) -> dict[str, Any] | None:
    """What `hnkit frontier` would say of the methods, in the trained reward.

    Args:
        base: the base's images.
        methods: the images of every other method.
        pool: best-of-N's images, whose candidates are base samples; `None`: the base's images are all there are.
        nats: method -> KL of its noise law from the base, where it was measured.

    Returns:
        The document of `hnkit.frontier.frontier_document`; `None` where the prompts have too few base samples.
    """
    samples = base_rewards(base.rows if pool is None else pool.rows)
    if min(len(values) for values in samples.values()) < LEAST_SAMPLES:
        return None
    table = {"base": Rewards(samples)}
    for evaluation in methods:
        table[evaluation.method] = Rewards(base_rewards(evaluation.rows, pooled=False), nats.get(evaluation.method))
    try:
        frontier, found = methods_on_frontier(table)
    except InputError:  # a reward that is constant over the base has no frontier
        return None
    return frontier_document(frontier, found)


def base_rewards(rows: Sequence[Row], *, pooled: bool = True) -> dict[str, torch.Tensor]:
    """Prompt -> rewards of its images, or of the candidates that they were chosen from."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.prompt, []).extend(row.pool if pooled and row.pool else (row.scores[REWARD],))
    return {prompt: torch.tensor(values, dtype=torch.float64) for prompt, values in found.items()}
