"""`hnkit train`: train a noise hypernetwork, or go on with a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.cli.folders import resumed_folder
from hnkit.cli.options import WithBackend, flags_of
from hnkit.config import CONFIG_FILE, RunConfig, TrainConfig, resolve_config
from hnkit.errors import InputError
from hnkit.internal.files import require_run_folder
from hnkit.internal.values import printable, setting
from hnkit.internal.workers import is_first

CARD = "h100"
"""The card of a plan where none is named."""
EXAMPLE = "hnkit train --backend digits --reward legibility=1 --steps 600"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Train a noise hypernetwork, or resume its training; Ctrl-C writes a checkpoint first.

    Attributes:
        config: configuration file.
        preset: named settings of the backend.
        reward: reward, or pkg.mod:fn=WEIGHT (repeatable); default: the backend's.
        heldout: reward that is reported and never trained on (repeatable).
        resume: continue a run: this one, or the newest if none is named.
        plan: say what the run needs on a card and how long it takes there; nothing is trained, loaded or written.
        card: the card of --plan; one of rtx-3090, rtx-4090, a10, l4, a100-40gb, a6000, l40s, a100, h100, h200; default:
            h100.
    """

    config: Path | None = setting(None, metavar="FILE.toml")
    preset: str | None = setting(None, metavar="NAME")
    settings: Mapping[str, Any] = flags_of(TrainConfig, defaults=" or the preset's")
    reward: tuple[str, ...] = setting((), metavar="NAME=WEIGHT")
    heldout: tuple[str, ...] = setting((), metavar="NAME=WEIGHT")
    resume: str | None = setting(None, metavar="[DIR]")
    plan: bool = False
    card: str | None = setting(None, metavar="NAME")


def run(options: Options) -> int:
    """Train or resume; the exit code is that of the run, 128 + signal where one stopped it."""
    from hnkit.output import terminal

    folder = None
    if options.resume is not None:
        folder = resumed_folder(options.resume, options.out, "train", CONFIG_FILE)
        if not os.path.lexists(folder):
            raise InputError(f"--resume {folder}: no run is there (there is no such folder): name a run folder")
        require_run_folder(folder, "train")  # before anything is asked for what a foreign configuration says
    flags = [f"train.{name}={value}" for name, value in options.settings.items()]
    config = resolve_config(
        backend=options.backend,
        config_file=options.config,
        preset=options.preset,
        overrides=[*flags, *options.all_overrides()],
        rewards=options.reward,
        heldout=options.heldout,
        resume=folder,
    )
    if options.plan:
        return _plan(config, options)
    if options.card is not None:
        raise InputError(f"--card {options.card} without --plan: a run trains on the card that is here")
    from hnkit.training.run import train

    result = train(config, out=options.out if folder is None else None, resume=folder)
    if not is_first():  # one of several processes speaks
        return result.exit_code
    if options.as_json:
        document = {
            "run_folder": str(result.folder), "step": result.step, "finished": result.finished,
            "skipped": result.skipped, "report": result.report,
        }  # fmt: skip
        terminal.print_json(document)
    elif result.finished:
        terminal.print_card_of(result.report)
        print(printable(f"report: {result.folder / 'report.html'}"))
    return result.exit_code


def _plan(config: RunConfig, options: Options) -> int:
    """Print what a run needs; 0 whether it fits or not: a plan is an answer, not a check."""
    from hnkit.output import terminal
    from hnkit.training.plan.cards import find_card
    from hnkit.training.plan.plan import as_document, plan_training
    from hnkit.training.plan.view import as_text

    if options.out is not None:
        raise InputError(f"--out {options.out} with --plan: a plan is printed, nothing is written; leave it out")
    if not is_first():  # all processes have the same plan, and one of them says it
        return 0
    card = find_card(CARD if options.card is None else options.card)
    with terminal.waiting("counting a step on tensors without values, up to some minutes for a large model"):
        plan = plan_training(config, card, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if options.as_json:
        terminal.print_json(as_document(plan))
    else:
        screen = terminal.console()
        for line in as_text(plan).splitlines():
            screen.print(terminal.Words(line))
    return 0
