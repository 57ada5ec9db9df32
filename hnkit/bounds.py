"""Bounds on the log-det error term `E(A) = tr A - log|det(I + A)|`, from few numbers about A.

All rest on one scalar function, `h(s) = -log(1 - s) - s = sum_{k>=2} s^k / k`, because
`|Re z - log|1 + z|| <= h(|z|)` for complex `|z| < 1`. It is evaluated without cancellation: every bound here has full
relative accuracy down to `L = 0`, and what it gives is rounded outward: the numbers given are taken as exact, and
singular values and eigenvalues, which a bound near norm 1 magnifies, are moved outward by the error of their solver.
Enclosures that are theorems about the matrix are in `hnkit.linalg.enclosures`.

`BOUNDS` lists the bounds for all that show, test or prove them: a bound is added by its proof and one entry there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from hnkit.errors import InputError

Number: TypeAlias = float | Tensor

_EPS = torch.finfo(torch.float64).eps
_LEAST = 2.0**-1074  # the least positive float64: what an operation that underflows may have lost, twice over
_SWITCH = 0.5  # |s| up to which the series is used
_TERMS = 18  # t^2 <= 1/9 there, so the first term left out is below 1/39 * 9^-18 = 2e-19 of the leading one


def _cubic_coefficient(s: Tensor) -> Tensor:
    """`c(s) = (h(s) - s^2/2) / s^3` for `|s| <= 1/2`.

    With `t = s / (2 - s)`, `-log(1 - s) = 2 artanh t` and `2 t = s - s^2/2 + ...` in closed form, so that
    `c = 1 / (2 (2 - s)) + 2 q(t^2) / (2 - s)^3`, `q(w) = sum_k w^k / (2k + 3)`: no two close numbers are subtracted.
    """
    w = (s / (2 - s)).square()
    q = torch.zeros_like(w)
    for k in reversed(range(_TERMS)):
        q = q * w + 1 / (2 * k + 3)
    return 0.5 / (2 - s) + 2 * q / (2 - s) ** 3


def _quotients(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`h(s)`, `h(s)/s^2` and `(h(s) - s^2/2)/s^2` for any `s < 1` (negative too), each without cancellation."""
    near = s.abs() <= _SWITCH
    small = torch.where(near, s, torch.zeros_like(s))
    large = torch.where(near, torch.full_like(s, _SWITCH), s)  # keeps the branch not taken, and its gradient, finite
    tail = small * _cubic_coefficient(small)
    direct = -torch.log1p(-large) - large
    ratio = direct / large.square()
    value = torch.where(near, small.square() * (0.5 + tail), direct)
    return value, torch.where(near, 0.5 + tail, ratio), torch.where(near, tail, ratio - 0.5)


def solver_margin(dim: int) -> float:
    """Relative to `|A|_2`, more than LAPACK's singular values and eigenvalues of a `(dim, dim)` matrix are off.

    They are those of a matrix within a small multiple of `dim eps |A|_2` of A.
    """
    return 8 * dim * _EPS


def _outward(value: Tensor, units: float, positive: Tensor, lost: float | None = None) -> Tensor:
    """A number that is not negative, rounded up by some units of rounding and by what was lost to underflow.

    It stays as it is where `positive` does not hold, as it is exactly 0 there.

    Args:
        value: `(...)`.
        units: units of rounding, relative to the value.
        positive: `(...)`, where there is something to round up.
        lost: multiples of the least float64 that underflow may have taken; `None`: as many as the units.
    """
    return torch.where(positive, value * (1 + units * _EPS) + (units if lost is None else lost) * _LEAST, value)


def _weighted(norm: Tensor, quotient: Tensor) -> Tensor:
    """`norm^2 quotient` of what is not negative, but for rounding no less, even where a factor underflows."""
    return (norm.square() + _LEAST) * (quotient + _LEAST)


