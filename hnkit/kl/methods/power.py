"""The power series of the logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, power_series
from hnkit.kl.method import Adaptive, Run
from hnkit.linalg.krylov import Operator


@dataclass(frozen=True)
class Power(Adaptive):
    """The truncated series, one transposed product a term, for norms below 1."""

    name: ClassVar[str] = "power"

    def products_of(self, steps: int) -> int:
        """See `Probed`."""
        return max(2, steps)

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        return power_series(operator, vectors, lipschitz=run.lipschitz, **self.lengths)
