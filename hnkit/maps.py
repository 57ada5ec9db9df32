"""Maps on noise: batch-first functions, with one condition per row where prompts steer them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.internal.seeds import generator_for, image_seed

NoiseMap = Callable[[Tensor], Tensor]
"""A batch-first map `f(x) -> delta`: `x` of shape `(n, *shape)`, rows independent, differentiable."""


@dataclass(frozen=True)
class Condition:
    """What a batch of prompts became, and which image of its prompt each row is.

    Attributes:
        prompts: the prompt of each row.
        tensors: what an encoder made of them; the first dimension is the row.
        seeds: the seed of each row's image, from which all that is random in it is drawn; empty: the rows are counted
            within their prompt, as its images 0, 1, ... under seed 0.
    """

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds:
            numbers: Counter[str] = Counter()
            seeds = []
            for prompt in self.prompts:
                seeds.append(image_seed(0, prompt, numbers[prompt]))
                numbers[prompt] += 1
            object.__setattr__(self, "seeds", tuple(seeds))
        if len(self.seeds) != len(self.prompts):
            raise InputError(f"{len(self.seeds)} seeds and {len(self.prompts)} prompts given: one seed per prompt")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompts)

    def of_images(self, seed: int, numbers: Sequence[int]) -> Condition:
        """The same condition, row i for image `numbers[i]` of its prompt under `seed`."""
        rows = zip(self.prompts, numbers, strict=True)
        return replace(self, seeds=tuple(image_seed(seed, prompt, number) for prompt, number in rows))

    def generators(self, purpose: str, *position: int) -> list[torch.Generator]:
        """A CPU generator for each row, which depends on its image, the purpose and the position alone.

        Two calls give generators that draw the same.
        """
        return [generator_for(seed, purpose, *position) for seed in self.seeds]

    def select(self, index: Tensor) -> Condition:
        """The condition of the rows `index` (repeats allowed), in that order."""
        rows = index.tolist()
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            tensors={key: value[index.to(value.device)] for key, value in self.tensors.items()},
            seeds=tuple(self.seeds[i] for i in rows),
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


def map_numbers(f: NoiseMap, count: int) -> Tensor:
    """Which map each of `count` rows is of, `(count,)`: rows of one number are of one map.

    All are, of a map that treats its rows alike; of a hypernetwork those of one prompt whose conditions are equal; of
    another map that selects rows, none is known to be of another's.
    """
    if not selects_rows(f):
        return torch.zeros(count, dtype=torch.long)
    if not isinstance(f, ConditionedMap):
        return torch.arange(count)
    first: dict[str, list[int]] = {}
    numbers = []
    for row, prompt in enumerate(f.condition.prompts[:count]):
        known = first.setdefault(prompt, [])
        alike = (
            other
            for other in known
            if all(torch.equal(value[row], value[other]) for value in f.condition.tensors.values())
        )
        number = next(alike, row)
        if number == row:
            known.append(row)
        numbers.append(number)
    return torch.tensor(numbers)


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
