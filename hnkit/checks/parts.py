"""What a run of `verify-bound` has found out so far, on the disk as soon as it is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hnkit.checks.check import Check
from hnkit.checks.quantities import Quantity
from hnkit.checks.report import Report, finite_numbers
from hnkit.errors import InputError
from hnkit.internal.files import new_run_folder, write_json
from hnkit.internal.provenance import record_provenance
from hnkit.internal.workers import ALONE, Workers

UNFINISHED, PARTS = "unfinished.json", "parts"
"""The mark of a folder whose run has not ended, and where its parts are."""

Done = Callable[[str, Sequence[Check], Sequence[Quantity]], None]
"""`done(part, checks, figures)`: told of each part of a run when it is known."""


class Parts:
    """The folder of a run, made with its first part; while it has `unfinished.json`, the run has not ended.

    A part that cannot be written, on a full disk, does not end the run: `finish` says so when all is measured.

    Of several processes the main one makes the folder and writes the report; parts are written by each, once the folder
    is shared.

    Args:
        out: the folder that the user asked for, or `None`.
        record: what the run is made with.
        workers: the processes of the run.
    """

    def __init__(self, out: Path | None, record: Mapping[str, Any], workers: Workers = ALONE) -> None:
        self._out, self._record, self._workers = out, record, workers
        self.folder: Path | None = None
        self._names: list[str] = []
        self._problem: OSError | InputError | None = None

    def share(self) -> None:
        """Make the folder now, for all processes, which come here together; one process makes it with its first part.

        Raises:
            InputError: it could not be made.
        """
        if self._workers.count > 1:
            self.folder = self._workers.on_main(self._begun)

    def done(self, name: str, checks: Sequence[Check], figures: Sequence[Quantity]) -> None:
        """Write one part; a process that has no folder leaves it to the main one, which finds out the same."""
        main = self._workers.index == 0
        if self._problem is not None or not (main or self.folder):
            return
        self._names.append(name)
        try:
            folder = self._begun()
            part = {"part": name, "checks": [asdict(check) for check in checks],
                    "figures": [asdict(figure) for figure in figures]}  # fmt: skip
            number = f"{len(self._names):03d}" + (f"-{self._workers.index}" if self._workers.count > 1 else "")
            write_json(folder / PARTS / f"{number}.json", finite_numbers(part))
            if main:
                write_json(folder / UNFINISHED, {"finished": False, "parts": self._names})
        except (OSError, InputError) as problem:
            self._problem = problem

    def finish(self, report: Report) -> Path:
        """Write the report, and then take the mark and the parts away.

        Raises:
            InputError: the folder could not be made.
            OSError: the disk is full or read-only; the folder is marked as unfinished.
        """
        if self._problem is not None:
            raise self._problem
        folder = self._begun()
        report.write(folder)
        shutil.rmtree(folder / PARTS)
        (folder / UNFINISHED).unlink()
        return folder

    def _begun(self) -> Path:
        if self.folder is None:
            self.folder = new_run_folder(self._out, "verify")
            write_json(self.folder / UNFINISHED, {"finished": False, "parts": []})
            record_provenance(self.folder, self._record)
            (self.folder / PARTS).mkdir()
        return self.folder
