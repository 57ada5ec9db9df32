"""Every statement has a derivation and a check that holds, whose false variant is refuted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "proofs"
sys.path.insert(0, str(ROOT))

import run  # noqa: E402


@pytest.mark.parametrize("name", run.statements())
def test_statement(name):
    outcome = run.run(name)
    assert outcome.claims
    failing = [claim for claim in [*outcome.claims, *outcome.counterexamples] if not claim.holds]
    assert not failing
    assert outcome.false_variant_fails, "the deliberately false variant was not refuted"
    derivation = (ROOT / name / "README.md").read_text()
    assert "**Statement" in derivation
    assert len(derivation.split()) > 120


def test_index_is_current_and_complete():
    assert run.index() == run.INDEX.read_text(), "python proofs/run.py --write-index"


def test_every_folder_is_listed():
    folders = {path.parent.name for path in ROOT.glob("*/check.py")} - {"coq"}
    assert folders == set(run.statements())
