"""A network on the frontier: the same figures whatever else is measured and however many images go together."""

from __future__ import annotations

import pytest
import torch

from hnkit.backend import completed
from hnkit.frontier.measured import FrontierSettings, network_on_frontier
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
