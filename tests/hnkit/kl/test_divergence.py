"""noise_kl against closed forms and quadrature, what it says about its own error, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor, nn

from hnkit import Estimate, InputError, NonFiniteError, noise_kl
from hnkit.errors import ExpansiveMapError
from hnkit.kl.divergence import FORMS, METHODS
from hnkit.kl.estimators import roulette
from hnkit.maps import Condition, ConditionedMap
from tests.hnkit.functions import Linear, f64, network, noise, seeded
from tests.hnkit.operator_zoo import MatrixOperator, exact_error, matrix

TURN = torch.tensor([[0.0, -0.4], [0.4, 0.0]], dtype=torch.float64)


def turned(x: Tensor) -> Tensor:
    """0.4 times a quarter turn: every probe of two signs sees the same of it."""
    return x @ TURN


STOCHASTIC = ("arnoldi", "lanczos", "power", "roulette", "second-order")


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lipschitz": math.inf}, "lipschitz inf"),
        ({"lipschitz": -0.1}, "lipschitz -0.1"),
        ({"tolerance": 1.0}, "tolerance 1.0"),
        ({"tolerance": 1.5}, "tolerance 1.5"),
        ({"method": "arnoldi", "rel_error": 1.0}, "rel_error 1.0"),
        ({"probes": 2**40}, "below 2\\^40"),
        ({"method": "arnoldi", "probes": 1, "variance_reduction": "xtrace"}, "2 probes or more"),
    ],
)
def test_options_just_outside_their_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        noise_kl(turned, noise(2, 2, seed=3), **{"method": "l2", **options})


def test_options_at_the_edge_of_their_range_are_accepted():
    assert noise_kl(lambda x: 0 * x + 1, noise(2, 2, seed=3), method="l2", lipschitz=0.0).bias_bound == 0.0
    assert noise_kl(turned, noise(2, 2, seed=3), method="l2", probes=2**40 - 1).probes == 0
    pair = noise_kl(turned, noise(3, 2, seed=3), method="arnoldi", probes=2, variance_reduction="xtrace")
    assert pair.probes == 2


def test_a_lipschitz_constant_of_one_bounds_nothing():
    assert noise_kl(turned, noise(2, 2, seed=3), method="l2", lipschitz=1.0).bias_bound is None
    assert noise_kl(turned, noise(2, 2, seed=3), method="second-order", lipschitz=1.0).bias_bound is None


@pytest.mark.parametrize("n", [1, 5])
def test_the_error_of_the_truncation_is_a_mean_over_samples(n):
    """`h(L) - L^2/2` for each dimension bounds what the second-order term leaves of the log-determinant."""
    estimate = noise_kl(turned, noise(n, 2, seed=3), method="second-order", lipschitz=0.4)
    assert estimate.bias_bound == pytest.approx(2 * (-math.log(0.6) - 0.4 - 0.08), rel=1e-12)
    alone = noise_kl(turned, noise(1, 2, seed=3), method="second-order", lipschitz=0.4)
    assert estimate.bias_estimate == pytest.approx(alone.bias_estimate, rel=1e-12)
    assert estimate.bias_estimate > 0


def test_the_symmetry_index_of_small_jacobians():
    assert noise_kl(lambda x: 0.01 * x, noise(3, 2, seed=3)).symmetry_index == pytest.approx(1.0)
    assert noise_kl(turned, noise(3, 2, seed=3)).symmetry_index == pytest.approx(-1.0)


def test_the_local_norm_is_the_largest_seen():
    estimate = noise_kl(lambda x: x.square() / 4, f64([0.2], [-1.5], [1.0]), method="arnoldi")
    assert estimate.local_norm == pytest.approx(0.75)


def test_a_map_is_prepared_for_compilation_only_if_it_is_compiled(monkeypatch):
    monkeypatch.setattr("hnkit.kl.divergence.reusable_graphs", lambda: pytest.fail("nothing is compiled"))
    assert noise_kl(turned, noise(3, 2, seed=3)).error == pytest.approx(-math.log1p(0.4**2))
