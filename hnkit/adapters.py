"""Trained adapters: a backend as its run left it, and the prompts to look at it with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hnkit.backend import BackendBase, BundlesAdapter, RecordsOptions, backend_factory, completed
from hnkit.config import (
    CONFIG_FILE,
    PERMISSIONS,
    PLACES,
    RunConfig,
    make_options,
    parse_options,
    read_tables,
    resolve_config,
)
from hnkit.errors import InputError
from hnkit.internal.files import file_digest
from hnkit.internal.folders import adapter_files, adapter_folder, unreadable_adapter
from hnkit.internal.values import shown
from hnkit.output.terminal import waiting

__all__ = ["adapter_folder", "default_prompts", "load_trained", "local_files_only", "named_adapter"]

BUNDLED = "bundled"
"""The name of the adapter that comes with a backend's model; a folder of that name is `./bundled`."""


def named_adapter(name: str, adapter: str | Path | None) -> Path | None:
    """The folder that `--adapter` means: the one that is named, or, by the name `bundled`, that of the backend's model.

    Args:
        name: the name of an installed backend.
        adapter: what was given; `None` stays `None`.

    Raises:
        InputError: `bundled`, of a backend whose model comes without an adapter.
    """
    if adapter is None or str(adapter) != BUNDLED:
        return None if adapter is None else Path(adapter)
    factory = backend_factory(name)
    if not isinstance(factory, BundlesAdapter):
        raise InputError(
            f"--adapter {BUNDLED}: backend {name} comes without an adapter: train one, or write ./{BUNDLED} for a "
            "folder of that name"
        )
    return factory.bundled_adapter()


def adapter_word(name: str, adapter: str | Path) -> str:
    """What `--adapter` is given for this folder: `bundled` where it is the one that the backend's model comes with."""
    factory = backend_factory(name)
    if isinstance(factory, BundlesAdapter) and Path(adapter).resolve() == factory.bundled_adapter().resolve():
        return BUNDLED
    return str(adapter)


def adapter_digests(adapter: str | Path | None) -> dict[str, str]:
    """SHA-256 of each file that its outputs depend on, by name, and of its run's options of the backend, if it has one.

    Files that only describe it, and options that say where something lies or give leave, are left out: what was moved,
    or has a new README.md, is the same. Of no adapter, none.
    """
    if adapter is None:
        return {}
    try:
        found = {path.name: file_digest(path) for path in adapter_files(adapter_folder(adapter))}
    except PermissionError as error:
        raise unreadable_adapter(Path(adapter), error) from None
    if (run := _run_of(Path(adapter))) is not None:
        options = read_tables(run / CONFIG_FILE).get("backend", {})
        kept = [key for key in sorted(options) if f"backend.{key}" not in PLACES and key not in PERMISSIONS]
        said = json.dumps({key: str(options[key]) for key in kept})
        found[f"{CONFIG_FILE} [backend]"] = hashlib.sha256(said.encode()).hexdigest()
    return found


def _run_of(adapter: Path) -> Path | None:
    """The folder of the run that an adapter is of, where it has one."""
    try:
        return next((folder for folder in (adapter, adapter.parent) if (folder / CONFIG_FILE).is_file()), None)
    except PermissionError as error:
        raise unreadable_adapter(adapter, error) from None


def load_trained(
    name: str, adapter: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[BackendBase, float | None]:
    """A backend with its adapter loaded, and the effective temperature it was trained at if its run says so.

    The options are those of the run or adapter where these record them, and `--set backend.*` on top. The rewards of
    the run are not loaded: only training needs them.

    Args:
        name: the name of an installed backend.
        adapter: the adapter's folder, the run folder that holds it, or `bundled`; `None`: the backend as it starts,
            f = 0.
        overrides: `backend.key=value`.

    Raises:
        InputError: there is no adapter, it is damaged or another backend's, or records a value that is not finite.
    """
    factory = backend_factory(name)
    for override in overrides:
        if not override.startswith("backend."):
            raise InputError(f"--set {override}: only backend.KEY=VALUE applies here")
    adapter = named_adapter(name, adapter)
    if adapter is None:
        return load_backend(factory, resolve_config(backend=name, overrides=overrides).options), None
    if not adapter.is_dir():
        raise InputError(f"--adapter {adapter} is not a folder: name the folder of a trained adapter, or its run")
    weights = adapter_folder(adapter)
    run = _run_of(adapter)
    config: RunConfig | None = None
    if run is not None:
        config = resolve_config(resume=run, overrides=overrides, rewards_of_files="none")
        if config.backend != name:
            raise InputError(f"--adapter {adapter} was trained with --backend {config.backend}, not {name}")
        options = config.options
        require_recorded(factory, weights, config, overrides)
    elif isinstance(factory, RecordsOptions):
        given = parse_options(overrides, factory.options, "backend")
        options = make_options(factory.options, {**factory.recorded(weights), **given})
    else:
        options = resolve_config(backend=name, overrides=overrides).options
    for item in fields(options):
        value = getattr(options, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--adapter {adapter} has {item.name} = {value}: give --set backend.{item.name}=VALUE")
    backend = load_backend(factory, options)
    backend.load_adapter(weights)
    if config is None:
        return backend, None
    dim = torch.Size(backend.noise_shape).numel()
    return backend, config.train.alpha / (dim if config.train.reduction == "mean" else 1)


def require_recorded(factory: Any, weights: str | Path, config: RunConfig, overrides: Sequence[str] = ()) -> None:
    """Refuse the configuration of a run whose sizes are not those of its adapter, before anything is allocated.

    Args:
        factory: the factory of the backend.
        weights: the folder of the adapter, whose files bound what it records.
        config: the configuration of its run.
        overrides: `backend.key=value`: what the user says is not the configuration's.

    Raises:
        InputError: they differ, or the adapter is damaged.
    """
    weights, mine = Path(weights), [text for text in overrides if text.startswith("backend.")]
    given = parse_options(mine, factory.options, "backend")
    if not isinstance(factory, RecordsOptions) or not weights.is_dir():
        return
    for key, recorded in factory.recorded(weights).items():
        says = getattr(config.options, key, recorded)
        if type(recorded) is int and key not in given and says != recorded:
            raise InputError(
                f"the {CONFIG_FILE} of the run of adapter {weights} has backend.{key} = {shown(says)}, and the adapter "
                f"itself {shown(recorded)}: one of them was altered, take another copy"
            )


def load_backend(factory: Any, options: Any) -> BackendBase:
    """The backend of a factory with these options, completed; a terminal shows that it is being loaded."""
    with waiting(f"loading {factory.name}"):
        return completed(factory.load(options))


def local_files_only(name: str, overrides: Sequence[str]) -> bool:
    """The switch for what is loaded beside the backend: off where `--set backend.local_files_only=false` is given."""
    mine = [override for override in overrides if override.startswith("backend.")]
    given = parse_options(mine, backend_factory(name).options, "backend")
    return bool(given.get("local_files_only", True))


def default_prompts(backend: BackendBase) -> list[str]:
    """The backend's own held-out prompts."""
    if backend.prompts is None:
        raise InputError(f"backend {backend.name} has no prompts of its own: give --prompts FILE")
    held_out = list(backend.prompts()[1])
    return held_out[:16]
