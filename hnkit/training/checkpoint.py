"""Checkpoints that are whole or absent, and a log that ends where its checkpoint says.

A checkpoint is a folder `checkpoints/step-NNNNNNNN` with `tensors.safetensors`, `state.json` and `manifest.json`,
which holds the SHA-256 of the other two and of itself. It is written beside its final place, flushed to the disk and
renamed, so a crash at any moment leaves the older ones as they were. Damage, down to one flipped bit or one missing
byte, is found when it is read, and the newest whole one is used. Nothing is deleted but what is written here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.files import (
    encoded,
    file_digest,
    open_plain,
    read_plain,
    read_sealed,
    read_tensor_file,
    require_tensor_file,
    write_sealed,
)
from hnkit.internal.folders import CHECKPOINT_FILES, MANIFEST, STATE, TENSORS, open_to_append, sweep_temporaries
from hnkit.internal.values import finite, shown

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,39})")
_HALF = re.compile(r"\.step-[0-9]{8,40}\.(tmp|old)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: tensors by name, and a JSON document."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written; the message says what is wrong with it."""


def save_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and remove all but it and the newest others, `keep` in all.

    Args:
        run: the run folder.
        step: optimiser steps done.
        tensors: copied to the CPU; no two may share memory.
        state: a JSON document without NaN.
        keep: how many checkpoints are kept, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or read-only; older checkpoints are intact and nothing partial remains in sight.
    """
    parent = run / CHECKPOINTS
    final = parent / f"step-{step:08d}"
    temporary = parent / f".{final.name}.tmp"
    parent.mkdir(exist_ok=True)
    _sweep_checkpoints(run)
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
        for name in (*CHECKPOINT_FILES, "."):
            _sync(temporary / name)
        _remove(final)
        os.rename(temporary, final)  # noqa: PTH104 - the plain rename is the atomic step
        _sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    others = [folder for folder in _folders(run) if folder != final]  # some may claim to be newer than this one
    for old in others[keep - 1 :]:
        if {path.name for path in old.iterdir()} <= set(CHECKPOINT_FILES):  # what somebody put there is kept
            _remove(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, every byte checked against its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, truncated or altered.
        InputError: a file may not be read, which says nothing about what is in it.
    """
    try:
        manifest = read_plain(folder / MANIFEST)
        try:
            files = json.loads(manifest)["files"]
            whole = manifest == _manifest(files)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole or not isinstance(files, dict) or set(files) != {TENSORS, STATE}:
            raise DamagedCheckpointError(f"{MANIFEST} is truncated or altered")
        require_tensor_file(folder / TENSORS)
        for name, expected in files.items():
            if file_digest(folder / name) != expected:
                raise DamagedCheckpointError(f"the SHA-256 of {name} does not match: truncated or altered")
        state = json.loads(read_plain(folder / STATE))
        if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
            raise DamagedCheckpointError(f"{STATE} is not the state of a run")
        return Checkpoint(state["step"], _tensors(folder / TENSORS), state)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"what was written is not a checkpoint: {error}") from error
    except PermissionError as error:
        raise _unreadable(error, folder) from error
    except OSError as error:
        raise DamagedCheckpointError(f"{Path(error.filename or folder).name}: {error.strerror}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that is whole; safetensors opens no path that is not UTF-8, and takes its content."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return load(read_tensor_file(path))
    return load_file(path)


def _unreadable(error: OSError, path: Path) -> InputError:
    return InputError(f"{error.filename or path} cannot be read ({error.strerror}): mend that and resume again")


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or `None` where it has none yet.

    Args:
        run: the run folder.
        warn: told, in one line each, of the damaged ones that were passed over.

    Raises:
        InputError: there are checkpoints and all are damaged, or one may not be read.
    """
    folders, renamed = _folders(run), ""
    for folder in folders:
        try:
            found = load_checkpoint(folder)
        except DamagedCheckpointError as error:
            warn(f"checkpoint {folder} is damaged and was passed over: {error}")
            continue
        if found.step == _step_of(folder):
            return found
        warn(f"checkpoint {folder} was passed over: it says that it is of step {shown(found.step)}")
        renamed = f"give {folder.name} the name of its step if you renamed it, or "
    if folders:
        raise InputError(f"no checkpoint in {run / CHECKPOINTS} can be used: {renamed}start a new run")
    return None


def sweep(run: Path) -> None:
    """Remove what writes that were killed have left in a run folder; the caller holds its lock.

    Raises:
        InputError: a file or a link lies where a folder will be written.
    """
    for entry in (run / CHECKPOINTS).glob("*step-*"):
        if _HALF.fullmatch(entry.name) or _NAME.fullmatch(entry.name):
            _is_folder(entry)
    _sweep_checkpoints(run)
    for folder, half in ((run / name, run / f".{name}.tmp") for name in REPLACED):
        if _is_folder(half):
            shutil.rmtree(half)
        old = run / f".{folder.name}.old"
        if _is_folder(old):
            if folder.exists():
                shutil.rmtree(old)
            else:  # killed between the two renames
                old.rename(folder)
    sweep_temporaries(run)


def _sweep_checkpoints(run: Path) -> None:
    parent = run / CHECKPOINTS
    for folder in parent.iterdir() if parent.is_dir() else ():
        if _HALF.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def _is_folder(path: Path) -> bool:
    """Whether a folder is there; nothing may be.

    Raises:
        InputError: something else is there, where a folder will be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} is no folder, and one is written there: take it out of the run folder")
    return path.is_dir()


