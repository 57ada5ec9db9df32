"""hnkit.testing: strategies give what they promise, assertions pass on truth and fail on planted errors."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hnkit import InputError, NoiseLoss, lipschitz_upper, local_lipschitz, log_det_error
from hnkit.testing import (
    MATRIX_KINDS,
    TiltedGaussian,
    assert_bounds,
    assert_kl,
    assert_kl_identity,
    assert_lipschitz,
    assert_map,
    assert_mean,
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

F64 = torch.float64
ROOT = Path(__file__).parents[3]
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def gaussian(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- strategies -------------------------------------------------------------------------------------------------------


@few
@given(st.data(), st.integers(1, 6), st.floats(1e-6, 3), st.sampled_from(MATRIX_KINDS))
def test_matrices_have_the_norm_and_the_structure(data, d, norm, kind):
    A = data.draw(matrices(d, norm, kind))
    assert A.shape == (d, d)
    assert A.dtype == F64
    vanishes = d == 1 and kind in ("skew", "nilpotent", "low-rank")
    found = float(torch.linalg.matrix_norm(A, 2))
    assert found == 0 if vanishes else found == pytest.approx(norm, rel=1e-9)
    small = 1e-10 * norm
    if kind == "symmetric":
        assert float((A - A.T).abs().max()) < small
    elif kind == "skew":
        assert float((A + A.T).abs().max()) < small
    elif kind == "normal":
        assert float((A @ A.T - A.T @ A).abs().max()) < small * norm
    elif kind == "nilpotent":
        assert float(torch.linalg.matrix_power(A / norm, d).abs().max()) < 1e-10
    elif kind == "low-rank":
        assert int(torch.linalg.matrix_rank(A)) < d


def test_matrices_reach_every_kind_and_negative_errors():
    seen = set()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(matrices(norm=0.9))
    def collect(A):
        error = float(log_det_error(A))
        seen.add("negative" if error < -1e-6 else "positive" if error > 1e-6 else "zero")

    collect()
    assert seen == {"negative", "positive", "zero"}


@few
@given(matrices())
def test_every_bound_holds_on_drawn_matrices(A):
    assert_bounds(A)


@few
@given(st.data(), st.sampled_from([(3,), (1,), (2, 4, 4)]), st.floats(0, 1.5))
def test_lipschitz_maps_are_certified_at_the_constant(data, shape, constant):
    f = data.draw(lipschitz_maps(shape, constant))
    x = data.draw(noise(shape, 6))
    assert x.shape == (6, *shape)
    assert f(x).shape == x.shape
    value = lipschitz_upper(f).value
    assert value <= constant
    assert value == pytest.approx(constant, rel=1e-9)
    assert_lipschitz(f, constant, x)
    assert_rows_independent(f, x)
    if constant < 1:
        assert_theorem7(f, x)
        assert_theorem7(f, x, lipschitz=constant)


@few
@given(tilted_gaussians())
def test_tilted_gaussians_know_their_laws(problem):
    x = gaussian(20_000, problem.dim, seed=1)
    weights = torch.exp(problem.reward(x) - problem.log_z())
    assert_mean(weights, 1.0, what="E[exp(r)] / Z")
    best, l2 = problem.optimal_map(), problem.l2_map()
    S = problem.covariance
    assert_moments(x + best(x), problem.mean, S)
    assert_moments(x + l2(x), problem.mean, S @ S)
    assert_kl(best, x[:500], problem.kl_optimal())
    gap = problem.kl_optimal() - float(problem.mean @ problem.linear) + problem.log_z()
    gap += 0.5 * float(problem.mean @ problem.precision @ problem.mean + torch.trace(problem.precision @ S))
    assert gap == pytest.approx(0.0, abs=1e-9)  # KL(p0* || p0) - E[r] + log Z = 0 at the optimum
    s = torch.linalg.eigvalsh(S)
    assert problem.l2_gap() == pytest.approx(float((s - 1 - s.log()).sum()) / 2, abs=1e-12)


@few
@given(lipschitz_maps((3,)))
def test_drawn_maps_satisfy_the_identity_of_the_two_forms(f):
    assert_kl_identity(f, gaussian(1500, 3))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (matrices(2, -1.0), "norm = -1"),
        (matrices(2, 0.5, "diagonal"), "unknown matrix kind 'diagonal'"),
        (matrices(0, 0.5), "dim = 0"),
        (lipschitz_maps((2,), math.inf), "constant = inf"),
        (tilted_gaussians(2, math.nan), "strength = nan"),
    ],
)
def test_strategies_refuse_bad_arguments(strategy, message):
    @settings(max_examples=1, database=None)
    @given(strategy)
    def draw(value):
        raise AssertionError(value)

    with pytest.raises(InputError, match=message):
        draw()


# --- every assertion fails on a planted error -------------------------------------------------------------------------


def smooth(x):
    return 0.3 * torch.sin(x) + 0.2 * x.roll(1, -1)


def test_assert_mean():
    samples = 2 + gaussian(1000)
    assert_mean(samples, 2.0)
    assert_mean(samples, 2.1, bias_bound=0.1)
    with pytest.raises(AssertionError, match=r"the mean is 2.0\d* \+- 0.03\d*, expected 3: off by .* standard errors"):
        assert_mean(samples, 3.0)
    assert_mean(torch.full((40,), 1 / 3, dtype=F64), 1 / 3 + 1e-12)
    with pytest.raises(AssertionError, match="inf standard errors"):
        assert_mean(torch.full((40,), 1.0), 1.001)
    with pytest.raises(AssertionError):
        assert_mean(torch.full((40,), math.nan), 1.0)
    with pytest.raises(InputError, match="at least 32"):
        assert_mean(torch.zeros(31), 0.0)
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="false_alarm"):
            assert_mean(samples, 2.0, false_alarm=rate)


def test_the_false_alarm_rate_is_the_one_stated():
    """Over 2000 sets of true samples at rate 0.1 the number of failures is binomial: within 5 standard deviations."""
    failures = 0
    for row in gaussian(2000, 64, seed=4):
        try:
            assert_mean(row, 0.0, false_alarm=0.1)
        except AssertionError:
            failures += 1
    assert abs(failures - 200) < 5 * math.sqrt(2000 * 0.1 * 0.9)


def test_assert_moments():
    x = gaussian(5000, 3)
    zero, identity = torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)
    assert_moments(x, zero, identity)
    with pytest.raises(AssertionError, match=r"mean entry 1 is 0.\d+ \+- .*, expected 0: .* standard errors off"):
        assert_moments(x + torch.tensor([0, 0.5, 0]), zero, identity)
    with pytest.raises(AssertionError, match=r"covariance entry \(2, 2\) is 1.\d+ .* expected 2"):
        assert_moments(x, zero, torch.diag(torch.tensor([1.0, 1, 2])))
    with pytest.raises(InputError, match="do not fit"):
        assert_moments(x, zero[:2], identity)


def test_assert_kl_identity():
    x = gaussian(3000, 4)
    assert_kl_identity(smooth, x)
    jumps = lambda x: 0.3 * torch.sign(x) + 0.1 * x  # noqa: E731  J = 0.1 I almost everywhere, E[x.f] has the jumps' share
    with pytest.raises(AssertionError, match=r"Stein's identity fails .* standard errors"):
        assert_kl_identity(jumps, x)
    with pytest.raises(AssertionError, match="is x standard normal"):
        assert_kl_identity(smooth, 1.3 * x)
    with pytest.raises(InputError, match="at least 32"):
        assert_kl_identity(smooth, x[:5])


def test_assert_kl():
    problem = TiltedGaussian(torch.diag(torch.tensor([0.5, 2.0], dtype=F64)), torch.tensor([0.3, -0.2], dtype=F64))
    x = gaussian(3000, 2)
    for form in ("stein", "change-of-variables"):
        assert_kl(problem.optimal_map(), x, problem.kl_optimal(), form=form)
    with pytest.raises(AssertionError, match=r"KL \(method exact, stein form, nats\) is .* expected"):
        assert_kl(problem.optimal_map(), x, 2 * problem.kl_optimal())
    with pytest.raises(AssertionError, match="method l2"):  # the L2 term is not the KL
        assert_kl(problem.optimal_map(), x, problem.kl_optimal(), method="l2")


def test_assert_theorem7(monkeypatch):
    f = lambda x: -0.6 * x  # noqa: E731  attains the bound
    x = gaussian(3, 4)
    assert_theorem7(f, x)
    assert_theorem7(f, x, lipschitz=0.6)
    with pytest.raises(
        AssertionError, match=r"Theorem 7 fails at sample 0: .* claimed constant 0.59, d = 4, .* 0.6 there"
    ):
        assert_theorem7(f, x, lipschitz=0.59)
    with pytest.raises(InputError, match=r"local norm = 1\.2"):
        assert_theorem7(lambda x: 1.2 * x, x)
    monkeypatch.setattr("hnkit.testing.assertions.log_det_error", lambda A: 1.001 * log_det_error(A))
    with pytest.raises(AssertionError, match="with L the local norm"):
        assert_theorem7(f, x)


@pytest.mark.parametrize(
    ("home", "name", "message"),
    [
        ("hnkit.bounds", "singular_value_bound", "exceeds singular-value bound"),
        ("hnkit.bounds", "frobenius_bound", "exceeds Frobenius bound"),
        ("hnkit.bounds", "local_theorem7_bound", "exceeds Theorem 7"),
        ("hnkit.bounds", "second_order_remainder_bound", "exceeds second-order remainder"),
        ("hnkit.linalg.matrices", "field_of_values_bounds", "exceeds field of values, upper"),
    ],
)
def test_assert_bounds(home, name, message, monkeypatch):
    A = torch.stack([-0.5 * torch.eye(3, dtype=F64), 0.3 * torch.eye(3, dtype=F64)])
    assert_bounds(A)
    import hnkit.bounds

    true = getattr(hnkit.bounds, name)

    def shrunk(*arguments):
        value = true(*arguments)
        return (value[0], 0.999 * value[1]) if isinstance(value, tuple) else 0.999 * value

    monkeypatch.setattr(f"{home}.{name}", shrunk)
    with pytest.raises(AssertionError, match=message + r".* nats \(matrix 0\)"):
        assert_bounds(A)


@pytest.mark.parametrize("scale", [1e-20, 1e-155, 1e-160, 1e-170, 1e-308, 5e-324])
def test_assert_bounds_takes_matrices_whose_squares_underflow(scale):
    generator = torch.Generator().manual_seed(0)
    for d in (1, 2, 5):
        assert_bounds(scale * torch.randn(3, d, d, dtype=torch.float64, generator=generator))


def test_assert_bounds_checks_the_lower_side(monkeypatch):
    from hnkit.bounds import field_of_values_bounds

    rotation = 0.01 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    assert_bounds(rotation)
    monkeypatch.setattr("hnkit.linalg.matrices.field_of_values_bounds", lambda A: (field_of_values_bounds(A)[1],) * 2)
    with pytest.raises(AssertionError, match=r"E\(S\) - E\(A\) = .* exceeds slack of the field of values = 0 by"):
        assert_bounds(rotation)


def test_assert_lipschitz():
    x = gaussian(40, 3)
    assert_lipschitz(smooth, 0.5, x)
    with pytest.raises(AssertionError, match=r"\|J\(x\)\|_2 = 0.4\d* at sample \d+ exceeds the Lipschitz constant 0.4"):
        assert_lipschitz(smooth, 0.4, x)
    steps = lambda x: torch.floor(3 * x) / 30  # noqa: E731  derivative 0, but it jumps
    with pytest.raises(AssertionError, match=r"at samples \d+ and \d+, .* constant of at least .* is needed, not 0.05"):
        assert_lipschitz(steps, 0.05, x)
    with pytest.raises(InputError, match="constant = -1"):
        assert_lipschitz(smooth, -1.0, x)


def test_assert_rows_independent():
    x = gaussian(6, 3)
    assert_rows_independent(smooth, x)
    for bad, message in (
        (lambda x: 0.1 * (x - x.mean(0)), r"row \d of f\(x\) changes by .* when other rows are replaced"),
        (nn.BatchNorm1d(3).double(), "when other rows are replaced"),
        (lambda x: x * torch.arange(6)[:, None] / 10, "when the batch is reversed"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_rows_independent(bad, x)
    with pytest.raises(InputError, match="at least two"):
        assert_rows_independent(smooth, x[:1])


class LowRank(nn.Module):
    """x -> B A x, as LoRA: zero if B is."""

    def __init__(self, left=0.0, right=1.0):
        super().__init__()
        self.down = nn.Parameter(right * torch.randn(2, 5))
        self.up = nn.Parameter(left * torch.randn(5, 2))

    def forward(self, x, condition=None):
        delta = x @ self.down.T @ self.up.T
        return delta if condition is None else delta * condition


def test_assert_zero_at_init():
    assert_zero_at_init(LowRank(), (5,))
    assert_zero_at_init(LowRank(), (5,), condition=torch.ones(3, 1))
    with pytest.raises(AssertionError, match=r"not zero at initialisation: the largest entry of f\(x\) is \d"):
        assert_zero_at_init(LowRank(left=1e-20), (5,))
    with pytest.raises(AssertionError, match="none of its 2 trainable parameters receives a gradient"):
        assert_zero_at_init(LowRank(right=0.0), (5,))
    assert_zero_at_init(LowRank(right=0.0), (5,), trainable=False)
    with pytest.raises(AssertionError, match="no parameter that requires a gradient"):
        assert_zero_at_init(LowRank().requires_grad_(False), (5,))
    with pytest.raises(AssertionError, match=r"shape \(3, 2\)"):
        assert_zero_at_init(nn.Linear(5, 2), (5,))
    broken = LowRank()
    nn.init.constant_(broken.up, math.nan)
    with pytest.raises(AssertionError, match="largest entry of f"):
        assert_zero_at_init(broken, (5,))


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.8)
    return net


def generate(x):
    return torch.tanh(x)


def reward(y):
    return (y * torch.tensor([1.0, -2.0, 0.5], dtype=y.dtype)).sum(1)


@pytest.mark.parametrize("kl", ["l2", "exact", "second-order", "arnoldi"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_assert_noise_loss_accepts_the_losses(kl, reduction):
    loss = NoiseLoss(kl=kl, alpha=0.7, reduction=reduction)
    assert_noise_loss(loss, network(), gaussian(4, 3), generate, reward, tolerance=1e-6 if kl == "l2" else 2e-3)


@dataclass(frozen=True)
class Planted:
    """A loss with one error planted."""

    error: str
    inner: NoiseLoss

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, f, x, generate, reward, *, generator=None):
        terms = self.inner(f, x, generate, reward, generator=generator)
        half = (terms.x_hat - x).square().sum(1) / 2
        if self.error == "the half dropped":
            return replace(terms, kl=terms.kl + half, total=terms.total + half)
        if self.error == "sign of the reward":
            return replace(terms, total=terms.kl + terms.reward / self.alpha)
        if self.error == "error term negated":
            kl = 2 * half - terms.kl
            return replace(terms, kl=kl, total=kl - terms.reward / self.alpha)
        if self.error == "first weight for all":
            mixed = terms.total.detach() + (terms.total.mean() - terms.total.mean().detach())
            return replace(terms, total=mixed)
        if self.error == "error term detached":
            kl = half + (terms.kl - half).detach()
            return replace(terms, kl=kl, total=kl - terms.reward / self.alpha)
        return replace(terms, x_hat=x)


@pytest.mark.parametrize(
    ("error", "kl", "message"),
    [
        ("the half dropped", "l2", "KL term"),
        ("sign of the reward", "l2", "total against"),
        ("error term negated", "exact", "KL term of kl='exact'"),
        ("error term negated", "second-order", "summed KL term of kl='second-order'"),
        ("error term negated", "arnoldi", "summed KL term of kl='arnoldi'"),
        ("first weight for all", "l2", "gradient with a weight per sample"),
        ("error term detached", "exact", "gradient with a weight per sample"),
        ("x_hat not moved", "l2", "x_hat against"),
    ],
)
def test_assert_noise_loss_notices(error, kl, message):
    loss = Planted(error, NoiseLoss(kl=kl, alpha=0.7))
    with pytest.raises(AssertionError, match=message):
        assert_noise_loss(loss, network(), gaussian(4, 3), generate, reward, repeats=400, tolerance=1e-3)


def test_assert_noise_loss_refuses_what_it_cannot_test():
    with pytest.raises(InputError, match="no trainable parameter"):
        assert_noise_loss(NoiseLoss(), nn.Tanh(), gaussian(4, 3), generate, reward)
    with pytest.raises(InputError, match="at least 32"):
        assert_noise_loss(NoiseLoss("second-order"), network(), gaussian(4, 3), generate, reward, repeats=8)


# --- as a stranger finds it -------------------------------------------------------------------------------------------


def test_the_example_project_passes():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--confcutdir=.",
        "-c",
        "pyproject.toml",
        ".",
    ]
    result = subprocess.run(
        command, cwd=ROOT / "docs" / "example-testing", capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def test_without_hypothesis_one_line_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import hnkit.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: hnkit.testing needs hypothesis: pip install 'hnkit[testing]'"
    )


def test_the_documentation_page_runs():
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/testing.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) >= 3
    for test in tests:
        test()


def test_local_norms_of_drawn_images_stay_below_their_certificate():
    @few
    @given(lipschitz_maps((2, 4, 4), 0.9), noise((2, 4, 4), 2))
    def check(f, x):
        assert float(local_lipschitz(f, x).max()) <= lipschitz_upper(f).value

    check()


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x - x.mean(0), "couples rows"),
        (lambda x: x / len(x), "how many rows"),
        (lambda x: x.mul_(0.5), "writes into its input"),
        (lambda x: x * x.detach(), "derivative of the map is wrong by 50 %"),
        (lambda x: x + (x.round() - x).detach(), "straight-through"),
        (lambda x: x[:, :1], "shape"),
    ],
)
def test_assert_map_says_what_is_not_kept(f, words):
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match=words):
        assert_map(f, x, jvp=False)


def test_assert_map_passes_on_maps_and_refuses_what_is_no_noise():
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_map(lambda x: 0.3 * x.sin(), x)
    assert_map(torch.nn.ReLU(), x[:1])
    with pytest.raises(InputError, match="int64"):
        assert_map(lambda x: x, torch.zeros(3, 2, dtype=torch.int64))
