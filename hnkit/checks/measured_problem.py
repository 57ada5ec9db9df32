"""A closed-form problem with its noise, and what several checks read from it, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hnkit.checks.check import Finding, confidence_radius, mean_finding, worst
from hnkit.checks.reference_maps import contraction
from hnkit.errors import NotApplicable
from hnkit.internal.seeds import generator_for
from hnkit.maps import NoiseMap
from hnkit.tilt import GapEstimate, TiltedProblem, optimality_gap


@dataclass
class MeasuredProblem:
    """A problem with the noise it is tested on; what several checks need is computed once.

    Args:
        problem: the generator, reward and temperature.
        samples: how many noise samples there are.
        seed: every draw is a function of it.
    """

    problem: TiltedProblem
    samples: int
    seed: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for one purpose, a function of the seed alone."""
        return generator_for(self.seed, f"verify/{self.problem.name}/{purpose}")

    def noise(self, purpose: str, count: int | None = None) -> Tensor:
        """`count` draws of the base noise, of their own for each purpose."""
        shape = (count or self.samples, *self.problem.noise_shape)
        return torch.randn(shape, dtype=torch.float64, generator=self.generator(purpose))

    @cached_property
    def x(self) -> Tensor:
        """The noise of the maps' checks."""
        return self.noise("x")

    @property
    def dim(self) -> int:
        """Noise dimensions d."""
        return math.prod(self.problem.noise_shape)

    def need(self, *members: str) -> None:
        """A check does not apply to a problem that lacks one of these members."""
        for member in members:
            if member in self.problem.unavailable:
                raise NotApplicable(f"the problem has no {member}")

    def ask(self, member: str) -> float:
        """A number that the problem gives for one of its members, if it has that."""
        self.need(member)
        return float(getattr(self.problem, member)())

    def log_tilt(self, y: Tensor) -> Tensor:
        """`r(y)/alpha - log Z*` per row of outputs."""
        return self.problem.reward(y) / self.problem.alpha - self.problem.log_z()

    @cached_property
    def _spread(self) -> float:
        """Standard deviation of `log p0*/p0` under `p0*` by weights of base noise: `E[w (log w - KL)^2]`."""
        logs = self.log_tilt(self.problem.generate(self.noise("spread")))
        terms = logs.exp() * (logs - self.problem.kl_optimal()).square()
        terms = torch.where(logs == -math.inf, 0.0, terms)  # no weight there
        return math.sqrt(float(terms.mean()))

    def divergence(self, logs: Tensor, floor: float) -> Finding:
        """The mean of `log p0*/p0` over draws of `p0*` against KL(p0* || p0).

        Where the tilt is strong, all draws may miss a part of `p0*` of small probability and be too much alike. Base
        noise sees that part, so the radius of the test is the larger of the two that draws and base noise give.

        Args:
            logs: `(n,)`, its values at the draws.
            floor: numerical error of one value.
        """
        finding = mean_finding(logs, self.problem.kl_optimal(), floor=floor)
        radius = confidence_radius(self._spread / math.sqrt(len(logs)), len(logs)) + floor
        return replace(finding, tolerance=worst(finding.tolerance, radius if math.isfinite(radius) else math.nan))

    @cached_property
    def tilted_noise(self) -> Tensor:
        """Draws of `p0*`."""
        self.need("sample_p0_star")
        return self.problem.sample_p0_star(self.samples, self.generator("p0*"))

    @cached_property
    def optimum(self) -> NoiseMap:
        """The map that reaches `p0*`."""
        self.need("optimal_map")
        return self.problem.optimal_map()

    @cached_property
    def proximal(self) -> NoiseMap:
        """The map that the L2 loss learns."""
        self.need("l2_map")
        return self.problem.l2_map()

    @cached_property
    def reference(self) -> NoiseMap:
        """A contraction with a certified constant, the same for every problem of this dimension."""
        if len(self.problem.noise_shape) != 1:
            raise NotApplicable("tried on problems whose noise is a vector")
        return contraction(self.dim)

    @cached_property
    def gap_of_optimum(self) -> GapEstimate:
        """Optimality gap of the optimal map."""
        return optimality_gap(self.problem, self.optimum, self.x)

    @cached_property
    def gap_of_proximal(self) -> GapEstimate:
        """Optimality gap of the L2 map."""
        return optimality_gap(self.problem, self.proximal, self.x)

    @cached_property
    def gap_of_reference(self) -> GapEstimate:
        """Optimality gap of the reference map."""
        return optimality_gap(self.problem, self.reference, self.x)

    def require_smooth(self, member: str) -> None:
        """A check that differentiates a map does not apply where the map jumps."""
        if member in self.problem.discontinuous:
            raise NotApplicable(f"{member} is not differentiable almost everywhere on this problem")
