"""hnkit: exact KL, bounds and training for noise hypernetworks (arXiv 2508.09968).

A noise hypernetwork `f` moves the initial noise of a frozen one-step generator, `x -> x + f(x)`, so that its outputs
follow a reward-tilted law. Names are imported from their modules on first use, so that `import hnkit` is fast; type
checkers and editors read them in `__init__.pyi`, which `python docs/stub.py` writes from the table below.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_API = {
    # maps on noise, and their Jacobians
    "maps": ("NoiseMap", "Condition", "ConditionedMap"),
    "jacobian": ("RowJacobian", "dense_jacobian", "check_map"),
    # the KL divergence and its parts
    "kl": ("noise_kl", "KLEstimate", "l2_verdict", "L2Verdict"),
    "internal.stats": ("Estimate",),
    "logdet": ("log_det_error",),
    # bounds
    "bounds": (
        "theorem7_bound",
        "local_theorem7_bound",
        "frobenius_bound",
        "second_order_remainder_bound",
        "singular_value_bound",
        "field_of_values_bounds",
    ),
    # Lipschitz constants: local norms, lower bounds, certificates
    "lipschitz": (
        "local_lipschitz",
        "lipschitz_lower",
        "lipschitz_upper",
        "LipschitzEstimate",
        "certify_injective",
        "InjectivityCertificate",
        "Sum",
        "Scaled",
        "register",
    ),
    # training, and how far from the target it ends
    "loss": ("NoiseLoss", "LossTerms"),
    "injection": ("NoiseInjection", "injected_bound", "InjectedBound"),
    "tilt": ("TiltedProblem", "optimality_gap"),
    "frontier": ("Frontier", "gap_lower_bound", "nats_lower_bound"),
    # generators and rewards
    "backend": ("Backend", "BackendBase", "Reward"),
    # verification
    "verify": ("verify_bound", "Report", "Check"),
    # errors
    "errors": (
        "InputError",
        "NonFiniteError",
        "ExpansiveMapError",
        "NotCertifiedError",
        "MissingDerivativeError",
    ),
}

_HOME = {name: module for module, names in _API.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hnkit' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"hnkit.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
