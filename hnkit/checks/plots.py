"""What the plots of `verify-bound` show: data from the maps, drawn by `hnkit.output.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from hnkit.bounds import BOUNDS
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.reference_maps import contraction
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.figures.table import FIGURES
from hnkit.internal.stats import Estimate
from hnkit.jacobian import dense_jacobian
from hnkit.linalg.matrices import MatrixNumbers
from hnkit.maps import NoiseMap
from hnkit.output.page import format_number
from hnkit.output.plots import Plot, densities, error_against_lipschitz, exact_against_l2, kl_split

_LEVELS = np.linspace(0.02, 0.98, 49)
_MATRICES = 16


def map_plots(measured: MeasuredMap) -> list[Plot]:
    """The plots of one map."""
    return [*_own_bounds(measured), _scatter(measured), _split([measured])]


def _own_bounds(measured: MeasuredMap) -> list[Plot]:
    """The bounds for the Jacobians of this map, with its own L marked; none for f = 0, or in too many dimensions."""
    rows = measured.rows_or_none
    if rows is None or not bool((rows.norm > 0).any()):
        return []
    J = dense_jacobian(*measured.first(_MATRICES if measured.dim <= 64 else 4)).cpu()
    try:
        own = measured.lower.value if measured.certified_constant is None else measured.certified_constant
    except NotApplicable:  # products with J are missing
        own = float(rows.norm.max())
    whose = "the largest local norm that was found" if measured.certified_constant is None else "its certified constant"
    return [_bounds_plot(J, f"the Jacobians of {measured.name}, scaled to norm L", own, whose)]


def toy_plots(maps: Sequence[MeasuredMap], problems: Sequence[MeasuredProblem]) -> list[Plot]:
    """The plots of a run on closed-form problems."""
    if len(maps) == 1:
        plots = _own_bounds(maps[0])
        return [*plots, *_densities(problems), _split(maps), _scatter(maps[0])]
    dim = 32
    x = torch.randn(_MATRICES, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = dense_jacobian(contraction(dim, 0.9, width=64), x)
    plots = [_bounds_plot(J, f"a two-layer network, d = {dim}, scaled to norm L")]
    plots += _densities(problems)
    if maps:
        plots.append(_split(maps))
        widest = max(maps, key=lambda measured: _spread(measured))
        plots.append(_scatter(widest))
    return plots


def _densities(problems: Sequence[MeasuredProblem]) -> list[Plot]:
    """The densities of each problem that has one dimension and all it takes to draw them."""
    needed = {"log_p0_star", "optimal_map", "l2_map"}
    return [_density_plot(known) for known in problems if known.dim == 1 and not needed & known.problem.unavailable]


def _spread(measured: MeasuredMap) -> float:
    """How much there is to see in the scatter: the spread of the integrand and of the L2 term's error."""
    return float(measured.error.std(correction=0)) if measured.dim > 1 else -1.0


def _bounds_plot(J: Tensor, what: str, own: float | None = None, whose: str = "") -> Plot:
    """`E(t J)` for `t J` of norm L, and the bounds on it, over a grid of L; `own` is the map's, marked as `whose`."""
    J = J[torch.linalg.matrix_norm(J, ord=2) > 0]
    unit = MatrixNumbers(J / torch.linalg.matrix_norm(J, ord=2)[:, None, None])
    at = [unit.scaled(float(level)) for level in _LEVELS]
    error = torch.stack([numbers.error.abs().mean() for numbers in at])
    half = torch.stack([(numbers.trace_square / 2).abs().mean() for numbers in at])
    bounds = {
        bound.label: torch.stack([bound.right(numbers).mean() for numbers in at])
        for bound in BOUNDS.values()
        if bound.left_label in ("|E(A)|", "E(A)")
    }
    curves = {"E(J), exact": error.numpy(), "tr(J²)/2": half.numpy()}
    inside = own is not None and own <= _LEVELS[-1]
    place = int(np.abs(_LEVELS - own).argmin()) if own is not None and inside else len(_LEVELS) // 2
    loose = float(bounds["Theorem 7"][place] / error[place])
    where = f"At its L = {format_number(own, 3)}" if inside else f"At L = {_LEVELS[place]:.2g}"
    title = f"{where} the bound of Theorem 7 is {format_number(loose, 3)} times E(J)"
    caption = (
        f"The log-det error term against the Lipschitz constant, for {what}, with its bounds: the L2 approximation "
        "drops exactly this term."
    )
    if own is not None:
        caption += f" Marked: {whose}."
    drawn = {name: np.asarray(values) for name, values in bounds.items()}
    return Plot(
        "error-against-lipschitz", caption, partial(error_against_lipschitz, _LEVELS, curves, drawn, title, own)
    )


