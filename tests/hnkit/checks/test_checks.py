"""Verdicts, the registry, and the reports of maps and toys, each against figures from elsewhere."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import norm
from torch import nn

from hnkit import InputError, NonFiniteError, noise_kl, verify_bound
from hnkit.checks.check import FALSE_ALARM, FAMILY, Finding, NotApplicable, Registry, confidence_radius, mean_finding
from hnkit.checks.injected import INJECTED_CHECKS
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import CERTIFIED_CHECKS, Certified
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.problems import TOY_CHECKS
from hnkit.checks.reference_maps import contraction, reference_maps
from hnkit.checks.registries import REGISTRIES, checks_by_proof
from hnkit.checks.report import Report
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.checks.view import report_view
from hnkit.errors import ExpansiveMapError
from hnkit.figures.measured_map import MeasuredMap
from hnkit.toy import PROBLEMS
from tests.hnkit.functions import Once


def judged(**finding):
    registry = Registry()
    registry.add("one", "a statement", proof="theorem_7_bound")(lambda _: Finding(**finding))
    return registry.run(None, "group")[0]


@pytest.mark.parametrize(
    ("finding", "verdict", "slack"),
    [
        ({"measured": 1.0, "expected": 1.1, "tolerance": 0.2}, "holds", 0.1),
        ({"measured": 1.0, "expected": 0.9, "tolerance": 0.2}, "holds", 0.1),
        ({"measured": 1.0, "expected": 1.3, "tolerance": 0.2}, "fails", -0.1),
        ({"measured": 1.0, "expected": 3.0, "tolerance": 0.0, "relation": "<="}, "holds", 2.0),
        ({"measured": 3.0, "expected": 1.0, "tolerance": 0.5, "relation": "<="}, "fails", -1.5),
        ({"measured": 3.0, "expected": 1.0, "tolerance": 0.5, "relation": ">="}, "holds", 2.5),
        ({"measured": 1.0, "expected": 3.0, "tolerance": 0.5, "relation": ">="}, "fails", -1.5),
        ({"measured": 1.0, "expected": 1.0, "tolerance": 0.0, "certified": False}, "not certified", 0.0),
        ({"measured": 2.0, "expected": 1.0, "tolerance": 0.0, "certified": False}, "fails", -1.0),
    ],
)
def test_verdict_and_slack(finding, verdict, slack):
    check = judged(**finding)
    assert check.verdict == verdict
    assert check.slack == pytest.approx(slack)


@pytest.mark.parametrize("field", ["measured", "expected", "tolerance"])
@pytest.mark.parametrize("relation", ["=", "<=", ">="])
def test_nan_never_holds(field, relation):
    values = {"measured": 1.0, "expected": 1.0, "tolerance": 1.0, "relation": relation, field: math.nan}
    assert judged(**values).verdict == "fails"


def test_unmet_hypothesis_is_named():
    registry = Registry()

    @registry.add("one", "a statement", proof="lemma_6_stein", kind="statistical")
    def one(_):
        raise NotApplicable("local norm 1.3 is not below 1")

    check = registry.run(None, "g")[0]
    assert (check.verdict, check.note, check.measured) == ("not applicable", "local norm 1.3 is not below 1", None)
    with pytest.raises(ValueError, match="two checks"):
        registry.add("one", "again", proof="lemma_6_stein")(one)


@pytest.mark.parametrize("error", [InputError, NonFiniteError, ExpansiveMapError, RuntimeError, ZeroDivisionError])
def test_any_other_error_fails(error):
    registry = Registry()

    @registry.add("one", "a statement", proof="lemma_6_stein")
    def one(_):
        raise error("the reason\nand more")

    check = registry.run(None, "g")[0]
    assert (check.verdict, check.note) == ("fails", f"could not be measured: {error.__name__}: the reason")
    assert not Report("t", {}, (check,)).ok


@pytest.mark.parametrize("value", [-math.inf, math.inf])
@pytest.mark.parametrize("field", ["measured", "tolerance"])
def test_infinity_never_holds(field, value):
    values = {"measured": 1.0, "expected": 1.0, "tolerance": 1.0, "relation": "<=", field: value}
    assert judged(**values).verdict == "fails"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["log-z-sampling", "theorem-3-pushforward", "control-reduction", "l2-is-proximal"])
def test_a_reward_that_is_not_finite_is_no_strong_tilt(name, value, monkeypatch):
    problem = PROBLEMS["linear-gaussian"]()
    right = type(problem).reward
    spoiled = lambda self, y: torch.where(y[:, 0] > 0, value, right(self, y))  # noqa: E731
    monkeypatch.setattr(type(problem), "reward", spoiled)
    check = TOY_CHECKS.statements[name].check(MeasuredProblem(problem, 64), "toy")
    assert check.verdict == "fails", check.note


def test_a_method_that_needs_a_contraction_says_so():
    """Its own hypothesis, tested by itself: on a map of norm 1.5 Arnoldi's checks do not apply, and nothing fails."""
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = MeasuredMap("steep", lambda x: 1.5 * x, x, method="arnoldi")
    checks = MAP_CHECKS.run(measured, "steep")
    assert "fails" not in {check.verdict for check in checks}
    assert any("below 1" in check.note for check in checks if check.verdict == "not applicable")
    with pytest.raises(InputError, match="below 1"):
        verify_bound(lambda x: 1.5 * x, (3,), samples=16, method="arnoldi")