def _tensor(name: str, value: Number) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name} = {value!r:.60}: give a real number or a tensor") from None
    if tensor.is_meta or tensor.layout != torch.strided:
        raise InputError(f"{name} is a tensor on device {tensor.device}, {tensor.layout}: give a dense one with values")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} has dtype {tensor.dtype}: give real numbers")
    tensor = tensor.to(torch.float64)
    if bool(tensor.isnan().any()):
        raise InputError(f"{name} is nan{_place(tensor.isnan())}: give a finite number")
    return tensor


def _place(bad: Tensor) -> str:
    """Where the first bad entry is, for a message; nothing for a scalar."""
    if bad.ndim == 0:
        return ""
    index = tuple(int(i) for i in bad.nonzero()[0])
    return f" (entry {index[0] if len(index) == 1 else index})"


def _require(name: str, value: Tensor, bad: Tensor, accepted: str) -> None:
    if bool(bad.any()):
        raise InputError(f"{name} = {float(value[bad].flatten()[0]):.6g}{_place(bad)}: {accepted}")


def _contraction(name: str, value: Number) -> Tensor:
    tensor = _tensor(name, value)
    accepted = "the bound needs 0 <= L < 1 (field_of_values_bounds does without it)"
    _require(name, tensor, (tensor < 0) | (tensor >= 1), accepted)
    return tensor


def _non_negative(name: str, value: Number) -> Tensor:
    tensor = _tensor(name, value)
    _require(name, tensor, (tensor < 0) | tensor.isinf(), "a norm is finite and at least 0")
    return tensor


