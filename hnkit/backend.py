"""What a generator, a condition and a reward are to hnkit, and how installed ones are found.

hnkit knows no model library. Generators reach it through the entry-point group `hnkit.backends`, rewards through
`hnkit.rewards`, closed-form problems through `hnkit.problems`; another distribution adds its own by declaring them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.injection import NoiseInjection, deployed_noise
from hnkit.internal.values import reason_of
from hnkit.maps import Condition, ConditionedMap, NoiseMap


@runtime_checkable
class Backend(Protocol):
    """A frozen generator with a trainable hypernetwork on its noise.

    `hypernetwork(noise, condition)` returns the delta, in float32 at least, and is exactly zero before training.
    """

    name: str
    noise_shape: tuple[int, ...]
    hypernetwork: nn.Module

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of a batch of prompts; no gradient flows into it."""
        ...

    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:
        """Images in [0, 1] (or a toy's outputs) of `noise`, differentiable in it; the weights are frozen."""
        ...

    def save_adapter(self, folder: str | Path) -> None:
        """Write the trained part of `hypernetwork` to a new or empty folder, as safetensors."""
        ...

    def load_adapter(self, folder: str | Path) -> None:
        """Read what `save_adapter` wrote; any missing or unmatched key raises `InputError`."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A score of images given their prompts; higher is better."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def weight(self) -> float:
        """Its share in a sum of rewards."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of shape `(n,)`, float32 at least, differentiable in `images` of shape `(n, 3, H, W)` in [0, 1]."""
        ...


def image_noise(backend: Backend, condition: Condition) -> Tensor:
    """The base noise x of each row's image, `(n, *noise_shape)` in the generator's type, where the hypernetwork is.

    Row i is drawn from row i's own generator, so it is the same in every batch.
    """
    full = completed(backend)
    parameter = next(iter(full.hypernetwork.parameters()), torch.zeros(()))
    draws = [
        torch.randn(full.noise_shape, dtype=full.noise_dtype, generator=generator)
        for generator in condition.generators("noise")
    ]
    return torch.stack(draws).to(parameter.device)


@dataclass(frozen=True)
class Steered:
    """What one pass of a hypernetwork does to a batch: its delta, the moved noise `(n, *shape)`, and their images."""

    delta: Tensor
    noise: Tensor
    images: Tensor


def steer(backend: Backend, noise: Tensor, condition: Condition, steps: int = 1) -> Steered:
    """Images of `x + f(x)` under one condition a row: `g(x + f(x))`, eq. 6 of arXiv 2508.09968.

    Where the hypernetwork was trained with injected noise, they are those of `a (x + f(x)) + sqrt(1 - a^2) eps`, `eps`
    drawn from the generator of each row's image.

    Args:
        backend: its hypernetwork is f, its generator g.
        noise: x, `(n, *noise_shape)`.
        condition: the condition of every row, from whose image injected noise is drawn.
        steps: sampler steps of the generator.
    """
    delta = ConditionedMap(backend.hypernetwork, condition)(noise)
    moved, delta = deployed_noise(completed(backend).injection, noise, delta, condition.generators("injected noise"))
    return Steered(delta, moved, backend.generate(moved, condition, steps))


class BackendBase(ABC):
    """A base for backends: what `Backend` asks for is abstract, and everything else that hnkit can use has a default.

    An offer that is `None` here is one that a backend need not make; a subclass makes it with a method of that name.

    Attributes:
        name: the name of the backend, for reports.
        noise_shape: the shape of one sample.
        hypernetwork: the trainable map; zero before training.
        noise_dtype: the type of the noise that the generator takes.
        max_steps: the most sampler steps of `generate`; `None`: any number.
        default_reward: what is trained on when no reward is named.
        problem: the `TiltedProblem` whose generator and reward these are, where the tilted law is known.
        injection: how the hypernetwork is deployed, set by training and by `load_adapter`; `None`: as `x + f(x)`.
        records_injection: whether adapters keep `injection`, without which none is trained with it.
    """

    name: str
    noise_shape: tuple[int, ...]
    hypernetwork: nn.Module
    noise_dtype: torch.dtype = torch.float32
    max_steps: int | None = None
    default_reward: Reward | None = None
    problem: Any = None
    injection: NoiseInjection | None = None
    records_injection: bool = False

    prompts: Callable[[], tuple[list[str], list[str]]] | None = None
    """`prompts()`: training prompts and held-out ones of the backend's own, disjoint."""
    direct: Callable[[], Backend] | None = None
    """`direct()`: the direct fine-tuning twin, whose trained parameters are the generator's own."""
    judge: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    """`judge(images, prompts)`: scores `(n,)` of a judge that nothing is trained on."""
    usage: Callable[[], str] | None = None
    """`usage()`: Python code that uses a saved adapter, for its model card."""
    category: Callable[[str], str] | None = None
    """`category(prompt)`: the kind of a prompt, by which a comparison groups its scores."""
    scenes: Callable[[Tensor], Sequence[Hashable]] | None = None
    """`scenes(images)`: what is seen in each image, so that distinct scenes can be counted."""
    propose: Callable[[str, Sequence[tuple[str, float]], int, torch.Generator], list[str]] | None = None
    """`propose(prompt, history, count, generator)`: rewordings, for the prompt-optimisation baseline."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Backend.encode`."""

    @abstractmethod
    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:
        """See `Backend.generate`."""

    @abstractmethod
    def save_adapter(self, folder: str | Path) -> None:
        """See `Backend.save_adapter`."""

    @abstractmethod
    def load_adapter(self, folder: str | Path) -> None:
        """See `Backend.load_adapter`."""

    def prepare(self, prompts: Sequence[str]) -> None:  # noqa: B027 - nothing to prepare is the ordinary case
        """Be told, once, of all prompts that are about to be used."""

    def share_out(self) -> bool:
        """Be told, once and before training, that the processes of `torch.distributed` are several.

        A backend that shares its frozen network out over them does so now and returns true: every process then has to
        run hypernetwork and generator as often as every other.
        """
        return False

    def map_for(self, prompts: Sequence[str]) -> NoiseMap:
        """The hypernetwork as a map of the noise alone, row i under prompt i."""
        return ConditionedMap(self.hypernetwork, self.encode(prompts))

    def memory_advice(self) -> str:
        """Which options would reduce memory, for an out-of-memory message; empty if none."""
        return ""

    def model_digest(self) -> str | None:
        """SHA-256 of the frozen weights, so that a base model exchanged behind a run is noticed; `None`: not known."""
        return None


