"""Control variates: no bias against closed forms and quadrature, honest error bars, and less variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit import Estimate, InputError, noise_kl
from hnkit.kl import two_level_kl
from hnkit.kl.control import FEWEST, _slope, controlled_mean, leave_one_out, two_level_mean
from hnkit.tilt import kl_gaussians
from tests.hnkit.functions import Linear, noise, seeded
from tests.hnkit.operator_zoo import exact_error, matrix

RUNS = 2000
ALARM = 4.5  # of a normal law: 7e-6 per comparison


def unbiased(errors: Tensor, stderrs: Tensor, most: float = 1.45) -> None:
    """The mean error is zero, and the squared z-scores have mean about 1."""
    z = float(errors.mean() / (errors.std() / math.sqrt(len(errors))))
    assert abs(z) < ALARM
    # Student's law of 22 degrees of freedom has variance 1.1; the coefficient's own error adds some percent.
    assert 0.9 < float((errors / stderrs).square().mean()) < most


def test_the_naive_twin() -> None:
    y, s = noise(20, seed=1), noise(20, seed=2) + 0.3
    expected = []
    for i in range(20):
        keep = torch.arange(20) != i
        c = -torch.cov(torch.stack([y[keep], s[keep]]))[0, 1] / s[keep].var()
        expected.append(y[i] + c * s[i])
    torch.testing.assert_close(leave_one_out(y, s), torch.stack(expected))
    far = leave_one_out(y + 1e9, s)  # a large mean costs no digits of the coefficient
    torch.testing.assert_close(far - 1e9, torch.stack(expected), rtol=0, atol=1e-5)


def test_no_bias_on_a_linear_gaussian_map() -> None:
    """2000 runs of 24 samples each; KL in closed form."""
    A, b = matrix("negative", 0.4, 6) + matrix("gaussian", 0.4, 6), 0.3 * noise(6, seed=9)
    eye = torch.eye(6, dtype=torch.float64)
    truth = kl_gaussians(b, (eye + A) @ (eye + A).T, 0 * b, eye)
    x = noise(RUNS * 24, 6, seed=3)
    f = x @ A.T + b
    integrand = (f.square().sum(1) / 2 + exact_error(A)).reshape(RUNS, 24)
    stein = ((x * f).sum(1) - torch.trace(A)).reshape(RUNS, 24)
    found = [controlled_mean(y, s) for y, s in zip(integrand, stein, strict=True)]
    errors = torch.tensor([e.value - truth for e in found])
    unbiased(errors, torch.tensor([e.stderr for e in found]))
    assert float(errors.var()) < 0.75 * float((integrand.mean(1) - truth).var())


def test_no_bias_where_the_same_samples_give_one() -> None:
    """`y = g^2`, g normal: a coefficient of the same samples is correlated with the mean of g, and off by 2/n."""
    g = noise(RUNS * 24, seed=8).reshape(RUNS, 24)
    y = g.square()
    found = [controlled_mean(*pair) for pair in zip(y, g, strict=True)]
    # The law of g^2 is so skew that its plain mean of 24 has a mean squared z-score of 1.9 already.
    plain = float(((y.mean(1) - 1) / (y.std(1) / math.sqrt(24))).square().mean())
    unbiased(torch.tensor([e.value - 1 for e in found]), torch.tensor([e.stderr for e in found]), 1.3 * plain)
    same = torch.stack([(a - _slope(a, b) * b).mean() - 1 for a, b in zip(y, g, strict=True)])
    assert float(same.mean()) == pytest.approx(-2 / 24, abs=0.03)
    assert abs(float(same.mean() / (same.std() / math.sqrt(RUNS)))) > ALARM


@pytest.mark.parametrize("count", [FEWEST, 16])
def test_the_error_bar_of_a_few_samples(count: int) -> None:
    """A coefficient from seven samples has an error of its own: the bars cover about as often as the plain mean's.

    The spread of the corrected samples, which are not independent, covers in 77 and 87 of 100 cases here; the residuals
    from the others' lines in 85 and 90.
    """
    runs = 1500
    x = noise(runs * count, seed=4)
    f, J = 0.4 * x + 0.3 * torch.sin(x) + 0.5, 0.4 + 0.3 * torch.cos(x)
    integrand = f.square() / 2 + J - torch.log1p(J)
    truth = float(integrand.mean())  # of 1500 times as many: a 39th of the error of one
    rows = zip(integrand.reshape(runs, count), (x * f - J).reshape(runs, count), strict=True)
    found = [controlled_mean(*row) for row in rows]
    controlled = sum(abs(e.value - truth) <= 1.96 * e.stderr for e in found) / runs
    plain = [Estimate.of(row) for row in integrand.reshape(runs, count)]
    alone = sum(abs(e.value - truth) <= 1.96 * e.stderr for e in plain) / runs
    assert controlled > alone - 0.04
    assert controlled < 0.97


def test_the_error_of_a_controlled_mean_by_its_naive_twin() -> None:
    """Lines through all other samples, one by one; and without a control, the error of a plain mean, n over n - 1."""
    y, s = noise(12, seed=1), noise(12, seed=2) + 0.3
    s0 = s - s.mean()
    total = 0.0
    for i in range(12):
        keep = torch.arange(12) != i
        line = torch.linalg.lstsq(torch.stack([torch.ones(11), s[keep]], 1).double(), y[keep][:, None]).solution[:, 0]
        weight = 1 / 12 - s.mean() * s0[i] / s0.square().sum()
        total += float(weight * (y[i] - line[0] - line[1] * s[i])) ** 2
    assert controlled_mean(y, s).stderr == pytest.approx(math.sqrt(total), rel=1e-12)
    alone = controlled_mean(y, torch.full_like(y, 0.3))
    assert alone.stderr == pytest.approx(Estimate.of(y).stderr * math.sqrt(12 / 11), rel=1e-12)


def test_no_bias_in_one_dimension_by_quadrature() -> None:
    """`f = 0.2 sin 3x`: KL 0.1146199 nats by quadrature."""
    t = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    weight = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        f, J = 0.2 * torch.sin(3 * x), 0.6 * torch.cos(3 * x)
        return f.square() / 2 + J - torch.log1p(J), x * f - J

    truth = float(torch.trapezoid(weight * parts(t)[0], t))
    assert truth == pytest.approx(0.114620, abs=1e-6)
    y, s = (part.reshape(RUNS, 24) for part in parts(noise(RUNS * 24, seed=4)))
    found = [controlled_mean(*pair) for pair in zip(y, s, strict=True)]
    unbiased(torch.tensor([e.value - truth for e in found]), torch.tensor([e.stderr for e in found]))


def test_the_record_has_it_for_free() -> None:
    A = matrix("negative", 0.3, 8) + matrix("gaussian", 0.3, 8)
    f, x = Linear(A, 0.2 * noise(8, seed=2)), noise(200, 8)
    exact = noise_kl(f, x)
    changed = noise_kl(f, x, form="change-of-variables")
    assert exact.controlled.stderr < min(exact.stderr, changed.stderr)
    assert exact.controlled.value == pytest.approx(changed.controlled.value, rel=1e-12)  # one family
    value, stderr = _by_hand(exact)
    assert exact.controlled == Estimate(value, exact.controlled.stderr, exact.bias_bound)
    assert exact.controlled.stderr == pytest.approx(stderr, rel=0.05)  # of many samples the spread says the same
    probed = noise_kl(f, x, method="arnoldi", generator=seeded(), lipschitz=0.6)
    assert probed.controlled.stderr < probed.stderr
    assert probed.controlled.bias_bound == probed.bias_bound
    plain = noise_kl(f, x, method="l2")
    assert plain.controlled == Estimate(plain.value, plain.stderr, plain.bias_bound)


def _by_hand(estimate) -> tuple[float, float]:
    corrected = leave_one_out(estimate.per_sample, estimate.parts.alignment - estimate.parts.trace)
    return float(corrected.mean()), float(corrected.std()) / math.sqrt(len(corrected))


def test_few_or_constant_samples() -> None:
    y = noise(FEWEST - 1)
    assert torch.equal(leave_one_out(y, noise(FEWEST - 1, seed=1)), y)
    assert math.isnan(noise_kl(lambda x: 0.1 * x, noise(1, 2)).controlled.stderr)
    for control in (torch.zeros(20, dtype=torch.float64), torch.full((20,), 3.0, dtype=torch.float64)):
        y = noise(20)
        assert torch.equal(leave_one_out(y, control), y)
    spike = torch.zeros(20, dtype=torch.float64)
    spike[3] = 1  # its own sample has no other to learn from
    assert bool(leave_one_out(noise(20), spike).isfinite().all())


def test_two_levels_are_unbiased_and_honest() -> None:
    """`y = g^2 + g + noise` with g normal: the mean of y is 1; the slope of y on g is 3, and skew couples the two."""
    g, e = noise(RUNS * 24, seed=5).reshape(RUNS, 24), noise(RUNS * 24, seed=6).reshape(RUNS, 24)
    y = g.square() + 3 * g + 0.3 * e
    more = noise(RUNS * 200, seed=7).reshape(RUNS, 200)
    found = [two_level_mean(*row) for row in zip(y, g, more, strict=True)]
    errors = torch.tensor([one.value - 1 for one in found])
    unbiased(errors, torch.tensor([one.stderr for one in found]))
    assert float(errors.var()) < 0.4 * float(y.mean(1).var())
    with pytest.raises(InputError, match="expensive"):
        two_level_mean(y[0, :15], g[0, :15], more[0])
    with pytest.raises(InputError, match="further"):
        two_level_mean(y[0], g[0], more[0, :7])  # whose spread tells little of their error


def test_two_levels_of_probes() -> None:
    """Arnoldi at 32 samples, the second order at 200 more, against the closed form: 40 runs."""
    A = matrix("symmetric", 0.6, 8)
    truth = float(A.square().sum()) / 2 + exact_error(A)
    found, alone = [], []
    for seed in range(40):
        x = noise(232, 8, seed=100 + seed)
        few = noise_kl(Linear(A), x[:32], method="arnoldi", tolerance=1e-8, generator=seeded(seed), check=False)
        cheap = noise_kl(Linear(A), x[32:], method="second-order", generator=seeded(seed + 1000), check=False)
        found.append(two_level_mean(few.per_sample, few.parts.l2 + few.parts.square / 2, cheap.per_sample))
        alone.append(few.value)
    errors = torch.tensor([one.value - truth for one in found])
    assert abs(float(errors.mean() / errors.std())) * math.sqrt(len(errors)) < ALARM
    assert float(errors.var()) < 0.5 * float(torch.tensor(alone).var())


class Wave:
    """`f(x) = a tanh(x) A^T`, with a factor of its own for each row, as prompts have."""

    def __init__(self, factors: Tensor, A: Tensor) -> None:
        self.factors, self.A = factors, A

    def __call__(self, x: Tensor) -> Tensor:
        return self.factors[:, None] * torch.tanh(x) @ self.A.T

    def select(self, index: Tensor) -> Wave:
        return Wave(self.factors[index], self.A)


def test_two_level_kl_of_prompts_that_differ() -> None:
    """Half of the rows are of another map: which rows are costly is drawn, so that their order does not matter."""
    factors = torch.cat([torch.full((60,), 0.3), torch.full((60,), 1.6)]).double()
    f, x = Wave(factors, matrix("symmetric", 1.0, 10)), noise(120, 10, seed=3)
    truth = noise_kl(f, x).value
    errors = torch.tensor([
        two_level_kl(f, x, costly=30, method="lanczos", check=False, generator=seeded(seed)).value - truth
        for seed in range(40)
    ])  # fmt: skip
    assert abs(float(errors.mean() / errors.std())) * math.sqrt(40) < ALARM
    first = noise_kl(f.select(torch.arange(30)), x[:30]).value - truth
    assert abs(first) > 5 * float(errors.std())  # the first rows alone tell another story


def test_two_level_kl_refuses() -> None:
    f, x = Linear(matrix("gaussian", 0.5, 4)), noise(40, 4)
    for costly in (15, 39):
        with pytest.raises(InputError, match=f"costly = {costly} of 40"):
            two_level_kl(f, x, costly=costly)
    with pytest.raises(InputError, match="did not look at J"):
        two_level_kl(f, x, costly=20, method="l2")
    assert two_level_kl(f, x, costly=20, method="exact", generator=seeded()).stderr > 0
