from __future__ import annotations

import pytest

import hnkit.adapters
import hnkit.backend
import hnkit.training.export
import hnkit.training.session
from tests.hnkit.fake_backend import FakeFactory


@pytest.fixture
def fake(monkeypatch) -> FakeFactory:
    factory = FakeFactory()
    for module in (hnkit.backend, hnkit.adapters, hnkit.training.export, hnkit.training.session):
        monkeypatch.setattr(module, "backend_factory", lambda name: factory)
    return factory
