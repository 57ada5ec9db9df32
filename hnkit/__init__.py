"""hnkit: exact KL, bounds and training for noise hypernetworks (arXiv 2508.09968).

A noise hypernetwork `f` moves the initial noise of a frozen one-step generator, `x -> x + f(x)`, so that its outputs
follow a reward-tilted law. Names are imported from their modules on first use, so that `import hnkit` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hnkit.backend import Backend as Backend
    from hnkit.backend import Reward as Reward
    from hnkit.bounds import field_of_values_bounds as field_of_values_bounds
    from hnkit.bounds import frobenius_bound as frobenius_bound
    from hnkit.bounds import second_order_remainder_bound as second_order_remainder_bound
    from hnkit.bounds import singular_value_bound as singular_value_bound
    from hnkit.bounds import theorem7_bound as theorem7_bound
    from hnkit.checks.check import Check as Check
    from hnkit.checks.report import Report as Report
    from hnkit.errors import InputError as InputError
    from hnkit.errors import NonFiniteError as NonFiniteError
    from hnkit.internal.stats import Estimate as Estimate
    from hnkit.jacobian import RowJacobian as RowJacobian
    from hnkit.jacobian import dense_jacobian as dense_jacobian
    from hnkit.kl.divergence import noise_kl as noise_kl
    from hnkit.kl.estimate import KLEstimate as KLEstimate
    from hnkit.lipschitz.certify import certify_injective as certify_injective
    from hnkit.lipschitz.local import LipschitzEstimate as LipschitzEstimate
    from hnkit.lipschitz.local import lipschitz_lower as lipschitz_lower
    from hnkit.lipschitz.local import lipschitz_upper as lipschitz_upper
    from hnkit.lipschitz.local import local_lipschitz as local_lipschitz
    from hnkit.logdet import log_det_error as log_det_error
    from hnkit.loss import LossTerms as LossTerms
    from hnkit.loss import NoiseLoss as NoiseLoss
    from hnkit.maps import Condition as Condition
    from hnkit.maps import ConditionedMap as ConditionedMap
    from hnkit.maps import NoiseMap as NoiseMap
    from hnkit.tilt import TiltedProblem as TiltedProblem
    from hnkit.tilt import optimality_gap as optimality_gap
    from hnkit.verify import verify_bound as verify_bound

_HOME = {
    "InputError": "errors",
    "NonFiniteError": "errors",
    "Backend": "backend",
    "Condition": "backend",
    "ConditionedMap": "backend",
    "NoiseMap": "backend",
    "Reward": "backend",
    "field_of_values_bounds": "bounds",
    "frobenius_bound": "bounds",
    "second_order_remainder_bound": "bounds",
    "singular_value_bound": "bounds",
    "theorem7_bound": "bounds",
    "RowJacobian": "jacobian",
    "dense_jacobian": "jacobian",
    "Estimate": "internal.stats",
    "KLEstimate": "kl.estimate",
    "noise_kl": "kl.divergence",
    "LipschitzEstimate": "lipschitz.local",
    "certify_injective": "lipschitz.certify",
    "lipschitz_lower": "lipschitz.local",
    "lipschitz_upper": "lipschitz.local",
    "local_lipschitz": "lipschitz.local",
    "log_det_error": "logdet",
    "LossTerms": "loss",
    "NoiseLoss": "loss",
    "TiltedProblem": "tilt",
    "optimality_gap": "tilt",
    "Check": "verify",
    "Report": "verify",
    "verify_bound": "verify",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hnkit' has no attribute {name!r}")
    return getattr(import_module(f"hnkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
