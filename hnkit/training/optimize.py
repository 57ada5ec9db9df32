"""Optimisers, the learning rate of each step, the averaged weights, and their state as plain tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.config import TrainConfig
from hnkit.errors import InputError


def build_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that the configuration names.

    Raises:
        InputError: `adamw8bit` is asked for and the package bitsandbytes is not installed.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "train.optimizer = 'adamw8bit' needs the package bitsandbytes: pip install bitsandbytes, or use 'adamw'"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimiser step `step`, counted from 0.

    Linear warm-up `lr (t + 1) / warmup`, then constant, or down to 0 at the last step: linearly, or as half a cosine.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    passed = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (1 - passed if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed)))


class _BoundedRows(torch.autograd.Function):
    """The identity, whose gradient is scaled down row by row to a norm of at most `bound`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        norm = grads[0].flatten(1).norm(dim=1).clamp(min=torch.finfo(grads[0].dtype).tiny)
        # a row that is not finite stays so, and its batch is skipped as ever
        scale = torch.where(norm > ctx.bound, ctx.bound / norm, torch.ones_like(norm))
        return grads[0] * scale.view(-1, *[1] * (grads[0].dim() - 1)), None


def bounded_rows(x: Tensor, bound: float) -> Tensor:
    """`x`, through which a gradient passes with a norm of at most `bound` in each row of `(n, *shape)`.

    A one-step generator jumps between scenes, and where it does the gradient of a reward in its noise is large and
    points along the jump: a hundredth of the samples then outweighs all the others in the mean of a batch, which
    bounding that mean's norm does not mend. Bounding each sample's is the robust mean of heavy-tailed variables.

    Source: Huber 1964, doi 10.1214/aoms/1177703732; of stochastic gradients: arXiv 1912.03194.
    """
    bounded: Tensor = _BoundedRows.apply(x, bound)  # type: ignore[no-untyped-call]
    return bounded


class WeightAverage:
    """The exponential average `a <- decay a + (1 - decay) w` of trained parameters; it starts at their first values."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = parameters
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the present parameters."""
        for name, parameter in self._parameters.items():
            self.average[name].lerp_(parameter, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        load_parameters(self._parameters, self.average)
        try:
            yield
        finally:
            load_parameters(self._parameters, kept)


@torch.no_grad()
def load_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values of the same names and shapes into parameters.

    Raises:
        InputError: a name is missing or foreign, or a shape differs.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(value.shape) for name, value in values.items()}
    if shapes != given:
        wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise InputError(f"saved parameters do not fit the network: {wrong[0]!r} and {len(wrong) - 1} more differ")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as named tensors (`"<parameter>/<entry>"`) and a JSON document of everything else."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for entry, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}/{entry}"] = value
    return tensors, numbers


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Undo `optimizer_tensors` on an optimiser of the same kind and parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, _, entry = key.partition("/")
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
