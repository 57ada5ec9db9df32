"""The mixture: its laws, its transports and the climb to its L2 optimum, against other routes."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, optimize

from hnkit import InputError
from hnkit.toy import PROBLEMS, Mixture
from hnkit.toy.mixture import _implicit
from tests.hnkit.functions import f64

EYE = torch.eye(2, dtype=torch.float64)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def on_the_line(weights, curvatures, slopes):
    """A mixture in one dimension."""
    return Mixture(f64(*weights), f64(*curvatures)[:, None, None], f64(*slopes)[:, None], torch.eye(1))


def three_entries():
    curvatures = torch.stack([torch.diag(f64(0.4, 1.0, 2.0)), torch.eye(3) + 0.2])
    return Mixture(f64(0.7, 1.6), curvatures, f64([0.5, -1.0, 0.2], [-0.6, 0.3, 1.1]), torch.eye(3) + f64([0, 2, 0]))


def exponent(problem, x):
    """`log sum_k w_k exp(-x'H_k x/2 + b_k'x)`, a term at a time."""
    terms = [
        w * torch.exp(-0.5 * ((x @ H) * x).sum(1) + (x * b).sum(1))
        for w, H, b in zip(problem.weights, problem.curvatures, problem.slopes, strict=True)
    ]
    return torch.log(sum(terms))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": f64(1.0, 0.0)}, "positive"),
        ({"weights": f64(1.0, -0.5)}, "positive"),
        ({"tail": 0.0}, "positive"),
        ({"curvatures": torch.stack([EYE, -2 * EYE])}, "infinite"),
    ],
)
def test_one_bad_component_or_a_flat_tail_is_refused(change, message):
    good = {"weights": f64(1.0, 2.0), "curvatures": torch.stack([EYE, EYE]), "slopes": torch.eye(2), "rotation": EYE}
    Mixture(**good)
    with pytest.raises(InputError, match=message):
        Mixture(**good | change)


@pytest.mark.parametrize(("d", "k", "available"), [(2, 1, True), (2, 2, True), (3, 2, False), (2, 3, False)])
def test_the_gap_is_known_for_two_gaussians_in_the_plane_alone(d, k, available):
    problem = Mixture(torch.ones(k), torch.zeros(k, d, d), torch.zeros(k, d), torch.eye(d))
    assert ("l2_gap" not in problem.unavailable) == available


def test_the_reward_inverts_the_generator_in_three_dimensions():
    problem, x = three_entries(), 2 * randn(40, 3)
    reward = problem.reward(problem.generate(x))
    torch.testing.assert_close(reward, exponent(problem, x), rtol=0, atol=1e-11)


def test_the_output_density_changes_variables():
    """`log p(g(x)) = log p0(x) - log|det Dg(x)|`, the Jacobian by differentiation."""
    problem, x = three_entries(), 2 * randn(40, 3)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: problem.generate(row[None])[0]))(x)
    volume = torch.linalg.slogdet(jacobian).logabsdet
    log_normal = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(problem.log_p_base(problem.generate(x)), log_normal - volume, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("curvature", "slope"), [(1.0, 0.5), (100.0, 0.0), (100.0, 15.0)])
def test_the_error_of_log_z_is_positive_and_covers_what_a_narrow_tilt_costs(curvature, slope):
    """A narrow Gaussian on a point of the coarse grid makes its sum too large, one between two points too small."""
    value, error = on_the_line([1.0], [curvature], [slope]).log_z_check()
    exact = 0.5 * (slope**2 / (1 + curvature) - math.log1p(curvature))
    assert error > 0
    assert abs(value - exact) <= error


@pytest.mark.parametrize("step", [24 / count for count in (24, 40, 48, 80, 100, 160, 161, 240)])
def test_the_grid_reaches_as_far_down_as_up(step):
    points, _ = on_the_line([1.0], [0.0], [0.0])._normal_grid(step)
    torch.testing.assert_close(points, -points.flip(0), rtol=0, atol=1e-11)


def test_quadrature_on_a_grid_stops_at_three_dimensions():
    one = Mixture(torch.ones(1), torch.zeros(1, 3, 3), torch.zeros(1, 3), torch.eye(3))
    _, weight = one._normal_grid(1.0)
    assert float(weight.exp().sum()) == pytest.approx(1, abs=1e-7)
    with pytest.raises(InputError, match="at most 3"):
        Mixture(torch.ones(1), torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.eye(4)).log_z_check()


def test_the_optimal_map_to_one_gaussian_is_affine_far_out():
    """`S b + L s` with `S = L L'`, also where all but 1e-200 of the mass is on one side."""
    H, b = f64([1.0, 0.3], [0.3, 2.0]), f64(0.5, -1.0)
    problem = Mixture(torch.ones(1), H[None], b[None], EYE)
    s = torch.cartesian_prod(f64(-30.0, -10.0, -1.0, 0.0, 2.0, 12.0, 30.0), f64(-30.0, -9.0, 0.5, 9.0, 30.0))
    S = torch.linalg.inv(EYE + H)
    expected = S @ b + s @ torch.linalg.cholesky(S).mT
    torch.testing.assert_close(s + problem.optimal_map()(s), expected, rtol=3e-13, atol=3e-13)


@pytest.mark.parametrize("near", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_a_component_without_weight_far_away_does_not_move_the_optimal_map(near, far):
    """Then `T(s) = near + s`, at an end of the interval between the quantiles of the components."""
    variance = 1e6
    problem = on_the_line([1.0, 1e-300], [0.0, 1 / variance - 1], [near, far / variance])
    s = f64([-3.0], [-0.5], [0.0], [2.0])
    torch.testing.assert_close(problem._transport(s), near + s, rtol=0, atol=5e-12)


class Climb:
    """The iterates of `_climb` for one point, and what it maximises at each of them."""

    def __init__(self, monkeypatch, problem, x, start):
        original, self.path = Mixture._gradient_and_bend, []

        def watched(self_, u):
            self.path.append(u.clone())
            return original(self_, u)

        with monkeypatch.context() as patch:
            patch.setattr(Mixture, "_gradient_and_bend", watched)
            self.end = problem._climb(x, start)
        path = torch.cat([*self.path, self.end])
        self.values = exponent(problem, path) - 0.5 * (path - x).square().sum(1)


def hilly():
    curvatures = torch.stack([f64([3.0, 0.5], [0.5, 1.0]), f64([1.0, -0.8], [-0.8, 4.0]), 0.3 * EYE])
    return Mixture(f64(1.0, 0.4, 0.7), curvatures, f64([-6.0, 1.0], [4.0, 6.0], [1.0, -2.0]), EYE)


def too_long_a_step():
    """Where Newton's method steps over the top to a lower point."""
    return on_the_line([0.96, 1.04, 0.78], [0.15, 3.7, 3.6], [1.41, 4.27, -0.73]), f64([-1.09]), f64([8.67])


