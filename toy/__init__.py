"""Generators whose reward-tilted law is known in closed form, to judge every other number of hnkit by.

`PROBLEMS` lists them by name; a new toy is added by listing it, and gets every test of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hnkit.tilt import TiltedProblem
from hnkit.toy.folding import Folding, folding
from hnkit.toy.half_space import HalfSpace, half_space
from hnkit.toy.linear_gaussian import LinearGaussian, linear_gaussian, linear_gaussian_low_rank, linear_reward
from hnkit.toy.mixture import Mixture, mixture
from hnkit.toy.one_dimensional import OneDimensional, one_dimensional

PROBLEMS: Mapping[str, Callable[[], TiltedProblem]] = MappingProxyType(
    {
        "linear-gaussian": linear_gaussian,
        "linear-gaussian-low-rank": linear_gaussian_low_rank,
        "linear-reward": linear_reward,
        "mixture": mixture,
        "one-dimensional": one_dimensional,
        "half-space": half_space,
        "folding": folding,
    }
)
"""Problem by name, each made by a call without arguments (entry point of the group `hnkit.problems`)."""

__all__ = ["PROBLEMS", "Folding", "HalfSpace", "LinearGaussian", "Mixture", "OneDimensional"]
