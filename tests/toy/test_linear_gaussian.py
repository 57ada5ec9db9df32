"""Item e on the linear-Gaussian problems: what each loss learns."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit import InputError
from hnkit.tilt import affine_coefficients
from hnkit.toy import PROBLEMS, LinearGaussian

NAMES = ["linear-gaussian", "linear-gaussian-low-rank", "linear-reward"]


def expected_loss(problem, K, c, kind):
    """The population loss of `T x = K x + c`, written out: E of quadratic forms of a standard normal."""
    d = problem.dim
    J = K - torch.eye(d, dtype=K.dtype)
    H, b = problem.hessian, problem.gradient
    kl = 0.5 * (J.square().sum() + c.square().sum())
    if kind == "second-order":
        kl = kl + 0.5 * torch.trace(J @ J)
    elif kind == "exact":
        kl = kl + torch.trace(J) - torch.linalg.slogdet(K).logabsdet
    reward = -0.5 * (torch.trace(K.mT @ H @ K) + c @ H @ c) + b @ c
    return kl - reward


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["l2", "second-order", "exact"])
def test_minimising_each_loss_numerically_finds_its_optimum(name, kind):
    problem = PROBLEMS[name]()
    d = problem.dim
    optimum = {"l2": problem.l2_map, "second-order": problem.second_order_map, "exact": problem.optimal_map}[kind]()
    K_star, c_star = affine_coefficients(optimum, d)
    # stationary and, started at the identity, reached: all steps from there stay symmetric
    K = torch.eye(d, dtype=torch.float64, requires_grad=True)
    c = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [K, c], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = expected_loss(problem, K, c, kind)
        loss.backward()
        return loss

    solver.step(closure)
    torch.testing.assert_close(c.detach(), c_star, atol=1e-6, rtol=0)
    torch.testing.assert_close(K.detach(), K_star, atol=1e-6, rtol=0)
    torch.testing.assert_close(c_star, problem.mean)
    gap = {"l2": problem.l2_gap, "second-order": problem.second_order_gap, "exact": lambda: 0.0}[kind]()
    assert problem.gap_of_affine(K_star, c_star) == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_learned_covariances(name):
    problem = PROBLEMS[name]()
    S = problem.covariance
    for f, expected in ((problem.optimal_map(), S), (problem.l2_map(), S @ S)):
        K, _ = affine_coefficients(f, problem.dim)
        torch.testing.assert_close(K @ K.mT, expected)


@pytest.mark.parametrize("name", ["linear-gaussian", "linear-gaussian-low-rank"])
def test_second_order_lands_in_between(name):
    problem = PROBLEMS[name]()
    assert 0 < problem.second_order_gap() < problem.l2_gap()
    slopes = {}
    for kind in ("l2_map", "second_order_map", "optimal_map"):
        K, _ = affine_coefficients(getattr(problem, kind)(), problem.dim)
        slopes[kind] = torch.linalg.eigvalsh(K)
    assert bool((slopes["l2_map"] <= slopes["second_order_map"] + 1e-12).all())
    assert bool((slopes["second_order_map"] <= slopes["optimal_map"] + 1e-12).all())


def test_closed_forms_in_one_dimension():
    problem = LinearGaussian(torch.tensor([[2.0]]), torch.tensor([[1.5]]), torch.tensor([1.0]), alpha=2.0)
    h, b = 4 * 1.5 / 2, 2 * 1.0 / 2
    s = 1 / (1 + h)
    assert float(problem.covariance) == pytest.approx(s)
    assert float(problem.mean) == pytest.approx(s * b)
    assert problem.log_z() == pytest.approx(0.5 * math.log(s) + 0.5 * s * b * b)
    assert problem.l2_gap() == pytest.approx((s - 1 - math.log(s)) / 2)
    assert problem.kl_optimal() == pytest.approx((s + (s * b) ** 2 - 1 - math.log(s)) / 2)
    assert float(affine_coefficients(problem.second_order_map(), 1)[0]) == pytest.approx(2 * s / (1 + s))


def test_skew_fields_on_the_kernel_cost_the_second_order_loss_nothing():
    """The second-order optimum is not unique where the reward is flat; the exact loss has no such directions."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    K, c = affine_coefficients(problem.second_order_map(), problem.dim)
    kernel = torch.linalg.eigh(problem.hessian).eigenvectors[:, :2]
    turn = kernel @ torch.tensor([[0.0, 0.7], [-0.7, 0.0]], dtype=torch.float64) @ kernel.mT
    loss = expected_loss(problem, K, c, "second-order")
    assert float(expected_loss(problem, K + turn, c, "second-order")) == pytest.approx(float(loss), abs=1e-12)
    assert problem.gap_of_affine(K + turn, c) > problem.second_order_gap() + 0.05


def test_off_the_support_the_output_density_vanishes():
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    y = problem.generate(torch.ones(1, 8, dtype=torch.float64))
    normal = torch.linalg.svd(problem.weight).U[:, 2]
    assert math.isfinite(float(problem.log_p_star(y)))
    assert float(problem.log_p_star(y + 0.1 * normal)) == -math.inf
    assert float(problem.log_p_base(y + 0.1 * normal)) == -math.inf


def test_a_reward_that_grows_too_fast_is_refused():
    eye = torch.eye(2)
    LinearGaussian(eye, -0.9 * eye, torch.zeros(2))
    with pytest.raises(InputError, match="infinite"):
        LinearGaussian(eye, -eye, torch.zeros(2))
    with pytest.raises(InputError, match="infinite"):
        LinearGaussian(eye, -0.9 * eye, torch.zeros(2)).with_alpha(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), torch.eye(3), torch.zeros(2)), "shapes"),
        ((torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2)), "symmetric"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(3)), "offset"),
        ((torch.eye(2) * math.nan, torch.eye(2), torch.zeros(2)), "finite"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), None, -1.0), "alpha"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), None, math.nan), "alpha"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        LinearGaussian(*arguments)


def test_gap_of_affine_checks_its_shapes():
    problem = PROBLEMS["linear-gaussian"]()
    with pytest.raises(InputError, match="shapes"):
        problem.gap_of_affine(torch.eye(5), torch.zeros(6))
    assert problem.gap_of_affine(torch.zeros(6, 6), torch.zeros(6)) == math.inf
