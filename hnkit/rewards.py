"""The rewards of a run: loaded by name or by the user's own import path, checked, and summed with their weights."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.backend import Reward, load_installed
from hnkit.config import RewardSpec
from hnkit.errors import InputError
from hnkit.internal.values import typed_value


def import_object(path: str, flag: str) -> Any:
    """The object at `pkg.mod:name`, from a flag that the user typed; the working directory is searched too.

    Args:
        path: module and attribute, dots allowed in both.
        flag: the flag, for messages.

    Raises:
        InputError: the path does not parse, the module does not import, or the attribute is missing.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise InputError(f"{flag} {path}: write pkg.mod:name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the user's module may raise anything while it is imported
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{flag} {path}: importing {module} failed ({type(error).__name__}: {reason})") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise InputError(f"{flag} {path}: {module} has no {attribute}")
        found = getattr(found, name)
    return found


@dataclass
class CallableReward:
    """A plain function `(images, prompts) -> (n,)` as a `Reward`."""

    name: str
    weight: float
    function: Callable[[Tensor, Sequence[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of the images, `(n,)`."""
        return self.function(images, prompts)


def load_reward(name: str, spec: RewardSpec, device: torch.device) -> Reward:
    """One reward of the configuration.

    Raises:
        InputError: unknown name or option, or something that it needs is missing.
    """
    if ":" in name:
        function = import_object(name, "--reward")
        if not callable(function):
            raise InputError(f"--reward {name} is a {type(function).__name__}: give a function of (images, prompts)")
        return CallableReward(name, spec.weight, function)
    factory = load_installed("hnkit.rewards", name)
    accepted = inspect.signature(factory).parameters
    options = dict(spec.options)
    if "device" in accepted:
        options.setdefault("device", str(device))
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError):  # names that exist for type checkers alone: nothing to check against
        hints = {}
    for key, value in options.items():
        if key not in accepted:
            raise InputError(f"reward {name!r} has no option {key!r}: accepted are {', '.join(accepted)}")
        if key in hints:
            options[key] = typed_value(value, hints[key], f"option {key!r} of reward {name!r}")
    if "device" in options:
        try:
            torch.empty(0, device=str(options["device"]))
        except (RuntimeError, AssertionError) as error:
            device_name = options["device"]
            raise InputError(f"reward {name!r}: device {device_name!r} cannot be used: choose cpu or cuda") from error
    reward: Reward = factory(weight=spec.weight, **options)
    return reward


@dataclass(frozen=True)
class Scores:
    """What a sum of rewards gives a batch of images.

    Attributes:
        total: the weighted sum, `(n,)`, in float32 at least, differentiable in the images.
        parts: name -> scores `(n,)` of each reward, unweighted and detached.
    """

    total: Tensor
    parts: dict[str, Tensor]


class RewardSum:
    """`r(images, prompts) = sum_k weight_k r_k(images, prompts)`."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = tuple(rewards)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards, in order."""
        return tuple(reward.name for reward in self.rewards)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum, `(n,)`; see `scores`."""
        return self.scores(images, prompts).total

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """The weighted sum and its parts.

        Every reward gets images of its own, so that one that edits them in place changes nothing for the others.

        Raises:
            InputError: a reward returned no tensor of shape `(n,)`, or raised; the message names it.
        """
        total = torch.zeros(len(images), device=images.device)
        parts = {}
        for index, reward in enumerate(self.rewards):
            values = score(reward, images, prompts)
            values = values if values.dtype == torch.float64 else values.float()
            parts[reward.name] = values.detach()
            total = reward.weight * values if index == 0 else total + reward.weight * values
        return Scores(total, parts)


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores `(n,)` of one reward, which is given images of its own.

    Raises:
        InputError: the reward returned something else, or raised or called `exit`; the message names it. A
            `NonFiniteError`, or any other `InputError` that it raises, is passed on as it is; so is lack of memory.
    """
    try:
        values: Any = reward(images.clone(), tuple(prompts))
    except (InputError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything: say whose it is, keep the cause
        reason = " ".join(str(error).split())
        raise InputError(f"reward {reward.name!r} raised {type(error).__name__}: {reason}") from error
    given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if given != (len(images),):
        raise InputError(f"reward {reward.name!r} returned {given}: it must return ({len(images)},)")
    scores: Tensor = values
    return scores


def load_rewards(specs: Mapping[str, RewardSpec], default: Reward | None, device: torch.device) -> RewardSum:
    """The rewards of a table, or the backend's default one where the table is empty."""
    loaded = [load_reward(name, spec, device) for name, spec in specs.items()]
    return RewardSum(loaded or ([default] if default is not None else []))