class JsonLog:
    """An append-only file of JSON lines whose position can be stored and returned to.

    NaN and infinity are written as `null`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_to_append(path)
        self._file.seek(0, os.SEEK_END)
        self._hash = hashlib.sha256()
        self._size = self._file.tell()
        if self._size:
            raise ValueError(f"{path} is not empty: use JsonLog.resume")

    @classmethod
    def resume(cls, path: Path, position: Mapping[str, Any], warn: Callable[[str], None]) -> Self:
        """Open a log cut back to a stored position; a log that is not the one stored is set aside, not used."""
        size = operator.index(position["size"])
        if size < 0:
            raise ValueError(f"a log of {size} bytes")
        begun, length = _digest_of_beginning(path, size)
        if length < size or begun.hexdigest() != position["sha256"]:
            if path.exists():
                aside = _new_file(path.with_name(f"{path.stem}-damaged"), path.suffix)
                path.replace(aside)
                warn(f"{path} is not the file its checkpoint knew: what is left of it is now {aside.name}")
            else:
                warn(f"{path}, which its checkpoint knew, is gone: it begins anew")
            return cls(path)
        log = cls.__new__(cls)
        log.path, log._file, log._hash, log._size = path, open_to_append(path), begun, size
        log._file.truncate(size)
        log._file.seek(size)
        return log

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append records, all of them or, on an error, none."""
        lines = [json.dumps(finite(record), ensure_ascii=False, allow_nan=False) for record in records]
        data = encoded("".join(f"{line}\n" for line in lines))
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def position(self) -> dict[str, Any]:
        """Flush to the disk and say where the log ends: its size and its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file; lines since the last `position` that the disk does not take are lost."""
        close_quietly(self._file)


def _new_file(stem: Path, suffix: str) -> Path:
    """A file that was not there, `<stem>-0<suffix>` or the next number; the system makes it, or says that it exists."""
    for number in itertools.count():
        path = stem.with_name(f"{stem.name}-{number}{suffix}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            return path
    raise AssertionError("numbers do not end")


def close_quietly(file: BinaryIO) -> None:
    """Close a file; what a full disk does not take is dropped, so that the error is seen that ended the run."""
    with contextlib.suppress(OSError):
        file.close()


def _digest_of_beginning(path: Path, size: int) -> tuple[Any, int]:
    """The running SHA-256 of the first `size` bytes of a file, and how many there are; of no file, none."""
    total, left = hashlib.sha256(), size
    with contextlib.suppress(FileNotFoundError), open_plain(path) as file:
        while chunk := file.read(min(left, 2**20)):
            total.update(chunk)
            left -= len(chunk)
    return total, size - left


_LIST = ".hnkit-files"
REPLACED = ("adapter", "best")
"""Folders of a run that are written anew as a whole."""


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and put it in the place of `folder`, which is whole at every moment but one rename.

    What an earlier call wrote there stands in a hidden list; files of the old folder that are not as they stand in it
    are somebody else's, and are copied into the new one, as `kept-<name>` where their name is taken.

    Raises:
        OSError: the disk is full or read-only; `folder` is then as it was.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        _remove(leftover)
    temporary.mkdir()
    write(temporary)
    written = folder_digests(temporary)
    if folder.exists():
        _keep_foreign(folder, temporary)
    write_sealed(temporary / _LIST, written)
    for path in [*temporary.rglob("*"), temporary]:
        if not path.is_symlink():
            _sync(path)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _remove(old)
    _sync(folder.parent)


def _keep_foreign(old: Path, new: Path) -> None:
    try:
        ours = dict(read_sealed(old / _LIST))
    except (OSError, ValueError, TypeError):
        ours = {}
    for path in sorted(old.iterdir()):
        there, plain = new / path.name, path.is_file() and not path.is_symlink()
        if path.name == _LIST or (plain and file_digest(path) == ours.get(path.name)):
            continue
        while there.exists() or there.is_symlink():
            there = there.with_name(f"kept-{there.name}")
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, there, symlinks=True)
        else:
            shutil.copy2(path, there, follow_symlinks=False)


def folder_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the files directly in a folder, but for the hidden list."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != _LIST}


def _folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first.

    Raises:
        InputError: the folder may not be read.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(run / CHECKPOINTS) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(error, run / CHECKPOINTS) from error
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _remove(folder: Path) -> None:
    """Delete a folder if it is there; it leaves its visible name first, so that a crash midway leaves no half."""
    if folder.exists():
        hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.old")
        if hidden != folder:
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
        shutil.rmtree(hidden)


def _canonical(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return encoded(text)


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
