"""How many samples and probes a budget or a target error means, and what pilots cost."""

import math

import pytest
import torch
from torch import Tensor

from hnkit import InputError, noise_kl
from tests.hnkit.functions import Linear, network, noise, seeded
from tests.hnkit.operator_zoo import matrix

STOCHASTIC = ("arnoldi", "lanczos", "power", "roulette", "second-order")


class Counted(torch.autograd.Function):
    """`x / 4`, counting the rows that products with its Jacobian are made of."""

    pulled = pushed = 0

    @staticmethod
    def forward(x):
        return x / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        Counted.pulled += grad.shape[0]
        return grad / 4

    @staticmethod
    def jvp(ctx, tangent):
        Counted.pushed += tangent.shape[0]
        return tangent / 4


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


@pytest.mark.parametrize("size", [{"rel_error": 0.2}, {"budget": 60}, {}], ids=str)
@pytest.mark.parametrize("method", ["arnoldi", "lanczos"])
def test_every_product_with_the_jacobian_is_counted(method, size):
    """Those of the pilot run too."""
    Counted.pulled = Counted.pushed = 0
    estimate = noise_kl(Counted.apply, noise(6, 2, seed=3), method=method, probes=2, check=False, certify=False, **size)
    assert (estimate.num_vjp, estimate.num_jvp) == (Counted.pulled, Counted.pushed)
    assert estimate.num_vjp > 0
    assert (estimate.num_jvp > 0) == (method == "lanczos")