def _scatter(measured: MeasuredMap) -> Plot:
    exact = measured.stein.per_sample.cpu().numpy()
    l2 = measured.half_square[: len(exact)].cpu().numpy()
    rows = measured.rows_or_none
    second = None
    if rows is not None and len(rows.trace) == len(exact):
        second = (measured.half_square + rows.trace_square / 2).cpu().numpy()
    gap = (l2.mean() - exact.mean()) / exact.mean() if exact.mean() else 0.0
    verb = "misses" if gap < 0 else "adds"
    title = f"{measured.name}: the L2 term {verb} {100 * abs(gap):.1f} % of the KL"
    caption = (
        f"{measured.name}: the exact integrand of the KL at every sample against its approximations. On the diagonal "
        "the approximation is exact."
    )
    return Plot("exact-against-l2", caption, partial(exact_against_l2, exact, l2, title, second))


def _split(maps: Sequence[MeasuredMap]) -> Plot:
    """The KL of each map as mean shift, fluctuation, second-order term, and what is left."""
    kept = [measured for measured in maps if measured.rows_or_none is not None]
    kept = kept or list(maps)
    names = [measured.name for measured in kept]
    totals = [_value("kl", measured) for measured in kept]
    shift, fluctuation, second, rest = [], [], [], []
    for measured, total in zip(kept, totals, strict=True):
        mean = 0.5 * float(measured.value.double().flatten(1).mean(0).square().sum())
        half = _value("l2", measured)
        quadratic = _value("second_order", measured) if measured.rows_or_none is not None else 0.0
        shift.append(mean)
        fluctuation.append(half - mean)
        second.append(quadratic)
        rest.append(total - half - quadratic)
    parts = {
        "|E f|²/2": shift,
        "Var(f)/2": fluctuation,
        "tr(J²)/2": second,
        "higher orders": rest,
    }
    if all(measured.rows_or_none is None for measured in kept):
        parts = {"|E f|²/2": shift, "Var(f)/2": fluctuation, "E(J)": [a + b for a, b in zip(second, rest, strict=True)]}
    caption = (
        "The split of the KL: the L2 term is the two solid parts alone, mean shift and fluctuation; the hatched ones "
        "are E(J)."
    )
    return Plot("kl-split", caption, partial(kl_split, names, parts, totals, "What the KL is made of"))


def _value(key: str, measured: MeasuredMap) -> float:
    """A figure of the table without its error."""
    reading = FIGURES[key].read(measured)
    return reading.value if isinstance(reading, Estimate) else reading


def _density_plot(measured: MeasuredProblem) -> Plot:
    """Base, tilted, and learned densities of a one-dimensional problem."""
    problem = measured.problem
    spread = torch.cat([measured.x, measured.tilted_noise]).flatten()
    low, high = float(spread.quantile(0.001)) - 0.3, float(spread.quantile(0.999)) + 0.3
    grid = np.linspace(low, high, 601)
    points = torch.from_numpy(grid)[:, None]
    target = problem.log_p0_star(points).exp().numpy()
    curves = {
        "base  p₀": np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi),
        "tilted  p₀*": target,
        "optimum of the L2 loss": _pushed_density(problem.l2_map(), grid),
        "optimum of the exact loss": _pushed_density(problem.optimal_map(), grid),
    }
    title = f"{problem.name}: the L2 optimum is {problem.l2_gap():.3g} nats from the target"
    caption = (
        f"{problem.statement}. What minimises the L2 loss is the proximal map, which draws the noise together at the "
        "maxima of the reward; the exact loss reaches the tilted law."
    )
    return Plot(f"densities-{problem.name}", caption, partial(densities, grid, curves, title))


def _pushed_density(f: NoiseMap, grid: np.ndarray) -> np.ndarray:
    """Density of `T x` on the cells of a grid, for increasing T: differences of `Phi(T^-1)`; jumps leave gaps."""
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    with torch.no_grad():
        moved = np.maximum.accumulate((x + f(x[:, None]).flatten()).numpy())
    half = (grid[1] - grid[0]) / 2
    edges = np.append(grid - half, grid[-1] + half)
    mass = ndtr(np.interp(edges, moved, x.numpy(), left=-np.inf, right=np.inf))
    density: np.ndarray = np.diff(mass) / (2 * half)
    return density