def test_maps_without_second_derivatives_are_green():
    """The ascent and `J v` products do not exist for it; the dense Jacobian by `J' v` products does."""
    report = verify_bound(lambda x: 0.3 * Once.apply(x), (3,), samples=16)
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]


def test_statistical_radius_has_the_stated_level():
    # The quantile of Student's law, for many degrees of freedom that of the normal law.
    assert confidence_radius(1.0, 10**7) == pytest.approx(norm.isf(FALSE_ALARM / FAMILY / 2), rel=1e-4)
    assert confidence_radius(2.0, 3) > 2 * confidence_radius(1.0, 100)
    with pytest.raises(NotApplicable):
        confidence_radius(1.0, 1)


def test_mean_finding_is_a_t_test():
    samples = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    found = mean_finding(samples, 2.5, floor=0.25)
    values = samples.numpy()
    assert found.measured == 3.0
    assert found.tolerance == pytest.approx(confidence_radius(values.std(ddof=1) / 2, 4) + 0.25)


def test_false_alarms_stay_within_the_family():
    """A default run makes fewer statistical comparisons than the family allows; they are counted where they are made.

    The problem with the most checks stands for the others.
    """
    most = "linear-gaussian-low-rank"
    report = verify_toys([PROBLEMS[most]()], VerifySettings(samples=64), references=["rotation", "extremal"])
    made = {group: sum(c.comparisons for c in report.checks if c.group == group) for group in report.groups}
    assert made[most] > 4 * 7 + 14  # seven test functions in four checks, fourteen bounds in one
    assert len(PROBLEMS) * made[most] + len(reference_maps()) * max(made["rotation"], made["extremal"]) <= FAMILY
    assert report.comparisons == sum(made.values())
    assert report.false_alarm_rate == FALSE_ALARM
    assert replace(report, checks=report.checks * 100).false_alarm_rate > FALSE_ALARM


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_few_samples_of_a_reward_with_steps_raise_no_alarm(samples):
    """Each sample may hold one value of the reward alone: 200 seeds, of which most are such, and none fails."""
    problem = PROBLEMS["half-space"]()
    for seed in range(200):
        check = TOY_CHECKS.statements["output-sampler"].check(MeasuredProblem(problem, samples, seed), "toy")
        assert check.verdict == "holds", (seed, check)
        assert check.comparisons == 7


