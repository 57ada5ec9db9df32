"""What counts as a map: a zoo of right maps that are never refused, and of wrong ones that always are."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hnkit import InputError, NoiseLoss, NonFiniteError, RowJacobian, lipschitz_lower, local_lipschitz, noise_kl
from hnkit.jacobian import Acquaintances, check_for_loss, check_map
from hnkit.maps import Condition, ConditionedMap
from tests.hnkit.functions import NoForwardMode, Once, attention
from tests.hnkit.functions import points as images

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
D = 12


def points(n: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build, seed: int = 0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build()


def mlp(activation: type[nn.Module] = nn.Tanh, width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(D, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, D))


class LowRank(nn.Module):
    """A frozen network with a trainable low-rank last layer, exactly zero at initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp().requires_grad_(False)
        self.down = nn.Linear(D, 3, bias=False)
        self.up = nn.Linear(3, D, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.body(x)))


class Energy(nn.Module):
    """The negative gradient of a network's output, differentiable again."""

    def __init__(self, create_graph: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 1))
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(z).sum(), z, create_graph=self.create_graph)
        return -slope


class Blocks(nn.Module):
    """Convolution, normalisations, pooling, attention and an indexed sort: what real networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.batch = nn.BatchNorm2d(6).eval()
        self.back = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.unflatten(1, (3, 2, 2))
        h = F.silu(self.batch(self.norm(self.conv(image))))
        h = h + F.max_pool2d(h, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        tokens = h.flatten(2)
        h = F.scaled_dot_product_attention(tokens, tokens, tokens).reshape(h.shape)
        return 0.3 * self.back(h).flatten(1).sort(1).values


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def modules() -> dict[str, nn.Module]:
    return {
        "tanh": mlp(),
        "relu": mlp(nn.ReLU),
        "relu, wide": mlp(nn.ReLU, 400),
        "leaky": mlp(partial(nn.LeakyReLU, 0.3)),
        "gelu": mlp(nn.GELU),
        "hardtanh": mlp(nn.Hardtanh),
        "zero at initialisation": LowRank(),
        "energy": Energy(),
        "blocks": Blocks(),
        "checkpointed": Checkpointed(),
        "layer norm": nn.Sequential(nn.LayerNorm(D), mlp()),
        "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)),
    }


def functions() -> dict[str, object]:
    mix = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {
        "identity": lambda x: x,
        "zero": torch.zeros_like,
        "zero times x": lambda x: 0 * x,
        "constant": lambda x: torch.full_like(x, 3.0),
        "linear": lambda x: x @ mix.to(x),
        "tiny": lambda x: 1e-6 * (x @ mix.to(x)).tanh(),
        "large": lambda x: 1e3 * (x @ mix.to(x)).tanh(),
        "far from zero": lambda x: 50 + 0.1 * (x @ mix.to(x)).tanh(),
        "fast": lambda x: 0.1 * (10 * x).sin(),
        "absolute": torch.abs,
        "square": torch.square,
        "steep": lambda x: (20 * x).tanh(),
        "staircase without a slope": lambda x: x.round(),
        "cancelling": lambda x: (x + 0.5 * 300) - 150,
        "half inside": lambda x: 0.3 * (x.to(torch.bfloat16) @ mix.to(torch.bfloat16)).tanh().to(x),
        "single inside": lambda x: 0.3 * (x.float() @ mix.float()).tanh().to(x),
        "in place inside": lambda x: x.clone().mul_(0.5).sin_(),
        "no forward mode": NoForwardMode.apply,
        "differentiable once": Once.apply,
        "sorted": lambda x: x.sort(1).values,
        "clamped": lambda x: x.clamp(-0.5, 0.5),
    }


RIGHT = [*modules(), *functions()]


def right(name: str, dtype: torch.dtype, seed: int = 0):
    if name in functions():
        return functions()[name]
    return seeded(lambda: modules()[name], seed).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_map_is_never_refused(name: str, dtype: torch.dtype) -> None:
    once = name in ("differentiable once",)
    for seed, n in enumerate((1, 2, 5, 9)):
        f, x = right(name, dtype, seed), points(n, dtype, seed)
        check_map(f, x, jvp=dtype == torch.float64)
        check_for_loss(f, x, products=not once)
    check_map(f, torch.zeros(3, D, dtype=dtype), jvp=False)  # where kinks are
    check_map(f, points(40, dtype).abs(), jvp=False)


MIX = 0.4 * torch.randn(D, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Forgetful(torch.autograd.Function):
    """tanh, whose backward is right and rests on what forward left on ctx: its own derivative is lost."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.slope = 1 - y**2
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class Numpy(torch.autograd.Function):
    """sin by numpy, backward too."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = np.cos(x.detach().numpy())
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.detach().numpy() * ctx.slope)


class Factor(torch.autograd.Function):
    """sin, whose backward is off by a factor and whose forward mode is off by another."""

    @staticmethod
    def forward(x, backward, forward):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.backward_factor, ctx.forward_factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward_factor * grad * ctx.saved_tensors[0].cos(), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return ctx.forward_factor * tangent * ctx.saved_tensors[0].cos()


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def constant(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x @ MIX.to(x)).tanh()


WRONG_DERIVATIVES = {
    "a constant of no_grad": (lambda x: 0.3 * x + 0.3 * constant(x), "wrong by"),
    "a detached factor": (lambda x: x * (1 + x.tanh()).detach(), "wrong by"),
    "a small detached part": (lambda x: 0.5 * x.sin() + 0.1 * constant(x), "wrong by"),
    "an energy without create_graph": (lambda x: 0.5 * x + seeded(lambda: Energy(False)).to(x)(x), "wrong by"),
    "a backward off by a tenth": (lambda x: Factor.apply(x, 1.1, 1.0), "wrong by"),
    "a backward of the other sign": (lambda x: Factor.apply(x, -1.0, 1.0), "wrong by"),
    "round with the identity's gradient": (lambda x: 0.3 * Round.apply(x), "staircase.*straight-through"),
    "sign with the identity's gradient": (lambda x: x + (x.sign() - x).detach(), "staircase.*straight-through"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WRONG_DERIVATIVES)
def test_a_wrong_derivative_is_refused(name: str, dtype: torch.dtype) -> None:
    f, words = WRONG_DERIVATIVES[name]
    for n in (1, 3, 9):
        with pytest.raises(InputError, match=words) as caught:
            check_map(f, points(n, dtype, seed=n), jvp=False)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=words):
            NoiseLoss("arnoldi")(f, points(n, dtype, seed=n), lambda z: z, lambda y: y.sum(1))
    with pytest.raises(InputError, match=words):
        noise_kl(f, points(9, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("f", [lambda x: 0.3 * Round.apply(x), lambda x: 0.3 * x + 0.6 * constant(x)])
def test_a_wrong_derivative_is_seen_through_half_precision(f, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"staircase|wrong by"):
        check_map(f, points(9, dtype), jvp=False)


DISAGREEING = {
    "forward mode off by a tenth": lambda x: Factor.apply(x, 1.0, 1.1),
    "forward mode of the other sign": lambda x: Factor.apply(x, 1.0, -1.0),
    "a numpy backward in a part": lambda x: 0.3 * NoForwardMode.apply(x) + 0.3 * Numpy.apply(x),
    "an energy of a detached copy, under forward mode": lambda x: 0.5 * x + seeded(Energy).to(x)(x),
}


@pytest.mark.parametrize("name", DISAGREEING)
def test_products_that_disagree_are_refused_where_both_are_used(name: str) -> None:
    """A right J^T u beside a wrong J v: Lanczos needs both, a dense Jacobian or Arnoldi the former alone."""
    f, x = DISAGREEING[name], points()
    check_map(f, x, jvp=False)
    with pytest.raises(InputError, match=r"u\.\(J v\) != v\.\(J\^T u\)"):
        check_map(f, x)
    with pytest.raises(InputError, match="disagree"):
        noise_kl(f, x, method="lanczos")
    noise_kl(f, x, method="exact")


def test_a_tangent_that_forward_mode_loses_is_found_by_double_backward() -> None:
    f, x, v = seeded(Energy).double(), points(), points(seed=3)
    check_map(f, x)
    forward = (f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(RowJacobian(f, x).jvp(v), forward.detach(), rtol=1e-7, atol=1e-9)


class Wrapped(nn.Module):
    """A linear layer, a function, a linear layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(D, D), nn.Linear(D, D), function

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.last(self.function(self.first(x)))


