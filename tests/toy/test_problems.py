"""One loop over every listed problem: a new toy gets all of these by being listed.

Statistical comparisons use fixed seeds and Student's z at 4.8 standard errors: a false alarm of 2e-6 each, about
1e-4 for the whole file.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from hnkit import InputError
from hnkit.backend import load_installed
from hnkit.internal.stats import mean_and_stderr
from hnkit.tilt import TiltedProblem, log_standard_normal, log_z_monte_carlo, optimality_gap
from hnkit.toy import PROBLEMS

Z = 4.8
MAPS = ("optimal_map", "l2_map")


@pytest.fixture(scope="module", params=sorted(PROBLEMS))
def problem(request) -> TiltedProblem:
    return PROBLEMS[request.param]()


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(problem, n, seed=0):
    return torch.randn(n, *problem.noise_shape, dtype=torch.float64, generator=rng(seed))


def log_tilt(problem, x):
    return problem.reward(problem.generate(x)) / problem.alpha


def jacobian(f, x):
    """Dense Jacobians by one reverse pass for each output entry, sharing nothing with hnkit.jacobian."""
    x = x.clone().requires_grad_()
    y = f(x)
    rows = []
    for i in range(y.shape[1]):
        grad = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True, allow_unused=True)[0]
        rows.append(torch.zeros_like(x) if grad is None else grad)
    return torch.stack(rows, 1)


def assert_mean(samples, expected, error=0.0):
    mean, stderr = mean_and_stderr(samples)
    assert abs(mean - expected) <= Z * stderr + error + 1e-12, (mean, expected, stderr)


def features(x):
    """Test functions of a law: entries, products, a bounded nonlinear one."""
    rows = x.flatten(1)
    squares = (rows[:, :, None] * rows[:, None, :]).flatten(1)
    return torch.cat([rows, squares, torch.tanh(rows), torch.cos(2 * rows)], 1)


def assert_same_law(a, b):
    for one, two in zip(features(a).mT, features(b).mT, strict=True):
        (m1, s1), (m2, s2) = mean_and_stderr(one), mean_and_stderr(two)
        assert abs(m1 - m2) <= Z * math.hypot(s1, s2) + 1e-12
    for one, two in zip(a.flatten(1).mT, b.flatten(1).mT, strict=True):
        assert stats.ks_2samp(one.numpy(), two.numpy()).pvalue > 1e-6


def test_is_a_tilted_problem_and_installed(problem):
    assert isinstance(problem, TiltedProblem)
    assert problem.name in PROBLEMS
    assert load_installed("hnkit.problems", "toy")[problem.name] is PROBLEMS[problem.name]
    assert problem.statement
    assert "\n" not in problem.statement


def test_log_z_by_two_routes_and_by_monte_carlo(problem):
    value, error = problem.log_z_check()
    assert error < 1e-7
    assert abs(problem.log_z() - value) <= error + 1e-11
    estimate, stderr = log_z_monte_carlo(problem, 40_000, rng(1))
    assert abs(estimate - problem.log_z()) <= Z * stderr
    weights = (log_tilt(problem, noise(problem, 40_000, 2)) - problem.log_z()).exp()
    assert_mean(weights, 1.0)


def test_tilted_noise_density_is_the_tilt_of_the_base(problem):
    x = torch.cat([noise(problem, 500), problem.sample_p0_star(500, rng(3)), 2.5 * noise(problem, 200, 4)])
    expected = log_standard_normal(x) + log_tilt(problem, x) - problem.log_z()
    torch.testing.assert_close(problem.log_p0_star(x), expected, rtol=1e-10, atol=1e-9)


def test_output_densities(problem):
    y = problem.generate(torch.cat([noise(problem, 500), problem.sample_p0_star(500, rng(5))]))
    expected = problem.log_p_base(y) + problem.reward(y) / problem.alpha - problem.log_z()
    torch.testing.assert_close(problem.log_p_star(y), expected, rtol=1e-10, atol=1e-9)


def test_densities_integrate_to_one(problem):
    # importance sampling from a Gaussian twice as wide, in noise space
    x = 2 * noise(problem, 200_000, 6)
    proposal = log_standard_normal(x / 2) - x[0].numel() * math.log(2)
    assert_mean((problem.log_p0_star(x) - proposal).exp(), 1.0)
    if len(problem.noise_shape) == 1 and problem.noise_shape[0] == 1:
        total, error = integrate.quad(
            lambda t: float(problem.log_p0_star(torch.tensor([[t]], dtype=torch.float64)).exp()), -12, 12, limit=400
        )
        assert abs(total - 1) <= error + 1e-9


def test_sampler_has_the_density(problem):
    # its moments are those of base samples with the weights p0*/p0, which are bounded or nearly so
    x = problem.sample_p0_star(60_000, rng(7))
    base = noise(problem, 60_000, 8)
    weight = (problem.log_p0_star(base) - log_standard_normal(base)).exp()
    for mine, weighted in zip(features(x).mT, (features(base) * weight[:, None]).mT, strict=True):
        (m1, s1), (m2, s2) = mean_and_stderr(mine), mean_and_stderr(weighted)
        assert abs(m1 - m2) <= Z * math.hypot(s1, s2) + 1e-12


def test_outputs_of_the_tilted_noise_have_the_tilted_output_law(problem):
    """Theorem 3, part 1."""
    y = problem.generate(problem.sample_p0_star(20_000, rng(9)))
    assert_same_law(y, problem.sample_p_star(20_000, rng(10)))
    base = problem.generate(noise(problem, 60_000, 11))
    weight = (problem.log_p_star(base) - problem.log_p_base(base)).exp()
    for mine, weighted in zip(features(y).mT, (features(base) * weight[:, None]).mT, strict=True):
        (m1, s1), (m2, s2) = mean_and_stderr(mine), mean_and_stderr(weighted)
        assert abs(m1 - m2) <= Z * math.hypot(s1, s2) + 1e-12


def test_optimal_map_changes_variables_exactly(problem):
    """`log p0(x) = log p0*(T x) + log|det DT|` at every point, also far out."""
    x = torch.cat([noise(problem, 1500, 12), 2.5 * noise(problem, 200, 13)])
    f = problem.optimal_map()
    J = jacobian(f, x) + torch.eye(x.shape[1])
    with torch.no_grad():
        T = x + f(x)
    residual = log_standard_normal(x) - problem.log_p0_star(T) - torch.linalg.slogdet(J).logabsdet
    assert float(residual.abs().max()) < 1e-9


def test_optimal_map_pushes_the_base_to_the_tilted_law(problem):
    x = noise(problem, 20_000, 14)
    with torch.no_grad():
        T = x + problem.optimal_map()(x)
    assert_same_law(T, problem.sample_p0_star(20_000, rng(15)))


@pytest.mark.parametrize("name", MAPS)
def test_derivatives_of_the_maps_are_those_of_their_values(problem, name):
    """Central differences; the maps give their derivatives by formulas, so the values must not drift from them."""
    f = getattr(problem, name)()
    x = noise(problem, 200, 16)
    J = jacobian(f, x)
    h = 1e-5
    wrong = 0
    for i in range(x.shape[1]):
        e = torch.zeros_like(x)
        e[:, i] = h
        with torch.no_grad():
            change = (f(x + e) - f(x - e)) / (2 * h)
        wrong += int(((change - J[:, :, i]).abs().amax(1) > 1e-5 * (1 + J.abs().amax())).sum())
    # a difference that straddles a kink or a jump disagrees; 2e-5 wide, it meets one of 200 points with p < 0.01
    assert wrong <= 1


@pytest.mark.parametrize("name", MAPS)
def test_second_derivatives(problem, name):
    f = getattr(problem, name)()
    x = noise(problem, 30, 17).requires_grad_()
    direction = torch.ones_like(x) / math.sqrt(x.shape[1])

    def slope(points):
        (grad,) = torch.autograd.grad((f(points) * direction).sum(), points, create_graph=True)
        return (grad * direction).sum(1)

    first = slope(x)
    second = torch.autograd.grad(first.sum(), x, allow_unused=True)[0] if first.requires_grad else None
    second = torch.zeros_like(x) if second is None else second  # affine on pieces
    h = 1e-5
    ahead, behind = ((x + s * h * direction).detach().requires_grad_() for s in (1, -1))
    numeric = (slope(ahead) - slope(behind)).detach() / (2 * h)
    deviation = (numeric - (second * direction).sum(1)).abs()
    assert int((deviation > 1e-4 * (1 + numeric.abs())).sum()) <= 1


def test_forward_mode_agrees_with_reverse_mode(problem):
    from hnkit.jacobian import dense_jacobian

    x = noise(problem, 20, 18)
    for name in MAPS:
        f = getattr(problem, name)()
        torch.testing.assert_close(dense_jacobian(f, x, mode="forward"), jacobian(f, x), rtol=1e-10, atol=1e-10)


def test_l2_map_is_the_proximal_map(problem):
    """No point of a large random cloud, or of the segment to x, beats it."""
    x = noise(problem, 300, 19)
    with torch.no_grad():
        best = x + problem.l2_map()(x)

    def objective(u):
        return log_tilt(problem, u) - 0.5 * (u - x).square().sum(1)

    reached = objective(best)
    generator = rng(20)
    for scale in (2.0, 0.5, 0.1, 1e-2, 1e-4):
        for centre in (x, best):
            for _ in range(30):
                step = scale * torch.randn(x.shape, dtype=torch.float64, generator=generator)
                assert bool((objective(centre + step) <= reached + 1e-10).all())
    for t in np.linspace(0, 1.5, 31):
        assert bool((objective(x + float(t) * (best - x)) <= reached + 1e-10).all())


def test_l2_map_is_stationary_where_it_is_smooth(problem):
    x = noise(problem, 200, 21)
    with torch.no_grad():
        u = x + problem.l2_map()(x)
    point = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_tilt(problem, point).sum(), point)
    residual = (gradient + x - u).abs().amax(1)
    if problem.l2_gap() == math.inf:
        # points that were moved onto the edge of the reward: no derivative there
        on_edge = (u - x).abs().amax(1) > 0
        assert bool(on_edge.any())
        residual = residual[~on_edge]
    assert float(residual.max()) < 1e-9


def test_kl_of_the_optimum_by_independent_routes(problem):
    # as a mean of the log ratio under p0*, and as a self-weighted mean under p0
    x = problem.sample_p0_star(60_000, rng(22))
    assert_mean(problem.log_p0_star(x) - log_standard_normal(x), problem.kl_optimal())
    base = noise(problem, 60_000, 23)
    exponent = log_tilt(problem, base) - problem.log_z()
    assert_mean(exponent.exp() * exponent, problem.kl_optimal())
    y = problem.generate(x)  # data processing is an equality: the ratio of the laws is a function of g
    assert_mean(problem.log_p_star(y) - problem.log_p_base(y), problem.kl_optimal())


def test_l2_gap_by_an_independent_route(problem):
    x = noise(problem, 20_000, 24)
    f = problem.l2_map()
    det = torch.linalg.slogdet(jacobian(f, x) + torch.eye(x.shape[1])).logabsdet
    with torch.no_grad():
        u = x + f(x)
    if problem.l2_gap() == math.inf:
        # positive mass where the map is singular: the law has no density
        singular = (det < -20).double()
        assert float(singular.mean()) > 0.05
        return
    assert problem.l2_gap() >= 0
    assert_mean(log_standard_normal(x) - det - problem.log_p0_star(u), problem.l2_gap())


def test_optimality_gap_vanishes_at_the_optimum_and_is_positive_elsewhere(problem):
    x = noise(problem, 400, 25)
    best = optimality_gap(problem, problem.optimal_map(), x)
    assert float(best.per_sample.abs().max()) < 1e-9
    nothing = optimality_gap(problem, lambda x: 0.0 * x, x)
    assert nothing.kl == pytest.approx(0.0, abs=1e-12)
    # J_noise(0) + log Z* = KL(p0 || p0*) = log Z* - E[rho]
    expected = problem.log_z() - float(log_tilt(problem, x).mean())
    assert nothing.value == pytest.approx(expected, rel=1e-10)
    assert nothing.value > 0
    assert nothing.kind == ("gap" if nothing.certified else "lower bound")


def test_stein_form_of_the_gap(problem):
    """The Stein form has another integrand and the same mean; both maps used here are Lipschitz."""
    x = noise(problem, 4000, 26)
    gap = optimality_gap(problem, problem.optimal_map(), x, form="stein")
    assert abs(gap.value) <= Z * gap.stderr + 1e-9


def test_alternatives_have_the_same_outputs_and_a_larger_divergence(problem):
    """Theorem 3, part 2."""
    if "alternatives" in problem.unavailable:
        assert problem.injective
        with pytest.raises(InputError, match="alternatives"):
            problem.alternatives()
        return
    assert not problem.injective
    target = problem.sample_p_star(20_000, rng(27))
    laws = problem.alternatives()
    assert len(laws) >= 2
    for seed, law in enumerate(laws):
        x = law.sample(20_000, rng(100 + seed))
        assert_same_law(problem.generate(x), target)
        assert law.kl > problem.kl_optimal() + 1e-3


def test_data_processing(problem):
    """`KL(g_# q || g_# p0) <= KL(q || p0)`: equality at p0*, strict at the alternatives."""
    y = problem.sample_p_star(30_000, rng(28))
    output, stderr = mean_and_stderr(problem.log_p_star(y) - problem.log_p_base(y))
    assert output <= problem.kl_optimal() + Z * stderr
    if "alternatives" not in problem.unavailable:
        assert all(output < law.kl - Z * stderr for law in problem.alternatives())


def test_unavailable_members_say_so(problem):
    for member in problem.unavailable:
        with pytest.raises(InputError, match=member):
            getattr(problem, member)(*([torch.eye(1), torch.zeros(1)] if member == "gap_of_affine" else []))


def test_discontinuous_maps_are_declared(problem):
    """Along random lines the optimal map never jumps; a jump of the L2 map is declared."""
    a, b = 3 * noise(problem, 12, 29)[:, None], 3 * noise(problem, 12, 30)[:, None]
    lines = a + torch.linspace(0, 1, 501, dtype=torch.float64)[:, None] * (b - a)
    jumped = set()
    for name in MAPS:
        points = lines.flatten(0, 1)
        with torch.no_grad():
            T = (points + getattr(problem, name)()(points)).reshape(lines.shape)
        steps, spacing = (T[:, 1:] - T[:, :-1]).norm(dim=2), (lines[:, 1:] - lines[:, :-1]).norm(dim=2)
        if bool((steps > 20 * spacing).any()):
            jumped.add(name)
    assert jumped == set(problem.discontinuous)


def test_temperature(problem):
    if problem.name == "mixture":
        assert problem.with_alpha(problem.alpha) is problem
        with pytest.raises(InputError, match="alpha"):
            problem.with_alpha(2 * problem.alpha)
    else:
        colder = problem.with_alpha(2 * problem.alpha)
        assert colder.alpha == 2 * problem.alpha
        value, error = colder.log_z_check()
        assert abs(colder.log_z() - value) <= error + 1e-11
        assert colder.log_z() != problem.log_z()
        with pytest.raises(InputError, match="alpha"):
            problem.with_alpha(0.0)


def test_no_samples_is_refused(problem):
    with pytest.raises(InputError, match="samples"):
        problem.sample_p0_star(0, rng(0))


def test_samplers_are_reproducible(problem):
    assert torch.equal(problem.sample_p0_star(50, rng(3)), problem.sample_p0_star(50, rng(3)))
