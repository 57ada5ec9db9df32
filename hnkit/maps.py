"""Maps on noise: batch-first functions, with one condition per row where prompts steer them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hnkit.errors import InputError

NoiseMap = Callable[[Tensor], Tensor]
"""A batch-first map `f(x) -> delta`: `x` of shape `(n, *shape)`, rows independent, differentiable."""


@dataclass(frozen=True)
class Condition:
    """What a batch of prompts became: tensors whose first dimension is the row, and the prompts themselves."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompts)

    def select(self, index: Tensor) -> Condition:
        """The condition of the rows `index` (repeats allowed), in that order."""
        rows = index.tolist()
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            tensors={key: value[index.to(value.device)] for key, value in self.tensors.items()},
        )


@dataclass(frozen=True)
class ConditionedMap:
    """The map `x -> f(x | c)`: a hypernetwork with one condition per row closed over.

    Estimators that repeat or split rows ask it for the map of those rows through `select(index)`; see `selects_rows`
    for how another map offers the same.
    """

    hypernetwork: nn.Module
    condition: Condition

    def __call__(self, x: Tensor) -> Tensor:
        """The delta of every row of `x`, under the condition of that row."""
        delta: Tensor = self.hypernetwork(x, self.condition)
        return delta

    def select(self, index: Tensor) -> ConditionedMap:
        """The same map for the rows `index` (repeats allowed)."""
        return replace(self, condition=self.condition.select(index))


def selects_rows(f: object) -> bool:
    """Whether a map says what it is on other rows: its class has a method `select(self, index)`.

    The name of the parameter belongs to the protocol: a module's own `select`, whatever it selects, is not taken for
    it, nor is a submodule or an attribute of that name.
    """
    method = getattr(type(f), "select", None)
    if not inspect.isfunction(method):
        return False
    _, *parameters = inspect.signature(method).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    return needed == ["index"]


def select_rows(f: NoiseMap, index: Tensor) -> NoiseMap:
    """The map of the rows `index` of the batch that `f` was made for; `f` itself if it treats all rows alike.

    Raises:
        InputError: what `f.select(index)` returned cannot be called.
    """
    if not selects_rows(f):
        return f
    selected = f.select(index)  # type: ignore[attr-defined]
    if not callable(selected):
        raise InputError(
            f"the map's select(index) returned {type(selected).__name__}: it must return the map of those rows"
        )
    inner: NoiseMap = selected
    return inner


def at_rows(f: NoiseMap, x: Tensor, rows: Tensor | int) -> tuple[NoiseMap, Tensor]:
    """The map and the noise of some rows of a batch: of the indices `rows`, or of the first `rows` there are."""
    index = rows if isinstance(rows, Tensor) else torch.arange(min(rows, x.shape[0]), device=x.device)
    return select_rows(f, index), x[index]


def slices(count: int, width: int) -> Iterator[slice]:
    """Slices of at most `width` that cover `count` rows in order, for what is not a map: prompts, images, matrices."""
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


def chunked(
    f: NoiseMap, x: Tensor, width: int, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, NoiseMap, Tensor]]:
    """The loop over the rows of a batch that do not all go through a network together.

    Args:
        f: batch-first map of the batch `x`.
        x: `(n, *shape)`.
        width: rows of a chunk, 1 or more.
        rows: `(count,)` indices of the rows to visit, in order, repeats allowed; `None`: every row once.

    Yields:
        `(index, f of those rows, x[index])` of each chunk.
    """
    index = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    for part in torch.split(index, width):
        yield part, *at_rows(f, x, part)


def working_type(f: NoiseMap, x: Tensor) -> torch.dtype:
    """The coarsest floating-point type that a map computes in: of `x`, or of weights that the map shows it has.

    A network in bfloat16 may well return float32, and its values and products still carry bfloat16's rounding.
    """
    module = f.hypernetwork if isinstance(f, ConditionedMap) else f
    weights = module.parameters() if isinstance(module, nn.Module) else iter(())
    types = {x.dtype, *(parameter.dtype for parameter in weights if parameter.is_floating_point())}
    return max(types, key=lambda kind: torch.finfo(kind).eps)
