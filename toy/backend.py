"""The toys as a backend of the trainer: a small float64 network moves the noise of a problem with a known optimum."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hnkit.backend import BackendBase, Reward
from hnkit.errors import InputError
from hnkit.injection import read_injection
from hnkit.internal.files import atomic_write, machine_memory, read_plain
from hnkit.internal.values import shown
from hnkit.maps import Condition
from hnkit.tilt import TiltedProblem
from hnkit.toy import PROBLEMS

FORMAT, INJECTED = "hnkit-toy-adapter-1", "hnkit-toy-adapter-2"
"""The second is that of adapters with injected noise."""
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
_SMALL = 2**16
"""Bytes of a network that is made whatever its file holds."""


@dataclass(frozen=True)
class ToyOptions:
    """What the table `[backend]` of the toy backend may hold.

    Attributes:
        problem: name of a listed problem.
        hypernetwork: `"affine"`, `f(x) = A x + c`, or `"mlp"`, tanh layers of `width` with a linear last layer.
        width: the width of the hidden layers of the MLP.
        depth: number of hidden layers of the MLP.
        seed: the seed of the MLP's initial weights; its last layer starts at zero.
    """

    problem: str = "linear-gaussian"
    hypernetwork: Literal["affine", "mlp"] = "affine"
    width: int = 64
    depth: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise InputError(f"backend.problem = {shown(self.problem)}: accepted are {', '.join(PROBLEMS)}")
        if self.hypernetwork not in ("affine", "mlp"):
            raise InputError(f"backend.hypernetwork = {shown(self.hypernetwork)}: accepted are affine, mlp")
        for key, least in (("width", 1), ("depth", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"backend.{key} = {shown(getattr(self, key))}: accepted is an integer >= {least}")
        if self.seed >= 2**63:
            raise InputError(f"backend.seed = {shown(self.seed)}: accepted is an integer below 2^63")

    def weights(self, dim: int) -> int:
        """How many weights the network of a noise of `dim` dimensions has, before any of them is made."""
        if self.hypernetwork == "affine":
            return dim * (dim + 1)
        return self.width * (dim + 1) + (self.depth - 1) * self.width * (self.width + 1) + dim * (self.width + 1)


class ToyHypernetwork(nn.Module):
    """`f(x) = body(x)`; the condition is ignored. `body` is what a Lipschitz certificate walks through."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:  # noqa: ARG002
        """The delta of `noise`, `(n, d)`, float64."""
        delta: Tensor = self.body(noise.double())
        return delta


@dataclass(frozen=True)
class ToyReward:
    """The problem's own reward as a reward of a backend; prompts are ignored."""

    problem: TiltedProblem
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Name of the problem."""
        return self.problem.name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Rewards `(n,)` of the outputs `images`."""
        return self.problem.reward(images)


