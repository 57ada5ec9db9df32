"""requirements.lock is constraints.txt with a hash for every file, and torch in the one version that is supported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "docs" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_has_the_pins_and_no_others(lock):
    assert lock.differences() == []  # else run docs/lock.py
    assert lock.locked()["torch"] == "2.13.0"
    assert {"pip", "setuptools", "wheel"} <= lock.locked().keys()  # what installs the others, and builds hnkit


def test_every_line_is_an_exact_pin_with_a_hash():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+ --hash=sha256:[0-9a-f]{64}", line) for line in pins)


def test_what_is_missing_or_of_another_version_is_named(lock, monkeypatch):
    name, version = next(iter(lock.locked().items()))
    monkeypatch.setattr(lock, "wanted", lambda: [f"{name}=={version}.1", "new-one==1"])
    found = lock.differences()
    assert f"{name}=={version}.1 is {version}" in found
    assert "new-one==1 is missing" in found
    assert "torch is not in constraints.txt" in found
