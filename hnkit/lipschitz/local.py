"""How much a map can stretch: local norms, lower bounds of the Lipschitz constant, and certified upper bounds.

A maximum of `|J(x)|_2` over points is a *lower* bound of the Lipschitz constant; Theorem 7 needs an *upper* one. The
two never share a name here: every result says whether it is `"sampled"`, `"lower"` or `"certified"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hnkit.errors import InputError, MissingDerivativeError
from hnkit.internal.seeds import check_generator
from hnkit.jacobian import (
    RowJacobian,
    check_batch,
    check_map,
    dense_jacobian,
    evaluate,
    math_attention,
    recording,
    require_differentiable_again,
)
from hnkit.linalg.singular import BASIS, CYCLES, FEWEST_STEPS, LocalNorms, leading_singular, unit_rows
from hnkit.lipschitz.certify import certified_bounds
from hnkit.maps import NoiseMap, at_rows, chunked

RESOLVED = 2**-4
"""Relative residual up to which a local norm is given where a network's products resolve no more: 8 bfloat16 units."""

_DENSE_DIM = 16  # up to this dimension the dense Jacobian costs fewer products than a Krylov space
_BASIS_BYTES = 2**29  # of all Krylov vectors of the rows that run together


@dataclass(frozen=True)
class LipschitzEstimate:
    """A number about the Lipschitz constant of a map, and what kind of number it is.

    Attributes:
        value: the number; distances are Euclidean over all entries of a row.
        kind: `"sampled"`: the largest `|J(x)|_2` met among given points (a lower bound of the constant);
            `"lower"`: the same after gradient ascent on x (still a lower bound); `"certified"`: an upper bound.
        how: one line that says how it was obtained.
    """

    value: float
    kind: Literal["sampled", "lower", "certified"]
    how: str


def _default_tolerance(x: Tensor) -> float:
    """1e-5, or what products in the precision of `x` can resolve."""
    return max(1e-5, 8 * float(torch.finfo(x.dtype).eps))


def _tolerance(tolerance: float | None, x: Tensor) -> float:
    if tolerance is None:
        return _default_tolerance(x)
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance = {tolerance}: a relative tolerance lies between 0 and 1")
    return float(tolerance)


