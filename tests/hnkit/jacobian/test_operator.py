"""Products with the Jacobian, one row of the batch at a time, against torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from hnkit import InputError, NonFiniteError, RowJacobian, dense_jacobian
from hnkit.jacobian import (
    check_finite,
    math_attention,
)
from tests.hnkit.functions import DIM, NoForwardMode, Once, attention, points, rows


def reference(f, x: Tensor) -> Tensor:
    d = x[0].numel()
    with math_attention():
        return vmap(jacrev(lambda z: f(z[None])[0].flatten()))(x).reshape(x.shape[0], d, d)


def test_products_reuse_one_graph_and_are_counted() -> None:
    f, x = attention(), points()
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z)

    J = reference(f, x)
    operator = RowJacobian(counted, x)
    u = points(seed=1).flatten(1)
    for k in range(1, 4):
        torch.testing.assert_close(operator.vjp(k * u), k * torch.einsum("njk,nj->nk", J, u))
    assert calls == 1
    torch.testing.assert_close(operator.jvp(u), torch.einsum("njk,nk->nj", J, u))
    assert (operator.num_vjp, operator.num_jvp, operator.rows, operator.dim) == (15, 5, 5, DIM)
    torch.testing.assert_close(operator.value, f(x).flatten(1).detach())


def test_jvp_falls_back_to_double_backward() -> None:
    f, x = NoForwardMode.apply, points()
    v = points(seed=1).flatten(1)
    operator = RowJacobian(f, x)
    for scale in (1.0, -2.0):
        torch.testing.assert_close(operator.jvp(scale * v), scale * 2 * x.flatten(1) * v)


def test_a_map_without_either_derivative_says_so() -> None:
    class Neither(NoForwardMode):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    operator = RowJacobian(Neither.apply, points())
    with pytest.raises(InputError, match="neither forward mode nor double backward"):
        operator.jvp(points().flatten(1))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(context) -> None:
    f = attention()
    expected = dense_jacobian(f, points())
    with context():
        torch.testing.assert_close(dense_jacobian(f, points()), expected)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_products_carry_no_graph_even_of_a_map_that_switches_gradients_on(mode: str) -> None:
    layer = nn.Linear(4, 4).double()

    @torch.enable_grad()
    def f(x: Tensor) -> Tensor:
        return layer(x).tanh()

    x = points(3, shape=(4,)).requires_grad_()
    assert not dense_jacobian(f, x, mode=mode).requires_grad
    operator = RowJacobian(f, x)
    assert not operator.vjp(x).requires_grad
    assert not operator.jvp(x).requires_grad


def test_parameters_are_left_alone() -> None:
    f = attention()
    dense_jacobian(f, points())
    RowJacobian(f, points()).vjp(points().flatten(1))
    assert all(p.grad is None for p in f.parameters())


def test_bfloat16_network_gives_float64_products() -> None:
    f, x = attention().bfloat16(), points().bfloat16()
    J = dense_jacobian(f, x)
    assert J.dtype == torch.float64
    exact = reference(attention(), points()).detach()
    assert float((J - exact).norm() / exact.norm()) < 0.05


def test_constant_in_x_but_not_in_its_parameters() -> None:
    bias = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    operator = RowJacobian(lambda x: bias.expand(x.shape[0], -1).reshape(x.shape), points())
    assert not operator.vjp(points().flatten(1)).any()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_double_backward_does_not_leave_out_a_part_of_the_map(share):
    """A part that cannot be differentiated twice: J v would be that of the other part."""

    def f(x):
        # the sum has no forward mode, since one of its terms has none
        rest = NoForwardMode.apply(x)
        return rest if share == 0 else share * Once.apply(x) + (1 - share) * rest

    x, v = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3), torch.ones(2, 3, dtype=torch.float64)
    slope = share * x.cos() + (1 - share) * 2 * x
    if share == 0:
        torch.testing.assert_close(RowJacobian(f, x).jvp(v), slope)
    else:
        with pytest.raises(InputError, match=r"neither forward mode nor double backward .*once_differentiable"):
            RowJacobian(f, x).jvp(v)
    torch.testing.assert_close(RowJacobian(f, x).vjp(v), slope)


def test_a_vector_of_values_names_its_first_bad_sample():
    values = torch.tensor([0.0, 1.0, math.nan, math.inf])
    with pytest.raises(NonFiniteError, match="sample 2"):
        check_finite(values, "it")
    with pytest.raises(NonFiniteError, match="sample 7"):
        check_finite(values, "it", torch.tensor([5, 6, 7, 8]))


class Tokens(nn.Module):
    """softmax attention of a row over itself, with a learned key."""

    def __init__(self):
        super().__init__()
        self.key = nn.Parameter(torch.tensor([[0.5, -1.0], [0.2, 0.7]], dtype=torch.float64))
        self.fused = []

    def forward(self, x):
        self.fused.append(torch.backends.cuda.flash_sdp_enabled())
        tokens = x.unflatten(1, (3, 2))
        return nn.functional.scaled_dot_product_attention(tokens, tokens @ self.key, tokens).flatten(1)

    def by_hand(self, row, key):
        tokens = row.unflatten(0, (3, 2))
        return (torch.softmax(tokens @ (tokens @ key).mT / math.sqrt(2), 1) @ tokens).flatten()


def test_products_can_be_differentiated_in_the_parameters_and_there_alone():
    f, x, u = Tokens(), rows(4, 6).requires_grad_(), rows(4, 6).flip(0)
    product = RowJacobian(f, x, twice=True).vjp(u, create_graph=True)
    product.square().sum().backward()

    def loss(key):
        rows = zip(x.detach(), u, strict=True)
        pulled = [torch.func.vjp(lambda z: f.by_hand(z, key), row)[1](v)[0] for row, v in rows]
        return torch.stack(pulled).square().sum()

    torch.testing.assert_close(f.key.grad, torch.func.grad(loss)(f.key.detach()), rtol=1e-10, atol=1e-12)
    assert x.grad is None


@pytest.mark.parametrize("twice", [False, True])
def test_fused_attention_runs_unless_products_are_to_be_differentiated(twice):
    f, x = Tokens(), rows(4, 6)
    with torch.nn.attention.sdpa_kernel([*map(torch.nn.attention.SDPBackend, range(3))]):
        operator = RowJacobian(f, x, twice=twice)
        default = RowJacobian(f, x)
    assert f.fused == [not twice, True]
    torch.testing.assert_close(operator.value, default.value)


def test_products_carry_no_graph_unless_asked():
    f, x = Tokens(), rows(4, 6)
    operator = RowJacobian(f, x, twice=True)
    assert not operator.vjp(x).requires_grad
    assert not operator.pull(x).requires_grad
    assert not dense_jacobian(f, x).requires_grad
