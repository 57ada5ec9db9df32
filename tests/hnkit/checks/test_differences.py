"""Maps with steps that samples miss, told from maps and code that are wrong."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit import verify_bound
from hnkit.checks.check import NotApplicable, confidence_radius, mean_finding
from hnkit.checks.differences import explained_by_steps
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.toy import PROBLEMS, HalfSpace

SAMPLES = 2048


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cliff(x):
    """Smooth, and steep in a strip of width 1e-9 around 0.3: E[tr J] = 0.3 p(0.3) + 0.2 in the first entry."""
    first = 0.15 * torch.tanh((x[:, :1] - 0.3) * 1e9) + 0.2 * x[:, :1]
    return torch.cat([first, 0.1 * x[:, 1:]], 1)


def residual_finding(f, x, factor=1.0):
    """Stein's identity by the slopes at the samples, `factor` a mistake in them."""
    with torch.enable_grad():
        points = x.clone().requires_grad_(True)
        value = f(points)
        slopes = [torch.autograd.grad(value[:, i].sum(), points, retain_graph=True)[0][:, i] for i in range(x.shape[1])]
    return mean_finding((x * value.detach()).sum(1) - factor * sum(slopes), 0.0)


def test_a_cliff_between_samples_is_named():
    x = normal(SAMPLES, 2)
    finding = residual_finding(cliff, x)
    assert finding.slack < 0
    # the residual that is missing is the cliff's height times the density there
    assert finding.measured == pytest.approx(0.3 * math.exp(-0.045) / math.sqrt(2 * math.pi), abs=0.02)
    with pytest.raises(NotApplicable, match="steps that 2048 samples do not resolve"):
        explained_by_steps(finding, cliff, x, continuous=True)


def test_a_map_that_nobody_vouches_for_keeps_its_verdict_and_gets_the_reason():
    x = normal(SAMPLES, 2)
    found = explained_by_steps(residual_finding(cliff, x), cliff, x, continuous=False)
    assert found.slack < 0
    assert "steps that 2048 samples do not resolve" in found.note


def gentle(x):
    return 0.3 * torch.sin(2 * x)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.5])
def test_wrong_traces_are_not_put_down_to_steps(factor):
    x = normal(SAMPLES, 2)
    finding = residual_finding(gentle, x, factor)
    assert finding.slack < 0
    assert explained_by_steps(finding, gentle, x, continuous=True) is finding


def test_wrong_traces_of_a_map_with_a_resolved_step_are_not_put_down_to_it():
    def slope(x):
        return 0.15 * torch.tanh((x - 0.3) * 20)

    x = normal(SAMPLES, 1)
    finding = residual_finding(slope, x, 2.0)
    assert finding.slack < 0
    assert explained_by_steps(finding, slope, x, continuous=True) is finding


def test_what_holds_is_left_alone():
    x = normal(SAMPLES, 2)
    finding = residual_finding(gentle, x)
    assert finding.slack >= 0
    assert explained_by_steps(finding, gentle, x, continuous=True) is finding


def test_a_rounded_map_still_fails():
    """Its Jacobian is 0 almost everywhere, so its KL cannot be had from it: red, with the reason."""
    report = verify_bound(lambda x: 0.2 * torch.round(x), (3,))
    stein = next(check for check in report.checks if check.name == "stein-identity")
    assert stein.verdict == "fails"
    assert "steps" in stein.note
    assert not report.ok


@pytest.mark.parametrize("alpha", [1e4, 0.1, 0.02, 0.002])
@pytest.mark.parametrize("toy", [name for name in PROBLEMS if name != "mixture"])  # known at alpha = 1 alone
def test_no_temperature_turns_a_true_statement_red(toy, alpha):
    problem = PROBLEMS[toy]().with_alpha(alpha)
    report = verify_toys([problem], VerifySettings(samples=512), references=[])
    assert [check.name for check in report.checks if check.verdict == "fails"] == []
    assert sum(check.verdict == "holds" for check in report.checks) >= 20


def test_draws_that_miss_a_rare_part_are_not_taken_for_certain():
    """A half-space tilted by exp(12) has 3e-5 of its noise outside: a thousand draws miss it, and do not vary."""
    problem = HalfSpace(torch.eye(1), torch.zeros(1), torch.ones(1), threshold=0.0, height=1.2, alpha=0.1)
    tilted = MeasuredProblem(problem, 1000)
    outside = 1 / (1 + math.exp(12))
    logs = torch.full((1000,), math.log(2 * (1 - outside)), dtype=torch.float64)
    kl = (1 - outside) * math.log(2 * (1 - outside)) + outside * math.log(2 * outside)
    assert problem.kl_optimal() == pytest.approx(kl, rel=1e-9)
    assert mean_finding(logs, kl, floor=1e-9).slack < 0  # by the draws alone it is a failure
    finding = tilted.divergence(logs, floor=1e-9)
    assert finding.slack >= 0
    spread = 12 * math.sqrt(outside * (1 - outside) / 1000)  # the standard error with the true variance
    assert finding.tolerance == pytest.approx(confidence_radius(spread, 1000), rel=0.3)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_divergence_is_still_red(factor):
    problem = PROBLEMS["half-space"]()
    tilted = MeasuredProblem(problem, SAMPLES)
    logs = problem.log_p0_star(tilted.tilted_noise) + 0.5 * tilted.tilted_noise.square().sum(1)
    logs = logs + 0.5 * problem.dim * math.log(2 * math.pi)
    assert tilted.divergence(logs, floor=1e-8).slack >= 0
    assert tilted.divergence(factor * logs, floor=1e-8).slack < 0
