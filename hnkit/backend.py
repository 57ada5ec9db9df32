"""What a generator, a condition and a reward are to hnkit, and how installed ones are found.

hnkit knows no model library. Generators reach it through the entry-point group `hnkit.backends`, rewards through
`hnkit.rewards`, closed-form problems through `hnkit.problems`; another distribution adds its own by declaring them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import Condition


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

    def save_adapter(self, folder: Path) -> None:
        """Write the trained part of `hypernetwork` to a new or empty folder, as safetensors."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Read what `save_adapter` wrote; any missing or unmatched key raises `InputError`."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A score of images given their prompts; higher is better."""

    name: str
    weight: float

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of shape `(n,)`, float32 at least, differentiable in `images` of shape `(n, 3, H, W)` in [0, 1]."""
        ...


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


def _installed(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def installed_names(group: str) -> list[str]:
    """Names of the installed entry points of one of hnkit's groups, sorted."""
    return sorted(_installed(group))


def load_installed(group: str, name: str) -> Any:
    """The object that the entry point `name` of `group` refers to.

    Raises:
        InputError: nothing of that name is installed, or importing it needs a package that is not.
    """
    found = _installed(group)
    kind = group.removeprefix("hnkit.").removesuffix("s")
    if name not in found:
        raise InputError(f"unknown {kind} {name!r}: installed are {', '.join(sorted(found)) or 'none'}")
    try:
        return found[name].load()
    except ImportError as error:
        raise InputError(
            f"{kind} {name!r} needs the package {error.name or error}: pip install 'hnkit[scaled]' adds it"
        ) from error


def backend_factory(name: str) -> BackendFactory:
    """The factory of an installed backend, by name; `InputError` lists what is installed."""
    factory: BackendFactory = load_installed("hnkit.backends", name)
    return factory