class WeightOnCtx(torch.autograd.Function):
    """x W^T, whose backward uses a copy of W that it made itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.copy = weight.detach().clone()
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.copy, grad.T @ ctx.saved_tensors[0]


class Copied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return WeightOnCtx.apply(x, self.weight)


class SinOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


ONCE = {
    "once_differentiable": lambda: Wrapped(SinOnce.apply),
    "an intermediate on ctx": lambda: Wrapped(Forgetful.apply),
    "an intermediate on ctx in a small part": lambda: Wrapped(lambda h: 0.8 * h.tanh() + 0.2 * Forgetful.apply(h)),
    "a weight on ctx": Copied,
    "a numpy backward": lambda: Wrapped(Numpy.apply),
}


@pytest.mark.parametrize("kl", ["second-order", "arnoldi", "exact"])
@pytest.mark.parametrize("name", ONCE)
def test_the_loss_refuses_maps_whose_products_have_no_right_derivative(name: str, kl) -> None:
    """Their first derivatives are right, so the KL can be estimated and the L2 term be trained on."""
    f, x = seeded(ONCE[name]).double(), points()
    check_map(f, x, jvp=False)
    with pytest.raises(InputError, match=r"wrong derivative in its parameters.*kl='l2'"):
        NoiseLoss(kl)(f, x, lambda z: z, lambda y: y.sum(1))
    NoiseLoss("l2")(f, x, lambda z: z, lambda y: y.sum(1))


class Quantised(nn.Module):
    """A linear layer with weights on a grid and the straight-through gradient: right in x, and meant in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.weight * 8).round() / 8
        return (x @ (self.weight + (grid - self.weight).detach()).T).tanh()