@pytest.mark.parametrize("case", [lambda: (hilly(), randn(60, 2, seed=1), 3 * randn(60, 2, seed=2)), too_long_a_step])
def test_the_climb_to_the_l2_optimum_never_falls_and_ends_on_a_top(monkeypatch, case):
    problem, points, starts = case()
    for x, start in zip(points[:, None], starts[:, None], strict=True):
        climb = Climb(monkeypatch, problem, x, start)
        assert bool((climb.values.diff() >= -1e-12).all())
        assert len(climb.path) <= 25
        u = climb.end.requires_grad_()
        (slope,) = torch.autograd.grad((exponent(problem, u) - 0.5 * (u - x).square().sum(1)).sum(), u)
        assert float(slope.abs().max()) < 1e-11


@pytest.mark.parametrize("x", [0.3, 1e-3, -0.2])
def test_the_climb_is_quick_where_the_components_nearly_merge(monkeypatch, x):
    """`u (1 + h) = x + c tanh(c u)`, whose fixed-point iteration shrinks the error by 1 % a step near the merger."""
    h, c = 1.0, math.sqrt(1.98)
    problem = on_the_line([1.0, 1.0], [h, h], [-c, c])
    expected = optimize.brentq(lambda u: u * (1 + h) - x - c * math.tanh(c * u), 0, math.copysign(2, x), xtol=1e-15)
    climb = Climb(monkeypatch, problem, f64([x]), f64([math.copysign(0.9, x)]))
    assert float(climb.end) == pytest.approx(expected, abs=1e-12)
    assert len(climb.path) <= 15


