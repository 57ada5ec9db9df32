"""Are the error bars right? 400 repetitions of every estimator, with fixed seeds.

The noise is drawn from a finite population of points whose exact integrands are known, so that the true mean is too.
One call of `noise_kl` on 400 x 40 samples makes the 400 repetitions: rows are independent, and a repetition's value and
standard error are those that a call with its 40 samples returns, by the same function of `per_sample`.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from hnkit import noise_kl
from hnkit.internal.stats import mean_and_stderr
from hnkit.kl.estimators import arnoldi, draw_probes, lanczos
from tests.hnkit.operator_zoo import MatrixOperator, hard_spectra

DIM, REPETITIONS, SAMPLES = 12, 400, 40
NORMAL_COVERAGE = {1: 0.6767, 2: 0.9476}  # of Student's law with 39 degrees of freedom
ALARM = 3.9  # standard deviations: a false alarm with probability 1e-4 per comparison


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, 24), nn.Tanh(), nn.Linear(24, DIM)).double()
    with torch.no_grad():
        net[2].weight.mul_(1.2)
    return net


def population() -> Tensor:
    return torch.randn(64, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draws() -> Tensor:
    index = torch.randint(0, 64, (REPETITIONS * SAMPLES,), generator=torch.Generator().manual_seed(1))
    return population()[index]


def exact_second_order(f: nn.Module, x: Tensor) -> float:
    J = torch.func.vmap(torch.func.jacrev(f))(x)
    return float((f(x).square().sum(1) / 2 + (J @ J).diagonal(dim1=1, dim2=2).sum(1) / 2).mean())


CASES = [
    ("arnoldi", {"tolerance": 1e-6}),
    ("arnoldi", {"tolerance": 1e-6, "probe": "gaussian"}),
    ("arnoldi", {"tolerance": 1e-6, "probe": "spherical", "probes": 2}),
    ("arnoldi", {"tolerance": 1e-6, "variance_reduction": "xtrace", "probes": 3}),
    ("lanczos", {"tolerance": 1e-6}),
    ("power", {"tolerance": 1e-6}),
    ("roulette", {}),
    ("second-order", {}),
    ("exact", {}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_standard_errors_cover_as_they_should(method, options: dict) -> None:
    f = network()
    truth = noise_kl(f, population()).value
    if method == "second-order":
        truth = exact_second_order(f, population())
    estimate = noise_kl(f, draws(), method=method, generator=torch.Generator().manual_seed(2), check=False, **options)
    runs = [mean_and_stderr(values) for values in estimate.per_sample.reshape(REPETITIONS, SAMPLES)]
    scores = torch.tensor([(value - truth) / stderr for value, stderr in runs])
    for width, probability in NORMAL_COVERAGE.items():
        covered = float((scores.abs() < width).double().mean())
        assert abs(covered - probability) < ALARM * math.sqrt(probability * (1 - probability) / REPETITIONS)
    # Unbiased: the mean of all 16,000 samples within its own error.
    assert abs(estimate.value - truth) < ALARM * estimate.stderr
    # The scale of the scores, not only their tails: the variance of Student's law is 39/37.
    assert float(scores.std()) == pytest.approx(math.sqrt(39 / 37), abs=ALARM / math.sqrt(2 * REPETITIONS))


SLOW_TO_CONVERGE = ("gap at 0.97", "two-sided to 0.999", "lopsided", "a small cluster")


@pytest.mark.parametrize(
    ("method", "name"),
    [("arnoldi", name) for name in hard_spectra(30)] + [("lanczos", name) for name in SLOW_TO_CONVERGE],
)
def test_standard_errors_cover_on_hard_spectra(method, name: str) -> None:
    """At the default tolerance, where a process that stops too early is biased by many standard errors.

    E(J) alone, of one matrix: its only error is that of the probes and of the truncation. 57 comparisons in all.
    """
    A = hard_spectra(30)[name]
    values = torch.linalg.eigvals(A)
    truth = float((values.real - (1 + values).abs().log()).sum())
    probes = draw_probes(REPETITIONS * SAMPLES // 8, 30, "gaussian", torch.Generator().manual_seed(5))
    forms = {"arnoldi": arnoldi, "lanczos": lanczos}[method](MatrixOperator(A, len(probes)), probes).value
    runs = [mean_and_stderr(part) for part in forms.reshape(REPETITIONS // 8, SAMPLES)]
    scores = torch.tensor([(value - truth) / stderr for value, stderr in runs])
    # The forms are skewed, which costs Student's coverage up to 0.02.
    for width, probability in NORMAL_COVERAGE.items():
        covered = float((scores.abs() < width).double().mean())
        assert abs(covered - probability) < ALARM * math.sqrt(probability * (1 - probability) / len(runs)) + 0.02
    value, stderr = mean_and_stderr(forms)
    assert abs(value - truth) < ALARM * stderr


def test_one_call_is_one_repetition() -> None:
    f, x = network(), draws()
    whole = noise_kl(f, x[: 2 * SAMPLES], method="arnoldi", steps=5, generator=torch.Generator().manual_seed(2))
    first = noise_kl(f, x[:SAMPLES], method="arnoldi", steps=5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(whole.per_sample[:SAMPLES], first.per_sample)
    assert mean_and_stderr(whole.per_sample[:SAMPLES]) == pytest.approx((first.value, first.stderr))


@pytest.mark.parametrize("probes", [2, 6])
@pytest.mark.parametrize("method", ["arnoldi", "lanczos", "roulette", "xtrace"])
def test_probe_errors_cover_as_they_should(method: str, probes: int) -> None:
    # With the samples fixed only the probes vary: their own standard error must describe the scatter.
    f, x = network(), population()[:20]
    exact = noise_kl(f, x).per_sample
    options: dict = {"method": method, "tolerance": 1e-6} if method != "xtrace" else {
        "method": "arnoldi", "variance_reduction": "xtrace", "tolerance": 1e-6
    }  # fmt: skip
    repeated = x.repeat(REPETITIONS, 1)
    estimate = noise_kl(f, repeated, probes=probes, generator=torch.Generator().manual_seed(3), check=False, **options)
    scatter = (estimate.per_sample.reshape(REPETITIONS, 20) - exact).mean(1)
    # probe_stderr is of the mean over all 400 x 20 samples; a repetition's is sqrt(400) times that.
    claimed = estimate.probe_stderr * math.sqrt(REPETITIONS)
    slack = 0.2 if method == "xtrace" else ALARM / math.sqrt(2 * REPETITIONS)  # leave-one-out estimates are dependent
    assert float(scatter.std()) == pytest.approx(claimed, rel=slack + 0.05)
    assert abs(float(scatter.mean())) < ALARM * float(scatter.std()) / math.sqrt(REPETITIONS)


@pytest.mark.parametrize("method", ["arnoldi", "power", "lanczos"])
@pytest.mark.parametrize("steps", [2, 3])
def test_bias_is_real_and_inside_its_bound(method, steps: int) -> None:
    # A map with a known Lipschitz constant: the truncation shows as a bias, and the bound covers it.
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
    A = -0.6 * Q @ torch.diag(torch.linspace(0.3, 1, DIM, dtype=torch.float64)) @ Q.T

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x) @ A.T

    x = draws()[:4000]
    exact = noise_kl(f, x)
    estimate = noise_kl(
        f, x, method=method, steps=steps, lipschitz=0.6, generator=torch.Generator().manual_seed(4), check=False
    )
    difference = estimate.per_sample - exact.per_sample
    bias, stderr = mean_and_stderr(difference)
    assert estimate.bias_bound is not None
    assert abs(bias) <= estimate.bias_bound + ALARM * stderr
    if method == "power":
        assert abs(bias) > ALARM * stderr  # two or three terms are visibly too few: the test can see a bias
