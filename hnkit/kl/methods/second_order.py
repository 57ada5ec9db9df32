"""The second-order approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, second_order
from hnkit.kl.method import Probed, Run
from hnkit.linalg.krylov import Operator


@dataclass(frozen=True)
class SecondOrder(Probed):
    """`tr(J^2)/2` for E(J), by two transposed products a probe."""

    name: ClassVar[str] = "second-order"

    @property
    def fixed_products(self) -> int:
        """See `Probed`."""
        return 2

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        return second_order(operator, vectors, lipschitz=run.lipschitz)