@pytest.mark.parametrize("x", [[-1e6, 0.0], [0.0, 1e6], [3e5, -2e5]])
def test_the_climb_stops_once_it_has_arrived_far_out(monkeypatch, x):
    climb = Climb(monkeypatch, hilly(), f64(x), f64(x))
    assert len(climb.path) <= 25


def test_an_entry_that_arrives_at_once_does_not_stop_the_climb_of_the_others():
    """The second entry is the same in both components, so its first step is exact."""
    h, c = 1.0, 1.3
    curvatures = torch.stack([torch.diag(f64(h, 2.0))] * 2)
    problem = Mixture(torch.ones(2), curvatures, f64([-c, 0.5], [c, 0.5]), EYE)
    x = f64([0.4, 1.0])
    u = optimize.brentq(lambda u: u * (1 + h) - 0.4 - c * math.tanh(c * u), 0, 3, xtol=1e-15)
    torch.testing.assert_close(x + problem.l2_map()(x), f64([u, 0.5]), rtol=0, atol=1e-12)


def test_the_l2_map_of_a_point_does_not_depend_on_its_company():
    f, x = PROBLEMS["mixture"]().l2_map(), randn(30, 2)
    alone = torch.cat([f(row[None]) for row in x])
    torch.testing.assert_close(alone, f(x), rtol=0, atol=1e-11)


def test_the_l2_map_finds_the_highest_of_all_tops():
    """Three narrow hills on one side of 0, against a fine grid."""
    modes, curvature = (1.0, 2.5, 4.0), 20.0
    weights = [math.exp(-0.5 * curvature * m * m + 0.3 * m * m) for m in modes]
    problem = on_the_line(weights, [curvature] * 3, [curvature * m for m in modes])
    x = torch.linspace(-4, 6, 41, dtype=torch.float64)
    grid = torch.linspace(-1, 6, 7001, dtype=torch.float64)
    height = exponent(problem, grid[:, None]) - 0.5 * (grid - x[:, None]).square()
    best = grid[height.argmax(1)]
    assert best.round().unique().numel() > 2
    torch.testing.assert_close(x + problem.l2_map()(x[:, None])[:, 0], best, rtol=0, atol=1e-3)


def l2_gap_on_the_line(weights, curvatures, slopes):
    """The same divergence by adaptive quadrature over the values of the map, between which lies its jump."""
    terms = list(zip(weights, curvatures, slopes, strict=True))

    def rho(u):
        """The exponent and its first two derivatives."""
        parts = [w * math.exp(-0.5 * h * u * u + b * u) for w, h, b in terms]
        pulls = [b - h * u for _, h, b in terms]
        total = math.fsum(parts)
        first = math.fsum(p * g for p, g in zip(parts, pulls, strict=True)) / total
        square = math.fsum(p * (g * g - h) for p, g, (_, h, _) in zip(parts, pulls, terms, strict=True)) / total
        return math.log(total), first, square - first**2

    def source(u):
        return u - rho(u)[1]

    def height(u, x):
        return rho(u)[0] - 0.5 * (u - x) ** 2

    grid = [0.001 * i - 9 for i in range(18001)]
    falling = [u for u in grid if rho(u)[2] > 1]
    top, dip = min(falling), max(falling)  # between them no point is the image of another

    def feet(x):
        left = optimize.brentq(lambda u: source(u) - x, -9, top, xtol=1e-15)
        return left, optimize.brentq(lambda u: source(u) - x, dip, 9, xtol=1e-15)

    def lead(x):
        left, right = feet(x)
        return height(right, x) - height(left, x)

    left, right = feet(optimize.brentq(lead, source(dip), source(top), xtol=1e-15))
    log_z = math.log(sum(w * math.exp(0.5 * b * b / (1 + h)) / math.sqrt(1 + h) for w, h, b in terms))

    def integrand(u):
        x, (value, _, second) = source(u), rho(u)
        log_density = -0.5 * x * x - 0.5 * math.log(2 * math.pi) + math.log(1 - second)
        return math.exp(log_density) * (log_density + 0.5 * u * u + 0.5 * math.log(2 * math.pi) - value + log_z)

    pieces = [integrate.quad(integrand, *ends, epsabs=1e-13, epsrel=1e-12) for ends in ((-9, left), (right, 9))]
    return math.fsum(value for value, _ in pieces)


