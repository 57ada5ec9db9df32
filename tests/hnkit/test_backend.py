"""Backends: the protocol, the documented base, and what a backend that offers no more than the protocol gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.backend import Backend, BackendBase, completed
from hnkit.maps import Condition
from hnkit.rewards import CallableReward, RewardSum, score
from hnkit.toy.backend import ToyBackend, ToyOptions


class Bare:
    """The seven members of the protocol and one offer."""

    def __init__(self) -> None:
        self.name, self.noise_shape = "bare", (3,)
        self.hypernetwork = nn.Identity()

    def encode(self, prompts):
        return Condition(tuple(prompts))

    def generate(self, noise, condition, steps=1):
        return noise

    def save_adapter(self, folder): ...

    def load_adapter(self, folder): ...

    def category(self, prompt):
        return prompt[0]


def test_a_bare_backend_is_completed_and_stays_itself():
    bare = Bare()
    assert isinstance(bare, Backend)
    full = completed(bare)
    assert isinstance(full, BackendBase)
    assert completed(full) is full
    assert (full.name, full.noise_dtype, full.max_steps, full.problem) == ("bare", torch.float32, None, None)
    assert full.prompts is full.judge is full.direct is full.propose is full.default_reward is None
    assert full.category is not None
    assert full.category("cat") == "c"
    assert full.memory_advice() == ""
    bare.hypernetwork = nn.Linear(3, 3)
    full.noise_shape = (4,)
    assert full.hypernetwork is bare.hypernetwork
    assert bare.noise_shape == (4,)


def test_the_map_of_a_bare_backend_is_its_network_under_each_row_s_prompt():
    class Scale(nn.Module):
        def forward(self, noise, condition):
            return noise * torch.tensor([float(len(prompt)) for prompt in condition.prompts])[:, None]

    bare = Bare()
    bare.hypernetwork = Scale()
    f = completed(bare).map_for(["a", "bcd"])
    assert torch.equal(f(torch.ones(2, 3)), torch.tensor([[1.0] * 3, [3.0] * 3]))


def test_backends_of_the_house_derive_from_the_base():
    backend = ToyBackend(ToyOptions())
    assert completed(backend) is backend
    assert backend.map_for([]) is backend.hypernetwork.body


# --- rewards ---------------------------------------------------------------------------------------------------


def mean(images, prompts):
    return images.mean((1, 2, 3))


def test_a_sum_returns_its_parts_and_keeps_nothing():
    rewards = RewardSum([CallableReward("a", 2.0, mean), CallableReward("b", -1.0, lambda x, p: x.amax((1, 2, 3)))])
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = rewards.scores(images, ["x"] * 3)
    assert torch.equal(scores.parts["a"], images.mean((1, 2, 3)))
    assert not scores.parts["a"].requires_grad
    assert torch.allclose(scores.total, 2 * images.mean((1, 2, 3)) - images.amax((1, 2, 3)))
    assert torch.equal(rewards(images, ["x"] * 3), scores.total)
    assert vars(rewards) == {"rewards": rewards.rewards}


def test_a_reward_that_edits_images_in_place_changes_them_for_itself_alone():
    def normalised(images, prompts):
        return images.mul_(2).sub_(1).mean((1, 2, 3))

    rewards = RewardSum([CallableReward("in place", 1.0, normalised), CallableReward("plain", 1.0, mean)])
    images = torch.full((2, 3, 4, 4), 0.75).requires_grad_()
    outputs = images * 1.0
    scores = rewards.scores(outputs, ["x"] * 2)
    assert scores.parts["in place"].tolist() == [0.5, 0.5]
    assert scores.parts["plain"].tolist() == [0.75, 0.75]
    assert torch.equal(outputs, images)
    scores.total.sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 3 / 48))


@pytest.mark.parametrize("error", [ValueError("no such\n model"), SystemExit(3), KeyError("x")])
def test_a_reward_that_raises_is_named(error):
    def broken(images, prompts):
        raise error

    with pytest.raises(InputError, match=f"reward 'broken' raised {type(error).__name__}: ") as caught:
        score(CallableReward("broken", 1.0, broken), torch.zeros(2, 3, 4, 4), ["x"] * 2)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_lack_of_memory_and_input_errors_are_passed_on():
    for error in (torch.OutOfMemoryError("no room"), InputError("one line")):

        def broken(images, prompts, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            score(CallableReward("broken", 1.0, broken), torch.zeros(2, 3, 4, 4), ["x"] * 2)
        assert caught.value is error
