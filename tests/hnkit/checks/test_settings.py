"""Which method a run of `verify-bound` takes by itself, and what takes over where its rank is too small."""

from __future__ import annotations

import pytest
import torch

from hnkit import ExpansiveMapError
from hnkit.checks.settings import VerifySettings
from hnkit.figures.measured_map import MeasuredMap
from tests.hnkit.functions import noise, orthogonal


def test_trained_networks_are_measured_by_low_rank() -> None:
    settings = VerifySettings()
    assert [settings.method_for(dim, trained=trained) for dim in (1024, 1025) for trained in (False, True)] == [
        "exact", "exact", "arnoldi", "low-rank",
    ]  # fmt: skip
    assert VerifySettings(method="power").method_for(5000, trained=True) == "power"
    wide = torch.zeros(2, 1025, dtype=torch.float64)
    assert settings.measured("f", torch.zeros_like, wide, trained=True).fallback == "lanczos"
    assert VerifySettings(method="low-rank").measured("f", torch.zeros_like, wide, trained=True).fallback is None


def test_lanczos_takes_over_where_rank_is_lacking() -> None:
    Q = orthogonal(60, 1)

    def f(x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ Q.T  # 60 singular values of 2: no small rank leaves a remainder below 1

    subject = MeasuredMap("f", f, noise(3, 60), method="low-rank", fallback="lanczos")
    assert subject.estimate.method == subject.method == "lanczos"
    alone = MeasuredMap("f", f, noise(3, 60), method="low-rank")
    with pytest.raises(ExpansiveMapError, match="more rank"):
        _ = alone.estimate
