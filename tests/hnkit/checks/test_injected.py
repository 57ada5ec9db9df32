"""Checks and figures of hypernetworks that are deployed with injected noise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad

from hnkit import verify_bound
from hnkit.checks.injected import INJECTED_CHECKS, quadrature
from hnkit.checks.reference_maps import contraction
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_backend import verify_backend
from hnkit.cli.app import app
from hnkit.figures.measured_map import MeasuredMap
from hnkit.injection import NoiseInjection, lipschitz_mean_square_upper
from hnkit.toy.backend import ToyBackend, ToyOptions


def attention(x):
    """Dot-product attention of the token x among itself and two fixed tokens, keys and queries scaled by 2."""
    tokens = torch.cat([x, torch.full_like(x, -1.5), torch.full_like(x, 2.0)], 1)
    weights = torch.softmax(4 * x * tokens, 1)
    return (weights * tokens).sum(1, keepdim=True) - 0.3 * x


MAPS = {
    "folding": lambda x: -1.2 * torch.tanh(2 * x),
    "collapse": lambda x: -x,
    "not continuous": lambda x: torch.sign(x) - x,
    "not Lipschitz": lambda x: torch.sign(x) * x.abs().sqrt(),
    "attention": attention,
    "far away": lambda x: 5 + 0 * x,
}


def measured(f, dim=1, injection=None, samples=64):
    x = torch.randn(samples, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return MeasuredMap("map", f, x, injection=injection)


@pytest.mark.parametrize("name", MAPS)
def test_the_kl_in_one_dimension_is_below_the_bound(name):
    for injection in (None, NoiseInjection(0.3, 0.8)):
        check = INJECTED_CHECKS.statements["injected-noise-one-dimensional"].check(
            measured(MAPS[name], injection=injection), name
        )
        assert check.verdict == "holds", check.note
        assert 0 < check.measured < 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_quadrature_is_right_where_the_law_is_known(share):
    """f = k x: a Gaussian of known variance; f = sgn x - x: two bumps, by adaptive quadrature of their density."""
    for k in (-2.0, -1.0, 0.7):
        cost, bound = quadrature(measured(lambda x, k=k: k * x), NoiseInjection(share), 512)
        variance = (1 - share) * (1 + k) ** 2 + share
        assert cost == pytest.approx(0.5 * (variance - 1 - math.log(variance)), abs=1e-6)
        assert bound == pytest.approx((1 - share) * k**2 / (2 * share), rel=1e-6)
    a = math.sqrt(1 - share)

    def integrand(z):
        density = sum(math.exp(-((z - s * a) ** 2) / (2 * share)) for s in (-1, 1)) / 2 / math.sqrt(2 * math.pi * share)
        return density * (math.log(density) + z * z / 2 + math.log(2 * math.pi) / 2) if density > 1e-300 else 0.0

    cost, bound = quadrature(measured(MAPS["not continuous"]), NoiseInjection(share), 512)
    assert cost == pytest.approx(quad(integrand, -6, 6, limit=200)[0], abs=1e-5)
    # E (sgn x - x)^2 = 2 - 2 E|x|
    assert bound == pytest.approx((1 - share) / (2 * share) * (2 - 2 * math.sqrt(2 / math.pi)), rel=1e-3)


def test_the_bound_is_reached_by_shifts_as_little_is_kept():
    K, c = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for share in (0.5, 0.99, 0.9999):
        check = INJECTED_CHECKS.statements["injected-noise-bound"].check(
            measured(lambda x: x @ (K - K) + c, 3, NoiseInjection(share)), "shift"
        )
        assert check.measured == pytest.approx(share, rel=1e-9)
        assert check.verdict == "holds"


def test_a_map_of_float32_images_is_checked_as_far_as_it_can_be():
    x = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    checks = INJECTED_CHECKS.run(MeasuredMap("images", lambda x: torch.tanh(x) / 2, x), "images")
    assert [check.verdict for check in checks] == [
        "holds",
        "holds",
        *["not applicable"] * 2,
        "holds",
        "holds",
        "not applicable",
    ]


def deployed(injection, problem="linear-gaussian", **options) -> ToyBackend:
    backend = ToyBackend(ToyOptions(problem=problem, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backend.hypernetwork.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    backend.injection = injection
    return backend


def test_the_report_on_a_deployed_network_bounds_what_is_deployed(tmp_path: Path):
    """Bound, certificate and gap of an affine network in closed form, from its adapter; all else is said to be of f."""
    deployed(NoiseInjection(0.3)).save_adapter(tmp_path / "adapter")
    backend = ToyBackend(ToyOptions())
    backend.load_adapter(tmp_path / "adapter")
    assert backend.injection == NoiseInjection(0.3)
    report = verify_backend(backend, ["toy"], VerifySettings(samples=400, seed=1))
    assert report.ok
    figures = {figure.name: figure for figure in report.figures}
    linear = backend.hypernetwork.body[0]
    A, c = linear.weight.detach(), linear.bias.detach()
    square = float(A.square().sum() + c.square().sum())
    bound = figures["KL of the deployed law, at most"]
    assert abs(bound.value - 0.7 / 0.6 * square) < 4.9 * bound.stderr
    certified = figures["the same, certified at 95 %"]
    assert certified.value > bound.value
    L = float(torch.linalg.matrix_norm(A, 2))
    mean = torch.full((400,), bound.value / (0.7 / 0.6), dtype=torch.float64)
    assert certified.value == pytest.approx(0.7 / 0.6 * lipschitz_mean_square_upper(mean, L), rel=1e-6)
    assert "the same, for certain" not in figures
    gap = figures["optimality gap, at most"]
    problem = backend.problem
    K = torch.eye(len(A), dtype=torch.float64) + A
    law = (math.sqrt(0.7) * c, 0.7 * K @ K.mT + 0.3 * torch.eye(len(A), dtype=torch.float64))
    true_gap = true_distance(problem, *law)
    assert gap.value > true_gap - 4.9 * gap.stderr
    notes = " ".join(sentence for _, sentence in report.notes)
    assert "at most" in notes
    assert "not what is deployed" in notes


def true_distance(problem, mean, covariance) -> float:
    """`KL(N(mean, covariance) || p0*)` by samples of the Gaussian: its log density less that of the tilted law."""
    law = torch.distributions.MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    z = law.sample((20_000,))
    return float((law.log_prob(z) - problem.log_p0_star(z)).mean())


def test_a_clipped_network_has_a_ceiling():
    report = verify_backend(deployed(NoiseInjection(0.5, 1.5)), ["toy"], VerifySettings(samples=64))
    figures = {figure.name: figure.value for figure in report.figures}
    assert figures["the same, for certain"] == pytest.approx(1.125)
    assert figures["KL of the deployed law, at most"] < figures["the same, certified at 95 %"] < 1.125


def test_a_certified_map_needs_no_clipping():
    found = measured(contraction(6, 0.6), 6, NoiseInjection(0.5), samples=4000).injected
    assert "certified Lipschitz constant 0.6" in found.how
    assert found.nats.value < found.certified < found.nats.value + 0.1


def test_a_map_of_one_s_own_is_bounded_where_it_is_deployed_with_injected_noise():
    """Attention has no Lipschitz certificate: the bound of its KL needs none, and clipping certifies it."""
    report = verify_bound(attention, (1,), samples=64, injection=NoiseInjection(0.5, 0.8))
    assert report.ok
    figures = {figure.name: figure.value for figure in report.figures}
    assert figures["the same, for certain"] == pytest.approx(0.32)
    assert figures["KL of the deployed law, at most"] < figures["the same, certified at 95 %"] <= 0.32
    assert report.to_json()["config"]["injection"] == {"share": 0.5, "max_delta": 0.8}
    assert "KL of the deployed law, at most" not in {f.name for f in verify_bound(attention, (1,), samples=8).figures}


def test_the_command_takes_the_share(tmp_path, capsys):
    arguments = ["verify-bound", "--map", "torch:sin", "--shape", "3", "--samples", "16", "--json"]
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--injection", "0.25", "--max-delta", "2", "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    figures = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out)["figures"]}
    assert figures["the same, for certain"] == pytest.approx(0.75 / 0.5 * 4)
    assert figures["KL of the deployed law, at most"] < 0.75 / 0.5 * 3
