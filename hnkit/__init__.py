"""hnkit: exact KL, bounds and training for noise hypernetworks (arXiv 2508.09968).

A noise hypernetwork `f` moves the initial noise of a frozen one-step generator, `x -> x + f(x)`, so that its outputs
follow a reward-tilted law. Names are imported from their modules on first use, so that `import hnkit` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hnkit._errors import InputError, NonFiniteError
    from hnkit.backend import Backend, Condition, ConditionedMap, NoiseMap, Reward
    from hnkit.bounds import (
        field_of_values_bounds,
        frobenius_bound,
        second_order_remainder_bound,
        singular_value_bound,
        theorem7_bound,
    )
    from hnkit.jacobian import RowJacobian, dense_jacobian
    from hnkit.kl import KLEstimate, noise_kl
    from hnkit.lipschitz import (
        LipschitzEstimate,
        certify_injective,
        lipschitz_lower,
        lipschitz_upper,
        local_lipschitz,
    )
    from hnkit.logdet import log_det_error
    from hnkit.loss import LossTerms, NoiseLoss
    from hnkit.tilt import TiltedProblem, optimality_gap
    from hnkit.verify import Check, Report, verify_bound

_HOME = {
    "InputError": "_errors",
    "NonFiniteError": "_errors",
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
    "KLEstimate": "kl",
    "noise_kl": "kl",
    "LipschitzEstimate": "lipschitz",
    "certify_injective": "lipschitz",
    "lipschitz_lower": "lipschitz",
    "lipschitz_upper": "lipschitz",
    "local_lipschitz": "lipschitz",
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
