"""`hnkit train`: train a noise hypernetwork, or go on with a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.cli.folders import resumed_folder
from hnkit.cli.options import WithBackend, flags_of
from hnkit.config import CONFIG_FILE, TrainConfig, resolve_config
from hnkit.internal.values import setting

EXAMPLE = "hnkit train --backend digits --reward legibility=1 --steps 600"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Train a noise hypernetwork, or resume its training; Ctrl-C writes a checkpoint first.

    Attributes:
        config: configuration file.
        preset: named settings of the backend.
        reward: reward, or pkg.mod:fn=WEIGHT (repeatable); default: the backend's.
        heldout: reward that is reported and never trained on (repeatable).
        model_id: model of the backend: a hub name, or a folder.
        resume: continue a run: this one, or the newest if none is named.
    """

    config: Path | None = setting(None, metavar="FILE.toml")
    preset: str | None = setting(None, metavar="NAME")
    settings: Mapping[str, Any] = flags_of(TrainConfig, defaults=" or the preset's")
    reward: tuple[str, ...] = setting((), metavar="NAME=WEIGHT")
    heldout: tuple[str, ...] = setting((), metavar="NAME=WEIGHT")
    model_id: str | None = setting(None, metavar="NAME")
    resume: str | None = setting(None, metavar="[DIR]")


def run(options: Options) -> int:
    """Train or resume; the exit code is that of the run, 128 + signal where one stopped it."""
    from hnkit.output import terminal
    from hnkit.training.run import train

    folder = None
    if options.resume is not None:
        folder = resumed_folder(options.resume, options.out, "train", CONFIG_FILE)
    flags = [f"train.{name}={value}" for name, value in options.settings.items()]
    flags += [] if options.model_id is None else [f"backend.model_id={options.model_id}"]
    config = resolve_config(
        backend=options.backend,
        config_file=options.config,
        preset=options.preset,
        overrides=[*flags, *options.overrides],
        rewards=options.reward,
        heldout=options.heldout,
        resume=folder,
    )
    result = train(config, out=options.out if folder is None else None, resume=folder)
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks
        return result.exit_code
    if options.as_json:
        document = {
            "run_folder": str(result.folder), "step": result.step, "finished": result.finished,
            "skipped": result.skipped, "report": result.report,
        }  # fmt: skip
        terminal.print_json(document)
    elif result.finished:
        print(f"report: {result.folder / 'report.html'}")
    return result.exit_code
