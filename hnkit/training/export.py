"""The adapter that a run had at one of its checkpoints, as a folder that every command takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hnkit.adapters import load_backend
from hnkit.backend import BackendBase, backend_factory, completed
from hnkit.config import CONFIG_FILE, RunConfig, config_toml, resolve_config
from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, new_run_folder, read_plain, require_run_folder
from hnkit.internal.folders import adapter_folder
from hnkit.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    newest_checkpoint,
    replace_folder,
)
from hnkit.training.optimize import load_parameters
from hnkit.training.recorder import METRICS, written_here
from hnkit.training.report import ADAPTER, write_adapter
from hnkit.training.session import require_same_model


def export_adapter(
    checkpoint: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the adapter of a checkpoint; no reward is loaded, and the run is only read.

    The new folder holds `adapter/`, with a model card, and the configuration of the run, so that options, temperature
    and rewards go with it. Where the run averages its weights, it is the average, as at the end of the run.

    Args:
        checkpoint: a checkpoint (`RUN/checkpoints/step-N`), or a run, of which it is the newest whole one.
        out: a new folder; `None`: under `runs/`.
        overrides: `backend.key=value`, such as the place that the model has been moved to.

    Returns:
        `run_folder`, `adapter` (the folder of the adapter), `checkpoint` and `step`.

    Raises:
        InputError: no checkpoint is there, it is damaged, or does not fit the model that its run names.
    """
    for override in overrides:
        if not override.startswith("backend."):
            raise InputError(f"--set {override}: only backend.KEY=VALUE applies here")
    run, folder, found = _read(Path(checkpoint))
    config = resolve_config(resume=run, overrides=overrides, rewards_of_files="none")
    backend = load_backend(backend_factory(config.backend), config.options)
    trained = completed(backend.direct()) if config.train.objective == "direct" and backend.direct else backend
    with written_here(run):
        require_same_model(found.state, config, backend.model_digest())
        _put(found, config, trained)
        trained.injection = config.train.deployment
        tables = found.state["config"]
        rewards = {name: float(entry["weight"]) for name, entry in tables["rewards"].items()}
        skipped = int(found.state["skipped"])
    if not rewards and backend.default_reward is not None:
        rewards = {backend.default_reward.name: backend.default_reward.weight}
    target = new_run_folder(None if out is None else Path(out), "export")
    said = config.to_dict()
    said |= {table: tables[table] for table in ("rewards", "heldout")}
    said["train"]["draws"] = tables["train"].get("draws", 1)  # as it was trained, be it refused today
    atomic_write(target / CONFIG_FILE, config_toml(said))
    replace_folder(
        target / ADAPTER,
        lambda new: write_adapter(
            new,
            config,
            trained,
            step=found.step,
            skipped=skipped,
            rewards=rewards,
            measurement=_measured(run, found.step),
        ),
    )
    return {
        "run_folder": str(target),
        "adapter": str(target / ADAPTER),
        "checkpoint": str(folder),
        "step": found.step,
    }


def _read(named: Path) -> tuple[Path, Path, Checkpoint]:
    """The run, the folder of the checkpoint, and what is in it."""
    if named.parent.name == CHECKPOINTS:
        run = named.parent.parent
        require_run_folder(run, "train", "--checkpoint")
        try:
            return run, named, load_checkpoint(named)
        except DamagedCheckpointError as error:
            raise InputError(f"--checkpoint {named} is not a whole checkpoint ({error}): name another one") from error
    require_run_folder(named, "train", "--checkpoint")
    damaged: list[str] = []
    found = newest_checkpoint(named, damaged.append)
    if found is None:
        raise InputError(f"--checkpoint {named}: the run has no checkpoint yet: name another one")
    if damaged:
        raise InputError(f"{damaged[0]}; name the one to export, such as {named / CHECKPOINTS}/step-{found.step:08d}")
    return named, named / CHECKPOINTS / f"step-{found.step:08d}", found


def _put(found: Checkpoint, config: RunConfig, backend: BackendBase) -> None:
    """Give the network the weights of the checkpoint: the averaged ones, where the run averages."""
    if config.train.from_adapter and Path(config.train.from_adapter).is_dir():
        backend.load_adapter(adapter_folder(config.train.from_adapter))  # it may have layers that a new one has not
    part = "average/" if config.train.ema else "network/"
    values = {name.removeprefix(part): value for name, value in found.tensors.items() if name.startswith(part)}
    backend.injection = config.train.deployment
    own = {name: parameter for name, parameter in backend.hypernetwork.named_parameters() if parameter.requires_grad}
    load_parameters(own, values)


def _measured(run: Path, step: int) -> Mapping[str, Any] | None:
    """What the run measured at that step, if it did."""
    try:
        records = [json.loads(line) for line in read_plain(run / METRICS).decode().splitlines()]
        return next((r["measurement"] for r in reversed(records) if r["step"] == step and r.get("measurement")), None)
    except (OSError, ValueError, LookupError, TypeError):  # a card can do without
        return None
