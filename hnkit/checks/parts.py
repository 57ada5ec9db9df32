"""What a run of `verify-bound` has found out so far: on the disk as soon as it is known, and taken up from there."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from hnkit.checks.check import Check
from hnkit.checks.quantities import Quantity
from hnkit.checks.report import Report
from hnkit.errors import InputError
from hnkit.figures.measured_map import RowStatistics
from hnkit.internal.files import (
    document_digest,
    new_run_folder,
    read_plain,
    read_sealed,
    resumable,
    write_json,
    write_sealed,
)
from hnkit.internal.folders import run_lock, sweep_temporaries
from hnkit.internal.kept import from_document, to_document
from hnkit.internal.provenance import record_provenance, recorded_provenance
from hnkit.internal.stats import Estimate
from hnkit.internal.workers import ALONE, Workers
from hnkit.kl.estimate import KLEstimate
from hnkit.kl.moments import Moments
from hnkit.kl.verdict import L2Verdict
from hnkit.lipschitz.local import LipschitzEstimate

UNFINISHED, PARTS, PLAN = "unfinished.json", "parts", "verify.json"
"""The mark of a folder whose run has not ended, where its parts are, and what it was asked."""
RECORDS: Mapping[str, type[Any]] = {
    record.__name__: record
    for record in (Check, Quantity, Estimate, KLEstimate, Moments, RowStatistics, LipschitzEstimate, L2Verdict)
}
"""What parts are made of."""

T = TypeVar("T")


class Parts:
    """The folder of a run, made with its first part; while it has `unfinished.json`, the run has not ended.

    A part that cannot be written, on a full disk, does not end the run: `finish` says so when all is measured. Inside a
    `with`, the folder is this process's, and whatever ends the run says how it is gone on with.

    Of several processes the main one makes the folder and writes the report; parts are written by each, once the folder
    is shared, and taken up by one process alone.

    Args:
        out: the folder that the user asked for, or `None`.
        record: what the run is made with and what it was asked, by content; its digest is in every part, and one with
            another digest is another run's, and is made again.
        plan: what it was asked, for the run that goes on with it.
        again: the flags of the run that goes on with it, besides `--resume`.
        workers: the processes of the run.
    """

    def __init__(
        self,
        out: Path | None,
        record: Mapping[str, Any],
        plan: Mapping[str, Any],
        again: Sequence[str] = (),
        workers: Workers = ALONE,
    ) -> None:
        self._out, self._record, self._plan, self._again, self._workers = out, record, plan, again, workers
        self._made_from = document_digest(record)
        self.folder: Path | None = None
        self._known: dict[str, Path] = {}
        self._names: list[str] = []
        self._problem: OSError | InputError | None = None
        self._stack = contextlib.ExitStack()

    def share(self) -> None:
        """Make the folder now, for all processes, which come here together; one process makes it with its first part.

        Raises:
            InputError: it could not be made.
        """
        if self._workers.count > 1:
            self.folder = self._workers.on_main(self._begun)

    def take_up(self, folder: Path) -> bool:
        """Go on in the folder of a run that was begun; whether its parts are taken up.

        Those that other code or other versions have made are not: they are made again.

        Raises:
            InputError: another process holds the folder.
            OSError: it cannot be written.
        """
        self._enter(folder)
        sweep_temporaries(folder)
        before = recorded_provenance(folder)
        same = before[-1] == self._record if before else not any((folder / PARTS).glob("*"))
        self._known = _parts_of(folder, self._made_from) if same else {}
        if not same:
            _remove_parts(folder)
        write_json(folder / UNFINISHED, {"finished": False, "parts": []})
        write_sealed(folder / PLAN, self._plan)  # what was moved has been found
        record_provenance(folder, self._record)
        (folder / PARTS).mkdir(exist_ok=True)
        return same

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._known and isinstance(error, LookupError | TypeError | AttributeError):
            error = InputError(
                f"--resume {self.folder}: its parts are not what this version writes ({error!r}): start a new run"
            )
            with contextlib.suppress(InputError):
                self._stack.__exit__(InputError, error, trace)
            raise error
        return self._stack.__exit__(kind, error, trace)

    def keep(self, name: str, make: Callable[[], T], /) -> T:
        """The part of that name as an earlier run has left it, or else as it is made now, and written."""
        if (path := self._known.get(name)) is not None:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a damaged part is made again
                found: T = from_document(read_sealed(path)["value"], RECORDS)
                self._tell(name)
                return found
        made = make()
        if self._problem is None and (self._workers.index == 0 or self.folder):
            try:
                folder = self._begun()
                path = folder / PARTS / _file_of(name)
                write_sealed(path, {"part": name, "made_from": self._made_from, "value": to_document(made)})
                self._tell(name)
            except (OSError, InputError) as problem:
                self._problem = problem
        return made

    def _tell(self, name: str) -> None:
        self._names.append(name)
        if self.folder is not None and self._workers.index == 0:
            write_json(self.folder / UNFINISHED, {"finished": False, "parts": self._names})

    def finish(self, report: Report, command: str) -> Path:
        """Write the report with the command that makes it again, and then take the mark and the parts away.

        Raises:
            InputError: the folder could not be made.
            OSError: the disk is full or read-only; the folder is marked as unfinished.
        """
        if self._problem is not None:
            raise self._problem
        folder = self._begun()
        report.write(folder, command)
        _remove_parts(folder)
        with contextlib.suppress(OSError):  # what somebody put there stays
            (folder / PARTS).rmdir()
        (folder / UNFINISHED).unlink()
        return folder

    def _begun(self) -> Path:
        if self.folder is None:
            folder = new_run_folder(self._out, "verify")
            write_json(folder / UNFINISHED, {"finished": False, "parts": []})
            write_sealed(folder / PLAN, self._plan)
            record_provenance(folder, self._record)
            (folder / PARTS).mkdir()
            self._enter(folder)
        assert self.folder is not None
        return self.folder

    def _enter(self, folder: Path) -> None:
        self._stack.enter_context(run_lock(folder))
        again = ("hnkit", "verify-bound", *self._again, "--resume", str(folder))
        self._stack.enter_context(resumable(*again))
        self.folder = folder


def _parts_of(folder: Path, made_from: str | None = None) -> dict[str, Path]:
    """The parts of a folder by name, all of them or those made from this; one that is damaged is none."""
    found: dict[str, Path] = {}
    for path in sorted((folder / PARTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            part = read_sealed(path)
            if made_from is None or part["made_from"] == made_from:
                found[str(part["part"])] = path
    return found


def _remove_parts(folder: Path) -> None:
    """Delete what parts are in a folder, damaged ones and another run's too, and nothing else."""
    ours = set(_parts_of(folder).values())
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        ours |= {folder / PARTS / _file_of(str(name)) for name in json.loads(read_plain(folder / UNFINISHED))["parts"]}
    for path in ours:
        path.unlink(missing_ok=True)


def _file_of(name: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