class _Completed(BackendBase):
    """A backend that offers what the protocol asks for and perhaps more, with the defaults of `BackendBase`."""

    def __init__(self, backend: Backend) -> None:
        object.__setattr__(self, "_backend", backend)

    def __getattribute__(self, name: str) -> Any:
        backend = object.__getattribute__(self, "_backend")
        return getattr(backend, name) if hasattr(backend, name) else object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_backend"), name, value)


_Completed.__abstractmethods__ = frozenset()  # the backend behind it has them


def completed(backend: Backend) -> BackendBase:
    """The backend itself if it derives from `BackendBase`, else a view of it with the defaults for what it lacks."""
    return backend if isinstance(backend, BackendBase) else _Completed(backend)  # type: ignore[abstract]


class BackendFactory(Protocol):
    """What an entry point of the group `hnkit.backends` names: it knows a backend without loading it.

    `options` is a frozen dataclass type whose fields, all with defaults, are what the table `[backend]` of a
    configuration may hold. `presets` are named overrides of the configuration (keys `train.*`, `backend.*`).
    """

    name: str
    summary: str
    options: type[Any]
    presets: Mapping[str, Mapping[str, Any]]

    def load(self, options: Any) -> Backend:
        """Build the backend; `InputError` in one line when something it needs is missing."""
        ...

    def status(self) -> str:
        """One line for `hnkit backends`: ready, or what is missing and how to get it. Loads no weights."""
        ...


@runtime_checkable
class RecordsOptions(Protocol):
    """A factory whose adapters record options that they were trained with."""

    def recorded(self, folder: str | Path) -> Mapping[str, Any]:
        """The options that a saved adapter fixes, by name, so that it loads without repeating them."""
        ...


@runtime_checkable
class BundlesAdapter(Protocol):
    """A factory whose model comes with a trained adapter, which commands find by the name `bundled`."""

    def bundled_adapter(self) -> Path:
        """The folder of that adapter."""
        ...


def _installed(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name: several where distributions disagree on what a name means."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = found.setdefault(point.name, [])
        # a distribution that is seen twice, as in a checkout of it, is one; a name is read from a file of metadata
        if not same or (point.value, _distribution(point)) not in {(p.value, _distribution(p)) for p in same}:
            same.append(point)
    return found


def _distribution(point: EntryPoint) -> str:
    """The name of the distribution that declares an entry point; empty if that is not known."""
    return point.dist.name if point.dist is not None else ""


def installed_names(group: str) -> list[str]:
    """Names of the installed entry points of one of hnkit's groups, sorted."""
    return sorted(_installed(group))


def load_installed(group: str, name: str) -> Any:
    """The object that the entry point `name` of `group` refers to.

    Raises:
        InputError: nothing of that name is installed, two distributions claim it, importing it needs a package that
            is not installed, or fails in another way: the message names the distribution.
    """
    found = _installed(group)
    kind = group.removeprefix("hnkit.").removesuffix("s")
    if name not in found:
        raise InputError(f"unknown {kind} {name!r}: installed are {', '.join(sorted(found)) or 'none'}")
    if len(found[name]) > 1:
        owners = " and ".join(f"{_distribution(point) or 'unnamed'} ({point.value})" for point in found[name])
        raise InputError(f"{kind} {name!r} is claimed by {owners}: uninstall all but one")
    point, owner = found[name][0], _distribution(found[name][0])
    try:
        return point.load()
    except ModuleNotFoundError as error:
        cure = "pip install 'hnkit[scaled]' adds it" if owner == "hnkit" else f"{owner or point.value} should bring it"
        raise InputError(f"{kind} {name!r} needs the package {error.name or error}: {cure}") from error
    except (Exception, SystemExit) as error:  # another distribution's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(
            f"{kind} {name!r} of {owner or point.value} is broken ({reason}): mend or uninstall it"
        ) from error


def backend_factory(name: str) -> BackendFactory:
    """The factory of an installed backend, by name; `InputError` lists what is installed."""
    factory: BackendFactory = load_installed("hnkit.backends", name)
    return factory
