"""Checkpoints that are whole or absent, a log that ends where its checkpoint says, and a lock on the run folder.

A checkpoint is a folder `checkpoints/step-NNNNNNNN` with `tensors.safetensors`, `state.json` and `manifest.json`,
which holds the SHA-256 of the other two and of itself. It is written beside its final place, flushed to the disk and
renamed, so a crash at any moment leaves the older ones as they were. Damage, down to one flipped bit or one missing
byte, is found when it is read, and the newest whole one is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.files import file_digest
from hnkit.internal.values import finite

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: tensors by name, and a JSON document."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written; the message says what is wrong with it."""


def save_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and remove all but the `keep` newest.

    Args:
        run: the run folder.
        step: optimiser steps done.
        tensors: copied to the CPU; no two may share memory.
        state: a JSON document without NaN.
        keep: at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or read-only; older checkpoints are intact and nothing partial remains in sight.
    """
    parent = run / CHECKPOINTS
    final = parent / f"step-{step:08d}"
    temporary = parent / f".{final.name}.tmp"
    parent.mkdir(exist_ok=True)
    for leftover in parent.glob(".step-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS
            )
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(temporary / TENSORS)) from error
        (temporary / STATE).write_bytes(_canonical(state))
        files = {name: file_digest(temporary / name) for name in (TENSORS, STATE)}
        (temporary / MANIFEST).write_bytes(_manifest(files))
        for name in (TENSORS, STATE, MANIFEST, "."):
            _sync(temporary / name)
        _remove(final)
        os.rename(temporary, final)  # noqa: PTH104 - the plain rename is the atomic step
        _sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _folders(run)[keep:]:
        _remove(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, every byte checked against its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, truncated or altered.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
        try:
            files = json.loads(manifest)["files"]
            whole = manifest == _manifest(files)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole or set(files) != {TENSORS, STATE}:
            raise DamagedCheckpointError(f"{MANIFEST} is truncated or altered")
        for name, expected in files.items():
            if file_digest(folder / name) != expected:
                raise DamagedCheckpointError(f"the SHA-256 of {name} does not match: truncated or altered")
        state = json.loads((folder / STATE).read_bytes())
        if not isinstance(state, dict) or type(state.get("step")) is not int:
            raise DamagedCheckpointError(f"{STATE} is not the state of a run")
        return Checkpoint(state["step"], load_file(folder / TENSORS), state)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"what was written is not a checkpoint: {error}") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{Path(error.filename or folder).name}: {error.strerror}") from error


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or `None` where it has none yet.

    Args:
        run: the run folder.
        warn: told, in one line each, of the damaged ones that were passed over.

    Raises:
        InputError: there are checkpoints and all are damaged.
    """
    folders = _folders(run)
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except DamagedCheckpointError as error:
            warn(f"checkpoint {folder} is damaged and was passed over: {error}")
    if folders:
        raise InputError(f"all {len(folders)} checkpoints in {run / CHECKPOINTS} are damaged: start a new run")
    return None


def sweep(run: Path) -> None:
    """Remove what writes that were killed have left in a run folder; the caller holds its lock."""
    for folder in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(folder)
    for path in list(run.rglob(".*.tmp")):
        if path.is_file():
            path.unlink()


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the system releases it however the process ends.

    Raises:
        InputError: another process holds it.
    """
    try:
        lock = FileLock(run / ".lock", timeout=0).acquire()
    except Timeout:
        raise InputError(f"run folder {run} is in use by another process: wait for it or choose another") from None
    with lock:
        yield


class JsonLog:
    """An append-only file of JSON lines whose position can be stored and returned to.

    NaN and infinity are written as `null`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")
        self._hash = hashlib.sha256()
        self._size = self._file.tell()
        if self._size:
            raise ValueError(f"{path} is not empty: use JsonLog.resume")

    @classmethod
    def resume(cls, path: Path, position: Mapping[str, Any], warn: Callable[[str], None]) -> Self:
        """Open a log cut back to a stored position; a log that is not the one stored is set aside, not used."""
        size = int(position["size"])
        kept = path.read_bytes()[:size] if path.exists() else b""
        if len(kept) < size or hashlib.sha256(kept).hexdigest() != position["sha256"]:
            aside = path.with_name(f"{path.stem}-damaged-{len(list(path.parent.glob('*-damaged-*')))}{path.suffix}")
            warn(f"{path} is not the file its checkpoint knew: what is left of it is now {aside.name}")
            if path.exists():
                path.rename(aside)
            return cls(path)
        with path.open("ab") as file:
            file.truncate(size)
        log = cls.__new__(cls)
        log.path, log._file, log._hash, log._size = path, path.open("ab"), hashlib.sha256(kept), size
        return log

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._hash.update(line)
        self._size += len(line)

    def position(self) -> dict[str, Any]:
        """Flush to the disk and say where the log ends: its size and its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and put it in the place of `folder`, which is whole at every moment but one rename.

    Raises:
        OSError: the disk is full or read-only; `folder` is then as it was.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        _remove(leftover)
    temporary.mkdir()
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _remove(old)
    _sync(folder.parent)


def _folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((run / CHECKPOINTS).glob("step-????????*"), key=lambda path: path.name, reverse=True)


def _remove(folder: Path) -> None:
    """Delete a folder if it is there; it leaves its visible name first, so that a crash midway leaves no half."""
    if folder.exists():
        hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.old")
        if hidden != folder:
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
        shutil.rmtree(hidden)


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _manifest(files: Mapping[str, str]) -> bytes:
    own = hashlib.sha256(_canonical(files)).hexdigest()
    return _canonical({"files": files, "sha256": own})


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and renames in them are durable without
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
