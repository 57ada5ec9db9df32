"""Small runs for the tests of the trainer."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

import hnkit.training.session
from hnkit.config import RewardSpec, RunConfig, TrainConfig, resolve_config
from hnkit.training.run import TrainResult, train
from tests.hnkit.fake_backend import FakeFactory


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def toy(*overrides: str) -> RunConfig:
    return resolve_config(backend="toy", preset="item-e", overrides=[f"train.{override}" for override in overrides])


def small(*overrides: str) -> RunConfig:
    base = ("steps=20", "batch=8", "checkpoint_every=6", "measure_samples=16", "measure_every=5", "validate_samples=4")
    return toy(*base, *overrides)


def run(config: RunConfig, folder: Path, **options) -> TrainResult:
    return train(config, out=folder, console=quiet(), **options)


def resume(config: RunConfig, folder: Path) -> TrainResult:
    return train(config, resume=folder, console=quiet())


def outcome(folder: Path) -> dict[str, bytes]:
    """Everything that a run is for; timings and the lock are not."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timings.jsonl", ".lock")
    }


def same_outcome(one: Path, two: Path, final: str) -> bool:
    """Whether two runs left the same, but for checkpoints other than the final one, which depend on interruptions."""

    def kept(folder: Path) -> dict[str, bytes]:
        return {key: value for key, value in outcome(folder).items() if "checkpoints" not in key or final in key}

    return kept(one) == kept(two)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fake_config(
    rewards: dict[str, float] | None = None, heldout: dict[str, float] | None = None, **settings
) -> RunConfig:
    defaults = {"steps": 6, "batch": 4, "measure_samples": 8, "validate_samples": 4, "lr": 0.05}
    tables = [{name: RewardSpec(weight) for name, weight in (table or {}).items()} for table in (rewards, heldout)]
    return RunConfig("fake", FakeFactory().options(), TrainConfig(**defaults | settings), *tables)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Let a signal arrive at the end of a step."""
    update = hnkit.training.session.Session.update

    def interrupted(session, sums):
        record = update(session, sums)
        if session.step == step:
            os.kill(os.getpid(), signum)
        return record

    monkeypatch.setattr(hnkit.training.session.Session, "update", interrupted)
