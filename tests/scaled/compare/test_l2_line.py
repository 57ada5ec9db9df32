"""The line on the L2 term at the head of a comparison, against maps whose KL is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit.checks.l2_term import _claimed, _ratio_in_words
from hnkit.figures import measure
from hnkit.kl import verdict
from hnkit.kl.verdict import L2Verdict
from hnkit.scaled.compare.page import lead
from tests.hnkit.checks.test_planted_errors import plant, with_fields
from tests.hnkit.functions import Linear, noise, seeded
from tests.hnkit.operator_zoo import matrix

MATRICES = {
    "misses": matrix("symmetric", 0.4, 24),
    "overcounts": matrix("skew", 0.4, 24) + 0.1 * torch.eye(24).double(),
}


def document(A: Tensor) -> dict[str, object]:
    """What the head of a comparison of one network reads, that network being `f(x) = A x`."""
    measurement = measure(Linear(A), noise(64, len(A), seed=5), generator=seeded(1))
    gain = {"reward": {"value": 0.1, "stderr": 0.01}}
    row = {"method": "hypernoise", "prompts": 3, "gain": gain, "scores": {"reward": {"value": 1.0}}}
    return {"table_1": [row], "l2": [measurement.to_json()], "scores": ["reward"]}


def line(A: Tensor) -> str:
    """The last sentence, which follows the figures of the L2 term."""
    return lead(document(A)).partition(" what it stands for. ")[2]


def judge(word: str) -> None:
    """The line's words against the closed form: 16 samples and 4 probes, at 5 of their standard errors."""
    A = MATRICES[word]
    text = line(A)
    x = noise(64, len(A), seed=5)[:16]
    l2 = float((x @ A.mT).square().sum(1).mean()) / 2
    square = float(torch.trace(A @ A)) / 2
    symmetric = A @ A / 2
    off = float((symmetric - symmetric.diagonal().diag()).square().sum())
    radius = 5 * math.sqrt(2 * off / 64) / l2
    assert word in text
    assert abs(_ratio_in_words(text) - square / l2) < radius + 1e-3
    error = float(torch.trace(A) - torch.linalg.slogdet(torch.eye(len(A), dtype=A.dtype) + A).logabsdet)
    share = error / (float(A.square().sum()) / 2 + error)
    least, most = _claimed(text)
    assert least <= share <= most
    assert -math.inf < least <= most < math.inf


@pytest.mark.parametrize("word", MATRICES)
def test_the_line_is_that_of_the_closed_form(word: str) -> None:
    judge(word)


PLANTED = {
    "sign": lambda m: plant(m, verdict, "_moments", with_fields(square=lambda record: -record.square)),
    "factor": lambda m: plant(m, verdict, "_moments", with_fields(square=lambda record: record.square / 2)),
    "shares for percent": lambda m: m.setattr(verdict, "_percent", lambda share, up=True: f"{share:.2g} %"),
    "no line": lambda m: m.setattr(L2Verdict, "sentence", ""),
}


@pytest.mark.parametrize("word", MATRICES)
@pytest.mark.parametrize("error", PLANTED)
def test_the_line_is_seen_to_be_wrong(error: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[error](monkeypatch)
    with pytest.raises(AssertionError):
        judge(word)
