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
from hnkit.jacobian import (
    RowJacobian,
    check_batch,
    dense_jacobian,
    evaluate,
    math_attention,
    recording,
    require_differentiable_again,
)
from hnkit.lipschitz.certify import (
    certified_bounds,
)
from hnkit.maps import NoiseMap, select_rows

_DENSE_DIM = 16  # up to this dimension the dense Jacobian costs fewer products than a Krylov space
_BASIS = 48  # Krylov vectors kept per side and row before a restart
_MIN_STEPS = 8  # steps before the first convergence test: a residual alone does not say which singular value it is
_CHECK_EVERY = 4  # steps between convergence tests
_MAX_CYCLES = 12
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


@dataclass(frozen=True)
class LocalNorms:
    """Spectral norms of the Jacobian at each row, with the singular vectors and the residuals they leave.

    `value = |J v|` for the unit vector `v = right`, so that it never exceeds `|J|_2` beyond rounding, and some singular
    value lies within `value * residual` of it.

    Attributes:
        value: `(n,)` float64.
        residual: `(n,)` relative residual `|J' u - value v| / value`, 0 where `J v = 0`.
        left: `(n, d)` unit vectors `u = J v / |J v|`.
        right: `(n, d)` unit vectors `v`.
        products: matrix-vector products spent, over all rows and both sides.
    """

    value: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor
    products: int


