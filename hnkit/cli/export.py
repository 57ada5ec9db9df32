"""`hnkit export`: the adapter that a run had at a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hnkit.cli.folders import refuse_existing
from hnkit.cli.options import Common
from hnkit.errors import InputError
from hnkit.internal.values import printable, setting

EXAMPLE = "hnkit export --checkpoint runs/red/checkpoints/step-00000400"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Make an adapter of a checkpoint; every command takes what comes out as --adapter.

    Attributes:
        checkpoint: checkpoint of a run, or a run, of which the newest is taken.
        overrides: override one option of the backend (repeatable).
    """

    checkpoint: Path | None = setting(None, metavar="DIR")
    overrides: tuple[str, ...] = setting((), flags=("--set",), metavar="backend.KEY=VALUE")


def run(options: Options) -> int:
    """Write the adapter; see `hnkit.training.export`."""
    from hnkit.output import terminal
    from hnkit.training.export import export_adapter

    if options.checkpoint is None:
        raise InputError("no checkpoint given: use --checkpoint RUN/checkpoints/step-N, or --checkpoint RUN")
    refuse_existing(options.out)
    document = export_adapter(options.checkpoint, out=options.out, overrides=options.overrides)
    if options.as_json:
        terminal.print_json(document)
    else:
        print(printable(f"adapter: {document['adapter']}"))
    return 0
