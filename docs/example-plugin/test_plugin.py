"""What a backend and a reward have to hold, with hnkit's own tools."""

from __future__ import annotations

import pytest
import torch
from blots.backend import FACTORY, BlotsOptions
from blots.rewards import darkness

import hnkit
from hnkit.backend import Backend, Reward, steer
from hnkit.jacobian import check_map


@pytest.fixture
def backend():
    return FACTORY.load(BlotsOptions())


def test_it_is_a_backend_and_a_reward(backend):
    assert isinstance(backend, Backend)
    assert isinstance(darkness(), Reward)


def test_before_training_nothing_is_moved(backend):
    condition = backend.encode(["a red blot", "a blue blot"])
    x = torch.randn(2, *backend.noise_shape)
    with torch.no_grad():
        steered = steer(backend, x, condition)
        assert torch.equal(steered.images, backend.generate(x, condition))
    assert steered.images.min() >= 0
    assert steered.images.max() <= 1


def test_rows_are_independent_and_derivatives_right(backend):
    torch.nn.init.normal_(backend.hypernetwork.last.weight, std=0.02)
    check_map(backend.map_for(["a red blot", "a blue blot"]), torch.randn(2, *backend.noise_shape))


def test_the_reward_pulls_the_right_way(backend):
    condition = backend.encode(["a red blot"])
    x = torch.randn(1, *backend.noise_shape, requires_grad=True)
    darkness()(backend.generate(x, condition), ["a red blot"]).sum().backward()
    assert (x.grad < 0).all()  # less ink, a darker image


def test_an_adapter_comes_back(backend, tmp_path):
    torch.nn.init.normal_(backend.hypernetwork.last.weight, std=0.02)
    backend.save_adapter(tmp_path / "adapter")
    again = FACTORY.load(BlotsOptions(seed=1))
    again.load_adapter(tmp_path / "adapter")
    x, condition = torch.randn(2, *backend.noise_shape), backend.encode(["a red blot", "a green blot"])
    assert torch.equal(backend.hypernetwork(x, condition), again.hypernetwork(x, condition))
    with pytest.raises(hnkit.InputError, match="another network"):
        FACTORY.load(BlotsOptions(width=4)).load_adapter(tmp_path / "adapter")
    with pytest.raises(hnkit.InputError, match="adapter"):
        again.load_adapter(tmp_path)
