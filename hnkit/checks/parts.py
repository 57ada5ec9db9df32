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

UNFINISHED, PARTS = "unfinished.json", "parts"
"""The mark of a folder whose run has not ended, and where its parts are."""

Done = Callable[[str, Sequence[Check], Sequence[Quantity]], None]
"""`done(part, checks, figures)`: told of each part of a run when it is known."""


class Parts:
    """The folder of a run, made with its first part; while it has `unfinished.json`, the run has not ended.

    A part that cannot be written, on a full disk, does not end the run: `finish` says so when all is measured.

    Args:
        out: the folder that the user asked for, or `None`.
        record: what the run is made with.
    """

    def __init__(self, out: Path | None, record: Mapping[str, Any]) -> None:
        self._out, self._record = out, record
        self.folder: Path | None = None
        self._names: list[str] = []
        self._problem: OSError | InputError | None = None

    def done(self, name: str, checks: Sequence[Check], figures: Sequence[Quantity]) -> None:
        """Write one part."""
        if self._problem is not None:
            return
        self._names.append(name)
        try:
            folder = self._begun()
            part = {"part": name, "checks": [asdict(check) for check in checks],
                    "figures": [asdict(figure) for figure in figures]}  # fmt: skip
            write_json(folder / PARTS / f"{len(self._names):03d}.json", finite_numbers(part))
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
