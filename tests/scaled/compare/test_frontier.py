"""The frontier of a comparison: from candidates of best-of-N where they exist, and from scores of images alone."""

from __future__ import annotations

import json
import math

import torch

from hnkit.frontier import Frontier
from hnkit.scaled.compare.baselines import Cost
from hnkit.scaled.compare.evaluation import Evaluation, Row
from hnkit.scaled.compare.frontier import base_rewards, frontier_part


def evaluation(
    name: str, shift: float, seed: int, *, prompts: int = 5, images: int = 4, candidates: int = 0
) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(prompts):
        for image in range(images):
            pool = torch.randn(candidates, generator=generator).tolist()
            reward = max(pool) if pool else shift + float(torch.randn((), generator=generator))
            rows.append(Row(f"p{prompt}", image, "", {"reward": reward}, pool))
    return Evaluation(name, 1, tuple(rows), Cost())


def test_the_candidates_of_best_of_n_are_the_base_samples():
    base, pool = evaluation("base", 0.0, 0), evaluation("best-of-n", 0.0, 1, candidates=20)
    ours = evaluation("hypernoise", 0.5, 2)
    document = frontier_part(base, [ours, pool], pool, {"hypernoise": 0.2})
    samples = base_rewards(pool.rows)
    assert {len(values) for values in samples.values()} == {80}
    assert document["base_samples"] == 400
    frontier = Frontier(list(samples.values()))
    method = document["methods"]["hypernoise"]
    assert method["efficiency"] == method["gain"] / frontier.point(0.2).gain
    best = document["methods"]["best-of-n"]
    assert best["nats"] is None
    assert best["nats_lower_bound"] <= math.log(20) - 19 / 20
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_too_few_samples_or_a_constant_reward_give_none():
    base = evaluation("base", 0.0, 0)
    assert frontier_part(base, [], None, {}) is None
    flat = Evaluation("base", 1, tuple(Row("p", k, "", {"reward": 1.0}) for k in range(20)), Cost())
    assert frontier_part(flat, [], None, {}) is None
