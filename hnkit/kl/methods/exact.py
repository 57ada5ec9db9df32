"""The exact method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hnkit.kl.method import Estimator, Run
from hnkit.kl.moments import Moments, dense_moments
from hnkit.maps import NoiseMap


@dataclass(frozen=True)
class Exact(Estimator):
    """Dense Jacobians, d products per sample, and their log-determinants in float64."""

    name: ClassVar[str] = "exact"

    def moments(self, f: NoiseMap, x: Tensor, run: Run) -> Moments:
        """See `Estimator`."""
        return dense_moments(f, x, run.chunk, run.progress)
