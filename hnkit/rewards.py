"""The rewards of a run: loaded by name or by the user's own import path, checked, and summed with their weights."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.backend import Reward, load_installed
from hnkit.config import RewardSpec
from hnkit.errors import InputError
from hnkit.internal.stops import Stopped
from hnkit.internal.values import printable, reason_of, typed_value

_STOPS = (KeyboardInterrupt, Stopped)
"""What a signal raises wherever it arrives, and what is no fault of the code that was running."""


def import_object(path: str, flag: str) -> Any:
    """The object at `pkg.mod:name`, from a flag that the user typed; the working directory is searched too, last.

    Args:
        path: module and attribute, dots allowed in both.
        flag: the flag, for messages.

    Raises:
        InputError: the path does not parse, the module does not import, or the attribute is missing.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise InputError(f"{flag} {path}: write pkg.mod:name")
    try:
        with _working_directory_on_path():
            found: Any = importlib.import_module(module)
    except _STOPS:
        raise
    except BaseException as error:  # the user's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {reason_of(error)}{_user_line(error, module)}"
        cure = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            cure = ": run from the folder of that file, or install the package"
        if module.endswith(".py"):
            cure = f": write the module, {module.removesuffix('.py').replace('/', '.').strip('.')}:{attribute}"
        raise InputError(f"{flag} {path}: importing {module} failed ({reason}){cure}") from error
    where = getattr(found, "__file__", None)
    for name in attribute.split("."):
        if not hasattr(found, name):
            place = f" ({where})" if where else ""
            raise InputError(f"{flag} {path}: {module}{place} has no {attribute}: name what it has")
        found = getattr(found, name)
    return found


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Inside, modules of the working directory are found after installed ones, so that no file hides one of those."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def made(found: Any, path: str, flag: str) -> Any:
    """What a class or a function without arguments makes; anything else as it is.

    Raises:
        InputError: making it failed.
    """
    if isinstance(found, nn.Module) or not (isinstance(found, type) or (callable(found) and _takes_nothing(found))):
        return found
    try:
        return found()
    except _STOPS:
        raise
    except BaseException as error:  # the user's code may raise anything: say so in one line, keep the cause
        where = _user_line(error, path, _module(found))
        reason = f"{type(error).__name__}: {reason_of(error)}{where}"
        raise InputError(f"{flag} {path}: calling it failed ({reason})") from error


def _user_line(error: BaseException, *modules: str) -> str:
    """`, at FILE:LINE` of the innermost frame in the user's own code; nothing where the error has no such frame.

    Args:
        error: what was caught, with its traceback.
        modules: where that code is; what shares a package with it is the user's too.
    """
    own = {re.split("[.:]", module)[0] for module in modules} - {"hnkit"}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in own:
            file = Path(frame.f_code.co_filename)
            shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            place = f", at {printable(str(shown))}:{line}"
    return place


def _module(found: Any) -> str:
    return str(getattr(found, "__module__", ""))


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a callable is a factory: no argument is required and none is taken by position alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return not any(
        parameter.kind is parameter.VAR_POSITIONAL or parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind is not parameter.VAR_KEYWORD
    )


@dataclass
class CallableReward:
    """A plain function `(images, prompts) -> (n,)` as a `Reward`."""

    name: str
    weight: float
    function: Callable[[Tensor, Sequence[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of the images, `(n,)`."""
        return self.function(images, prompts)


def load_reward(name: str, spec: RewardSpec, device: torch.device, *, local_files_only: bool = True) -> Reward:
    """One reward of the configuration.

    Args:
        name: the name of an installed reward, or an import path.
        spec: its weight and options.
        device: given to a loader that takes one.
        local_files_only: given to a loader that takes it: one switch for the whole run, that of the backend.

    Raises:
        InputError: unknown name or option, or something that it needs is missing.
    """
    if ":" in name:
        function = made(import_object(name, "--reward"), name, "--reward")
        if not callable(function):
            raise InputError(f"--reward {name} is a {type(function).__name__}: give a function of (images, prompts)")
        _require_two_arguments(function, name)
        return CallableReward(name, spec.weight, function)
    factory = load_installed("hnkit.rewards", name)
    accepted = inspect.signature(factory).parameters
    options = dict(spec.options)
    if "device" in accepted:
        options.setdefault("device", str(device))
    if "local_files_only" in accepted:
        options.setdefault("local_files_only", local_files_only)
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


def _require_two_arguments(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a compiled function, which does not say what it takes
        return
    try:
        signature.bind((), ())
    except TypeError as error:
        raise InputError(
            f"--reward {name} takes {signature}: a reward is a function of (images, prompts), images "
            "(n, 3, height, width) in [0, 1] and n texts, that returns n numbers"
        ) from error


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
    """The scores `(n,)` of one reward, on the images' device; it is given images of its own.

    Raises:
        InputError: the reward returned something else, or raised or called `exit`; the message names it and the line. A
            `NonFiniteError`, or any other `InputError` that it raises, is passed on as it is; so is lack of memory.
    """
    try:
        values: Any = reward(images.clone(), tuple(prompts))
    except (InputError, torch.OutOfMemoryError, *_STOPS):
        raise
    except BaseException as error:  # the user's code may raise anything: say whose it is, keep the cause
        reason = " ".join(str(error).split())
        function = getattr(reward, "function", reward)
        where = _user_line(error, reward.name if ":" in reward.name else "", _module(function))
        raise InputError(f"reward {reward.name!r} raised {type(error).__name__}: {reason}{where}") from error
    given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if given != (len(images),):
        raise InputError(
            f"reward {reward.name!r} returned {given} for {len(images)} images: it must return one number "
            f"for each, a tensor of shape ({len(images)},)"
        )
    scores: Tensor = values.to(images.device)  # a reward may run elsewhere
    return scores


def load_rewards(
    specs: Mapping[str, RewardSpec], default: Reward | None, device: torch.device, *, local_files_only: bool = True
) -> RewardSum:
    """The rewards of a table, or the backend's default one where the table is empty; see `load_reward`."""
    loaded = [load_reward(name, spec, device, local_files_only=local_files_only) for name, spec in specs.items()]
    return RewardSum(loaded or ([default] if default is not None else []))
