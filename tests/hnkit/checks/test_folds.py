"""Maps of the line that fold: what eq. 53 leaves out, the degree, and what turns their checks red."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor, nn

from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.one_dimension import folded_kl
from hnkit.checks.reference_maps import reference_maps
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.figures.measured_map import MeasuredMap
from hnkit.kl import moments
from tests.hnkit.checks.test_planted_errors import plant, with_fields
from tests.hnkit.functions import noise

FOLD = reference_maps()["fold"][0]


def measured(f: Callable[[Tensor], Tensor] = FOLD, n: int = 512, dim: int = 1, **fields: bool) -> MeasuredMap:
    return MeasuredMap("fold", f, noise(n, dim), **fields)


def judged(name: str, subject: MeasuredMap):
    return MAP_CHECKS.statements[name].check(subject, "fold")


def by_density() -> tuple[float, float]:
    """`E[eq. 53]` and the KL of `x - 1.2 tanh 2x` by quadrature over y of the density summed over its preimages."""
    turn = math.acosh(math.sqrt(2.4)) / 2

    def T(x: float) -> float:
        return x - 1.2 * math.tanh(2 * x)

    def weights(y: float) -> list[float]:
        found = []
        for low, high in ((-12, -turn), (-turn, turn), (turn, 12)):
            if (T(low) - y) * (T(high) - y) < 0:
                x = brentq(lambda x: T(x) - y, low, high, xtol=1e-14)
                found.append(math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / abs(1 - 2.4 / math.cosh(2 * x) ** 2))
        return found

    def log_p0(y: float) -> float:
        return -y * y / 2 - math.log(2 * math.pi) / 2

    def kl(y: float) -> float:
        rho = sum(weights(y))
        return rho * (math.log(rho) - log_p0(y))

    def eq53(y: float) -> float:
        return sum(w * (math.log(w) - log_p0(y)) for w in weights(y))

    def over_y(g: Callable[[float], float]) -> float:
        edge = abs(T(turn))  # y = edge -+ s^2 takes the root out of the density there
        inside = quad(lambda s: g(edge - s * s) * 2 * s, 1e-7, math.sqrt(edge), limit=200)[0]
        return 2 * (inside + quad(lambda s: g(edge + s * s) * 2 * s, 1e-7, 3, limit=200)[0])

    return over_y(eq53), over_y(kl)


def test_the_kl_of_a_fold_is_eq_53_and_the_entropy_of_the_preimage() -> None:
    lower, entropy, masses = folded_kl(measured(), 1024)
    eq53, kl = by_density()
    assert eq53 == pytest.approx(0.0577050, abs=5e-6)
    assert kl == pytest.approx(0.927207, abs=1e-5)
    assert lower == pytest.approx(eq53, abs=2e-5)
    assert lower + entropy == pytest.approx(kl, abs=2e-5)
    assert masses == pytest.approx(kl, abs=2e-5)


def test_verify_bound_shows_it() -> None:
    report = verify_toys([], VerifySettings(samples=384), references=["fold"])
    verdicts = {check.name: check.verdict for check in report.checks}
    assert "fails" not in verdicts.values()
    assert verdicts["folding-entropy"] == verdicts["degree"] == "holds"
    assert verdicts["injectivity"] == verdicts["kl-one-dimensional"] == "not applicable"


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.abs() - 1 - x,  # a kink: two preimages everywhere, KL = E[eq. 53] + log 2
        lambda x: -1.5 * torch.sin(2 * x),  # folds without end
        lambda x: -1.3 * torch.tanh(3 * (x - 0.7)),  # off the middle
        lambda x: x * x,  # unbounded, with an integrand of thousands in the tails
        lambda x: 0.1 * x**4 - x * x,  # three turns
    ],
)
def test_other_folds(f: Callable[[Tensor], Tensor]) -> None:
    check = judged("folding-entropy", measured(f, smooth=False))
    assert check.verdict == "holds", check.note
    assert check.tolerance < 0.02


def test_two_preimages_everywhere_are_worth_log_2() -> None:
    _, entropy, _ = folded_kl(measured(lambda x: x.abs() - 1 - x), 1024)
    assert entropy == pytest.approx(math.log(2), abs=1e-4)


ERRORS = {
    "log-det halved": with_fields(error=lambda record: record.error / 2),
    "sign of E(J)": with_fields(error=lambda record: -record.error),
    "sign of x.f": with_fields(alignment=lambda record: -record.alignment),
    "|f|^2 in place of its half": with_fields(l2=lambda record: 2 * record.l2),
    "NaN": with_fields(error=lambda record: record.error * math.nan),
}


@pytest.mark.parametrize("error", ERRORS)
def test_red_under_a_planted_error(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, moments, "dense_moments", ERRORS[error])
    assert judged("folding-entropy", measured()).verdict == "fails"


def test_red_without_the_preimages(monkeypatch: pytest.MonkeyPatch) -> None:
    """eq. 53 alone, as if T were injective, is not the KL."""
    import hnkit.checks.maps as home

    plant(monkeypatch, home, "folded_kl", lambda f: lambda *a: (f(*a)[0], 0.0, f(*a)[2]))
    assert judged("folding-entropy", measured()).verdict == "fails"


def test_the_degree_needs_its_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    many = measured(n=8000)
    assert judged("degree", many).verdict == "holds"
    plant(monkeypatch, moments, "dense_moments", with_fields(sign=lambda record: record.sign.abs()))
    assert judged("degree", measured(n=8000)).verdict == "fails"


def test_where_they_do_not_apply() -> None:
    class Push(nn.Module):
        """A bounded shift so far that no mean of its weights can be trusted."""

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x + 6

        lipschitz_upper = staticmethod(lambda: 0.0)
        bounded = staticmethod(lambda: True)

    assert "too uneven" in judged("degree", measured(Push())).note
    Push.forward = lambda self, x: 0 * x + 60  # all weights vanish
    assert "too uneven" in judged("degree", measured(Push())).note
    assert "jumps" in judged("folding-entropy", measured(lambda x: -2 * torch.sign(x) + 0 * x)).note
    assert "has none" in judged("folding-entropy", measured(lambda x: -50 * torch.tanh(50 * x))).note
    assert "no certificate" in judged("degree", measured(lambda x: 0.1 * x)).note
    assert "monotone" in judged("folding-entropy", measured(lambda x: 0.1 * x)).note
    assert "d = 2" in judged("folding-entropy", measured(FOLD, dim=2)).note
    half = dataclasses.replace(measured(), x=noise(16, 1).bfloat16())
    assert "float32" in judged("folding-entropy", half).note
    assert np.isfinite(judged("folding-entropy", dataclasses.replace(measured(), x=noise(16, 1).float())).measured)
