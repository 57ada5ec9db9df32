"""Hypothesis strategies and assertions for testing noise maps, losses and estimators; see docs/testing.md.

Needs the extra `testing`.
"""

from hnkit.testing.assertions import (
    assert_bounds,
    assert_kl,
    assert_kl_identity,
    assert_lipschitz,
    assert_map,
    assert_mean,
    assert_moments,
    assert_rows_independent,
    assert_theorem7,
)
from hnkit.testing.strategies import (
    MATRIX_KINDS,
    TiltedGaussian,
    lipschitz_maps,
    matrices,
    noise,
    tilted_gaussians,
)
from hnkit.testing.trained import assert_noise_loss, assert_zero_at_init

__all__ = [
    "MATRIX_KINDS",
    "TiltedGaussian",
    "assert_bounds",
    "assert_kl",
    "assert_kl_identity",
    "assert_lipschitz",
    "assert_map",
    "assert_mean",
    "assert_moments",
    "assert_noise_loss",
    "assert_rows_independent",
    "assert_theorem7",
    "assert_zero_at_init",
    "lipschitz_maps",
    "matrices",
    "noise",
    "tilted_gaussians",
]
