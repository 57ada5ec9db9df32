"""The one table of bounds: its two formulas agree, its readers take what is in it, and adding a bound is one entry."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mpmath
import pytest
import torch

from hnkit.bounds import BOUNDS, Bound, field_of_values_bounds, solver_margin
from hnkit.checks import plots
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import CERTIFIED_CHECKS
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.figures.table import FIGURES
from hnkit.linalg.enclosures import certify_bounds
from hnkit.linalg.matrices import MatrixNumbers, bound_sides
from hnkit.testing import assert_bounds
from tests.hnkit.functions import f64, noise

F64 = torch.float64


def matrices(norm, d=4, count=6):
    A = noise(count, d, d, seed=int(100 * norm))
    return norm * A / torch.linalg.matrix_norm(A, 2)[:, None, None]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("norm", [0.01, 0.5, 0.9])
def test_the_two_formulas_of_a_bound_agree_and_it_holds(name, norm):
    """The public function, and the formula in the numbers of the matrix, which shares the numbers alone."""
    bound, numbers = BOUNDS[name], MatrixNumbers(matrices(norm))
    value = bound.bound(numbers)
    assert value.shape == (6,)
    torch.testing.assert_close(value, bound.right(numbers), rtol=1e-11, atol=1e-15)
    assert bool((bound.left(numbers) <= value).all())


@pytest.mark.parametrize("name", BOUNDS)
def test_the_ball_certificate_reads_the_same_formula(name):
    pytest.importorskip("flint")
    A = matrices(0.6)
    left, right = bound_sides(MatrixNumbers(A))
    for i in range(2):
        record = certify_bounds(A[i]).bounds[name]
        assert record.verdict == "holds"
        assert record.value.lower == pytest.approx(float(left[name][i]), rel=1e-9)
        assert record.bound.lower == pytest.approx(float(right[name][i]), rel=1e-9)
        assert float(right[name][i]) >= record.bound.lower


def test_sides_are_nan_where_a_hypothesis_is_not_met():
    A = torch.stack([0.5 * torch.eye(2, dtype=F64), 3 * f64([0.0, 1.0], [-1.0, 0.0]), -2 * torch.eye(2, dtype=F64)])
    left, right = bound_sides(MatrixNumbers(A))
    for name, bound in BOUNDS.items():
        met = [True, bound.hypothesis == "cone", False]
        assert [not math.isnan(value) for value in left[name].tolist()] == met
        assert [not math.isnan(value) for value in right[name].tolist()] == met
    nearly = MatrixNumbers(-torch.diag(torch.tensor([1 - 1e-16, 0.1], dtype=F64))[None])
    assert not any(bool(nearly.meets(bound)) for bound in BOUNDS.values())


def test_numbers_of_a_matrix_known_in_closed_form():
    """`S = diag(0.3, -0.2)`, `K = [[0, 0.1], [-0.1, 0]]`."""
    A = f64([0.3, 0.1], [-0.1, -0.2])
    numbers = MatrixNumbers(A[None])
    trace, det = 0.1, 1.3 * 0.8 + 0.01
    sigma = mpmath.svd_r(mpmath.matrix(A.tolist()), compute_uv=False)
    h = lambda s: -mpmath.log(1 - s) - s  # noqa: E731
    expected = {
        "error": trace - math.log(det),
        "trace_square": 0.09 + 0.04 - 0.02,
        "frobenius": math.sqrt(0.15),
        "frobenius_square": 0.15,
        "norm": max(sigma),
        "h": h(max(sigma)),
        "ratio": h(max(sigma)) / max(sigma) ** 2,
        "excess": h(max(sigma)) / max(sigma) ** 2 - mpmath.mpf(1) / 2,
        "singular_sum": sum(map(h, sigma)),
        "symmetric_error": h(-0.3) + h(0.2),
        "skew_square": 0.02,
        "least": -0.2,
    }
    for name, value in expected.items():
        assert float(getattr(numbers, name)) == pytest.approx(float(value), rel=1e-12), name
    assert float(numbers.norm) > max(sigma)
    assert float(numbers.least) < -0.2
    twice = numbers.scaled(2.0)
    fresh = MatrixNumbers(2 * A[None])
    for name in (*expected, "dim"):
        assert float(getattr(twice, name)) == pytest.approx(float(getattr(fresh, name)), rel=1e-12), name


def test_bounds_keep_their_order_up_to_norm_1():
    """Singular values are moved outward: so is the norm that looser bounds take, or their order would break near 1."""
    for gap in (1e-6, 1e-9, 1e-12):
        A = -(1 - gap) * torch.eye(12, dtype=F64)
        assert_bounds(A)
        numbers = MatrixNumbers(A[None])
        values = [float(BOUNDS[name].bound(numbers)) for name in ("singular values", "frobenius", "theorem 7")]
        assert values[0] <= values[1] * (1 + 1e-10) <= values[2] * (1 + 2e-10)
        assert float(numbers.norm) == pytest.approx(1 - gap, rel=2 * solver_margin(12))


# --- readers ----------------------------------------------------------------------------------------------------------


def test_every_bound_has_a_proof_and_its_checks():
    root = Path(__file__).parents[3]
    for name, bound in BOUNDS.items():
        assert (root / "proofs" / bound.proof / "README.md").is_file()
        assert MAP_CHECKS.statements[bound.check].proof == bound.proof
        certified = CERTIFIED_CHECKS.statements[f"certified-{name.replace(', ', '-').replace(' ', '-')}"]
        assert certified.text == f"{bound.statement}, in ball arithmetic"
        assert bound.looser is None or bound.looser in BOUNDS
        assert not bound.figure or FIGURES[bound.figure].name == bound.label


def test_the_figure_of_a_bound_is_its_mean_over_the_samples():
    A = matrices(0.5)[0]
    measured = MeasuredMap("linear", lambda x: x @ A.T, noise(8, 4))
    for name, bound in BOUNDS.items():
        if bound.figure:
            reading = FIGURES[bound.figure].read(measured)
            assert reading.value == pytest.approx(float(bound.bound(MatrixNumbers(A[None]))), rel=1e-9), name
    for key, side in zip(("field_of_values_lower", "field_of_values_upper"), field_of_values_bounds(A), strict=True):
        assert FIGURES[key].read(measured).value == pytest.approx(float(side), rel=1e-9)
    expanding = MeasuredMap("linear", lambda x: 3 * x, noise(8, 4))
    for bound in BOUNDS.values():
        if bound.figure:
            with pytest.raises(NotApplicable):
                FIGURES[bound.figure].read(expanding)


TWICE = Bound(
    label="twice Theorem 7",
    check="twice",
    figure="twice_theorem7",
    left_label="|E(A)|",
    statement="|E(J)| ≤ 2 d h(L)",
    note="E[2 d h]",
    proof="theorem_7_bound",
    hypothesis="norm",
    left=lambda m: abs(m.error),
    right=lambda m: 2 * m.dim * m.h,
)


def test_a_bound_added_to_the_table_reaches_every_reader(monkeypatch):
    monkeypatch.setitem(BOUNDS, "twice", TWICE)
    A = matrices(0.5)
    pytest.importorskip("flint")
    certificate = certify_bounds(A[0])
    assert certificate.bounds["twice"].verdict == "holds"
    assert certificate.bounds["twice"].bound.lower == pytest.approx(2 * certificate.bounds["theorem 7"].bound.lower)
    assert certify_bounds(A[0], reported={"twice": 1e-9}).bounds["twice"].verdict == "fails"

    rows = MeasuredMap("linear", lambda x: x @ A[0].T, noise(8, 4)).rows
    assert rows.right["twice"].tolist() == pytest.approx((2 * rows.right["theorem 7"]).tolist())
    assert rows.left["twice"].tolist() == rows.left["theorem 7"].tolist()
    drawn = plots._bounds_plot(A, "linear maps").draw.args[2]
    assert drawn["twice Theorem 7"] == pytest.approx(2 * drawn["Theorem 7"])

    assert_bounds(A)
    monkeypatch.setitem(BOUNDS, "twice", replace(TWICE, right=lambda m: 0.01 * m.error.abs()))
    with pytest.raises(AssertionError, match=r"\|E\(A\)\| = .* exceeds twice Theorem 7"):
        assert_bounds(A)
