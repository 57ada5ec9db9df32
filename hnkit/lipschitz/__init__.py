"""How much a map can stretch: local norms, lower bounds of the Lipschitz constant, and certified upper bounds."""

from hnkit.linalg.singular import LocalNorms, leading_singular
from hnkit.lipschitz import rules as _rules  # noqa: F401  registers the rules of torch's layers
from hnkit.lipschitz.certify import (
    InjectivityCertificate,
    JacobianBounds,
    Scaled,
    Sum,
    certified_bounds,
    certify_injective,
    register,
)
from hnkit.lipschitz.local import (
    LipschitzEstimate,
    lipschitz_lower,
    lipschitz_upper,
    local_lipschitz,
    local_norms,
)

__all__ = [
    "InjectivityCertificate",
    "JacobianBounds",
    "LipschitzEstimate",
    "LocalNorms",
    "Scaled",
    "Sum",
    "certified_bounds",
    "certify_injective",
    "leading_singular",
    "lipschitz_lower",
    "lipschitz_upper",
    "local_lipschitz",
    "local_norms",
    "register",
]