def local_norms(
    f: NoiseMap,
    x: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    cycles: int = CYCLES,
) -> LocalNorms:
    """`|J(x_i)|_2` with singular vectors and residuals; unlike `local_lipschitz` it returns unconverged rows too.

    Read `converged` and `residual`: the products of a network that computes in bfloat16 leave some 1e-2, whatever the
    type of x, and the value is known to about that.

    Args:
        f: batch-first map, rows independent.
        x: `(n, *shape)`.
        tolerance: relative residual to reach; `None`: 1e-5, coarser for half-precision `x`.
        generator: the generator of the random start vectors; `None`: a fixed seed.
        cycles: restarts after which a row is left as it is.
    """
    check_batch(x)
    goal = _tolerance(tolerance, x)
    dim = x[0].numel()
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
    width = max(1, _BASIS_BYTES // (16 * dim * min(BASIS, dim)))
    parts = []
    for index, inner, points in chunked(f, x, width):
        probe = torch.randn(index.numel(), dim, generator=generator, dtype=torch.float64, device=generator.device)
        operator = RowJacobian(inner, points, samples=index)
        parts.append(leading_singular(operator, probe.to(x.device), tolerance=goal, cycles=cycles))
    return LocalNorms(
        torch.cat([part.value for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.left for part in parts]),
        torch.cat([part.right for part in parts]),
        sum(part.products for part in parts),
        goal,
    )


def local_lipschitz(
    f: NoiseMap,
    x: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spectral norm of the Jacobian at every row, `|J(x_i)|_2`.

    From the dense Jacobian up to d = 16, else by Golub-Kahan bidiagonalisation until the relative residual
    `|J' u - sigma v| / sigma` is at most `tolerance`. The error of the value is at most that, and of its square's
    order where the largest singular value stands apart.

    Args:
        f: batch-first map, rows independent.
        x: `(n, *shape)`.
        tolerance: relative residual that every row must reach. `None`: 1e-5 (8 units of rounding of the dtype of `x` if
            that is coarser), or what the products of the map resolve: a network that computes in half precision
            inside leaves some 1e-2, which `local_norms` states row by row. Up to 1/16 is given.
        generator: the generator of the random start vectors; `None`: a fixed seed, so that the result repeats.

    Returns:
        `(n,)` float64. Their maximum is a lower bound of the Lipschitz constant, not the constant.

    Raises:
        InputError: bad arguments, a map that `check_map` refuses, or a row that does not converge (its residual is
            named).
        NonFiniteError: a product is not finite; the message names the sample.
    """
    check_batch(x)
    check_generator(generator)
    goal = _tolerance(tolerance, x)
    check_map(f, x, jvp=x[0].numel() > _DENSE_DIM)
    if x[0].numel() <= _DENSE_DIM:
        norms: Tensor = torch.linalg.matrix_norm(dense_jacobian(f, x), 2)
        return norms
    result = local_norms(f, x, tolerance=goal, generator=generator)
    most = max(goal, RESOLVED) if tolerance is None else goal
    worst = int(result.residual.argmax())
    if float(result.residual[worst]) > most:
        remedy = "run the map in a higher precision"
        raise InputError(
            f"the local norm at sample {worst} did not converge: relative residual {float(result.residual[worst]):.2g} "
            f"after {result.products} products, tolerance {most:.2g}: "
            + (remedy if tolerance is None else f"raise the tolerance, or {remedy}")
        )
    return result.value


def lipschitz_lower(
    f: NoiseMap,
    x: Tensor,
    *,
    ascent_steps: int = 20,
    starts: int = 4,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> LipschitzEstimate:
    """Lower bound of the Lipschitz constant: the largest `|J|_2` among samples, then by gradient ascent on x.

    `sup_x |J(x)|_2 >= |J(x) v|` for every x and unit v: each step moves the best points along the gradient of
    `u' J(x) v` at the leading singular pair and is kept only where the norm grows, so the value never falls below
    that of the samples.

    Args:
        f: batch-first map, rows independent, twice differentiable for `ascent_steps > 0`.
        x: `(n, *shape)` the samples.
        ascent_steps: trial steps; 0: the samples alone.
        starts: how many of the samples are moved, the largest norms first.
        tolerance: as in `local_lipschitz`.
        generator: the generator of the random start vectors; `None`: a fixed seed.

    Returns:
        The estimate, `kind` `"sampled"` if `ascent_steps` is 0, else `"lower"`.

    Raises:
        InputError: bad arguments, or a map that `check_map` refuses.
        MissingDerivativeError: the map's gradient cannot be differentiated again.
    """
    if ascent_steps < 0:
        raise InputError(f"ascent_steps = {ascent_steps}: give 0 for the samples alone, or a positive number")
    if starts < 1:
        raise InputError(f"starts = {starts}: at least one point must be moved")
    check_generator(generator)
    check_map(f, x)
    sampled = local_norms(f, x, tolerance=tolerance, generator=generator)
    value = float(sampled.value.max())
    how = f"largest |J(x)|_2 of {x.shape[0]} samples"
    if ascent_steps == 0:
        return LipschitzEstimate(value, "sampled", how)
    index = sampled.value.topk(min(starts, x.shape[0])).indices
    ascended = _ascend(*at_rows(f, x.detach(), index), sampled, index, ascent_steps, _tolerance(tolerance, x))
    how += f", then {ascent_steps} steps of gradient ascent on x from the best {index.numel()}"
    return LipschitzEstimate(max(value, ascended), "lower", how)


def _ascend(f: NoiseMap, x: Tensor, norms: LocalNorms, index: Tensor, steps: int, tolerance: float) -> float:
    """Largest norm met on monotone ascent paths from the rows of `x`, whose norms are `norms` at `index`."""
    value, left, right = norms.value[index], norms.left[index], norms.right[index]
    length = torch.full_like(value, 0.5)  # noise entries have unit variance
    gradient = _norm_gradient(f, x, left, right, first=True)
    for _ in range(steps):
        if not bool(gradient.any()):
            break
        trial = x + (length.unsqueeze(-1) * gradient).to(x).reshape(x.shape)
        moved = leading_singular(RowJacobian(f, trial), right, tolerance=tolerance, basis=FEWEST_STEPS, cycles=2)
        up = moved.value > value
        rows = up.unsqueeze(-1)
        value = torch.where(up, moved.value, value)
        left, right = torch.where(rows, moved.left, left), torch.where(rows, moved.right, right)
        x = torch.where(up.reshape(-1, *[1] * (x.ndim - 1)), trial, x)
        length = torch.where(up, 2 * length, 0.5 * length)
        if bool(up.any()):
            gradient = torch.where(rows, _norm_gradient(f, x, left, right), gradient)
    return float(value.max())


def _norm_gradient(f: NoiseMap, x: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> Tensor:
    """Unit directions of `grad_x u' J(x) v`, `(n, d)`; zero where the Jacobian is locally constant."""
    with recording(), math_attention():
        point = x.detach().clone().requires_grad_()
        y = evaluate(f, point)
        zero = torch.zeros(x.shape[0], x[0].numel(), dtype=torch.float64, device=x.device)
        if not y.requires_grad:
            return zero
        try:
            cotangent = left.to(y).reshape(y.shape).clone().requires_grad_()
            (pulled,) = torch.autograd.grad(y, point, cotangent, create_graph=True, allow_unused=True)
            if pulled is None or not pulled.requires_grad:
                return zero
            norm = (pulled * right.to(pulled).reshape(pulled.shape)).sum()
            if first:
                require_differentiable_again(norm)
            (gradient,) = torch.autograd.grad(norm, point, allow_unused=True)
        except RuntimeError as error:
            raise MissingDerivativeError(
                f"the map has no second derivatives ({str(error).splitlines()[0]}): use ascent_steps=0"
            ) from error
    if gradient is None:
        return zero
    return unit_rows(gradient.detach().reshape(zero.shape).double().nan_to_num(0.0, 0.0, 0.0))[1]


def lipschitz_upper(module: object) -> LipschitzEstimate:
    """Certified upper bound of the Lipschitz constant of a map, or an error that names the layer in the way.

    `Lip(f o g) <= Lip(f) Lip(g)` and `Lip(f + g) <= Lip(f) + Lip(g)` over the layers: linear and convolution layers by
    a true bound of their operator norm, activations by their known constants. See `hnkit.lipschitz.certify` for the
    list and for how a module of one's own declares itself.

    Args:
        module: an `nn.Module` in eval mode, or any object with a method `lipschitz_upper() -> float`.

    Returns:
        The estimate with kind `"certified"`. It concerns the map of real numbers that the weights define, not the
        rounding of its evaluation.

    Raises:
        NotCertifiedError: a layer without a global constant (normalisation, attention) or without a rule, by name.
    """
    bounds = certified_bounds(module)
    return LipschitzEstimate(bounds.norm, "certified", bounds.how)
