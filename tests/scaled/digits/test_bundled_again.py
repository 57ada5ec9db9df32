"""The second way to the bundled adapter's figures: right where the answer is known, and in agreement with the first."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from hnkit import Frontier
from hnkit.maps import Condition
from hnkit.scaled.digits.checkpoint import model_folder
from hnkit.scaled.digits.train.adapter import read_figures

ROOT = Path(__file__).parents[3]


@pytest.fixture
def again(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("bundled_again")


class Linear:
    """`f(x) = A x`, images that are the noise, and their sum as the reward."""

    noise_shape = (1, 2, 2)
    A = torch.tensor([[0.5, 0.2, 0, 0], [0, -1.5, 0, 0], [0.3, 0, 0.1, 0], [0, 0, 0, 0.4]])

    def encode(self, texts):
        return Condition(tuple(texts))

    def hypernetwork(self, x, _):
        return (x.flatten(1) @ self.A.T).view_as(x)

    def generate(self, x, _):
        return x

    def default_reward(self, images, _):
        return images.flatten(1).sum(1)


def test_gain_nats_and_folds_of_a_linear_map(again):
    texts = [f"sentence {k}" for k in range(60)]
    found = again.summary(again.measured(Linear(), texts, again.Round(50, 64, 8, 2, 0, 1)), 3)
    A = Linear.A.double()
    l2 = float(A.square().sum()) / 2
    expected = l2 + float(A.trace() - torch.linalg.slogdet(torch.eye(4) + A)[1])
    for name, value in (("gain", 0.0), ("l2", l2), ("kl", expected)):
        assert abs(found[name][0] - value) < 4.9 * found[name][1], name
    assert (found["sentences"], found["images"], found["noises"], found["folds"]) == (50, 400, 100, 100)


def test_reweighted_rewards_are_on_the_frontier(again):
    """Of Gaussian rewards it is sqrt(2 K) spreads, and what `Frontier` says from the same rewards."""
    draw = torch.Generator().manual_seed(0)
    base = [2 * torch.randn(4000, generator=draw, dtype=torch.float64) + k for k in range(10)]
    for nats in (0.1, 0.6):
        ours = again.reweighted([values.numpy() for values in base], nats)
        assert ours == pytest.approx(2 * math.sqrt(2 * nats), rel=0.03)
        assert ours == pytest.approx(Frontier(base).point(nats).gain, rel=0.02)


def test_errors_are_those_of_the_means_over_sentences(again):
    draw = np.random.default_rng(0)
    rows = [
        again.Sentence(
            draw.normal(size=64), draw.normal(0.3, 1, 4), draw.normal(0.1, 0.01, 4), draw.normal(0.1, 0.01, 2), 0
        )
        for _ in range(40)
    ]
    found = again.summary(rows, 3)
    gains = np.array([row.gains.mean() for row in rows])
    assert found["gain"] == pytest.approx((gains.mean(), gains.std(ddof=1) / math.sqrt(40)))
    assert found["efficiency"][0] == pytest.approx(
        gains.mean() / again.reweighted([r.base for r in rows], found["kl"][0])
    )


def test_the_card_and_the_second_way_agree(again):
    """Figures at other noises of the same sentences differ by their errors, which are mostly the sentences' own."""
    found, card = json.loads(again.OUT.read_text(encoding="utf-8"))["sets"]["held-out"], read_figures(model_folder())
    for name, other in (("gain", "reward_gain"), ("kl", "kl"), ("efficiency", "efficiency")):
        (value, error), (said, uncertain) = found[name], card[other]
        assert abs(value - said) < 2 * math.hypot(error, uncertain), name
    assert abs(found["l2"][0] - card["l2"]) < 2 * math.hypot(found["l2"][1], card["l2_stderr"])
