"""What the toys share: defaults of the optional members, checks of their arguments, one-dimensional helpers."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.maps import NoiseMap
from hnkit.tilt import NoiseLaw


class Toy(ABC):
    """Base of the toys, which are frozen dataclasses with a field `alpha`; see `hnkit.tilt.TiltedProblem`."""

    unavailable: ClassVar[frozenset[str]] = frozenset(
        {"alternatives", "second_order_map", "second_order_gap", "gap_of_affine"}
    )
    discontinuous: ClassVar[frozenset[str]] = frozenset()
    alpha: float
    name: str

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension `d` of the noise."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """`(d,)`."""
        return (self.dim,)

    @abstractmethod
    def generate(self, x: Tensor) -> Tensor:
        """Outputs `g(x)`, one row for each row of `x`."""

    @abstractmethod
    def reward(self, y: Tensor) -> Tensor:
        """Rewards `(n,)`."""

    @abstractmethod
    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` samples of the tilted noise law."""

    def log_tilt(self, x: Tensor) -> Tensor:
        """`r(g(x))/alpha`, the exponent of the tilt, `(n,)`."""
        return self.reward(self.generate(x)) / self.alpha

    def sample_p_star(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` samples of the tilted output law, `g` of samples of the tilted noise law (Theorem 3, part 1)."""
        return self.generate(self.sample_p0_star(n, generator))

    def with_alpha(self, alpha: float) -> Self:
        """The same generator and reward at another temperature."""
        return dataclasses.replace(self, alpha=alpha)  # type: ignore[type-var]

    def alternatives(self) -> list[NoiseLaw]:
        """Other noise laws with the same output law: none exist unless `g` is not injective."""
        raise self._missing("alternatives", "its generator is injective")

    def second_order_map(self) -> NoiseMap:
        """The minimiser of the second-order loss, known for the linear-Gaussian toys alone."""
        raise self._missing("second_order_map", "it is known for the linear-Gaussian problems")

    def second_order_gap(self) -> float:
        """The gap of `second_order_map`, known for the linear-Gaussian toys alone."""
        raise self._missing("second_order_gap", "it is known for the linear-Gaussian problems")

    def gap_of_affine(self, slope: Tensor, offset: Tensor) -> float:  # noqa: ARG002
        """The gap of `x -> slope x + offset`, known for the linear-Gaussian toys alone."""
        raise self._missing("gap_of_affine", "it is known for the linear-Gaussian problems")

    def _missing(self, member: str, why: str) -> InputError:
        return InputError(f"the problem {self.name!r} has no {member}: {why}; see its `unavailable`")


def require_alpha(alpha: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha is {alpha!r}: give a positive, finite temperature")


def float64(value: Any) -> Tensor:
    """A float64 copy of a tensor, array or nested sequence, without gradient."""
    return torch.as_tensor(value).detach().to(torch.float64).clone()


def standard_normal(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """`(n, dim)` samples of `N(0, I)`, float64."""
    if n < 1:
        raise InputError(f"{n} samples: give at least 1")
    return torch.randn(n, dim, dtype=torch.float64, generator=generator)