def test_quantised_weights_may_be_trained() -> None:
    f = seeded(Quantised).double()
    check_map(f, points())
    check_for_loss(f, points(), products=True)


COUPLED = {
    "batch normalisation": (lambda: nn.BatchNorm1d(D).double().train(), "couples rows.*batch normalisation"),
    "the batch size": (lambda: lambda x: x / x.shape[0], "how many rows"),
    "a mean": (lambda: lambda x: x - x.mean(0), "couples rows"),
    "its input written to": (lambda: lambda x: x.mul_(0.5), "writes into its input"),
}


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kl", ["l2", "arnoldi"])
@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_depend_on_each_other_are_refused(name: str, kl, n: int) -> None:
    build, words = COUPLED[name]
    with pytest.raises(InputError, match=words):
        check_map(build(), points(n))
    with pytest.raises(InputError, match=words):
        NoiseLoss(kl)(build(), points(n), lambda z: z, lambda y: y.sum(1))


def test_dropout_is_refused_where_a_jacobian_is_needed_and_allowed_in_the_l2_loss() -> None:
    f = nn.Sequential(seeded(mlp), nn.Dropout(0.2)).double().train()
    with pytest.raises(InputError, match="dropout"):
        NoiseLoss("arnoldi")(f, points(), lambda z: z, lambda y: y.sum(1))
    NoiseLoss("l2")(f, points(), lambda z: z, lambda y: y.sum(1))
    coupled = nn.Sequential(f, nn.BatchNorm1d(D).double())
    with pytest.raises(InputError, match="couples rows"):
        NoiseLoss("l2")(coupled, points(), lambda z: z, lambda y: y.sum(1))


