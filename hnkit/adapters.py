"""Trained adapters: a backend as its run left it, and the prompts to look at it with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from hnkit.backend import BackendBase, BundlesAdapter, RecordsOptions, backend_factory, completed
from hnkit.config import CONFIG_FILE, RunConfig, make_options, parse_options, resolve_config
from hnkit.errors import InputError
from hnkit.internal.files import file_digest
from hnkit.internal.folders import adapter_folder

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


def adapter_digests(adapter: str | Path | None) -> dict[str, str]:
    """SHA-256 of each of an adapter's files by name; of none where there is no adapter."""
    files = [] if adapter is None else sorted(adapter_folder(adapter).glob("*"))
    return {path.name: file_digest(path) for path in files if path.is_file()}


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
        return completed(factory.load(resolve_config(backend=name, overrides=overrides).options)), None
    if not adapter.is_dir():
        raise InputError(f"--adapter {adapter} is not a folder: name the folder of a trained adapter, or its run")
    weights = adapter_folder(adapter)
    run = next((folder for folder in (adapter, adapter.parent) if (folder / CONFIG_FILE).is_file()), None)
    config: RunConfig | None = None
    if run is not None:
        config = resolve_config(resume=run, overrides=overrides, training=False)
        if config.backend != name:
            raise InputError(f"--adapter {adapter} was trained with --backend {config.backend}, not {name}")
        options = config.options
    elif isinstance(factory, RecordsOptions):
        given = parse_options(overrides, factory.options, "backend")
        options = make_options(factory.options, {**factory.recorded(weights), **given})
    else:
        options = resolve_config(backend=name, overrides=overrides).options
    for item in fields(options):
        value = getattr(options, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--adapter {adapter} has {item.name} = {value}: give --set backend.{item.name}=VALUE")
    backend = completed(factory.load(options))
    backend.load_adapter(weights)
    if config is None:
        return backend, None
    dim = torch.Size(backend.noise_shape).numel()
    return backend, config.train.alpha / (dim if config.train.reduction == "mean" else 1)


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
