"""A network on the frontier: the same figures whatever else is measured and however many images go together."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from hnkit.backend import completed, image_noise
from hnkit.frontier import gap_lower_bound
from hnkit.frontier.measured import FrontierSettings, network_on_frontier
from hnkit.maps import Condition
from hnkit.rewards import RewardSum
from tests.hnkit.fake_backend import Brightness, FakeBackend, Options


@pytest.fixture
def backend():
    made = FakeBackend(Options())
    made.hypernetwork.weight.data += 0.05
    made.hypernetwork.bias.data += 0.3
    return completed(made)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_batch_order_and_other_prompts_change_nothing(backend, method):
    def measured(prompts, batch):
        settings = FrontierSettings(base_samples=16, samples=4, steps=3, seed=2, batch=batch, method=method)
        return network_on_frontier(backend, RewardSum([Brightness()]), prompts, settings)

    whole = measured(["a cat", "a longer dog", "a bird"], 16)
    for prompts, batch in ((["a bird", "a cat", "a longer dog"], 1), (["a longer dog", "a bird", "a cat"], 7)):
        found = measured(prompts, batch)
        for name, table in whole.table.items():
            for prompt, values in table.rewards.items():
                torch.testing.assert_close(found.table[name].rewards[prompt], values, atol=1e-6, rtol=0)
        assert found.kl == pytest.approx(whole.kl, rel=1e-6)
    alone = measured(["a longer dog"], 3).table["base"].rewards["a longer dog"]
    torch.testing.assert_close(alone, whole.table["base"].rewards["a longer dog"], atol=1e-6, rtol=0)
    others = [values for table in whole.table.values() for values in table.rewards.values()]
    assert len({float(value) for values in others for value in values}) == 3 * (16 + 4)


class Fold(nn.Module):
    """`f(x | c) = -1.6 tanh(2 x)` by the length of the prompt in tenths: it folds where that is above 0.3."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(1.6, dtype=torch.float64))

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        return -self.size * torch.tanh(2 * noise) * condition.tensors["length"][:, None, None, None]


def test_every_figure_by_hand():
    """The oracle: the integrand of a map that acts on each coordinate alone, and sums over prompts and samples."""
    backend = completed(FakeBackend(Options()))
    backend.hypernetwork, backend.noise_shape, backend.noise_dtype = Fold(), (3, 1, 1), torch.float64
    prompts, count, seed, alpha = ["a", "ten letters", "two"], 5, 3, 0.4
    settings = FrontierSettings(base_samples=12, samples=count, seed=seed)
    found = network_on_frontier(backend, RewardSum([Brightness()]), prompts, settings, alpha=alpha)
    kl, half, steered, base, negative = [], [], [], [], 0
    for prompt in prompts:
        x = image_noise(backend, Condition((prompt,) * 12).of_images(seed, range(12))).flatten(1)
        base.append(2 * torch.sigmoid(x).mean(1))
        x, scale = x[:count], 1.6 * len(prompt) / 10
        f, slope = -scale * torch.tanh(2 * x), -2 * scale * (1 - torch.tanh(2 * x) ** 2)
        half.append(f.square().sum(1) / 2)
        kl.append(half[-1] + (slope - (1 + slope).abs().log()).sum(1))
        negative += int(((1 + slope).prod(1) < 0).sum())
        steered.append(2 * torch.sigmoid(x + f).mean(1))

    def mean(parts: list[Tensor]) -> tuple[float, float]:
        variance = sum(float(v.var()) / len(v) for v in parts)
        return fmean(float(v.mean()) for v in parts), math.sqrt(variance) / len(parts)

    assert (found.kl, found.kl_stderr) == pytest.approx(mean(kl))
    assert (found.l2, found.l2_stderr) == pytest.approx(mean(half))
    values, halves = torch.cat(kl), torch.cat(half)
    off = float((halves - values).mean() / values.mean())
    residuals = halves - (1 + off) * values
    assert found.relative_error.value == pytest.approx(off)
    assert found.relative_error.stderr == pytest.approx(float(residuals.std() / values.mean()) / math.sqrt(3 * count))
    assert 0 < negative < count
    assert found.folds == (negative, 3 * count)
    assert found.injective == "violated"  # under one prompt alone
    method = found.methods["hypernetwork"]
    gains = torch.stack([s.mean() - b.mean() for s, b in zip(steered, base, strict=True)])
    assert method.gain == pytest.approx(float(gains.mean()), rel=1e-6)
    assert (method.nats, method.nats_stderr) == (found.kl, found.kl_stderr)
    gap = gap_lower_bound(kl, steered, base, alpha)
    assert (found.gap.lower, found.gap.stderr) == pytest.approx((gap.lower, gap.stderr), rel=1e-6)
    assert found.l2_verdict.samples == min(16, 3 * count)
    document = found.figures()
    assert document["kl_stderr"] == found.kl_stderr
    assert document["gap_lower_bound"] == found.gap.lower
    assert document["folds"] == {"negative": negative, "samples": 3 * count}