def test_a_wrong_output_sampler_is_seen(monkeypatch):
    problem = PROBLEMS["half-space"]()
    monkeypatch.setattr(type(problem), "sample_p_star", lambda self, n, g: self.generate(torch.randn(n, 3).double()))
    assert TOY_CHECKS.statements["output-sampler"].check(MeasuredProblem(problem, 256), "toy").verdict == "fails"


def half_precision_maps(seed):
    torch.manual_seed(seed)
    relu = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    small = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    with torch.no_grad():
        small[2].weight.mul_(0.05)
    return nn.Linear(6, 6), relu, small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [1, 2, 4])
def test_half_precision_raises_no_alarm(dtype, seed):
    for f in half_precision_maps(seed):
        report = verify_bound(f.to(dtype).requires_grad_(False), (6,), seed=seed, samples=32)
        assert report.ok, [check for check in report.checks if check.verdict == "fails"]
        applied = {check.name for check in report.checks if check.verdict != "not applicable"}
        assert applied >= {"stein-identity", "two-forms", "kl-integrand", "local-norms", "lipschitz-order"}


def test_a_wrong_certificate_is_seen_in_half_precision():
    f = half_precision_maps(2)[0].bfloat16().requires_grad_(False)
    f.lipschitz_upper = lambda: 0.9 * float(torch.linalg.matrix_norm(f.weight.float(), 2))
    assert "lipschitz-order" in {c.name for c in verify_bound(f, (6,), samples=32).checks if c.verdict == "fails"}


def test_every_check_names_a_proof_and_a_statement():
    by_proof = checks_by_proof()
    names = [name for names in by_proof.values() for name in names]
    assert len(names) == len(set(names)) == sum(len(registry.statements) for registry in REGISTRIES)
    central = {
        "prop_2_objective", "theorem_3_pushforward", "theorem_3_minimiser", "prop_4_noise_objective",
        "control_reduction", "lemma_5_diffeomorphism", "lemma_6_stein", "kl_two_forms", "theorem_7_bound",
        "data_processing", "local_theorem_7", "frobenius_bound", "second_order", "symmetry_index", "l2_optimum",
        "optimality_gap", "non_injective", "estimates_certificates", "singular_value_bound", "field_of_values",
        "arnoldi_bias", "injected_noise", "folding_entropy",
    }  # fmt: skip
    assert set(by_proof) == central
    for registry in REGISTRIES:
        for statement in registry.statements.values():
            assert len(statement.name) <= 31
            assert statement.text
            assert "\n" not in statement.text


class Turn(nn.Module):
    """A rotation field: every row of its Jacobian is skew."""

    def forward(self, x):
        return 0.4 * torch.stack([-x[:, 1], x[:, 0]], 1)


def test_figures_of_a_map_against_closed_forms():
    report = verify_bound(Turn(), (2,), samples=128, seed=3)
    assert report.ok
    figures = {figure.name: figure for figure in report.figures}
    x = torch.randn(1, dtype=torch.float64)
    # E(J) = -log det(I + K) = -log(1 + 0.16); the L2 term is 0.08 |x|^2, so the two forms of the KL share no digits.
    assert figures["E(J)"].value == pytest.approx(-math.log(1.16), abs=1e-12)
    assert figures["symmetry index"].value == pytest.approx(-1)
    assert figures["local norm, median"].value == pytest.approx(0.4)
    assert figures["Theorem 7 estimate"].value == pytest.approx(2 * (-math.log(0.6) - 0.4), rel=1e-5)
    assert figures["Frobenius bound"].value == pytest.approx(2 * (-math.log(0.6) - 0.4))
    assert figures["field of values, lower"].value == pytest.approx(-0.16)
    assert figures["field of values, upper"].value == pytest.approx(0)
    assert figures["second-order term"].value == pytest.approx(-0.16)
    error = figures["relative error of L2"]
    ratio = figures["L2 term"].value / figures["KL (Stein form)"].value
    assert error.value == pytest.approx(100 * (ratio - 1))
    assert error.unit == "%"
    assert x.shape == (1,)


