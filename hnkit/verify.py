"""Measure one map and check what the theory says about it: the facade of `hnkit.checks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hnkit.checks.check import (
    FALSE_ALARM,
    FAMILY,
    Check,
    Finding,
    Registry,
    Statement,
    confidence_radius,
    mean_finding,
)
from hnkit.checks.quantities import Quantity
from hnkit.checks.registries import checks_by_proof
from hnkit.checks.report import Report
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_map import verify_map
from hnkit.errors import NotApplicable

if TYPE_CHECKING:
    from hnkit.injection import NoiseInjection
    from hnkit.maps import NoiseMap


def verify_bound(
    f: NoiseMap,
    shape: tuple[int, ...],
    *,
    samples: int | None = None,
    seed: int = 0,
    method: str | None = None,
    name: str = "map",
    certify: bool = False,
    injection: NoiseInjection | None = None,
    **options: Any,
) -> Report:
    """Measure a map on base noise and check everything the theory says about it.

    Args:
        f: batch-first map `x -> delta`, rows independent, differentiable; `x` of shape `(n, *shape)`.
        shape: noise shape of one row.
        samples: how many noise samples; standard errors come from them. `None`: 256, fewer in many dimensions.
        seed: the seed of the noise and of every probe.
        method: the method of `noise_kl`; `None` takes "exact" up to 1024 dimensions, "arnoldi" above.
        name: how the report calls the map.
        certify: enclose E(A) and its bounds in ball arithmetic at some points (needs python-flint).
        injection: how the map is deployed, `a (x + f(x)) + sqrt(1 - a^2) eps`: the report then bounds that law's KL.
        options: further options, which are passed to `noise_kl` (`probes`, `steps`, `rel_error`, `budget`, `probe`).

    Returns:
        The report; `report.ok` is false if a check fails, `report.write(folder)` writes the run folder.

    Raises:
        InputError: bad options, or a map that returns another shape, couples rows, is not deterministic, not
            differentiable or not finite.

    Source:
        arXiv 2508.09968, Theorem 7, Lemmas 5 and 6, eqs. 53 and 55.
    """
    settings = VerifySettings(samples, seed, method, certify, options, injection)
    return verify_map(f, tuple(shape), settings, name=name)


__all__ = [
    "FALSE_ALARM",
    "FAMILY",
    "Check",
    "Finding",
    "NotApplicable",
    "Quantity",
    "Registry",
    "Report",
    "Statement",
    "checks_by_proof",
    "confidence_radius",
    "mean_finding",
    "verify_bound",
]
