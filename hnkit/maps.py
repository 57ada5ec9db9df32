"""Maps on noise: batch-first functions, with one condition per row where prompts steer them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

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

    Estimators that repeat or split rows ask it for the map of those rows through `select`, which any callable with
    the same method may offer.
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


def select_rows(f: NoiseMap, index: Tensor) -> NoiseMap:
    """The map of the rows `index` of the batch that `f` was made for; `f` itself if it treats all rows alike."""
    select = getattr(f, "select", None)
    return f if select is None else select(index)
