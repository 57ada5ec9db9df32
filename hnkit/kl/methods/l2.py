"""The L2 approximation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hnkit.bounds import theorem7_bound
from hnkit.kl.method import Estimator, Run
from hnkit.kl.moments import Moments, plain_moments
from hnkit.maps import NoiseMap


@dataclass(frozen=True)
class L2(Estimator):
    """0 in place of E(J): the L2 term, off by at most `d h(L)` (Theorem 7) where `L < 1` is proved."""

    name: ClassVar[str] = "l2"
    sees_jacobian: ClassVar[bool] = False

    def moments(self, f: NoiseMap, x: Tensor, run: Run) -> Moments:
        """See `Estimator`."""
        found = plain_moments(f, x, run.chunk)
        if run.lipschitz is None or run.lipschitz >= 1:
            return found
        return replace(found, bound=torch.full_like(found.l2, theorem7_bound(x[0].numel(), run.lipschitz)))