def test_same_figures_as_noise_kl():
    f = contraction(5, 0.7)
    report = verify_bound(f, (5,), samples=64, seed=11)
    from hnkit.internal.seeds import generator_for

    x = torch.randn(64, 5, dtype=torch.float64, generator=generator_for(11, "noise"))
    estimate = noise_kl(f, x)
    figure = next(figure for figure in report.figures if figure.name == "KL (Stein form)")
    assert (figure.value, figure.stderr) == (estimate.value, estimate.stderr)
    certified = next(figure for figure in report.figures if figure.name == "Lipschitz, certified")
    assert certified.value == pytest.approx(0.7, rel=1e-9)
    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts["theorem-7"] == verdicts["lemma-5-inverse"] == verdicts["injectivity"] == "holds"


def test_a_map_that_folds_is_reported_as_a_lower_bound():
    report = verify_bound(lambda x: -2 * torch.tanh(2 * x), (1,), samples=256)
    assert report.ok  # a fold is no failure of the theory
    by_name = {check.name: check for check in report.checks}
    assert by_name["injectivity"].verdict == "not applicable"
    assert "changes sign" in by_name["injectivity"].note
    assert any("lower bound" in text for _, text in report.notes)


def test_float32_maps_and_images():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    with torch.no_grad():
        net[2].weight.mul_(0.3)
    report = verify_bound(net, (2, 4, 4), samples=32)
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]
    assert {check.name: check.verdict for check in report.checks}["theorem-7"] in ("holds", "not applicable")


@pytest.mark.parametrize("method", ["arnoldi", "lanczos", "power", "roulette", "second-order", "l2"])
def test_every_method_reports(method):
    report = verify_bound(contraction(6), (6,), samples=32, method=method)
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]
    assert report.config["method"] == method
    json.dumps(report.to_json(), allow_nan=False)


def test_a_budget_is_kept():
    report = verify_bound(contraction(6), (6,), samples=64, method="arnoldi", budget=60)
    assert report.ok
    assert report.config["budget"] == 60


@pytest.mark.parametrize("toy", PROBLEMS)
def test_every_toy_is_green(toy):
    report = verify_toys([PROBLEMS[toy]()], VerifySettings(samples=256, seed=1), references=[])
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]
    applied = [check for check in report.checks if check.verdict != "not applicable"]
    assert len(applied) > 25
    assert all(check.note for check in report.checks if check.verdict == "not applicable")


@pytest.mark.parametrize("seed", range(3))
def test_reference_maps_are_green_under_other_seeds(seed):
    report = verify_toys([], VerifySettings(samples=128, seed=seed))
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]


def test_quadrature_check_is_independent_of_the_jacobian():
    """For f = 0.2 sin 3x the integral of the density is 0.114620 nats, and the check compares with just that."""
    f, dim, _ = reference_maps()["gradient-field"]
    measured = MeasuredMap("sine", f, torch.randn(64, dim, dtype=torch.float64))
    check = MAP_CHECKS.statements["kl-one-dimensional"].check(measured, "sine")
    assert check.expected == pytest.approx(0.114620, abs=2e-6)
    assert check.measured == pytest.approx(0.114620, abs=2e-6)


def test_dense_statistics_against_numpy():
    f = contraction(4, 0.8)
    measured = MeasuredMap("c", f, torch.randn(3, 4, dtype=torch.float64))
    rows = measured.rows
    for i in range(3):
        J = torch.autograd.functional.jacobian(lambda v: f(v[None])[0], measured.x[i]).numpy()
        S, K = (J + J.T) / 2, (J - J.T) / 2
        assert float(rows.trace[i]) == pytest.approx(np.trace(J))
        assert float(rows.trace_square[i]) == pytest.approx(np.trace(J @ J))
        assert float(rows.frobenius[i]) == pytest.approx(np.linalg.norm(J))
        assert float(rows.norm[i]) == pytest.approx(np.linalg.norm(J, 2))
        assert float(rows.least_symmetric[i]) == pytest.approx(np.linalg.eigvalsh(S)[0])
        assert float(rows.skew[i]) == pytest.approx(np.linalg.norm(K))
        expected = np.trace(J) - np.linalg.slogdet(np.eye(4) + J)[1]
        assert float(rows.spectral[i]) == pytest.approx(expected, abs=1e-12)
    kept = measured.norms.tolist()
    assert kept == pytest.approx(rows.norm.tolist())


