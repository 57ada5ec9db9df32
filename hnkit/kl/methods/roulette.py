"""The randomly truncated series of residual flows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, keep_probability, roulette
from hnkit.kl.method import Probed, Run
from hnkit.kl.methods.power import Power
from hnkit.kl.moments import Moments
from hnkit.linalg.krylov import Operator


@dataclass(frozen=True)
class Roulette(Probed):
    """The power series, cut at a random length and reweighted: unbiased, for norms well below 1.

    Attributes:
        sure: terms that are always taken.
    """

    name: ClassVar[str] = "roulette"
    sure: int = 4

    @property
    def pilot(self) -> Power:
        """See `Probed`: the sure terms, which show the growth of the vectors."""
        return Power(steps=max(2, self.sure), probe=self.probe)

    def products(self, pilot: Moments, budget: int) -> int:
        """See `Probed`. Rows run together until the longest ends: N of a geometric law last `log N / -log q`."""
        sure = max(2, self.sure)
        keep = float(keep_probability(pilot.norm, None).max())
        return sure + math.ceil(math.log(max(budget // sure, 2)) / -math.log(keep))

    def finite_variance(self, lipschitz: float | None) -> bool:
        """See `Estimator`."""
        return lipschitz is not None and lipschitz < 1

    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """See `Probed`."""
        return roulette(operator, vectors, generator=run.generator, lipschitz=run.lipschitz, sure=self.sure)
