"""The trained networks of a comparison: given, or trained here by the one trainer, and reused when they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from hnkit.adapters import adapter_digests, load_trained
from hnkit.backend import Backend, backend_factory
from hnkit.config import CONFIG_FILE, RunConfig, TrainConfig
from hnkit.errors import InputError
from hnkit.internal.files import read_plain
from hnkit.training.run import METRICS, train


@dataclass(frozen=True)
class Network:
    """A backend with a trained adapter, and the records of its training where they are known.

    Attributes:
        name: the name of the network in tables.
        backend: the backend, with the adapter loaded.
        parameters: how many weights were trained.
        metrics: the records of its training.
        alpha: the effective temperature it was trained at; `None` where nothing says so, or where it moves no noise.
        digests: SHA-256 of the adapter's files: what was made with one network is not another's.
    """

    name: str
    backend: Backend
    parameters: int
    metrics: tuple[dict[str, Any], ...]
    alpha: float | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


def average_of(settings: TrainConfig, steps: int) -> float:
    """`train.ema` of a training of other length: the average spans the same share of it.

    An average of 500 steps would hold half of the first weights after 400.
    """
    if not settings.ema or steps >= settings.steps:
        return settings.ema
    return max(0.0, 1 - (1 - settings.ema) * settings.steps / steps)


def trained(name: str, config: RunConfig, folder: Path, again: str | None = None) -> Network:
    """Train a network in `folder`, go on with it, or load it if it is finished.

    Args:
        name: the name of the network in tables.
        config: the configuration of its training.
        folder: its run folder.
        again: the command that goes on with the comparison.

    Raises:
        KeyboardInterrupt: the run was stopped by SIGINT, after a checkpoint.
        SystemExit: the run was stopped by another signal, after a checkpoint; the code is 128 + signal.
    """
    backend = config.backend
    begun = (folder / CONFIG_FILE).is_file()
    result = train(config, resume=folder, again=again) if begun else train(config, out=folder, again=again)
    if not result.finished:
        if result.exit_code == 130:
            raise KeyboardInterrupt
        raise SystemExit(result.exit_code)
    alpha = None
    if config.train.objective == "direct":
        base: Any = backend_factory(backend).load(config.options)
        loaded = base.direct()
        loaded.load_adapter(folder / "adapter")
    else:
        model = getattr(config.options, "model_id", "")  # which may lie elsewhere than when it was trained
        loaded, alpha = load_trained(backend, folder, [f"backend.model_id={model}"] if model else [])
    return Network(name, loaded, trainable(loaded), _records(folder / METRICS), alpha, adapter_digests(folder))


def given(name: str, backend: str, adapter: Path, overrides: Sequence[str]) -> Network:
    """A network the user has trained: the adapter's folder or its run folder."""
    loaded, alpha = load_trained(backend, adapter, [o for o in overrides if o.startswith("backend.")])
    runs = [folder for folder in (adapter, adapter.parent) if (folder / METRICS).is_file()]
    records = _records(runs[0] / METRICS) if runs else ()
    return Network(name, loaded, trainable(loaded), records, alpha, adapter_digests(adapter))


def trainable(backend: Backend) -> int:
    """How many weights were trained."""
    return sum(p.numel() for p in backend.hypernetwork.parameters() if p.requires_grad)


@dataclass(frozen=True)
class _Score:
    role: StrictStr
    base: StrictFloat | None
    steered: StrictFloat | None


@dataclass(frozen=True)
class _Validation:
    scores: dict[str, _Score]


@dataclass(frozen=True)
class _Record:
    """What a comparison draws of a record."""

    step: StrictInt
    validation: _Validation | None = None


def _records(path: Path) -> tuple[dict[str, Any], ...]:
    """The records of a training; the file may be somebody else's."""
    record = TypeAdapter(_Record)
    try:
        found = [json.loads(line) for line in read_plain(path).decode().splitlines()]
        read = [record.validate_python(each) for each in found]
    except (ValidationError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged (not the records of a training): give the adapter's folder alone"
        ) from error
    names = {frozenset(each.validation.scores) for each in read if each.validation is not None}
    if len(names) > 1 or any("reward" not in scored for scored in names):
        raise InputError(f"{path} is damaged (scores that differ): give the adapter's folder alone")
    return tuple(found)