def test_contraction_has_the_stated_constant():
    net = contraction(7, 0.35)
    product = torch.linalg.matrix_norm(net[0].weight, 2) * torch.linalg.matrix_norm(net[2].weight, 2)
    assert float(product) == pytest.approx(0.35)
    assert torch.equal(net[0].weight, contraction(7, 0.35)[0].weight)  # nothing global is drawn from


def test_tilted_noise_has_a_stream_for_each_purpose():
    tilted = MeasuredProblem(PROBLEMS["linear-gaussian"](), 16)
    assert not torch.equal(tilted.noise("a"), tilted.noise("b"))
    assert torch.equal(tilted.noise("a"), tilted.noise("a"))


@pytest.mark.parametrize("name", ["extremal", "rotation", "contraction"])
def test_certified_bounds(name):
    pytest.importorskip("flint")
    f, dim, _ = reference_maps()[name]
    measured = MeasuredMap(name, f, torch.randn(2, dim, dtype=torch.float64))
    checks = CERTIFIED_CHECKS.run(Certified(measured), name)
    assert "fails" not in {check.verdict for check in checks}
    assert {check.name for check in checks if check.verdict == "holds"} >= {
        "certified-error", "certified-norm", "certified-theorem-7", "certified-frobenius",
    }  # fmt: skip


def test_a_constant_one_ulp_too_small_is_refuted():
    pytest.importorskip("flint")

    class Shrink(nn.Module):
        def __init__(self, claimed):
            super().__init__()
            self.claimed = claimed

        def forward(self, x):
            return -0.5 * x

        def lipschitz_upper(self):
            return self.claimed

    def verdicts(claimed):
        measured = MeasuredMap("shrink", Shrink(claimed), torch.randn(2, 3, dtype=torch.float64))
        return {check.name: check.verdict for check in CERTIFIED_CHECKS.run(Certified(measured), "shrink")}

    true = verdicts(0.5)
    assert true["certified-norm"] != "fails"
    wrong = verdicts(math.nextafter(math.nextafter(0.5, 0), 0))
    assert wrong["certified-norm"] == "fails"


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"seed": -1}, {"method": "guess"}, {"samples": -5}, {"seed": 2**63}]
)
def test_bad_settings(options):
    with pytest.raises(InputError):
        verify_bound(contraction(2), (2,), **options)


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_bad_shapes(shape):
    with pytest.raises(InputError, match="shape"):
        verify_bound(contraction(2), shape)


@pytest.mark.parametrize("toy", ["linear-gaussian-low-rank", "folding"])
def test_one_sample_is_enough_for_a_report(toy):
    report = verify_toys([PROBLEMS[toy]()], VerifySettings(samples=1), references=["rotation"])
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]
    statistical = [check for check in report.checks if check.kind == "statistical" and check.name != "log-z-sampling"]
    assert {check.verdict for check in statistical} == {"not applicable"}


