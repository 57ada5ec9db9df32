"""noise_kl against closed forms and quadrature, what it says about its own error, and what it refuses."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import hnkit.kl.method
from hnkit import Estimate, InputError, NonFiniteError, noise_kl
from hnkit.errors import ExpansiveMapError
from hnkit.kl import L2, Arnoldi, Exact, Lanczos, LowRank, Power, Roulette, SecondOrder
from hnkit.kl.divergence import FORMS, METHODS
from hnkit.kl.estimators import roulette
from hnkit.kl.method import Probed
from hnkit.maps import Condition, ConditionedMap
from tests.hnkit.operator_zoo import MatrixOperator, exact_error, matrix

STOCHASTIC = ("arnoldi", "lanczos", "power", "roulette", "second-order")


def noise(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear:
    """`f(x) = A x + b` on the flattened row."""

    def __init__(self, A: Tensor, b: Tensor | None = None) -> None:
        self.A, self.b = A, torch.zeros(A.shape[0], dtype=A.dtype) if b is None else b

    def __call__(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.A.T.to(x.dtype) + self.b.to(x.dtype)).reshape(x.shape)


def network(d: int = 6, width: int = 16, scale: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, d)).double()
    with torch.no_grad():
        net[2].weight.mul_(scale * 3)
    return net


@pytest.mark.parametrize("form", FORMS)
def test_exact_kl_of_a_gaussian(form) -> None:
    # x + f(x) ~ N(b, B B'), B = I + A: KL = (|B|_F^2 + |b|^2 - d)/2 - log|det B|.
    A, b = matrix("gaussian", 0.7, 6), torch.linspace(-0.3, 0.4, 6, dtype=torch.float64)
    B = torch.eye(6, dtype=torch.float64) + A
    closed = float((B.square().sum() + b.square().sum() - 6) / 2 - torch.linalg.slogdet(B).logabsdet)
    estimate = noise_kl(Linear(A, b), noise(20_000, 2, 3), form=form)
    assert estimate.error == pytest.approx(exact_error(A), rel=1e-12)
    assert abs(estimate.value - closed) < 4.5 * estimate.stderr  # false-alarm rate below 1e-5
    assert estimate.stderr < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_gaussian_kl_without_sampling_error(form) -> None:
    # The points +-sqrt(d) e_i have mean 0 and covariance I exactly, which is all that a linear map's KL depends on.
    A = matrix("jordan", 0.6, 5)
    points = math.sqrt(5) * torch.cat([torch.eye(5), -torch.eye(5)]).double()
    B = torch.eye(5, dtype=torch.float64) + A
    closed = float((B.square().sum() - 5) / 2 - torch.linalg.slogdet(B).logabsdet)
    assert noise_kl(Linear(A), points, form=form).value == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_example_of_one_dimension(form) -> None:
    # f(x) = 0.2 sin 3x, L = 0.6: KL 0.114620 nats, L2 term 0.0100000, by the trapezoidal rule (exponentially exact).
    x = torch.linspace(-10, 10, 2001, dtype=torch.float64)[:, None]
    w = torch.exp(-(x[:, 0] ** 2) / 2) * 0.01 / math.sqrt(2 * math.pi)

    def f(z: Tensor) -> Tensor:
        return 0.2 * torch.sin(3 * z)

    assert float(w @ noise_kl(f, x, form=form).per_sample) == pytest.approx(0.114620, abs=5e-7)
    assert float(w @ noise_kl(f, x, method="l2").per_sample) == pytest.approx(0.0100000, abs=5e-8)


def test_forms_agree_in_the_mean_only() -> None:
    f, x = network(), noise(4000, 6)
    stein, change = noise_kl(f, x), noise_kl(f, x, form="change-of-variables")
    difference = stein.per_sample - change.per_sample  # tr J - x . f, of mean 0 by Stein's identity
    assert float(difference.std()) > 0.1
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / math.sqrt(4000)


def test_fields_of_the_exact_estimate() -> None:
    f, x = network(), noise(7, 6)
    estimate = noise_kl(f, x)
    J = torch.func.vmap(torch.func.jacrev(f))(x)
    eye = torch.eye(6, dtype=torch.float64)
    error = J.diagonal(dim1=1, dim2=2).sum(1) - torch.linalg.slogdet(eye + J).logabsdet
    l2 = f(x).square().sum(1) / 2
    torch.testing.assert_close(estimate.per_sample, (l2 + error).detach())
    assert estimate.value == pytest.approx(float(estimate.per_sample.mean()))
    assert estimate.stderr == pytest.approx(float(estimate.per_sample.std()) / math.sqrt(7))
    assert estimate.l2 == pytest.approx(float(l2.mean()))
    assert estimate.error == pytest.approx(float(error.mean()))
    index = float((J @ J).diagonal(dim1=1, dim2=2).sum() / J.square().sum())
    assert estimate.symmetry_index == pytest.approx(index)
    assert (estimate.num_jvp, estimate.num_vjp) == (0, 42)
    assert (estimate.bias_bound, estimate.bias_estimate, estimate.probe_stderr) == (0.0, 0.0, 0.0)
    assert (estimate.samples, estimate.probes, estimate.method, estimate.form) == (7, 0, "exact", "stein")
    assert not estimate.per_sample.requires_grad


@pytest.mark.parametrize(("kind", "index"), [("symmetric", 1.0), ("skew", -1.0), ("nilpotent", 0.0)])
def test_symmetry_index(kind: str, index: float) -> None:
    f, x = Linear(matrix(kind, 0.5, 6)), noise(3, 6)
    assert noise_kl(f, x).symmetry_index == pytest.approx(index, abs=1e-12)
    estimate = noise_kl(f, x, method="arnoldi", probes=3000, generator=seeded())
    assert estimate.symmetry_index == pytest.approx(index, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_zero_map_is_exactly_zero(method) -> None:
    net = network()
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    estimate = noise_kl(net, noise(4, 6), method=method, generator=seeded())
    assert (estimate.value, estimate.stderr, estimate.l2) == (0.0, 0.0, 0.0)
    assert math.isnan(estimate.symmetry_index)
    assert estimate.bias_bound == 0.0
    assert estimate.injective == "certified"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", STOCHASTIC)
def test_stochastic_methods_agree_with_the_exact_one(method, form) -> None:
    f, x = network(), noise(50, 6)
    exact = noise_kl(f, x, form=form)
    estimate = noise_kl(f, x, method=method, form=form, probes=200, tolerance=1e-6, generator=seeded(1))
    error = float((estimate.per_sample - exact.per_sample).mean())
    if method == "second-order":
        J = torch.func.vmap(torch.func.jacrev(f))(x)
        error = estimate.error - float((J @ J).diagonal(dim1=1, dim2=2).sum(1).mean()) / 2
    if form == "stein":
        assert abs(error) < 4.5 * estimate.probe_stderr + 1e-9
    elif method != "second-order":
        # trace noise enters too: compare with the spread of the differences between samples
        difference = estimate.per_sample - exact.per_sample
        assert abs(error) < 4.5 * float(difference.std()) / math.sqrt(50)
    assert estimate.l2 == pytest.approx(exact.l2)
    assert estimate.probes == 200
    assert estimate.num_vjp > 0


def test_l2_is_the_same_in_both_forms_and_makes_no_products() -> None:
    f, x = network(), noise(9, 6)
    first, second = noise_kl(f, x, method="l2"), noise_kl(f, x, method="l2", form="change-of-variables")
    assert first.value == second.value == pytest.approx(float(f(x).square().sum(1).mean()) / 2)
    assert (first.num_jvp, first.num_vjp) == (0, 0)
    assert math.isnan(first.error)


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_claims_no_error_bar(method) -> None:
    estimate = noise_kl(network(), noise(1, 6), method=method, probes=3, generator=seeded())
    assert math.isnan(estimate.stderr)
    assert estimate.per_sample.shape == (1,)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_one_probe_claims_no_probe_error(method) -> None:
    one = noise_kl(network(), noise(5, 6), method=method, generator=seeded())
    two = noise_kl(network(), noise(5, 6), method=method, probes=2, generator=seeded())
    assert math.isnan(one.probe_stderr)
    assert two.probe_stderr > 0
    assert math.isfinite(one.stderr)


def test_batches_of_any_shape_and_any_chunk_give_the_same() -> None:
    f, x = network(12), noise(7, 3, 2, 2)

    def reshaped(z: Tensor) -> Tensor:
        return f(z.flatten(1)).reshape(z.shape)

    for method in ("exact", "arnoldi"):
        values = [
            noise_kl(reshaped, x, method=method, steps=12, chunk=chunk, generator=seeded()).per_sample
            for chunk in (None, 1, 5)
        ]
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(values[0], values[2])


def test_float32_and_bfloat16_networks() -> None:
    exact = noise_kl(network(), noise(20, 6))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        f, x = network().to(dtype), noise(20, 6).to(dtype)
        for method in ("exact", "arnoldi"):
            estimate = noise_kl(f, x, method=method, steps=6, probes=64, generator=seeded())
            slack = 4 * estimate.probe_stderr
            assert estimate.per_sample.dtype == torch.float64
            assert abs(estimate.value - exact.value) <= tolerance * exact.value + slack


def test_generator_decides_the_probes() -> None:
    f, x = network(), noise(5, 6)
    a, b, c = (noise_kl(f, x, method="arnoldi", generator=seeded(s)).value for s in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize("probe", ["rademacher", "gaussian", "spherical"])
def test_probe_laws(probe) -> None:
    f, x = network(), noise(10, 6)
    estimate = noise_kl(f, x, method="arnoldi", probes=400, probe=probe, tolerance=1e-6, generator=seeded())
    assert abs(estimate.value - noise_kl(f, x).value) < 4.5 * estimate.probe_stderr


def test_xtrace_reduces_the_probe_error() -> None:
    A = torch.diag(torch.tensor([0.8, 0.5, 0.2] + [1e-3] * 9, dtype=torch.float64))
    Q = torch.linalg.qr(noise(12, 12)).Q
    f, x = Linear(Q @ A @ Q.T), noise(20, 12)
    plain = noise_kl(f, x, method="arnoldi", probes=6, generator=seeded())
    better = noise_kl(f, x, method="arnoldi", probes=6, variance_reduction="xtrace", generator=seeded())
    exact = noise_kl(f, x).error
    assert abs(better.error - exact) < 0.02 * abs(plain.error - exact) + 1e-5
    assert better.probe_stderr < 0.1 * plain.probe_stderr


# --- injectivity ------------------------------------------------------------------------------------------------


def test_injectivity_is_certified_by_a_proved_constant() -> None:
    small = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        small[0].weight.copy_(matrix("gaussian", 0.5, 4))
    assert noise_kl(small, noise(3, 4)).injective == "certified"
    assert noise_kl(small, noise(3, 4), certify=False).injective == "unknown"


def test_injectivity_is_unknown_without_one() -> None:
    assert noise_kl(Linear(matrix("gaussian", 0.5, 4)), noise(3, 4)).injective == "unknown"


def test_a_change_of_orientation_violates_injectivity() -> None:
    # T(x) = |x| folds the line: det(I + J) is -1 on one side and 1 on the other.
    estimate = noise_kl(lambda x: x.abs() - x, torch.tensor([[-1.0], [2.0]], dtype=torch.float64))
    assert estimate.injective == "violated"
    reflected = noise_kl(lambda x: -1.9 * x, noise(4, 1))
    assert reflected.injective == "unknown"  # orientation reversed everywhere: no contradiction


def test_orientation_is_not_compared_across_conditions() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor, condition: Condition) -> Tensor:
            return x * condition.tensors["slope"][:, None]

    slopes = torch.tensor([-1.9, 0.5], dtype=torch.float64)
    f = ConditionedMap(Signed(), Condition(("a", "b"), {"slope": slopes}))
    assert noise_kl(f, noise(2, 1)).injective == "unknown"


# --- bounds of the bias -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["arnoldi", "power", "second-order", "lanczos"])
def test_bias_bound_needs_a_proved_constant_and_then_holds(method) -> None:
    A = matrix("symmetric", 0.6, 6)
    f, x = Linear(A), noise(4, 6)
    without = noise_kl(f, x, method=method, steps=3, generator=seeded())
    assert without.bias_bound is None
    bounded = noise_kl(f, x, method=method, steps=3, generator=seeded(), lipschitz=0.6)
    full = noise_kl(f, x, method="arnoldi", steps=6, generator=seeded())
    if method == "lanczos":
        full = noise_kl(f, x, method="lanczos", steps=6, generator=seeded())
    assert bounded.bias_bound is not None
    assert 0 < abs(bounded.value - full.value) <= bounded.bias_bound + 1e-12
    assert noise_kl(f, x, method=method, steps=3, lipschitz=1.2, generator=seeded()).bias_bound is None


def test_bias_bound_of_l2_is_theorem_7() -> None:
    from hnkit import theorem7_bound

    estimate = noise_kl(Linear(matrix("skew", 0.4, 6)), noise(4, 6), method="l2", lipschitz=0.4)
    assert estimate.bias_bound == pytest.approx(theorem7_bound(6, 0.4))


def test_bias_bound_from_a_certified_network() -> None:
    small = nn.Linear(4, 4).double()
    with torch.no_grad():
        small.weight.copy_(matrix("gaussian", 0.5, 4))
    estimate = noise_kl(small, noise(3, 4), method="arnoldi", steps=2, generator=seeded())
    assert estimate.bias_bound is not None
    assert noise_kl(small, noise(3, 4), method="roulette", generator=seeded()).bias_bound == 0.0


def test_printing() -> None:
    estimate = noise_kl(Linear(matrix("symmetric", 0.6, 6)), noise(4, 6), method="arnoldi", steps=3, lipschitz=0.6)
    assert str(estimate) == f"{Estimate(estimate.value, estimate.stderr)} nats (bias at most {estimate.bias_bound:.2g})"
    assert str(dataclasses.replace(estimate, value=1.0, stderr=0.25, bias_bound=0.0)) == "1.00 ± 0.25 nats"
    unproved = dataclasses.replace(estimate, bias_bound=None)
    assert str(unproved).endswith(f" nats (truncation about {estimate.bias_estimate:.2g})")
    assert repr(estimate) == f"KLEstimate({estimate}, arnoldi, 4 samples, injective: unknown)"
    assert isinstance(estimate, Estimate)


def test_parts_are_kept_per_sample() -> None:
    f, x = network(), noise(5, 6)
    J = torch.func.vmap(torch.func.jacrev(f))(x).detach()
    for method in ("exact", Arnoldi(probes=4)):
        estimate = noise_kl(f, x, method=method, form="change-of-variables", generator=seeded())
        parts = estimate.parts
        torch.testing.assert_close(parts.l2, f(x).detach().square().sum(1) / 2)
        torch.testing.assert_close(parts.alignment, (x * f(x).detach()).sum(1))
        torch.testing.assert_close(estimate.per_sample, parts.l2 + parts.error + parts.alignment - parts.trace)
        assert estimate.l2 == float(parts.l2.mean())
        assert estimate.error == float(parts.error.mean())
        assert Estimate.of(parts.error).value == estimate.error
    exact = noise_kl(f, x).parts
    torch.testing.assert_close(exact.trace, J.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(exact.frobenius, J.square().sum((1, 2)))


# --- estimators as objects --------------------------------------------------------------------------------------


OBJECTS = [
    (Exact(), "exact", {}),
    (L2(), "l2", {}),
    (Arnoldi(probes=3, steps=4), "arnoldi", {"probes": 3, "steps": 4}),
    (Arnoldi(probes=3, variance_reduction="xtrace"), "arnoldi", {"probes": 3, "variance_reduction": "xtrace"}),
    (Lanczos(tolerance=1e-6, probe="gaussian"), "lanczos", {"tolerance": 1e-6, "probe": "gaussian"}),
    (Power(steps=5), "power", {"steps": 5}),
    (LowRank(probes=2, rank=4), "low-rank", {"probes": 2, "rank": 4}),
    (Roulette(sure=2), "roulette", {"sure": 2}),
    (SecondOrder(probes=2), "second-order", {"probes": 2}),
]


@pytest.mark.parametrize(("estimator", "name", "options"), OBJECTS, ids=str)
def test_a_name_with_options_is_shorthand_for_an_object(estimator, name: str, options: dict) -> None:
    f, x = network(), noise(6, 6)
    first = noise_kl(f, x, method=estimator, generator=seeded())
    second = noise_kl(f, x, method=name, generator=seeded(), **options)
    assert torch.equal(first.per_sample, second.per_sample)
    assert first.method == second.method == name


def test_every_method_has_its_object() -> None:
    assert {name for _, name, _ in OBJECTS} == set(METHODS)


def test_options_beside_an_object_and_unknown_ones_are_refused() -> None:
    f, x = network(), noise(3, 6)
    with pytest.raises(InputError, match=r"probes beside an estimator: give Arnoldi\(...\) its options"):
        noise_kl(f, x, method=Arnoldi(), probes=2)
    with pytest.raises(InputError, match="unknown option 'probess'"):
        noise_kl(f, x, method="arnoldi", probess=2)
    with pytest.raises(InputError, match="tolerance 2 is not between"):
        Arnoldi(tolerance=2)
    with pytest.raises(InputError, match="unknown method 3"):
        noise_kl(f, x, method=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("generator", [3, "1", 0.5])
def test_a_generator_that_is_none_is_one_line(method, generator) -> None:
    with pytest.raises(InputError, match=r"generator .* is no torch\.Generator"):
        noise_kl(network(), noise(3, 6), method=method, generator=generator)


def test_a_new_estimator_is_one_class() -> None:
    """A class with a name is a method, with its options, its errors, its plans and its record."""

    @dataclasses.dataclass(frozen=True)
    class Hutchinson(Probed):
        name: ClassVar[str] = "half-hutchinson"

        @property
        def fixed_products(self) -> int:
            return 2

        def form(self, operator, vectors, run):
            return SecondOrder(self.probes, self.probe).form(operator, vectors, run)

    try:
        f, x = network(), noise(20, 6)
        own = noise_kl(f, x, method="half-hutchinson", probes=2, generator=seeded())
        assert torch.equal(
            own.per_sample, noise_kl(f, x, method="second-order", probes=2, generator=seeded()).per_sample
        )
        assert noise_kl(f, x, method=Hutchinson(), budget=20, generator=seeded()).samples == 10
        with pytest.raises(InputError, match="half-hutchinson"):
            noise_kl(f, x, method="neither")
    finally:
        hnkit.kl.method._CLASSES.pop("half-hutchinson")


# --- folds ------------------------------------------------------------------------------------------------------


def test_folds_of_a_map_that_folds() -> None:
    """`f = -1.2 tanh 2x` folds the middle of the line: degree 1, eq. 53 0.058 (not the KL, 0.917)."""
    estimate = noise_kl(lambda x: -1.2 * torch.tanh(2 * x), noise(20_000, 1), form="change-of-variables")
    folds = estimate.folds
    assert folds is not None
    inside = math.acosh(math.sqrt(2.4)) / 2  # det = 1 - 2.4 / cosh(2x)^2 is negative for |x| below it
    mass = math.erf(inside / math.sqrt(2))
    assert abs(folds.negative / 20_000 - mass) < 4.5 * math.sqrt(mass * (1 - mass) / 20_000)
    assert mass < folds.upper < mass + 0.02
    assert abs(folds.degree.value - 1) < 4.5 * folds.degree.stderr
    assert folds.degree.stderr < 0.05
    assert abs(estimate.value - 0.058) < 4.5 * estimate.stderr + 5e-4
    assert "orientation reversed at" in str(folds)
    # E[1{det < 0} exp(-ell)] is the integral of the density of T x over folded points, by quadrature in x.
    t = torch.linspace(-inside, inside, 20_001, dtype=torch.float64)
    y = t - 1.2 * torch.tanh(2 * t)
    density = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi) * (1 - 2.4 / torch.cosh(2 * t) ** 2).abs()
    assert abs(folds.folded.value - float(torch.trapezoid(density, t))) < 4.5 * folds.folded.stderr


def test_no_fold_is_said_with_its_bound() -> None:
    folds = noise_kl(network(), noise(59, 6)).folds
    assert folds is not None
    assert folds.negative == 0
    assert folds.upper == pytest.approx(1 - 0.05 ** (1 / 59))
    assert str(folds) == "no fold in 59 samples (in at most 0.05 of them, 95%)"
    assert noise_kl(network(), noise(5, 6), method="arnoldi").folds is None


# --- the roulette near a norm of 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.9, 0.97, 0.99])
def test_roulette_near_a_norm_of_one_is_right_or_refuses(norm: float) -> None:
    """The error bar of a variance that is infinite is no error bar: at -L I the truth is d h(L)."""
    f, x = Linear(-norm * torch.eye(6, dtype=torch.float64)), noise(400, 6)
    estimate = noise_kl(f, x, method="roulette", generator=seeded(), lipschitz=norm)
    truth = 6 * (-math.log1p(-norm) - norm)
    assert estimate.finite_variance
    error = Estimate.of(estimate.parts.error)
    assert abs(error.value - truth) < 4.5 * error.stderr
    assert not noise_kl(f, x, method="roulette", generator=seeded()).finite_variance


def test_roulette_refuses_what_it_cannot_say() -> None:
    f, x = Linear(-0.999 * torch.eye(6, dtype=torch.float64)), noise(4, 6)
    with pytest.raises(InputError, match="finite variance: use arnoldi or lanczos"):
        noise_kl(f, x, method="roulette", generator=seeded(), lipschitz=0.999)
    # An outlier that the first vectors do not show: the chance chosen from them is too small for it.
    outlier = torch.diag(torch.tensor([0.97] + [0.05] * 39, dtype=torch.float64))
    probe = torch.zeros(1, 40, dtype=torch.float64)
    probe[0, 0], probe[0, 1] = 1e-7, 1.0
    operator = MatrixOperator(outlier, 1)

    def all_seeds() -> None:
        for seed in range(100):
            roulette(operator, probe, generator=seeded(seed))

    with pytest.raises(ExpansiveMapError, match="variance is not finite"):
        all_seeds()


# --- targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.parametrize("budget", [60, 500])
def test_budget_is_kept_and_used(method, budget: int) -> None:
    f, x = network(), noise(20, 6)
    estimate = noise_kl(f, x, method=method, budget=budget, generator=seeded())
    spent = estimate.num_jvp + estimate.num_vjp
    if method != "roulette":  # its lengths are random
        assert spent <= budget
    assert spent > 0.4 * budget
    assert estimate.per_sample.shape == (estimate.samples,)
    # Samples come before probes: a second probe only once every sample has one.
    assert estimate.samples == 20 or estimate.probes == 1


@pytest.mark.parametrize("method", ["arnoldi", "lanczos", "power"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
def test_a_budget_keeps_the_tolerance(method, tolerance: float) -> None:
    """Adaptive steps stay adaptive: to the tolerance asked for, at every sample, not at the one that the pilot saw."""
    slopes = torch.linspace(0.1, 0.8, 20, dtype=torch.float64)

    def uneven(x: Tensor) -> Tensor:  # hardly bent at the first sample, strongly at the others
        return slopes * x.abs().clamp(max=1) * x / 2

    x = noise(20, 20)
    x[0] *= 1e-3
    estimate = noise_kl(uneven, x, method=method, budget=3000, tolerance=tolerance, generator=seeded(), check=False)
    assert estimate.num_jvp + estimate.num_vjp <= 3000
    size = float(estimate.parts.frobenius.mean()) / 2
    assert estimate.bias_estimate <= tolerance * size
    finest = noise_kl(uneven, x, method=method, tolerance=1e-12, probes=estimate.probes, check=False, max_steps=200)
    assert finest.steps >= estimate.steps


def test_a_budget_below_one_row_says_what_is_needed() -> None:
    with pytest.raises(InputError, match=r"budget 3 is too small: one sample needs \d+ products"):
        noise_kl(network(), noise(5, 6), method="arnoldi", budget=3)


def test_relative_error_target_is_met() -> None:
    f, x = network(), noise(16, 6)
    exact = noise_kl(f, x).value
    misses = []
    for seed in range(40):
        estimate = noise_kl(f, x, method="arnoldi", rel_error=0.02, check=False, generator=seeded(seed))
        misses.append((estimate.value - exact) / (0.02 * exact))
        assert estimate.probe_stderr < 1.6 * 0.02 * exact
    deviation = torch.tensor(misses)
    # Unbiased: the mean of 40 within 4.5 standard errors of 0. On target: root mean square at most 1, up to chance.
    assert abs(float(deviation.mean())) < 4.5 * float(deviation.std()) / math.sqrt(40)
    assert float(deviation.square().mean().sqrt()) < 1.2


def test_relative_error_covers_the_samples_too_where_it_can() -> None:
    f = Linear(matrix("symmetric", 0.5, 6))
    estimate = noise_kl(f, noise(4000, 6), method="arnoldi", rel_error=0.05, generator=seeded())
    assert estimate.stderr <= 0.05 * estimate.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rel_error": 0.01}, "zero"),
        ({"rel_error": 0.0}, "rel_error 0.0"),
        ({"rel_error": -1.0}, "rel_error -1.0"),
        ({"rel_error": 1.5}, "rel_error 1.5"),
        ({"budget": 0}, "budget 0"),
        ({"budget": -5}, "budget -5"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"probes": 0}, "probes 0"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"chunk": 0}, "chunk 0"),
        ({"probe": "uniform"}, "'uniform'"),
        ({"form": "neither"}, "'neither'"),
        ({"method": "magic"}, "'magic'"),
        ({"variance_reduction": "all"}, "'all'"),
        ({"variance_reduction": "xtrace"}, "2 probes or more"),
        ({"method": "power", "variance_reduction": "xtrace", "probes": 4}, "arnoldi"),
        ({"method": "exact", "budget": 100}, "no probes"),
        ({"method": "l2", "rel_error": 0.1}, "no probes"),
        ({"rel_error": 0.1, "budget": 100}, "both"),
        ({"lipschitz": -1.0}, "lipschitz -1.0"),
        ({"lipschitz": math.nan}, "lipschitz nan"),
    ],
)
def test_bad_options_are_one_line(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        noise_kl(lambda x: 0 * x, noise(3, 4), **{"method": "arnoldi", **options})
    assert "\n" not in str(caught.value)


def test_an_absurd_relative_error_is_refused() -> None:
    with pytest.raises(InputError, match="probes per sample"):
        noise_kl(network(), noise(2, 6), method="arnoldi", rel_error=1e-6, generator=seeded())


# --- failures ---------------------------------------------------------------------------------------------------


def test_series_methods_refuse_a_norm_of_one_and_name_it() -> None:
    f, x = Linear(matrix("gaussian", 1.4, 6)), noise(200, 6)
    for method in ("arnoldi", "power", "roulette"):
        with pytest.raises(InputError, match=r"method \w+ needs a local norm .* found at least 1\.\d+"):
            noise_kl(f, x, method=method, generator=seeded())
    exact, bracket = noise_kl(f, x), noise_kl(f, x, method="lanczos", probes=20, steps=6, generator=seeded())
    assert exact.error == pytest.approx(exact_error(matrix("gaussian", 1.4, 6)))
    assert abs(bracket.error - exact.error) < 4.5 * bracket.probe_stderr


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_values_name_the_sample(method) -> None:
    x = noise(6, 3).abs()
    x[4] = -1.0
    with pytest.raises(NonFiniteError, match="sample 4"):
        noise_kl(lambda z: 0.1 * z.sqrt(), x, method=method, check=False, generator=seeded())


def test_a_singular_point_is_named() -> None:
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="singular at sample 1"):
        noise_kl(lambda z: z.square() / 2 - z, x)


def test_the_map_is_checked_first() -> None:
    with pytest.raises(InputError, match="couples rows"):
        noise_kl(lambda x: x - x.mean(0), noise(5, 3))
    with pytest.raises(InputError, match="no gradient"):
        noise_kl(lambda x: x.detach(), noise(5, 3), method="arnoldi")


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    noise_kl(network(), noise(5, 6), chunk=4, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)
    noise_kl(network(), noise(5, 6), chunk=4, method="arnoldi", progress=lambda *at: seen.append(at))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] != []


def test_large_matrices_take_the_in_place_route(monkeypatch: pytest.MonkeyPatch) -> None:
    import hnkit.kl.moments

    f, x = Linear(matrix("gaussian", 0.9, 40)), noise(3, 40)
    usual = noise_kl(f, x)
    monkeypatch.setattr(hnkit.kl.moments, "_IN_PLACE_ENTRIES", 64)
    streamed = noise_kl(f, x)
    torch.testing.assert_close(streamed.per_sample, usual.per_sample, rtol=1e-11, atol=0)
    assert streamed.symmetry_index == pytest.approx(usual.symmetry_index)
    assert streamed.injective == usual.injective


def test_compiled_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def fake(f, backend):
        compiled.append(backend)
        return lambda x: f(x)

    monkeypatch.setattr(torch, "compile", fake)
    f, x = network(), noise(5, 6)
    plain = noise_kl(f, x, method="arnoldi", generator=seeded())
    quick = noise_kl(f, x, method="arnoldi", generator=seeded(), compile=True)
    assert compiled == ["inductor"]
    assert quick.value == plain.value
