"""NoiseLoss: values and gradients against autograd through the dense log-determinant."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hnkit.loss
from hnkit import InputError, NoiseLoss, NonFiniteError, log_det_error
from hnkit.injection import NoiseInjection
from hnkit.jacobian import RowJacobian, math_attention
from hnkit.loss import KL_TERMS
from tests.hnkit.functions import Slopes, f64
from tests.hnkit.operator_zoo import matrix

D = 4
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25], dtype=torch.float64)


class Attention(nn.Module):
    """Two tokens of two channels through layer normalisation and scaled-dot-product attention."""

    def __init__(self, scale: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mix = nn.Linear(2, 6)
        self.out = nn.Linear(2, 2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 2, 2)
        centred = nn.functional.layer_norm(tokens, (2,), eps=1.0)
        q, k, v = self.mix(centred).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.scale * self.out(tokens + mixed).reshape(x.shape)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
    with torch.no_grad():
        net[2].weight.mul_(1.4)
    return net


MAPS = {"mlp": mlp, "attention": lambda: Attention().double()}


def noise(n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(z: Tensor) -> Tensor:
    return z


def linear_reward(y: Tensor) -> Tensor:
    return y @ torch.arange(1.0, D + 1, dtype=y.dtype)


def no_reward(y: Tensor) -> Tensor:
    return 0 * y.sum(1)


def gradient(f: nn.Module, objective: Tensor) -> Tensor:
    f.zero_grad()
    objective.backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in f.parameters()])


def dense(f: nn.Module, x: Tensor) -> Tensor:
    """Differentiable Jacobians, one row and one entry at a time; shares no code with the loss."""
    with math_attention():
        return torch.stack(
            [torch.autograd.functional.jacobian(lambda z: f(z[None])[0], row, create_graph=True) for row in x]
        )


def dense_error(f: nn.Module, x: Tensor) -> Tensor:
    J = dense(f, x)
    eye = torch.eye(D, dtype=torch.float64)
    return J.diagonal(dim1=1, dim2=2).sum(1) - torch.linalg.slogdet(eye + J).logabsdet


def all_signs(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the probes run through all 2^d sign vectors: their mean is the expectation, exactly."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=torch.float64)

    def enumerate_probes(rows, dim, kind, generator, device):
        assert rows % len(signs) == 0
        return signs.repeat(rows // len(signs), 1)

    monkeypatch.setattr(hnkit.loss, "draw_probes", enumerate_probes)
    return len(signs)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kl", ["exact", "arnoldi"])
def test_log_det_value_and_gradient_with_different_row_weights(monkeypatch: pytest.MonkeyPatch, name: str, kl) -> None:
    f, x = MAPS[name](), noise()
    count = all_signs(monkeypatch) if kl == "arnoldi" else 1
    terms = NoiseLoss(kl, probes=count, steps=D)(f, x, identity, no_reward)
    found = gradient(f, (WEIGHTS * terms.total).sum())  # outside any attention context
    error = dense_error(f, x)
    with math_attention():
        expected_total = f(x).square().sum(1) / 2 + error
    expected = gradient(f, (WEIGHTS * expected_total).sum())
    torch.testing.assert_close(terms.kl.detach(), expected_total.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MAPS)
def test_second_order_value_and_gradient(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    f, x = MAPS[name](), noise()
    count = all_signs(monkeypatch)
    terms = NoiseLoss("second-order", probes=count)(f, x, identity, no_reward)
    found = gradient(f, (WEIGHTS * terms.total).sum())
    J = dense(f, x)
    with math_attention():
        expected_total = f(x).square().sum(1) / 2 + (J @ J).diagonal(dim1=1, dim2=2).sum(1) / 2
    expected = gradient(f, (WEIGHTS * expected_total).sum())
    torch.testing.assert_close(terms.kl.detach(), expected_total.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kl", KL_TERMS)
def test_gradient_against_finite_differences_of_the_value(monkeypatch: pytest.MonkeyPatch, kl) -> None:
    f, x = mlp(), noise(3)
    count = all_signs(monkeypatch) if kl in ("arnoldi", "second-order") else 1
    loss = NoiseLoss(kl, alpha=0.7, probes=count, steps=D)
    weights = WEIGHTS[:3]

    def objective() -> Tensor:
        return (weights * loss(f, x, torch.tanh, linear_reward).total).sum()

    found = gradient(f, objective())
    step = 1e-5
    for index in (0, 17, 40, 71):  # entries of both layers
        name, offset = 0, index
        parameters = list(f.parameters())
        while offset >= parameters[name].numel():
            offset -= parameters[name].numel()
            name += 1
        entry = parameters[name].data.view(-1)
        values = []
        for sign in (1, -1):
            entry[offset] += sign * step
            values.append(float(objective().detach()))
            entry[offset] -= sign * step
        assert float(found[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-6, abs=1e-8)


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_random_probes_are_unbiased_and_follow_the_generator(kl) -> None:
    f, x = mlp(), noise()
    loss = NoiseLoss(kl, probes=400, tolerance=1e-8)
    terms = loss(f, x, identity, no_reward, generator=torch.Generator().manual_seed(0))
    again = loss(f, x, identity, no_reward, generator=torch.Generator().manual_seed(0))
    assert torch.equal(terms.kl, again.kl)
    found = gradient(f, terms.total.sum())
    exact = NoiseLoss("exact")(f, x, identity, no_reward)
    reference = gradient(f, exact.total.sum())
    assert float((found - reference).norm() / reference.norm()) < (0.05 if kl == "arnoldi" else 0.3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kl", KL_TERMS)
def test_rows_satisfy_the_definition(kl, reduction) -> None:
    f, x, alpha = mlp(), noise(), 0.25
    loss = NoiseLoss(kl, alpha=alpha, reduction=reduction)
    terms = loss(f, x, lambda z: 2 * z, linear_reward, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(terms.x_hat, x + f(x))
    torch.testing.assert_close(terms.reward, linear_reward(2 * (x + f(x))))
    torch.testing.assert_close(terms.total, terms.kl - terms.reward / alpha)
    assert terms.total.shape == terms.kl.shape == terms.reward.shape == terms.solve_error.shape == (5,)
    whole = NoiseLoss(kl, alpha=alpha)(f, x, identity, no_reward, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(terms.kl, whole.kl / (D if reduction == "mean" else 1))


def test_l2_is_half_the_squared_length() -> None:
    f, x = mlp(), noise()
    torch.testing.assert_close(NoiseLoss("l2")(f, x, identity, no_reward).kl, f(x).square().sum(1) / 2)


def test_effective_alpha() -> None:
    assert NoiseLoss(alpha=2.0).effective_alpha(100) == 2.0
    assert NoiseLoss(alpha=1.0, reduction="mean").effective_alpha(32_768) == 1 / 32_768
    # d times the loss of the mean is the loss of the sum at that temperature.
    f, x = mlp(), noise()
    mean = NoiseLoss(alpha=2.0, reduction="mean")
    total = mean(f, x, identity, linear_reward).total
    twin = NoiseLoss(alpha=mean.effective_alpha(D))(f, x, identity, linear_reward).total
    torch.testing.assert_close(D * total, twin)


@pytest.mark.parametrize("kl", KL_TERMS)
def test_zero_at_initialisation_has_a_gradient_from_the_reward_alone(kl) -> None:
    f, x = mlp(), noise()
    nn.init.zeros_(f[2].weight)
    nn.init.zeros_(f[2].bias)
    terms = NoiseLoss(kl)(f, x, identity, linear_reward, generator=torch.Generator().manual_seed(0))
    assert torch.equal(terms.kl, torch.zeros(5, dtype=torch.float64))
    found = gradient(f, terms.total.sum())
    expected = gradient(f, -linear_reward(x + f(x)).sum())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kl", KL_TERMS)
def test_bfloat16_network_gives_a_float32_loss(kl) -> None:
    f, x = mlp().bfloat16(), noise().bfloat16()
    terms = NoiseLoss(kl)(f, x, identity, lambda y: y.sum(1), generator=torch.Generator().manual_seed(0))
    assert terms.kl.dtype in (torch.float32, torch.float64)
    assert terms.total.dtype in (torch.float32, torch.float64)
    gradient(f, terms.total.sum())
    # |f|^2/2 is summed in float32: bfloat16 would lose all of a difference of 2^-9
    constant = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    l2 = NoiseLoss("l2")(lambda z: 0 * z + constant, constant, identity, lambda y: y.sum(1)).kl
    assert float(l2[0]) == pytest.approx(4096 * float(constant[0, 0]) ** 2 / 2, rel=1e-6)


def test_more_steps_solve_better_and_the_error_is_reported() -> None:
    f, x = mlp(), noise()
    errors = []
    for steps in (1, 2, 3, 4):
        terms = NoiseLoss("arnoldi", steps=steps)(f, x, identity, no_reward, generator=torch.Generator().manual_seed(0))
        errors.append(float(terms.solve_error.max()))
    assert errors[0] > 0.01
    assert errors[2] < errors[0]
    assert errors[-1] < 1e-12
    adaptive = NoiseLoss("arnoldi", tolerance=0.05)(f, x, identity, no_reward)
    assert 0 < float(adaptive.solve_error.max()) < 0.2


def test_solve_error_is_the_distance_to_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    # w from two steps against w from a dense solve: the reported error is at least the true one.
    A = matrix("gaussian", 0.5, D)
    f = nn.Linear(D, D, bias=False).double()
    with torch.no_grad():
        f.weight.copy_(A)
    loss = NoiseLoss("arnoldi", steps=2)
    operator = hnkit.loss.RowJacobian(f, noise(), twice=True)
    v = torch.ones(5, D, dtype=torch.float64)
    _, w, error = loss._value_and_weight(operator, v)
    exact = torch.linalg.solve(torch.eye(D, dtype=torch.float64) + A.T, A.T @ v.T).T
    relative = (w - exact).norm(dim=1) / (v @ A).norm(dim=1)
    assert bool((relative <= 1.05 * error).all())
    assert bool((relative >= 0.1 * error).all())


def test_gradients_do_not_reach_the_noise() -> None:
    f, x = mlp(), noise().requires_grad_()
    NoiseLoss("arnoldi")(f, x, identity, linear_reward).total.sum().backward()
    assert x.grad is None


def test_conditions_follow_replicated_rows() -> None:
    from hnkit.maps import Condition, ConditionedMap

    class Scaled(nn.Module):
        def forward(self, x: Tensor, condition: Condition) -> Tensor:
            return x * condition.tensors["scale"][:, None]

    scale = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    f = ConditionedMap(Scaled(), Condition(("a", "b", "c"), {"scale": scale}))
    expected = D * (scale - torch.log1p(scale))
    for kl, probes in (("arnoldi", 1), ("arnoldi", 3), ("exact", 1)):
        x = noise(3)
        terms = NoiseLoss(kl, probes=probes)(f, x, identity, no_reward)
        torch.testing.assert_close(terms.kl - f(x).square().sum(1) / 2, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kl": "magic"}, "'magic'"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": -1.0}, "alpha -1.0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"alpha": math.inf}, "alpha inf"),
        ({"reduction": "max"}, "'max'"),
        ({"probes": 0}, "probes 0"),
        ({"steps": 0}, "steps 0"),
        ({"max_steps": 1.5}, "max_steps 1.5"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"probe": "uniform"}, "'uniform'"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        NoiseLoss(**arguments)


def test_bad_rewards_and_maps() -> None:
    with pytest.raises(InputError, match=r"reward returned \(5, 4\)"):
        NoiseLoss()(mlp(), noise(), identity, identity)
    with pytest.raises(InputError, match="reward returned float"):
        NoiseLoss()(mlp(), noise(), identity, lambda y: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="shape"):
        NoiseLoss("arnoldi")(lambda x: x[:, :1], noise(), identity, no_reward)


@pytest.mark.parametrize("determinant", ["positive", "negative"])
def test_arnoldi_on_expansive_maps(determinant) -> None:
    """Averaged over all sign vectors, value and gradient are those of the dense log-determinant, whatever the norm."""
    torch.manual_seed(3)
    eye = torch.eye(4, dtype=torch.float64)
    A = torch.randn(4, 4, dtype=torch.float64)
    A = 2.5 * A / torch.linalg.matrix_norm(A, 2)
    if torch.linalg.det(eye + A) * (1 if determinant == "positive" else -1) < 0:
        A[0] = -2 * eye[0] - A[0]  # negates the first row of I + A
    assert float(torch.linalg.matrix_norm(A, 2)) > 1.5
    assert (float(torch.linalg.det(eye + A)) > 0) == (determinant == "positive")
    weight = A.clone().requires_grad_()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    operator = RowJacobian(lambda x: x @ weight.T, torch.randn(16, 4, dtype=torch.float64), twice=True)
    value, w, error = NoiseLoss("arnoldi", tolerance=1e-12)._value_and_weight(operator, signs)
    dense = log_det_error(weight)
    torch.testing.assert_close(value.mean(), dense.detach(), rtol=1e-8, atol=1e-8)
    surrogate = (operator.vjp(w, create_graph=True) * signs).sum(1).mean()
    (found,) = torch.autograd.grad(surrogate, weight)
    (expected,) = torch.autograd.grad(dense, weight)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert bool((error < 1e-6).all())


def test_arnoldi_trains_a_batch_in_which_one_row_expands() -> None:
    x = torch.tensor([[0.1, 0.2], [2.0, -2.0]], dtype=torch.float64)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    f = lambda z: scale * z * z.abs()  # noqa: E731 (local norm 0.8 max|z|: below 1 in the first row only)
    terms = NoiseLoss("arnoldi")(f, x, identity, no_reward, generator=torch.Generator().manual_seed(0))
    expected = [float((f(r).detach() ** 2).sum() / 2 + log_det_error(torch.diag(0.8 * r.abs()))) for r in x]
    torch.testing.assert_close(terms.kl.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    terms.total.sum().backward()
    assert math.isfinite(float(scale.grad))


@pytest.mark.parametrize("kl", ["arnoldi", "second-order", "exact"])
def test_a_non_finite_map_is_named(kl) -> None:
    x = noise().abs()
    x[3] = -1.0
    with pytest.raises(NonFiniteError, match="sample 3"):
        NoiseLoss(kl)(lambda z: 0.1 * z.sqrt(), x, identity, no_reward)


def test_the_exact_term_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    f, x = MAPS["attention"](), noise()
    whole = gradient(f, (WEIGHTS * NoiseLoss("exact")(f, x, identity, linear_reward).total).sum())
    monkeypatch.setattr(hnkit.loss, "rows_per_pass", lambda dim, device: 3)
    pieces = gradient(f, (WEIGHTS * NoiseLoss("exact")(f, x, identity, linear_reward).total).sum())
    torch.testing.assert_close(pieces, whole)


def test_exact_gradients_reach_parameters_behind_a_computation() -> None:
    # The map's weight is itself computed: the gradient must arrive at the tensor it was computed from.
    raw = torch.full((D, D), 0.1, dtype=torch.float64, requires_grad=True)
    weight = torch.tanh(raw) + 0.2 * torch.eye(D, dtype=torch.float64)
    terms = NoiseLoss("exact")(lambda z: z @ weight, noise(), identity, no_reward)
    (terms.kl - (noise() @ weight).square().sum(1) / 2).sum().backward()
    assert raw.grad is not None
    found, raw.grad = raw.grad, None
    A = (torch.tanh(raw) + 0.2 * torch.eye(D, dtype=torch.float64)).T
    (5 * (A.trace() - torch.linalg.slogdet(torch.eye(D, dtype=torch.float64) + A).logabsdet)).backward()
    torch.testing.assert_close(found, raw.grad)


def test_the_exact_term_is_log_det_error_of_the_dense_jacobian() -> None:
    f, x = mlp(), noise()
    terms = NoiseLoss("exact")(f, x, identity, no_reward)
    J = dense(f, x).detach()
    torch.testing.assert_close(terms.kl - f(x).square().sum(1) / 2, log_det_error(J))


def fixed_probes(monkeypatch: pytest.MonkeyPatch, *probes: list[float]) -> None:
    """Every sample gets these probes."""

    def draw(rows, dim, kind, generator, device):
        assert rows % len(probes) == 0
        return f64(*probes).repeat(rows // len(probes), 1)

    monkeypatch.setattr(hnkit.loss, "draw_probes", draw)


def scaled(*factors: float):
    """The map of the diagonal matrix with these entries."""
    return lambda x: x * f64(*factors)


@pytest.mark.parametrize("tolerance", [1.0, 1.5])
def test_a_tolerance_of_one_asks_for_nothing_and_is_refused(tolerance):
    with pytest.raises(InputError, match="tolerance"):
        NoiseLoss(tolerance=tolerance)


@pytest.mark.parametrize("kl", [kl for kl in KL_TERMS if kl != "arnoldi"])
def test_a_term_without_a_linear_solve_reports_no_error_of_one(kl):
    terms = NoiseLoss(kl)(scaled(0.3, -0.2), torch.ones(3, 2, dtype=torch.float64), identity, no_reward)
    assert terms.solve_error.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_two_probes_are_the_mean_of_each_alone(monkeypatch, kl):
    """Of a map whose rows have different Jacobians."""
    x = f64([0.1, -0.2], [0.3, 0.2], [-0.1, 0.4])
    pair = ([1.0, 1.0], [1.0, -1.0])

    def terms(*probes):
        fixed_probes(monkeypatch, *probes)
        mix = f64([0.5, 1.0], [-0.7, 0.2])
        return NoiseLoss(kl, probes=len(probes))(lambda z: z.square() @ mix, x, identity, no_reward)

    together, first, second = terms(*pair), terms(pair[0]), terms(pair[1])
    torch.testing.assert_close(together.kl, (first.kl + second.kl) / 2)
    assert bool(((first.kl - second.kl).abs() > 1e-3).all())
    torch.testing.assert_close(together.solve_error, torch.maximum(first.solve_error, second.solve_error))


class TwoTokens(nn.Module):
    """Two tokens of two channels through scaled-dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mix = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x.reshape(-1, 2, 2)).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].reshape(x.shape)


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_one_probe_through_attention_trains(monkeypatch, kl):
    """The mean of the gradients of single probes, over all sign vectors, is that of the dense Jacobian's term."""
    f = TwoTokens().double()
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = list(f.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    signs = list(itertools.product((-1.0, 1.0), repeat=4))
    for probe in signs:
        fixed_probes(monkeypatch, list(probe))
        loss = NoiseLoss(kl, steps=4)(f, x, identity, no_reward).total.sum()
        total = [old + new / len(signs) for old, new in zip(total, torch.autograd.grad(loss, weights), strict=True)]
    with math_attention():
        J = torch.stack(
            [torch.autograd.functional.jacobian(lambda z: f(z[None])[0], row, create_graph=True) for row in x]
        )
        term = (J @ J).diagonal(dim1=1, dim2=2).sum() / 2
        if kl == "arnoldi":
            eye = torch.eye(4, dtype=torch.float64)
            term = J.diagonal(dim1=1, dim2=2).sum() - torch.linalg.slogdet(eye + J).logabsdet.sum()
        expected = torch.autograd.grad(f(x).square().sum() / 2 + term, weights)
    for found, reference in zip(total, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_one_probe_evaluates_the_map_once(kl):
    calls = []

    def f(x):
        calls.append(x.shape[0])
        return 0.1 * x

    loss, x = NoiseLoss(kl, probes=1), torch.ones(3, 2, dtype=torch.float64)
    loss(f, x, identity, no_reward)  # the first call tries the map
    calls.clear()
    loss(f, x, identity, no_reward)
    assert calls == [3]


def test_the_worst_probe_of_a_sample_is_reported(monkeypatch):
    """An eigenvector is solved for in one step; (1, 1) is not.

    For J = diag(a, b), v = (1, 1), q = v / sqrt 2: J q has the part (a + b)/2 along q and (a - b)/2 across, and the
    one-dimensional least-squares problem leaves the part of J q perpendicular to (I + J) q.
    """
    a, b = 0.5, -0.2
    along, across = (a + b) / 2, (a - b) / 2
    size = math.hypot(along, across)
    residual = across / (size * math.hypot(1 + along, across))
    expected = residual / (1 - size)
    for probes in (([1.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0])):
        fixed_probes(monkeypatch, *probes)
        terms = NoiseLoss("arnoldi", probes=2, steps=1)(scaled(a, b), torch.ones(2, 2).double(), identity, no_reward)
        assert terms.solve_error.tolist() == pytest.approx([expected, expected])


def test_the_error_of_an_expansive_solve_comes_from_the_small_system(monkeypatch):
    """As before with a norm above 1, where `1 - |J|` says nothing: the margin is `|(I + J) q|`."""
    a, b = 1.5, -0.2
    along, across = (a + b) / 2, (a - b) / 2
    assert math.hypot(along, across) > 1
    system = math.hypot(1 + along, across)
    expected = across / (math.hypot(along, across) * system) / system
    fixed_probes(monkeypatch, [1.0, 1.0])
    terms = NoiseLoss("arnoldi", steps=1)(scaled(a, b), torch.ones(3, 2).double(), identity, no_reward)
    assert terms.solve_error.tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize(("options", "count"), [({"steps": 6}, 6), ({}, 2)])
def test_the_tolerance_ends_adaptive_steps_alone(options, count):
    """At norm 0.05 in 6 dimensions, m steps leave a residual of about 0.05^(m - 1): two meet a tolerance of 0.5."""
    mix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mix *= 0.05 / torch.linalg.matrix_norm(mix, 2)
    operator = RowJacobian(lambda x: x @ mix.T, torch.ones(1, 6, dtype=torch.float64), twice=True)
    probe = f64([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    _, weight, _ = NoiseLoss("arnoldi", tolerance=0.5, **options)._value_and_weight(operator, probe)
    assert operator.num_vjp == count
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) + mix.T, mix.T @ probe[0])
    error = float((weight[0] - exact).norm() / exact.norm())
    assert error < 1e-13 if count == 6 else 1e-4 < error < 0.5


@pytest.mark.parametrize("slopes", [(-1.5,), (-1.1, 0.4), (0.9, 0.01), (-0.95, 0.001), (1.0,), (-3.0, 0.2, 1.0)])
def test_value_at_jacobians_of_any_norm_in_one_batch(slopes):
    """In one dimension `E = J - log|1 + J|` and the solve is exact: its reported error is 0."""
    x = torch.zeros(len(slopes), 1, dtype=torch.float64)
    terms = NoiseLoss("arnoldi")(Slopes(torch.tensor(slopes, dtype=torch.float64)), x, identity, no_reward)
    assert terms.kl.tolist() == pytest.approx([s - math.log(abs(1 + s)) for s in slopes], rel=1e-11)
    assert terms.solve_error.tolist() == pytest.approx([0.0] * len(slopes), abs=1e-12)


# --- injected noise ---------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """`f(x) = slope x + shift` in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.shift


def cubic(y: Tensor) -> Tensor:
    return (0.3 * y**3 - 0.7 * y**2 + y + 5).sum(1)


def derivatives_of_the_mean(x: float, share: float, slope: float, shift: float) -> tuple[float, float]:
    """`d/dslope` and `d/dshift` of `E[cubic(a ((1 + slope) x + shift) + b eps)]`, from the moments of a Gaussian."""
    a, b2 = math.sqrt(1 - share), share
    mean = a * ((1 + slope) * x + shift)
    by_mean = 0.9 * (mean**2 + b2) - 1.4 * mean + 1  # E[cubic'(z)], z ~ N(mean, b^2)
    return a * x * by_mean, a * by_mean


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("gradient_of", ["pathwise", "score-function"])
def test_the_gradient_of_the_mean_reward_is_exact_under_quadrature(monkeypatch, share, gradient_of):
    """Draws on a product grid of Gauss-Hermite nodes: their weighted mean is the expectation, with no sampling."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    grid = [first.reshape(-1, 1), second.reshape(-1, 1)]
    joint = torch.outer(weights, weights).flatten()
    calls = iter(grid)
    monkeypatch.setattr(hnkit.loss, "fresh_noise", lambda x, generator: next(calls))
    f, alpha = Shift(), 0.5
    x = torch.full((len(joint), 1), 0.8, dtype=torch.float64)
    draws = 2 if gradient_of == "score-function" else 1
    loss = NoiseLoss(alpha=alpha, injection=NoiseInjection(share), draws=draws, reward_gradient=gradient_of)
    terms = loss(f, x, identity, cubic)
    found = gradient(f, (joint * terms.total).sum())
    delta = 0.3 * 0.8 - 0.4
    factor = (1 - share) / share * delta  # of a^2 delta^2 / (2 (1 - a^2))
    by_slope, by_shift = derivatives_of_the_mean(0.8, share, 0.3, -0.4)
    torch.testing.assert_close(found, f64(factor * 0.8 - by_slope / alpha, factor - by_shift / alpha))
    torch.testing.assert_close(terms.total, terms.kl - terms.reward / alpha)
    assert float(terms.kl[0].detach()) == pytest.approx(factor * delta / 2)
    m = math.sqrt(1 - share) * (0.8 + delta)
    mean_reward = 0.3 * (m**3 + 3 * m * share) - 0.7 * (m**2 + share) + m + 5
    assert float((joint * terms.reward).sum().detach()) == pytest.approx(mean_reward)


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_the_score_function_is_unbiased(draws):
    """Linear plus quadratic reward in four dimensions: 60 means against the closed form, |t| < 5.9 (2e-7 each)."""
    f = nn.Linear(D, D, dtype=torch.float64)
    with torch.no_grad():
        f.weight.copy_(matrix("gaussian", 0.3, D))
        f.bias.copy_(torch.arange(D) / 5)
    x, share, alpha = noise(1, seed=3), 0.4, 0.7
    H, w = torch.diag(f64(1.0, 0.5, -0.3, 2.0)), f64(1.0, -2.0, 0.5, 3.0)
    loss = NoiseLoss(alpha=alpha, injection=NoiseInjection(share), draws=draws, reward_gradient="score-function")
    repeats, batch = 60, 50
    generator = torch.Generator().manual_seed(draws)
    found = []
    for _ in range(repeats):
        terms = loss(f, x.expand(batch, D), identity, lambda y: y @ w - 0.5 * ((y @ H) * y).sum(1), generator=generator)
        found.append(gradient(f, (terms.kl - terms.total).mean() * alpha))  # of the reward alone
    a = math.sqrt(1 - share)
    by_delta = a * (w - a * (x + f(x))[0] @ H).detach()
    expected = torch.cat([torch.outer(by_delta, x[0]).flatten(), by_delta])
    samples = torch.stack(found)
    z = (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(repeats))
    assert float(z.abs().max()) < 5.9


def test_the_baseline_takes_a_constant_out_of_the_reward():
    f, x = mlp(), noise()
    loss = NoiseLoss(injection=NoiseInjection(0.5), draws=3, reward_gradient="score-function")

    def by(constant: float) -> Tensor:
        generators = [torch.Generator().manual_seed(row) for row in range(len(x))]
        terms = loss(f, x, identity, lambda y: linear_reward(y) + constant, generator=generators)
        return gradient(f, terms.total.mean())

    torch.testing.assert_close(by(0.0), by(1e4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"draws": 2, "reward_gradient": "score-function"}])
def test_a_row_s_injected_noise_does_not_depend_on_its_batch(options):
    f, x = mlp(), noise()
    loss = NoiseLoss(injection=NoiseInjection(0.5), **options)

    def terms(rows: slice):
        generators = [torch.Generator().manual_seed(row) for row in range(len(x))][rows]
        return loss(f, x[rows], torch.tanh, linear_reward, generator=generators)

    whole, part = terms(slice(0, 5)), terms(slice(2, 4))
    torch.testing.assert_close(whole.reward[2:4], part.reward)
    torch.testing.assert_close(whole.x_hat[2:4], part.x_hat)
    delta = f(x[2:4])
    torch.testing.assert_close(part.kl, delta.square().sum(1) / 2)
    eps = (part.x_hat - math.sqrt(0.5) * (x[2:4] + delta)) / math.sqrt(0.5)
    expected = torch.randn(D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(eps[0], expected)


def test_the_score_function_asks_for_values_alone():
    f, x, seen = mlp(), noise(), []

    def reward(y: Tensor) -> Tensor:
        seen.append(y.requires_grad)
        return torch.from_numpy((y.detach().numpy() > 0).sum(1).astype(float))

    loss = NoiseLoss(injection=NoiseInjection(0.5), draws=4, reward_gradient="score-function")
    terms = loss(f, x, identity, reward, generator=torch.Generator().manual_seed(0))
    assert seen == [False] * 4
    assert bool(gradient(f, -terms.reward.mean()).any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 2}, "draws 2 with reward_gradient 'pathwise', which takes one"),
        ({"draws": 4, "injection": NoiseInjection()}, "give draws=1, or reward_gradient 'score-function'"),
        ({"reward_gradient": "score-function"}, "'score-function' without injected noise"),
        ({"reward_gradient": "none", "injection": NoiseInjection()}, "accepted are pathwise, score-function"),
        ({"reward_gradient": "score-function", "injection": NoiseInjection()}, "give draws=2"),
        ({"kl": "exact", "injection": NoiseInjection()}, "use kl 'l2'"),
        ({"draws": 0, "injection": NoiseInjection()}, "draws 0"),
    ],
)
def test_bad_options_of_injected_noise(options, words):
    with pytest.raises(InputError, match=words):
        NoiseLoss(**options)
    with pytest.raises(InputError, match="for injected noise"):
        NoiseLoss()(mlp(), noise(), identity, linear_reward, generator=[torch.Generator()])