@pytest.mark.parametrize("seed", range(2))
def test_a_gapped_two_sided_spectrum_raises_no_alarm(seed):
    """Eigenvalues in +-[0.97, 0.999]: odd Krylov steps change nothing, and the estimate must not stop there."""
    dim = 60
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    size = torch.linspace(0.97, 0.999, dim // 2, dtype=torch.float64)
    f = nn.Linear(dim, dim, bias=False, dtype=torch.float64).requires_grad_(False)
    f.weight.copy_(Q @ torch.diag(torch.cat([size, -size])) @ Q.mT)
    x = torch.randn(16, dim, dtype=torch.float64, generator=generator)
    exact = float(-torch.log1p(-size.square()).sum())  # E = -log det(I + A), the trace being 0
    for name, tried in (("certified", f), ("not certified", lambda x: f(x))):
        check = MAP_CHECKS.statements["arnoldi"].check(MeasuredMap(name, tried, x, seed), name)
        assert check.verdict == "holds", check
        assert check.tolerance < 0.3 * exact


def test_a_report_at_80_columns_keeps_every_column():
    """The letters of the groups stand beside their figures, and no heading is cut."""
    report = verify_toys([PROBLEMS["linear-gaussian"]()], VerifySettings(samples=64), references=["rotation"])
    lines = io.StringIO()
    Console(file=lines, width=80).print(report_view(report, verbose=False))
    shown = lines.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    heading = next(line for line in shown.splitlines() if "L2 error, %" in line)
    assert heading.split() == ["KL", "L2", "term", "L2", "error,", "%", "Theorem", "7", "L2", "gap"]
    rows = [line.split() for line in shown.splitlines() if " ± " in line]
    assert [row[0] for row in rows] == ["A", "B"]


def test_the_report_on_a_map_leads_with_the_verdict_on_l2(tmp_path):
    report = verify_bound(lambda x: -0.3 * x, (4,), samples=32)
    assert "the L2 term misses" in report.notes[0][1]
    assert not any("--kl" in note for _, note in report.notes)  # one piece of advice, where all samples have spoken
    words = report.card.sentence
    assert "--kl " in words
    report.write(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert re.sub("</?span[^>]*>", "", html).index(escape(words)) < html.index("<h2")


def shown(report, *, verbose=False):
    lines = io.StringIO()
    Console(file=lines, width=80).print(report_view(report, verbose=verbose))
    return lines.getvalue()


def test_the_table_of_checks_is_for_those_who_ask():
    """A run ends with figures and the card; `--verbose` keeps every check; a failing one is shown in any case."""
    report = verify_bound(lambda x: -0.3 * x, (4,), samples=32)
    brief, whole = shown(report), shown(report, verbose=True)
    statement = report.checks[0].statement.split(",")[0]
    assert statement not in brief
    assert statement in whole
    assert "KL (Stein form)" in brief
    assert brief.rstrip().endswith(report.card.sentence.split()[-1])
    failed = replace(report, checks=(replace(report.checks[0], verdict="fails"),))
    assert f"✗ {report.checks[0].name}" in shown(failed)


def test_the_card_of_a_map_and_of_toys_says_what_was_checked():
    one = verify_toys([PROBLEMS["linear-gaussian"]()], VerifySettings(samples=64), references=[])
    labels = [line.label for line in one.card.lines]
    assert labels == ["checks", "KL", "L2 term", "injective", "local norm", "target"]
    assert f"{PROBLEMS['linear-gaussian']().l2_gap():.3g} nats away" in one.card.lines[-1].value
    several = verify_toys([PROBLEMS["linear-gaussian"]()], VerifySettings(samples=64), references=["fold"])
    counts = several.counts()
    assert several.card.lines[0].value.startswith(f"{counts['holds']} hold, {counts['not applicable']} do not apply")
    assert "folds seen in 1" in several.card.lines[2].value
    assert several.card.sentence.startswith("Every statement that applies holds")


@pytest.mark.parametrize("size", [1e-13, 1e-20, 1e-26, 1e-100, 1e-155, 1e-162, 5e-324])
def test_no_check_fails_on_a_tiny_map(size):
    """Rounding of figures of second order is not taken for a breach of a bound of third order, nor 0 for a bound."""
    A = size * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = MeasuredMap("tiny", lambda x: x @ A / 10, x)
    checks = [*MAP_CHECKS.run(measured, "tiny"), *INJECTED_CHECKS.run(measured, "tiny")]
    assert [check.name for check in checks if check.verdict == "fails"] == []
    assert sum(check.verdict == "holds" for check in checks) > 10
