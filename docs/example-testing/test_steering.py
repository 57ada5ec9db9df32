import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering import Steering, gaussian_kl
from torch import nn

from hnkit import NoiseLoss, lipschitz_upper
from hnkit.testing import (
    assert_bounds,
    assert_kl,
    assert_kl_identity,
    assert_lipschitz,
    assert_moments,
    assert_noise_loss,
    assert_rows_independent,
    assert_theorem7,
    assert_zero_at_init,
    lipschitz_maps,
    matrices,
    noise,
    tilted_gaussians,
)

settings.register_profile("example", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("example")


def trained(dim: int, scale: float = 0.4) -> Steering:
    """What a training run might have left: a scale that is not zero."""
    torch.manual_seed(0)
    module = Steering(dim).double()
    nn.init.constant_(module.scale, scale)
    return module


def gaussian(rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_fresh_network_steers_nothing_but_can_learn():
    assert_zero_at_init(Steering(6), (6,))


def test_rows_do_not_see_each_other():
    assert_rows_independent(trained(6), gaussian(8, 6))


@given(noise((6,), rows=16), st.floats(0.01, 1))
def test_the_declared_constant_is_not_refuted(x, scale):
    f = trained(6, scale)
    assert_lipschitz(f, lipschitz_upper(f).value, x)


def test_a_constant_that_is_too_small_is_refuted():
    f = trained(6)
    with pytest.raises(AssertionError, match="exceeds the Lipschitz constant"):
        assert_lipschitz(f, 0.2 * lipschitz_upper(f).value, gaussian(16, 6))


def test_theory_holds_for_the_trained_network():
    f, x = trained(6), gaussian(2000, 6)
    assert_theorem7(f, x[:50], lipschitz=lipschitz_upper(f).value)
    assert_kl_identity(f, x)


@given(matrices(dim=4, norm=0.5))
def test_my_closed_form_agrees_with_the_exact_kl(K):
    f = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    f.weight.copy_(K)
    assert_kl(f, gaussian(400, 4), gaussian_kl(f, 4))


@given(matrices())
def test_bounds_hold_also_where_the_error_term_is_negative(A):
    assert_bounds(A)


@given(lipschitz_maps((3,), constant=0.8))
def test_moved_noise_can_be_moved_back(f):
    x = gaussian(5, 3)
    y, z = x + f(x), gaussian(5, 3).flip(0)
    for _ in range(200):
        z = y - f(z)
    assert torch.allclose(z, x, atol=1e-9)


@given(tilted_gaussians(dim=3))
def test_the_optimal_map_reaches_the_tilted_law(problem):
    x = gaussian(3000, 3)
    assert_moments(x + problem.optimal_map()(x), problem.mean, problem.covariance)


@pytest.mark.parametrize("kl", ["l2", "exact"])
def test_the_loss_i_train_with(kl):
    assert_noise_loss(
        NoiseLoss(kl, alpha=0.5),
        trained(4),
        gaussian(6, 4),
        generate=torch.sin,
        reward=lambda y: y.sum(1),
    )