def _dimension(dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise InputError(f"dim = {dim!r}: the number of noise dimensions is a positive integer")
    return dim


def _like(result: Tensor, *inputs: object) -> Number:
    return result if any(isinstance(value, Tensor) for value in inputs) else float(result)


@overload
def log_gap(s: float) -> float: ...
@overload
def log_gap(s: Tensor) -> Tensor: ...
def log_gap(s: Number) -> Number:
    """The scalar function of Theorem 7, to full relative accuracy for every `s < 1`.

    `h(s) = -log(1 - s) - s`; `h(s) = s^2/2 + s^3/3 + ...` near 0. At `s = -z` it is `z - log(1 + z)`.

    Args:
        s: number or tensor of any shape, `s < 1`; negative values are accepted.

    Returns:
        `h(s)` in nats, a float for a float, a float64 tensor for a tensor.

    Raises:
        InputError: `s >= 1` or nan.

    Source:
        arXiv 2508.09968, Theorem 7.
    """
    tensor = _tensor("s", s)
    _require("s", tensor, tensor >= 1, "h(s) = -log(1 - s) - s needs s < 1")
    return _like(_quotients(tensor)[0], s)


@overload
def theorem7_bound(dim: int, lipschitz: float) -> float: ...
@overload
def theorem7_bound(dim: int, lipschitz: Tensor) -> Tensor: ...
def theorem7_bound(dim: int, lipschitz: Number) -> Number:
    """Bound `|E(J)|` by the dimension and a Lipschitz constant below 1.

    `|tr J - log|det(I + J)|| <= d h(L)`, about `d L^2 / 2` for small L.

    Args:
        dim: number of noise dimensions d.
        lipschitz: L with `|J|_2 <= L < 1`, number or tensor of any shape. The result is a bound only if L is an
            *upper* bound of the constant (`lipschitz_upper`), not a sampled maximum.

    Returns:
        The bound in nats, of the shape of `lipschitz`.

    Raises:
        InputError: L is negative, nan or at least 1; `dim` is not a positive integer.

    Source:
        arXiv 2508.09968, Theorem 7 (Theorem 1 in the main text).
    """
    constant = _contraction("lipschitz", lipschitz)
    return _like(_theorem7(_dimension(dim), constant), lipschitz)


def _theorem7(dim: int, norms: Tensor) -> Tensor:
    return _outward(dim * (_quotients(norms)[0] + _LEAST * (norms > 0)), 4, norms > 0)


def local_theorem7_bound(dim: int, norms: Tensor) -> Tensor:
    """Theorem 7 at each sample, with the norm of the Jacobian there in place of a global constant.

    `|E(J(x))| <= d h(|J(x)|_2)`; the mean over samples bounds `E|E(J)|`. No global constant is needed for the
    inequality; that the sum with `|f|^2/2` *is* the KL still needs `x + f(x)` to be injective.

    Args:
        dim: number of noise dimensions d.
        norms: `|J(x_i)|_2`, shape `(n,)`, each in [0, 1); see `local_lipschitz`.

    Returns:
        The bounds in nats, shape `(n,)`, float64.

    Raises:
        InputError: a norm is negative, nan or at least 1; the message names the sample.
    """
    return _theorem7(_dimension(dim), _contraction("local norm", norms))


@overload
def frobenius_bound(frobenius_norm: float, lipschitz: float) -> float: ...
@overload
def frobenius_bound(frobenius_norm: Tensor, lipschitz: Number) -> Tensor: ...
@overload
def frobenius_bound(frobenius_norm: Number, lipschitz: Tensor) -> Tensor: ...
def frobenius_bound(frobenius_norm: Number, lipschitz: Number) -> Number:
    """Bound `|E(A)|` by the Frobenius norm and a bound on the spectral norm.

    `|E(A)| <= (|A|_F^2 / L^2) h(L)` for every L with `|A|_2 <= L < 1`; at `L = 0` the limit `|A|_F^2 / 2`. Never
    looser than Theorem 7, since `|A|_F^2 <= d L^2`; attained by `A = -L I_k (+) 0`.

    Args:
        frobenius_norm: `|A|_F >= 0`, number or tensor.
        lipschitz: L, number or tensor; the two broadcast.

    Returns:
        The bound in nats; a float if both are numbers, else a float64 tensor.

    Raises:
        InputError: L is negative, nan or at least 1; the Frobenius norm is negative or not finite.
    """
    norm, constant = _non_negative("frobenius_norm", frobenius_norm), _contraction("lipschitz", lipschitz)
    quotient = _quotients(constant)[1]
    bound = torch.where(constant > 0, _weighted(norm, quotient), norm.square() * quotient)  # exact at L = 0: A = 0
    return _like(_outward(bound, 4, (norm > 0) & (constant > 0), 2), frobenius_norm, lipschitz)


@overload
def second_order_remainder_bound(frobenius_norm: float, lipschitz: float) -> float: ...
@overload
def second_order_remainder_bound(frobenius_norm: Tensor, lipschitz: Number) -> Tensor: ...
@overload
def second_order_remainder_bound(frobenius_norm: Number, lipschitz: Tensor) -> Tensor: ...
def second_order_remainder_bound(frobenius_norm: Number, lipschitz: Number) -> Number:
    """Bound what the second-order term leaves of E(A).

    `|E(A) - tr(A^2)/2| <= (|A|_F^2 / L^2) (h(L) - L^2/2)`, about `|A|_F^2 L / 3`; 0 at `L = 0`.

    Args:
        frobenius_norm: `|A|_F >= 0`, number or tensor.
        lipschitz: L with `|A|_2 <= L < 1`, number or tensor; the two broadcast.

    Returns:
        The bound in nats; a float if both are numbers, else a float64 tensor.

    Raises:
        InputError: L is negative, nan or at least 1; the Frobenius norm is negative or not finite.
    """
    norm, constant = _non_negative("frobenius_norm", frobenius_norm), _contraction("lipschitz", lipschitz)
    bound = _weighted(norm, _quotients(constant)[2])
    possible = (norm > 0) & (constant > 0)
    return _like(_outward(torch.where(possible, bound, 0.0), 8, possible, 2), frobenius_norm, lipschitz)


def _matrices(A: Tensor) -> Tensor:
    if not isinstance(A, Tensor):
        raise InputError(f"A is a {type(A).__name__}: give a tensor of square matrices (..., d, d)")
    if A.is_meta or A.layout != torch.strided:
        raise InputError(f"A is on device {A.device}, {A.layout}: give a dense tensor with values")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise InputError(f"A has shape {tuple(A.shape)}: give square matrices (..., d, d)")
    if A.is_complex():
        raise InputError(f"A has dtype {A.dtype}: give real matrices")
    matrices = A.to(torch.float64)
    bad = ~matrices.isfinite().all(-1).all(-1)
    if bool(bad.any()):
        raise InputError(f"A{_place(bad)} has an entry that is not finite: give finite matrices")
    return matrices


def _any_entry(matrices: Tensor) -> Tensor:
    """Whether a matrix is not 0, `(...)`."""
    return (matrices != 0).any(-1).any(-1)


def singular_value_bound(A: Tensor) -> Tensor:
    """Bound `|E(A)|` by the singular values of A.

    `|E(A)| <= sum_i h(sigma_i) = -sum_i log(1 - sigma_i) - |A|_*`, because `t -> h(e^t)` is increasing and convex and
    the moduli of the eigenvalues are log-majorised by the singular values. Never looser than `frobenius_bound`.

    Args:
        A: shape `(..., d, d)`, real, `|A|_2 < 1`.

    Returns:
        The bounds in nats, shape `(...)`, float64; infinite where the largest singular value is below 1 by less than
        the error of the solver.

    Raises:
        InputError: not square, not finite, or a spectral norm of at least 1 (named).

    Source:
        H. Weyl, PNAS 35 (1949), DOI 10.1073/pnas.35.7.408.
    """
    matrices = _matrices(A)
    values = torch.linalg.svdvals(matrices)
    _contraction("spectral norm", values[..., 0])
    dim = values.shape[-1]
    above = values + solver_margin(dim) * values[..., :1]
    beyond = above[..., 0] >= 1
    bound = _outward(_quotients(above.clamp(max=1 - _EPS))[0].sum(-1), 4 + dim, _any_entry(matrices))
    return torch.where(beyond, torch.full_like(bound, torch.inf), bound)


def leading_singular_value_bound(singular_values: Tensor, frobenius_norm: Number) -> Tensor:
    """Bound `|E(A)|` by the r largest singular values and the Frobenius norm.

    `|E(A)| <= sum_{i<=r} h(s_i) + (h(s_r)/s_r^2) (F^2 - sum_{i<=r} s_i^2)` for any `s_1 >= ... >= s_r` with
    `s_i >= sigma_i(A)` and `F >= |A|_F`: upper bounds of the singular values and of the norm are enough. Evaluated as
    `sum_i s_i^2 (h(s_i)/s_i^2 - h(s_r)/s_r^2) + F^2 h(s_r)/s_r^2`, in which no term is negative. With `r = 1` it is
    `frobenius_bound`, with `r = d` `singular_value_bound`.

    Args:
        singular_values: `s`, shape `(..., r)`, in descending order, each in [0, 1).
        frobenius_norm: F, number or tensor of shape `(...)`.

    Returns:
        The bounds in nats, shape `(...)`, float64.

    Raises:
        InputError: no value, a value outside [0, 1), not descending, or a negative Frobenius norm.
    """
    if singular_values.ndim == 0 or singular_values.shape[-1] == 0:
        raise InputError("singular_values is empty: give the r >= 1 largest, shape (..., r)")
    values = _contraction("singular value", singular_values)
    rising = values[..., 1:] > values[..., :-1]
    _require("singular value", values[..., 1:], rising, "give them in descending order")
    norm = _non_negative("frobenius_norm", frobenius_norm)
    _, ratio, _ = _quotients(values)
    squares = values.square()
    excess = (squares * (ratio - ratio[..., -1:])).sum(-1)
    count = values.shape[-1]
    rounding = (8 + count) * _EPS * (squares * ratio).sum(-1)  # of differences of close ratios, and sums
    possible = (norm > 0) & (values[..., 0] > 0)
    bound = torch.where(possible, excess + _weighted(norm, ratio[..., -1]), 0.0)
    return _outward(bound, 8 + count, possible) + rounding


def field_of_values_bounds(A: Tensor) -> tuple[Tensor, Tensor]:
    """Enclose E(A) by the symmetric and skew parts of A, without any condition on its norm.

    `E(S) - |K|_F^2 / (2 (1 + lambda_min(S))^2) <= E(A) <= E(S)` for `A = S + K`, `lambda_min(S) > -1`. From
    `E(A) = E(S) - log det(I + M'M)/2` with the skew matrix `M = (I+S)^-1/2 K (I+S)^-1/2`.

    Args:
        A: shape `(..., d, d)`, real, with `lambda_min((A + A')/2) > -1`; norms above 1 are fine.

    Returns:
        `(lower, upper)` in nats, each of shape `(...)`, float64; infinite where `lambda_min(S)` is above -1 by less
        than the error of the solver.

    Raises:
        InputError: not square, not finite, or `lambda_min(S) <= -1` (named).

    Source:
        Upper side: A. Ostrowski and O. Taussky, Indag. Math. 13 (1951); lower side derived in
        `proofs/field_of_values`.
    """
    matrices = _matrices(A)
    symmetric = matrices / 2 + matrices.mT / 2
    skew = matrices / 2 - matrices.mT / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    dim, least = eigenvalues.shape[-1], eigenvalues[..., 0]
    accepted = "the field-of-values bounds need it above -1"
    _require("lambda_min of the symmetric part", least, least <= -1, accepted)
    margin = solver_margin(dim) * eigenvalues.abs().amax(-1, keepdim=True)
    below, above = eigenvalues - margin, eigenvalues + margin
    beyond = below[..., 0] <= -1
    # z - log(1 + z) falls up to 0 and rises from there.
    inside = below.clamp(min=_EPS - 1)
    most = torch.maximum(_quotients(-inside)[0], _quotients(-above)[0]).sum(-1)
    nearest = torch.where(inside > 0, inside, above.clamp(max=0))
    some = _any_entry(matrices + matrices.mT)
    upper, fewest = _outward(most, 4 + dim, some), _quotients(-nearest)[0].sum(-1)
    turned = _any_entry(matrices - matrices.mT)
    square = skew.square().sum((-1, -2)) + dim**2 * _LEAST * turned
    slack = _outward(square / (2 * (1 + inside[..., 0]).square()), 8 + 2 * dim, turned)
    lower = fewest - _outward((4 + dim) * _EPS * fewest, 4 + dim, some) - slack
    infinite = torch.full_like(upper, torch.inf)
    return torch.where(beyond, -infinite, lower), torch.where(beyond, infinite, upper)


@dataclass(frozen=True)
class Bound:
    """One inequality about `E(A)`, with all that checks, figures, plots, assertions and certificates say of it.

    Both sides are formulas in the numbers of A that `hnkit.linalg.matrices.MatrixNumbers` lists, tensors or balls.

    Attributes:
        label: the name, in figures, plots and messages.
        check: the name of its check in `verify-bound`.
        figure: the key of the figure of its mean over samples; empty: the figures of the map hold it in their own way.
        left_label: what the left side is called in messages.
        statement: the inequality, for a Jacobian J.
        note: what a figure of its mean says beside the number.
        proof: the folder in `proofs/` that derives it.
        hypothesis: `"norm"`: `|A|_2 < 1`; `"cone"`: `lambda_min((A + A')/2) > -1`.
        left: the left side.
        right: the right side, the bound.
        value: the right side as the public function gives it, rounded outward; `None`: `right`.
        looser: a bound that is never below this one, by its name.
        equal_if_symmetric: both sides agree for symmetric A.
    """

    label: str
    check: str
    figure: str
    left_label: str
    statement: str
    note: str
    proof: str
    hypothesis: Literal["norm", "cone"]
    left: Callable[[Any], Any]
    right: Callable[[Any], Any]
    value: Callable[[Any], Any] | None = None
    looser: str | None = None
    equal_if_symmetric: bool = False

    def bound(self, numbers: Any) -> Tensor:
        """The right side in tensors, for matrices that meet the hypothesis."""
        result: Tensor = (self.value or self.right)(numbers)
        return result


BOUNDS: Mapping[str, Bound] = {
    "theorem 7": Bound(
        label="Theorem 7",
        check="local-theorem-7",
        figure="",
        left_label="|E(A)|",
        statement="|E(J)| ≤ d h(L), L = |J(x)|₂",
        note="E[d h(|J(x)|₂)]",
        proof="local_theorem_7",
        hypothesis="norm",
        left=lambda m: abs(m.error),
        right=lambda m: m.dim * m.h,
        value=lambda m: local_theorem7_bound(m.dim, m.norm),
    ),
    "frobenius": Bound(
        label="Frobenius bound",
        check="frobenius",
        figure="frobenius_bound",
        left_label="|E(A)|",
        statement="|E(J)| ≤ (|J|_F²/L²) h(L), L = |J(x)|₂",
        note="E[(|J|_F²/L²) h(L)], L = |J(x)|₂",
        proof="frobenius_bound",
        hypothesis="norm",
        left=lambda m: abs(m.error),
        right=lambda m: m.frobenius_square * m.ratio,
        value=lambda m: frobenius_bound(m.frobenius, m.norm),
        looser="theorem 7",
    ),
    "singular values": Bound(
        label="singular-value bound",
        check="singular-values",
        figure="singular_value_bound",
        left_label="|E(A)|",
        statement="|E(J)| ≤ Σ h(σᵢ(J))",
        note="E Σ h(σᵢ)",
        proof="singular_value_bound",
        hypothesis="norm",
        left=lambda m: abs(m.error),
        right=lambda m: m.singular_sum,
        value=lambda m: singular_value_bound(m.matrices),
        looser="frobenius",
    ),
    "second order": Bound(
        label="second-order remainder bound",
        check="second-order",
        figure="second_order_remainder",
        left_label="|E(A) - tr(A^2)/2|",
        statement="|E(J) - tr(J²)/2| ≤ (|J|_F²/L²)(h(L) - L²/2), L = |J(x)|₂",
        note="on |E(J) - tr(J²)/2|",
        proof="second_order",
        hypothesis="norm",
        left=lambda m: abs(m.error - m.trace_square / 2),
        right=lambda m: m.frobenius_square * m.excess,
        value=lambda m: second_order_remainder_bound(m.frobenius, m.norm),
    ),
    "field of values, upper": Bound(
        label="field of values, upper",
        check="field-of-values",
        figure="",
        left_label="E(A)",
        statement="E(J) ≤ E(S) for J = S + K with λ_min(S) > -1",
        note="E(J) is below it",
        proof="field_of_values",
        hypothesis="cone",
        left=lambda m: m.error,
        right=lambda m: m.symmetric_error,
        value=lambda m: m.field_of_values[1],
        equal_if_symmetric=True,
    ),
    "field of values, lower": Bound(
        label="slack of the field of values",
        check="field-of-values",
        figure="",
        left_label="E(S) - E(A)",
        statement="E(S) - E(J) ≤ |K|_F²/2(1+λ_min(S))² for J = S + K with λ_min(S) > -1",
        note="E(J) is above E(S) less it",
        proof="field_of_values",
        hypothesis="cone",
        left=lambda m: m.symmetric_error - m.error,
        right=lambda m: m.skew_square / (2 * (1 + m.least) ** 2),
        value=lambda m: m.field_of_values[1] - m.field_of_values[0],
        equal_if_symmetric=True,
    ),
}
"""Every bound on E(A), by its name in certificates."""
