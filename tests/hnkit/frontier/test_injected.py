"""A hypernetwork with injected noise on the frontier: its nats are a bound's, and its images what it deploys."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit.frontier import frontier_document
from hnkit.frontier.measured import FrontierSettings, network_on_frontier
from hnkit.frontier.page import sentences, table
from hnkit.injection import NoiseInjection
from hnkit.rewards import CallableReward, RewardSum
from hnkit.toy.backend import ToyBackend, ToyOptions

SHIFT, SHARE = 0.4, 0.36


def first_coordinate(images, prompts):
    return images[:, 0]


def deployed(injection):
    """`f = 0.4` in every coordinate, of a linear generator."""
    backend = ToyBackend(ToyOptions(problem="linear-gaussian"))
    with torch.no_grad():
        backend.hypernetwork.body[0].bias.fill_(SHIFT)
    backend.injection = injection
    return backend


def test_gain_and_nats_are_those_of_what_is_deployed():
    settings = FrontierSettings(base_samples=400, samples=400)
    rewards = RewardSum([CallableReward("first", 1.0, first_coordinate)])
    injected = deployed(NoiseInjection(SHARE))
    found = network_on_frontier(injected, rewards, ["a", "b", "c", "d"], settings, alpha=1.0)
    dim = injected.noise_shape[0]
    square = SHIFT**2 * dim
    assert found.injected
    assert found.kl == pytest.approx((1 - SHARE) / (2 * SHARE) * square)
    assert found.l2 == pytest.approx(square / 2)
    assert found.gap is None
    # x_hat has mean a c and unit variance: a gain by the mean alone, whose error is that of 400 paired images a prompt
    x = torch.full((1, dim), SHIFT * math.sqrt(1 - SHARE), dtype=torch.float64)
    zero = torch.zeros_like(x)
    exact = float((injected.problem.generate(x) - injected.problem.generate(zero))[0, 0])
    method = found.methods["hypernetwork"]
    spread = float(injected.problem.generate(torch.eye(dim, dtype=torch.float64))[:, 0].norm())
    assert abs(method.gain - exact) < 4.9 * spread * math.sqrt(2 / 1600)
    document = frontier_document(found.frontier, found.methods) | {"network": found.figures()}
    assert document["network"]["kl_at_most"] == found.kl
    assert "kl" not in document["network"]
    assert "for at most" in sentences(document)[0]
    (row,) = (row for row in table(document)[1] if row[0] == "hypernetwork")
    assert row[1].startswith("at most")
    # an image is the same whatever the other prompts are
    alone = network_on_frontier(injected, rewards, ["c"], settings)
    assert torch.equal(alone.table["hypernetwork"].rewards["c"], found.table["hypernetwork"].rewards["c"])


def test_without_injected_noise_nothing_is_drawn():
    settings = FrontierSettings(base_samples=16, samples=4)
    rewards = RewardSum([CallableReward("first", 1.0, first_coordinate)])
    found = network_on_frontier(deployed(None), rewards, ["a", "b"], settings)
    assert not found.injected
    gains = found.table["hypernetwork"].rewards["a"] - found.table["base"].rewards["a"][:4]
    assert float(gains.std()) < 1e-12  # a shift, image by image