@pytest.mark.parametrize("kl", ["l2", "arnoldi"])
def test_trying_a_map_changes_nothing(kl) -> None:
    """Neither random numbers, nor parameters to the last bit, nor a graph that holds them."""
    f, x = seeded(LowRank).double(), points()
    before = {name: value.clone() for name, value in f.state_dict().items()}
    kept = f.up.weight.square().sum() + f.down.weight.square().sum()
    state = torch.get_rng_state()
    NoiseLoss(kl)(f, x, lambda z: z, lambda y: y.sum(1), generator=torch.Generator().manual_seed(0))
    check_map(f, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert all(p.grad is None for p in f.parameters())
    kept.backward()
    torch.testing.assert_close(f.down.weight.grad, 2 * before["down.weight"])


def test_parameters_are_put_back_when_a_map_fails_half_way() -> None:
    class Fragile(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(self.first.weight, self.reference):
                raise ValueError("moved")
            return super().forward(x)

    f = seeded(lambda: Fragile(torch.tanh)).double()
    f.reference = f.first.weight.detach().clone()
    with pytest.raises(InputError, match="ValueError: moved"):
        check_for_loss(f, points(), products=True)
    assert torch.equal(f.first.weight, f.reference)


def test_a_loss_tries_a_map_once_and_again_in_another_mode() -> None:
    calls = []
    f = seeded(mlp).double()
    f.register_forward_hook(lambda *_: calls.append(1))
    loss, x = NoiseLoss("arnoldi"), points()

    def evaluations() -> int:
        calls.clear()
        loss(f, x, lambda z: z, lambda y: y.sum(1))
        return len(calls)

    assert evaluations() > 20
    assert evaluations() == 1
    f.eval()
    assert evaluations() > 20
    assert evaluations() == 1


def test_acquaintances() -> None:
    known, layer = Acquaintances(), nn.Linear(2, 2)
    conditioned = [ConditionedMap(layer, Condition(("a",))) for _ in range(2)]
    assert [known.meet(f) for f in (conditioned[0], conditioned[1], layer, layer)] == [True, False, False, False]
    fresh = [known.meet(lambda x: x) for _ in range(3)]  # one code, three functions
    assert fresh == [True, False, False]
    assert known.meet(layer, torch.float32)
    for copied in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert copied.meet(layer)
    loss = NoiseLoss("arnoldi")
    assert pickle.loads(pickle.dumps(loss)) == loss == copy.deepcopy(loss)
    assert hash(loss) == hash(NoiseLoss("arnoldi"))


@pytest.mark.parametrize("kl", ["second-order", "arnoldi", "exact"])
def test_second_derivatives_of_the_loss_are_refused(kl) -> None:
    f, x = seeded(mlp).double(), points()
    loss = NoiseLoss(kl)
    weights = list(f.parameters())

    def gradient(create_graph: bool) -> tuple[Tensor, ...]:
        total = loss(f, x, lambda z: z, lambda y: y.sum(1), generator=torch.Generator().manual_seed(0)).kl.sum()
        return torch.autograd.grad(total, weights, create_graph=create_graph)

    plain, recorded = gradient(False), gradient(True)
    for a, b in zip(plain, recorded, strict=True):
        torch.testing.assert_close(a, b)
    for weight in weights:
        with pytest.raises(InputError, match="differentiated twice"):
            torch.autograd.grad(sum(g.square().sum() for g in recorded), weight, retain_graph=True)
    with pytest.raises(InputError, match="differentiated twice"):
        sum(g.square().sum() for g in recorded).backward()


def test_second_derivatives_of_the_l2_loss_are_right() -> None:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = points()
    total = NoiseLoss("l2")(lambda z: scale**2 * z, x, lambda z: z, lambda y: 0 * y.sum(1)).total.sum()
    (first,) = torch.autograd.grad(total, scale, create_graph=True)
    (second,) = torch.autograd.grad(first, scale)
    assert float(second) == pytest.approx(6 * 0.7**2 * float(x.square().sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)]), "a nested tensor"),
    ],
)
def test_what_is_no_dense_tensor_is_refused_in_one_line(x: Tensor, words: str) -> None:
    for call in (check_map, noise_kl):
        with pytest.raises(InputError, match=words):
            call(lambda z: z, x)
    with pytest.raises(InputError, match=words):
        NoiseLoss()(lambda z: z, x, lambda z: z, lambda y: y.sum(1))
    with pytest.raises(InputError, match=f"the map returned.*{words}"):
        check_map(lambda z: x, torch.zeros(3, 3))


@pytest.mark.parametrize("generator", [3, "seed", np.random.default_rng(0)])
def test_a_generator_of_another_kind_is_refused(generator) -> None:
    with pytest.raises(InputError, match=r"generator .*torch.Generator"):
        NoiseLoss("arnoldi")(lambda z: 0.1 * z, points(), lambda z: z, lambda y: y.sum(1), generator=generator)
    with pytest.raises(InputError, match=r"generator .*torch.Generator"):
        noise_kl(lambda z: 0.1 * z, points(), method="arnoldi", generator=generator)


