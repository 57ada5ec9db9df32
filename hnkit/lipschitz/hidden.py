"""A certificate of injectivity of `x + V s(W x + b)` from the small matrix `W V`, at any norms of W and V."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_MOST = 1024
"""Hidden width up to which a linear system of that size is solved."""


def hidden_dominance(W: Tensor, V: Tensor, lower: float, upper: float) -> bool:
    """Whether `I + D W V` is proved strictly diagonally dominant for every diagonal D with entries in `[lower, upper]`.

    Then `det(I + V D W) = det(I + D W V) > 0` for all of them (Sylvester). The secants of `V s(W x + b)`, not only its
    Jacobians, have the form `V D W` where the slopes of s lie in the interval, so that `T(x) = x + V s(W x + b)` is a
    bijection with a Lipschitz inverse. Dominance is meant up to positive weights of the columns, which a linear solve
    proposes and the inequalities themselves confirm, rounding included; `False` claims nothing.

    Args:
        W: `(k, d)`.
        V: `(d, k)`.
        lower: least slope, at most 0 or not.
        upper: largest slope, at least `lower`.

    Source: `proofs/hidden_dominance`.
    """
    if W.shape != V.T.shape or W.shape[0] > _MOST:
        return False
    W, V = W.detach().double().cpu(), V.detach().double().cpu()
    lower, upper = min(lower, 0.0), max(upper, 0.0)  # D = 0, where the determinant is 1, belongs to the box
    product = W @ V
    error = (W.shape[1] + 2) * _EPS * (W.abs() @ V.abs())
    largest = max(-lower, upper)
    middle = product.diagonal()
    own = 1 + torch.minimum(lower * middle, upper * middle) - largest * error.diagonal() * (1 + 8 * _EPS)
    others = largest * (product.abs() + error)
    others.fill_diagonal_(0)
    try:
        weights = torch.linalg.solve(torch.diag(own) - others, torch.ones_like(own))
    except RuntimeError:  # singular
        return False
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        return False
    pull = others @ weights
    margin = (W.shape[0] + 16) * _EPS * (own.abs() * weights + pull + weights * (1 + largest * middle.abs()))
    return bool((own * weights - pull > margin).all())
