"""Products and dense Jacobians against torch.func, and the refusals of maps that are none."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from hnkit import InputError, NonFiniteError, RowJacobian, dense_jacobian
from hnkit.jacobian import check_map, compile_map, fill_dense_jacobian, math_attention, reusable_graphs
from hnkit.maps import Condition, ConditionedMap
from tests.hnkit.functions import NoForwardMode, Once

SHAPE = (2, 3, 3)
DIM = 18


class Attention(nn.Module):
    """Attention, layer normalisation and a convolution: what real hypernetworks are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mix = nn.Linear(4, 12)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        q, k, v = self.mix(nn.functional.layer_norm(tokens, (4,))).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return 0.3 * self.out(tokens + mixed).mT.reshape(x.shape)


class NoBackward(torch.autograd.Function):
    """x^2 with a forward mode only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return x.square()

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no backward here")


def attention() -> nn.Module:
    return Attention().double().eval()


def points(n: int = 5, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(f, x: Tensor) -> Tensor:
    d = x[0].numel()
    with math_attention():
        return vmap(jacrev(lambda z: f(z[None])[0].flatten()))(x).reshape(x.shape[0], d, d)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 1000])
def test_dense_jacobian(mode: str, chunk: int | None) -> None:
    f, x = attention(), points()
    J = dense_jacobian(f, x, mode=mode, chunk=chunk)
    assert J.dtype == torch.float64
    assert J.shape == (5, DIM, DIM)
    torch.testing.assert_close(J, reference(f, x), rtol=1e-10, atol=1e-12)


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


def test_dense_falls_back_to_forward_mode() -> None:
    x = points(2)
    expected = torch.diag_embed(2 * x.flatten(1))
    torch.testing.assert_close(dense_jacobian(NoBackward.apply, x), expected)
    with pytest.raises(RuntimeError, match="no backward here"):
        dense_jacobian(NoBackward.apply, x, mode="reverse")


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


def test_conditioned_maps_follow_their_rows() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, condition: Condition) -> Tensor:
            return x * condition.tensors["scale"][:, None]

    scale = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    f = ConditionedMap(Scaled(), Condition(("a", "b", "c"), {"scale": scale}))
    x = points(3, shape=(4,))
    for chunk in (1, 2, 5):
        J = dense_jacobian(f, x, chunk=chunk)
        torch.testing.assert_close(J, scale[:, None, None] * torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    check_map(f, x)


@pytest.mark.parametrize("f", [lambda x: torch.zeros_like(x), lambda x: 0 * x, lambda x: torch.ones_like(x)])
def test_constant_maps_have_a_zero_jacobian(f) -> None:
    x = points(2)
    check_map(f, x)
    for mode in ("reverse", "forward"):
        assert not dense_jacobian(f, x, mode=mode).any()
    operator = RowJacobian(f, x)
    assert not operator.vjp(x.flatten(1)).any()
    assert not operator.jvp(x.flatten(1)).any()


def test_constant_in_x_but_not_in_its_parameters() -> None:
    bias = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    operator = RowJacobian(lambda x: bias.expand(x.shape[0], -1).reshape(x.shape), points())
    assert not operator.vjp(points().flatten(1)).any()


def test_progress_counts_products() -> None:
    done: list[int] = []
    out = torch.empty(5, DIM, DIM)
    fill_dense_jacobian(out, attention(), points(), chunk=4, progress=done.append)
    assert sum(done) == 5 * DIM
    torch.testing.assert_close(out, reference(attention(), points()).float())


class Position:
    def __init__(self) -> None:
        self.shift = torch.arange(8.0, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return 0.1 * x + self.shift[: x.shape[0], None]


BAD_MAPS = [
    (lambda x: x[:, :1], "shape"),
    (lambda x: x.sum(), "shape"),
    (lambda x: (x > 0).int(), "int32"),
    (lambda x: [x], "list"),
    (lambda x: x.detach() * 2, "no gradient"),
    (lambda x: torch.as_tensor(x.detach().numpy() ** 2), "no gradient"),
    (lambda x: x - x.mean(0), "couples rows"),
    (lambda x: 0.5 * x + x.flip(0) * 0.01, "couples rows"),
    (nn.BatchNorm1d(4).double().train(), "couples rows"),
    (nn.Dropout(0.5).train(), "dropout"),
    (Position(), "position"),
    (lambda x: x @ torch.zeros(5, 5, dtype=x.dtype), "failed on input"),
    (lambda x: 1 / 0, "ZeroDivisionError"),
    ("f", "str"),
]


@pytest.mark.parametrize(("f", "words"), BAD_MAPS)
def test_check_map_refuses(f, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_map(f, points(6, shape=(4,)))
    assert "\n" not in str(caught.value)


def test_check_map_sees_coupling_behind_a_single_row() -> None:
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x - x.mean(0), points(1, shape=(4,)))
    check_map(attention(), points(1))


def test_check_map_sees_a_derivative_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="vector-Jacobian product is not finite at sample 0"):
        check_map(lambda x: (x - x.detach()).abs().sqrt(), points(3, shape=(4,)))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(0, 3), "shape"),
        (torch.zeros(3, 0), "shape"),
        (torch.zeros(3, 2, dtype=torch.int64), "int64"),
        (None, "NoneType"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), "sample 1"),
    ],
)
def test_refuses_what_is_no_batch(x, words: str) -> None:
    with pytest.raises(InputError, match=words):
        dense_jacobian(lambda z: z, x)


def test_bad_options() -> None:
    with pytest.raises(InputError, match="mode 'backward'"):
        dense_jacobian(lambda z: z, points(), mode="backward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk 0"):
        dense_jacobian(lambda z: z, points(), chunk=0)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_non_finite_names_the_sample(chunk: int) -> None:
    x = points(4, shape=(3,))
    x[2] = 0.0
    with pytest.raises(NonFiniteError, match="sample 2"):
        dense_jacobian(lambda z: z / z.norm(dim=1, keepdim=True), x, chunk=chunk)


@pytest.mark.slow
def test_compiled_map_agrees_and_is_reused() -> None:
    f, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double(), points(6, shape=(4,))
    with reusable_graphs():
        compiled = compile_map(f, x, "aot_eager")
        torch.testing.assert_close(dense_jacobian(compiled, x), dense_jacobian(f, x))


def test_a_compiled_map_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, backend: lambda x: f(x) + 0.01 * x)
    with pytest.raises(InputError, match="differs"):
        compile_map(attention(), points())


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
