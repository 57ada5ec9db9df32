"""Arnoldi's process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, arnoldi
from hnkit.kl.method import Adaptive, Run
from hnkit.kl.xtrace import xtrace
from hnkit.linalg.krylov import Operator


@dataclass(frozen=True)
class Arnoldi(Adaptive):
    """Functions of the Hessenberg matrix of a Krylov space of `J^T`: vector-Jacobian products only, norms below 1.

    Attributes:
        variance_reduction: "none", or "xtrace" with 2 probes or more: leave-one-out estimates from all probes of a
            sample, at twice the products, for spectra that decay.
    """

    name: ClassVar[str] = "arnoldi"
    variance_reduction: Literal["none", "xtrace"] = "none"

    @property
    def _leave_one_out(self) -> bool:
        return self.variance_reduction == "xtrace"

    @property
    def group(self) -> int:
        """See `Probed`."""
        return self.probes if self._leave_one_out else 1

    @property
    def least_probes(self) -> int:
        """See `Probed`."""
        return 2 if self._leave_one_out else 1

    @property
    def pilot(self) -> Arnoldi:
        """See `Probed`."""
        return replace(self, probes=max(2, self.probes) if self._leave_one_out else 1)

    def products_of(self, steps: int) -> int:
        """See `Probed`."""
        return 2 * steps if self._leave_one_out else steps

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        if self._leave_one_out:
            return xtrace(operator, vectors, group=self.probes, **self.lengths)
        return arnoldi(operator, vectors, lipschitz=run.lipschitz, **self.lengths)