def _unit(vectors: Tensor, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Norms and unit vectors of rows; rows of norm at most `floor` become 0. Scaled, so that nothing underflows."""
    scale = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(scale > 0, scale, torch.ones_like(scale))
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    length = (norm * scale).squeeze(-1)
    keep = (length > floor).unsqueeze(-1)
    unit = torch.where(keep, scaled / torch.where(norm > 0, norm, torch.ones_like(norm)), torch.zeros_like(scaled))
    return torch.where(keep.squeeze(-1), length, torch.zeros_like(length)), unit


def _against(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    """Remove the components along an orthonormal basis, twice: once leaves rounding errors of the size removed."""
    stacked = torch.stack(basis, 1)
    for _ in range(2):
        vectors = vectors - torch.einsum("rk,rkd->rd", torch.einsum("rkd,rd->rk", stacked, vectors), stacked)
    return vectors


def leading_singular(
    operator: RowJacobian,
    start: Tensor,
    *,
    tolerance: float,
    basis: int = _BASIS,
    cycles: int = _MAX_CYCLES,
) -> LocalNorms:
    """Largest singular value of J at every row by Golub-Kahan bidiagonalisation with full reorthogonalisation.

    A cycle builds `J V = U B`, `J' U = V B' + beta v e'` and takes the leading singular pair of the bidiagonal B; the
    next cycle starts from it, so that its first two products measure `|J v|` and the residual `|J' u - sigma v|`
    afresh. A row counts as converged only by such a measured residual, never by the recurrence's own estimate.

    The residual places *some* singular value within `tolerance * sigma`. That it is the largest one rests on the
    start having a component along its singular vector, true with probability one for a random start.

    Args:
        operator: products of J at each row.
        start: `(rows, d)` start vectors, not zero.
        tolerance: relative residual to reach.
        basis: Krylov vectors per side before a restart.
        cycles: cycles after which it stops, converged or not: the caller reads `residual`.

    Returns:
        The norms; not every row need be converged.

    Source:
        G. Golub and W. Kahan, SIAM J. Numer. Anal. 2 (1965), DOI 10.1137/0702016.
    """
    steps = min(basis, operator.dim)
    products = operator.num_jvp + operator.num_vjp
    right = _unit(start.double())[1]
    best: LocalNorms | None = None
    for cycle in range(cycles + 1):
        sigma, left = _unit(operator.jvp(right))
        pulled = operator.vjp(left)
        rest = pulled - sigma.unsqueeze(-1) * right
        residual = torch.where(sigma > 0, _unit(rest)[0] / sigma, torch.zeros_like(sigma))
        if cycle > 0 or cycles == 0:
            spent = operator.num_jvp + operator.num_vjp - products
            best = _better(best, LocalNorms(sigma, residual, left, right, spent))
            if cycle == cycles or bool((best.residual <= tolerance).all()):
                break
        right = _bidiagonal_cycle(operator, sigma, left, rest, right, steps, tolerance)
    assert best is not None
    return best


def _better(best: LocalNorms | None, new: LocalNorms) -> LocalNorms:
    """Row by row the larger value, with its own vectors and residual."""
    if best is None:
        return new
    take = new.value >= best.value
    rows = take.unsqueeze(-1)
    return LocalNorms(
        torch.where(take, new.value, best.value),
        torch.where(take, new.residual, best.residual),
        torch.where(rows, new.left, best.left),
        torch.where(rows, new.right, best.right),
        new.products,
    )


def _bidiagonal_cycle(
    operator: RowJacobian, sigma: Tensor, left: Tensor, rest: Tensor, right: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Right Ritz vectors of one cycle that starts at the pair `(left, right)` with `J right = sigma left`.

    A vector that vanishes (an invariant subspace is complete) is replaced by zero, and so is all that follows in its
    row: the padded bidiagonal matrix keeps its singular values.
    """
    eps = torch.finfo(torch.float64).eps
    V, U = [right], [left]
    diagonal: list[Tensor] = [sigma]
    above: list[Tensor] = []
    size = sigma
    for k in range(1, steps + 1):
        beta, v = _unit(_against(rest, V), 8 * eps * size)
        if k == steps or not bool(beta.any()):
            break
        if k >= _MIN_STEPS and k % _CHECK_EVERY == 0:
            outer, value, _ = _small_svd(diagonal, above)
            estimate = beta * outer[:, -1].abs()
            if bool((estimate <= 0.25 * tolerance * value).all()):
                break
        alpha, u = _unit(_against(operator.jvp(v) - beta.unsqueeze(-1) * U[-1], U), 8 * eps * size)
        rest = operator.vjp(u) - alpha.unsqueeze(-1) * v
        V.append(v)
        U.append(u)
        above.append(beta)
        diagonal.append(alpha)
        size = torch.maximum(size, torch.maximum(alpha, beta))
    ritz = torch.einsum("rk,rkd->rd", _small_svd(diagonal, above)[2], torch.stack(V, 1))
    length, unit = _unit(ritz)
    return torch.where((length > 0).unsqueeze(-1), unit, right)


def _small_svd(diagonal: list[Tensor], above: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left vector, value and right vector of the bidiagonal matrix of every row."""
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if above:
        matrix = matrix + torch.diag_embed(torch.stack(above, -1), offset=1)
    u, s, vh = torch.linalg.svd(matrix)
    return u[..., 0], s[..., 0], vh[..., 0, :]


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
    cycles: int = _MAX_CYCLES,
) -> LocalNorms:
    """`|J(x_i)|_2` with singular vectors and residuals; unlike `local_lipschitz` it returns unconverged rows too.

    Args:
        f: batch-first map, rows independent.
        x: `(n, *shape)`.
        tolerance: relative residual to reach; `None`: 1e-5, coarser for half-precision `x`.
        generator: of the random start vectors; `None`: a fixed seed.
        cycles: restarts after which a row is left as it is.
    """
    check_batch(x)
    goal = _tolerance(tolerance, x)
    dim = x[0].numel()
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
    width = max(1, _BASIS_BYTES // (16 * dim * min(_BASIS, dim)))
    parts = []
    for start in range(0, x.shape[0], width):
        index = torch.arange(start, min(x.shape[0], start + width), device=x.device)
        probe = torch.randn(index.numel(), dim, generator=generator, dtype=torch.float64, device=generator.device)
        operator = RowJacobian(select_rows(f, index), x[index], samples=index)
        parts.append(leading_singular(operator, probe.to(x.device), tolerance=goal, cycles=cycles))
    return LocalNorms(
        torch.cat([part.value for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.left for part in parts]),
        torch.cat([part.right for part in parts]),
        sum(part.products for part in parts),
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
        tolerance: relative residual; `None`: 1e-5, or 8 units of rounding of the dtype of `x` if that is coarser.
        generator: of the random start vectors; `None`: a fixed seed, so that the result repeats.

    Returns:
        `(n,)` float64. Their maximum is a lower bound of the Lipschitz constant, not the constant.

    Raises:
        InputError: bad arguments, or a row that does not converge (its residual is named).
        NonFiniteError: a product is not finite; the message names the sample.
    """
    check_batch(x)
    goal = _tolerance(tolerance, x)
    if x[0].numel() <= _DENSE_DIM:
        norms: Tensor = torch.linalg.matrix_norm(dense_jacobian(f, x), 2)
        return norms
    result = local_norms(f, x, tolerance=goal, generator=generator)
    worst = int(result.residual.argmax())
    if float(result.residual[worst]) > goal:
        raise InputError(
            f"the local norm at sample {worst} did not converge: relative residual {float(result.residual[worst]):.2g} "
            f"after {result.products} products, tolerance {goal:.2g}: raise the tolerance, or run the map in a higher "
            "precision"
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
        generator: of the random start vectors; `None`: a fixed seed.

    Returns:
        The estimate, `kind` `"sampled"` if `ascent_steps` is 0, else `"lower"`.

    Raises:
        InputError: bad arguments.
        MissingDerivativeError: the map's gradient cannot be differentiated again.
    """
    if ascent_steps < 0:
        raise InputError(f"ascent_steps = {ascent_steps}: give 0 for the samples alone, or a positive number")
    if starts < 1:
        raise InputError(f"starts = {starts}: at least one point must be moved")
    sampled = local_norms(f, x, tolerance=tolerance, generator=generator)
    value = float(sampled.value.max())
    how = f"largest |J(x)|_2 of {x.shape[0]} samples"
    if ascent_steps == 0:
        return LipschitzEstimate(value, "sampled", how)
    index = sampled.value.topk(min(starts, x.shape[0])).indices
    ascended = _ascend(select_rows(f, index), x[index].detach(), sampled, index, ascent_steps, _tolerance(tolerance, x))
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
        moved = leading_singular(RowJacobian(f, trial), right, tolerance=tolerance, basis=_MIN_STEPS, cycles=2)
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
    return _unit(gradient.detach().reshape(zero.shape).double().nan_to_num(0.0, 0.0, 0.0))[1]


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