@pytest.mark.parametrize(
    ("axis", "weights", "curvatures", "slopes"),
    [
        ((-0.6, 0.8), (0.9, 0.4), (0.5, 1.5), (-3.0, 2.5)),
        ((0.0, 1.0), (1.0, 0.2), (0.5, 0.9), (-2.8, 2.8)),
        ((1.0, 0.0), (1.0, 1e-4), (0.5, 0.9), (1.0, 6.5)),  # both on one side of 0
    ],
)
def test_the_l2_gap_is_that_of_the_line_along_which_the_components_differ(axis, weights, curvatures, slopes):
    """Across it both have curvature h and slope c, which adds (S - 1 - log S)/2; turning the plane changes nothing."""
    h, c = 0.7, 0.9
    turn = f64([axis[0], -axis[1]], [axis[1], axis[0]])
    H = torch.stack([turn @ torch.diag(f64(along, h)) @ turn.mT for along in curvatures])
    b = torch.stack([turn @ f64(along, c) for along in slopes])
    S = 1 / (1 + h)
    expected = l2_gap_on_the_line(weights, curvatures, slopes) + 0.5 * (S - 1 - math.log(S))
    assert Mixture(f64(*weights), H, b, EYE).l2_gap() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("narrow", "curvature", "slope"), [(20.0, 30.0, 5.0), (3.0, 8.0, 0.0)])
def test_the_l2_gap_is_refused_where_a_narrow_component_draws_points_from_both_sides(narrow, curvature, slope):
    """The map then jumps twice along a line, in and out of the reach of the narrow one."""
    curvatures, slopes = torch.stack([0 * EYE, curvature * EYE]), f64([0.0, 0.0], [slope, 0.0])
    problem = Mixture(f64(1.0, narrow), curvatures, slopes, EYE)
    assert "l2_gap" in problem.unavailable
    with pytest.raises(InputError, match="curvatures"):
        problem.l2_gap()


def test_the_derivative_of_an_implicit_solution_ignores_how_its_value_was_found():
    """`T^3 + T = x`: `T' = 1/(1 + 3 T^2)`, `T'' = -6 T T'^3`, whatever graph the given root carries."""
    x = f64([0.5], [2.0], [-3.0]).requires_grad_()
    root = f64(*[[optimize.brentq(lambda t, s=s: t**3 + t - s, -3, 3, xtol=1e-15)] for s in x.flatten().tolist()])
    T = _implicit(x, root + 5 * (x - x.detach()), lambda T, x: x - T**3 - T)
    (first,) = torch.autograd.grad(T.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    slope = 1 / (1 + 3 * root.square())
    torch.testing.assert_close(T.detach(), root, rtol=0, atol=1e-14)
    torch.testing.assert_close(first.detach(), slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, -6 * root * slope**3, rtol=1e-12, atol=1e-12)


def test_the_default_generator_turns_the_plane():
    rotation = PROBLEMS["mixture"]().rotation
    torch.testing.assert_close(rotation @ rotation.mT, EYE, rtol=0, atol=1e-7)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-7)


def test_the_default_problem_has_symmetric_curvatures_and_an_l2_optimum_that_jumps():
    problem = PROBLEMS["mixture"]()
    assert torch.equal(problem.curvatures, problem.curvatures.mT)
    x = torch.linspace(-4, 4, 2001, dtype=torch.float64)[:, None] * f64([1.0, 0.0])
    steps = (x + problem.l2_map()(x)).diff(dim=0).norm(dim=1)
    assert float(steps.max()) > 100 * float((x[1] - x[0]).norm())