class ToyBackend(BackendBase):
    """A problem's generator with a trainable network on its noise.

    Attributes:
        problem: the problem, at its own temperature; `problem.with_alpha` gives it at the training run's.
        default_reward: its reward.
        noise_dtype: the toys work in float64.
        max_steps: their generators have one step.
        injection: how the hypernetwork is deployed, kept in its adapters.
    """

    records_injection = True
    noise_dtype = torch.float64
    max_steps = 1

    def __init__(self, options: ToyOptions) -> None:
        self.name = "toy"
        self.options = options
        if 8 * options.weights(dim=0) > machine_memory():  # an adapter's is held against its file before it comes here
            raise InputError(
                f"out of memory: backend.width = {shown(options.width)} and backend.depth = {shown(options.depth)}: "
                "this machine's memory does not hold so many weights: give smaller ones"
            )
        self.problem: TiltedProblem = PROBLEMS[options.problem]()
        self.noise_shape = self.problem.noise_shape
        self.default_reward: Reward | None = ToyReward(self.problem)
        self.hypernetwork: ToyHypernetwork = ToyHypernetwork(_body(options, self.noise_shape[0]))

    def prompts(self) -> tuple[list[str], list[str]]:
        """One training and one held-out prompt; the toys ignore both."""
        return ["toy"], ["toy, held out"]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The prompts themselves: the toys have no condition."""
        return Condition(tuple(prompts))

    def map_for(self, prompts: Sequence[str]) -> nn.Sequential:  # noqa: ARG002
        """The network as a module of the noise alone, which a Lipschitz certificate can walk through."""
        return self.hypernetwork.body

    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:  # noqa: ARG002
        """`g(noise)`, `(n, m)`; one-step generators only."""
        if steps != 1:
            raise InputError(f"{steps} sampler steps for the toy backend: its generators have one")
        return self.problem.generate(noise)

    def save_adapter(self, folder: str | Path) -> None:
        """Write `adapter.safetensors` and, last, `adapter.json` with its checksum to a new or empty folder.

        Raises:
            InputError: the folder is not empty.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"adapter folder {folder} is not empty and nothing in it is overwritten: name a new one")
        weights = save_tensors({key: value.contiguous() for key, value in self.hypernetwork.state_dict().items()})
        atomic_write(folder / WEIGHTS, weights)
        config = {"format": FORMAT, **dataclasses.asdict(self.options), "sha256": hashlib.sha256(weights).hexdigest()}
        if self.injection is not None:
            config |= {"format": INJECTED, "injection": dataclasses.asdict(self.injection)}
        atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")

    def load_adapter(self, folder: str | Path) -> None:
        """Read what `save_adapter` wrote; the network is unchanged if anything does not match.

        Raises:
            InputError: the adapter is missing, damaged, or made with other options; the message names the key.
        """
        folder = Path(folder)
        found = adapter_options(folder)
        relevant = ["problem", "hypernetwork"] + ["width", "depth"] * (self.options.hypernetwork == "mlp")
        for key in relevant:
            have, want = getattr(found, key), getattr(self.options, key)
            if have != want:
                raise InputError(
                    f"adapter {folder} has {key} = {have!r}, this backend {key} = {want!r}: "
                    f"load it with backend.{key} = {have}"
                )
        injection = read_injection(_read_config(folder).get("injection"), folder / CONFIG)
        state = _read_weights(folder)
        own = self.hypernetwork.state_dict()
        unmatched = sorted(set(own) ^ set(state))
        if unmatched:
            where = "lacks" if unmatched[0] in own else "has the foreign key"
            raise InputError(f"adapter {folder} {where} {unmatched[0]}: it is not an adapter of this network")
        for key, value in state.items():
            if value.shape != own[key].shape or value.dtype != own[key].dtype:
                raise InputError(
                    f"adapter {folder}: {key} is {value.dtype} {tuple(value.shape)}, this network needs "
                    f"{own[key].dtype} {tuple(own[key].shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"adapter {folder}: {key} is not finite, its training diverged: take an earlier one")
        self.hypernetwork.load_state_dict(state)
        self.injection = injection


def adapter_options(folder: str | Path) -> ToyOptions:
    """The options that the adapter in `folder` was trained with; a damaged or foreign one raises `InputError`."""
    folder = Path(folder)
    config = _read_config(folder)
    wanted = FORMAT if config.get("injection") is None else INJECTED
    if config.get("format") != wanted:
        raise InputError(f"{folder / CONFIG}: format = {shown(config.get('format'))}, accepted is {wanted!r}")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(ToyOptions):
        value = config.get(item.name)
        if type(value) is not type(item.default):
            raise InputError(
                f"{folder / CONFIG}: {item.name} = {shown(value)}, accepted is {type(item.default).__name__}"
            )
        values[item.name] = value
    try:
        options = ToyOptions(**values)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    needed = 8 * options.weights(PROBLEMS[options.problem]().noise_shape[0])
    if (size := _size(folder / WEIGHTS)) < needed and needed > _SMALL:  # else it is said which tensor is not there
        raise InputError(
            f"{folder / CONFIG} claims a network of {shown(needed)} bytes, and {WEIGHTS} has {size}: the adapter is "
            "damaged, take another copy"
        )
    return options


def _read(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"adapter file {path} cannot be read ({error.strerror}): name a folder that holds {CONFIG} and {WEIGHTS}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(folder / CONFIG))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} is damaged (not a JSON object): take another copy of the adapter")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    data = _read(folder / WEIGHTS)
    if hashlib.sha256(data).hexdigest() != _read_config(folder).get("sha256"):
        raise InputError(
            f"{folder / WEIGHTS} does not match the checksum in {CONFIG}: the adapter is damaged, take another copy"
        )
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is not a safetensors file ({error}): take another copy") from None


def _body(options: ToyOptions, dim: int) -> nn.Sequential:
    """The network, zero at the start because its last layer is; nothing is drawn from the global generator."""
    widths = [dim, *([options.width] * options.depth if options.hypernetwork == "mlp" else ()), dim]
    generator = torch.Generator().manual_seed(options.seed)
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(itertools.pairwise(widths)):
        layer = nn.utils.skip_init(nn.Linear, width, following, dtype=torch.float64)  # type: ignore[no-untyped-call]
        nn.init.zeros_(layer.bias)
        if index == len(widths) - 2:
            nn.init.zeros_(layer.weight)
            layers.append(layer)
        else:
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers)


_ITEM_E = {
    "backend.problem": "linear-gaussian",
    "backend.hypernetwork": "affine",
    "train.steps": 1000,
    "train.batch": 512,
    "train.measure_every": 50,
    "train.optimizer": "adamw",
    "train.lr": 0.02,
    "train.schedule": "cosine",
    "train.clip": 0.0,
}


class ToyFactory:
    """What the entry point `toy` of the group `hnkit.backends` names."""

    name = "toy"
    summary = "closed-form problems with a small network, to see what each loss learns"
    options: type[Any] = ToyOptions
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType(
        {"default": MappingProxyType(_ITEM_E), "item-e": MappingProxyType(_ITEM_E)}
    )

    def load(self, options: ToyOptions) -> ToyBackend:
        """Build the backend."""
        return ToyBackend(options)

    def status(self) -> str:
        """One line for `hnkit backends`."""
        return f"ready; problems: {', '.join(PROBLEMS)}"

    def adapter_options(self, folder: str | Path) -> ToyOptions:
        """The options that a saved adapter was trained with, so that it can be loaded without repeating them."""
        return adapter_options(folder)

    def recorded(self, folder: str | Path) -> dict[str, Any]:
        """The same, by name."""
        return dataclasses.asdict(adapter_options(folder))


FACTORY = ToyFactory()
