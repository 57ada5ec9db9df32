"""The noise-space KL divergence: its definition, its estimators, and the sizes that a target error needs."""

from hnkit.kl.divergence import METHODS, noise_kl
from hnkit.kl.estimate import Folds, KLEstimate
from hnkit.kl.method import Estimator
from hnkit.kl.methods.arnoldi import Arnoldi
from hnkit.kl.methods.exact import Exact
from hnkit.kl.methods.l2 import L2
from hnkit.kl.methods.lanczos import Lanczos
from hnkit.kl.methods.low_rank import LowRank
from hnkit.kl.methods.power import Power
from hnkit.kl.methods.roulette import Roulette
from hnkit.kl.methods.second_order import SecondOrder
from hnkit.kl.two_level import two_level_kl
from hnkit.kl.verdict import L2Verdict, l2_verdict

__all__ = [
    "L2",
    "METHODS",
    "Arnoldi",
    "Estimator",
    "Exact",
    "Folds",
    "KLEstimate",
    "L2Verdict",
    "Lanczos",
    "LowRank",
    "Power",
    "Roulette",
    "SecondOrder",
    "l2_verdict",
    "noise_kl",
    "two_level_kl",
]
