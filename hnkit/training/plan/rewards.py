"""Rewards without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hnkit.backend import Reward, load_installed
from hnkit.config import RewardSpec, RunConfig
from hnkit.errors import InputError
from hnkit.rewards import RewardSum, load_reward
from hnkit.training.plan.skeleton import Skeleton, make_fake, without_weights


def reward_skeletons(config: RunConfig, skeleton: Skeleton) -> RewardSum:
    """The rewards that a run trains on, to count on the tensors of `skeleton`.

    A reward whose loader offers `skeleton(weight)` is built by that and read from nowhere; any other, such as one
    without weights or a function of the user's own, is loaded as for a run.

    Raises:
        InputError: no reward is named and the backend has none, or one does not load.
    """
    rewards = _all_built(config.rewards, skeleton)
    default = skeleton.backend.default_reward
    if not rewards and default is not None:
        rewards.append(default)
    if not rewards:
        raise InputError(
            f"no reward given and backend {config.backend!r} has no default: use --reward NAME=WEIGHT "
            "(hnkit backends lists names), or my_module:function=WEIGHT for one of yours"
        )
    return RewardSum(rewards)


def heldout_skeletons(config: RunConfig, skeleton: Skeleton) -> list[Reward]:
    """The rewards that a run only reports: their weights lie on the card all the time too."""
    return _all_built(config.heldout, skeleton)


def _all_built(specs: Mapping[str, RewardSpec], skeleton: Skeleton) -> list[Reward]:
    rewards: list[Reward] = []
    for name, spec in specs.items():
        build = None if ":" in name else getattr(load_installed("hnkit.rewards", name), "skeleton", None)
        rewards.append(_built(build, spec) if build is not None else load_reward(name, spec, torch.device("cpu")))
    mode: Any = skeleton.mode
    if hasattr(mode, "fake_tensor_converter"):
        make_fake(mode, (reward for reward in rewards if isinstance(reward, nn.Module)))
    return rewards


def _built(build: Any, spec: RewardSpec) -> Reward:
    accepted = inspect.signature(build).parameters
    options = {key: value for key, value in spec.options.items() if key in accepted}
    reward: Reward = without_weights(lambda: build(weight=spec.weight, **options))
    return reward
