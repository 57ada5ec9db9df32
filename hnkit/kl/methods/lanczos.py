"""Golub and Kahan's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, lanczos
from hnkit.kl.method import Adaptive, Run
from hnkit.linalg.krylov import Operator


@dataclass(frozen=True)
class Lanczos(Adaptive):
    """Gauss quadrature of `log det (I + J)^T (I + J)`: two products a step, at any norm."""

    name: ClassVar[str] = "lanczos"

    def products_of(self, steps: int) -> int:
        """See `Probed`."""
        return 2 * steps + 1

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        return lanczos(operator, vectors, lipschitz=run.lipschitz, **self.lengths)