@pytest.mark.parametrize("arguments", [{"alpha": "1"}, {"tolerance": "small"}, {"alpha": None}])
def test_a_loss_wants_numbers(arguments: dict) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        NoiseLoss(**arguments)


def test_a_derivative_that_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteError, match="sample 0"):
        NoiseLoss("arnoldi")(lambda x: (x - x.detach()).abs().sqrt(), points(), lambda z: z, lambda y: y.sum(1))


@pytest.mark.parametrize("name", [*DISAGREEING, "an energy without create_graph"])
def test_local_norms_of_a_map_with_wrong_products_are_refused(name: str) -> None:
    """They would not converge, or exceed the Lipschitz constant."""
    f = DISAGREEING.get(name) or WRONG_DERIVATIVES[name][0]
    x = points(4, d=D)
    with pytest.raises(InputError, match=r"disagree|create_graph"):
        lipschitz_lower(f, x)
    wide = torch.randn(4, 20, dtype=torch.float64)
    if name != "an energy without create_graph" and "energy" not in name:
        with pytest.raises(InputError, match="disagree"):
            local_lipschitz(f, wide)


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
        check_map(f, points(6, d=4))
    assert "\n" not in str(caught.value)


def test_check_map_sees_coupling_behind_a_single_row() -> None:
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x - x.mean(0), points(1, d=4))
    check_map(attention(), images(1))


def test_check_map_sees_a_derivative_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="vector-Jacobian product is not finite at sample 0"):
        check_map(lambda x: (x - x.detach()).abs().sqrt(), points(3, d=4))


class Drifting:
    """A map that moves by a step at each call."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls * self.step


@pytest.mark.parametrize("step", [0.1, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_that_drifts_either_way_is_refused(step, dtype):
    with pytest.raises(InputError, match="different values for the same x"):
        check_map(Drifting(step), points(dtype=dtype, d=3))


@pytest.mark.parametrize(("dtype", "rounding", "coupling"), [(torch.float32, 1e-5, 0.1), (torch.float64, 1e-13, 1e-6)])
def test_rows_may_be_coupled_by_rounding_and_no_more(dtype, rounding, coupling):
    x = points(dtype=dtype, d=3)
    check_map(lambda x: x + rounding * x.mean(0), x)
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x + coupling * x.mean(0), x)


def test_rows_coupled_through_what_a_constant_shift_leaves_alone_are_seen():
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x + 0.1 * nn.functional.layer_norm(x, (3,)).mean(0), points(d=3))


def test_a_derivative_that_overflows_is_refused():
    with pytest.raises(NonFiniteError, match="vector-Jacobian product is not finite at sample 0"):
        check_map(lambda x: x + (x - x.detach()) * 1e30 * 1e30, points(dtype=torch.float32, d=3))


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("what went wrong\nand where"), "ValueError: what went wrong$"),
                         (AssertionError(), "AssertionError: AssertionError$")]
)  # fmt: skip
def test_the_first_line_of_what_a_map_raises_is_told(error, words):
    def f(x):
        raise error

    with pytest.raises(InputError, match=words) as caught:
        check_map(f, points(d=3))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_in_half_precision_is_compared_with_itself_in_single(dtype: torch.dtype) -> None:
    """Weights, casts and constants in half precision are lifted too."""

    class Network(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.to(dtype)).to(dtype)
            return self.last(self.function(h)).to(x.dtype)

    right = seeded(lambda: Network(torch.tanh)).to(dtype)
    wrong = seeded(lambda: Network(lambda h: 0.3 * h + h.tanh().detach())).to(dtype)
    for x in (points(9, dtype), points(9, torch.float32)):
        check_map(right, x, jvp=False)
        with pytest.raises(InputError, match="derivative of the map is wrong"):
            check_map(wrong, x, jvp=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_function_that_is_differentiable_once_says_so_itself(dtype: torch.dtype) -> None:
    f = seeded(lambda: Wrapped(SinOnce.apply)).to(dtype)
    with pytest.raises(InputError, match="marked with once_differentiable"):
        NoiseLoss("arnoldi")(f, points(3, dtype), lambda z: z, lambda y: y.sum(1))
