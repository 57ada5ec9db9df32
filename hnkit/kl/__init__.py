"""The noise-space KL divergence: its definition, its estimators, and the sizes that a target error needs."""

from hnkit.kl.divergence import METHODS, KLEstimate, noise_kl

__all__ = ["METHODS", "KLEstimate", "noise_kl"]
