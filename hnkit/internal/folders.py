"""Run folders while they are written: locked, the same folder all along, and never written through a link.

A run folder may come from somebody else; its mark says only that hnkit may have made it. What protects the other files
of this machine is that nothing is written through a symbolic link, a hard link or a special file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from hnkit.errors import InputError
from hnkit.internal.files import TEMPORARY, atomic_write, before_writes, read_plain, require_run_folder
from hnkit.internal.values import printable

LOCK, HOLDER = ".lock", ".lock-holder"
CHECKPOINT_FILES = TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
"""What a checkpoint of a run consists of."""
VERDICT_FILE = "verdict.json"
"""The card in the folder of an adapter, as its training measured it."""


def adapter_folder(folder: str | Path) -> Path:
    """Where an adapter's files are: in the folder that is named, or, of a run folder, in its folder `adapter`.

    Raises:
        InputError: it is a checkpoint, of which an adapter is made first, or may not be read.
    """
    folder = Path(folder)
    try:
        inside, checkpoint = folder / "adapter", all((folder / name).is_file() for name in CHECKPOINT_FILES)
        has_inside = inside.is_dir()
    except PermissionError as error:
        raise unreadable_adapter(folder, error) from None
    if checkpoint:
        command = shlex.join(("hnkit", "export", "--checkpoint", printable(str(folder))))
        raise InputError(f"{folder} is a checkpoint of a run: {command} makes an adapter of it")
    return inside if has_inside else folder


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter that its outputs can depend on, by name.

    What it says of itself (README.md, verdict.json) and hidden files, such as the list of what was written, are none.

    Args:
        folder: where its files are; see `adapter_folder`.

    Raises:
        PermissionError: the folder may not be read.
    """
    said = ("README.md", VERDICT_FILE)
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.is_file() and path.name not in said and not path.name.startswith(".")
    ]


def unreadable_adapter(folder: Path, error: OSError) -> InputError:
    """What is said of an adapter that may not be read."""
    where = error.filename or folder
    return InputError(f"adapter {folder} cannot be read ({error.strerror}: {where}): make it readable, or name another")


def require_plain(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which something that hnkit writes is a link or a special file.

    Args:
        folder: the folder of the run.
        names: files and folders directly in it; of a folder, what is directly in it is looked at too.

    Raises:
        InputError: the message names the file.
    """
    if folder.is_symlink():
        raise InputError(f"run folder {folder} is a link: name the folder itself")
    for name in names:
        path = folder / name
        try:
            inside = sorted(entry.path for entry in os.scandir(path)) if _kind(path) == "folder" else []
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): mend that and try again") from None
        for found in (path, *map(Path, inside)):
            if (kind := _kind(found)) not in ("absent", "file", "folder"):
                raise InputError(
                    f"{found} is {kind}, and hnkit writes through none: take it out of the run folder, or start anew"
                )


def require_resumable(folder: Path, kind: str) -> None:
    """Refuse a folder that hnkit has not marked as a run of this kind, or that holds a link or a special file.

    For commands that write under many names: everything in the folder, and in the folders directly in it, is looked at.

    Raises:
        InputError: the message names what is in the way.
    """
    require_run_folder(folder, kind)
    require_plain(folder, sorted(entry.name for entry in os.scandir(folder)))


def sweep_temporaries(run: Path) -> None:
    """Remove what atomic writes that were killed have left in a run folder and the folders directly in it.

    The caller holds its lock.
    """
    for folder in (run, *(path for path in run.iterdir() if path.is_dir() and not path.is_symlink())):
        for path in folder.glob(f".*{TEMPORARY}"):
            if path.is_file() and not path.is_symlink():
                path.unlink()


def _kind(path: Path) -> str:
    try:
        mode = path.lstat()
    except FileNotFoundError:
        return "absent"
    if stat.S_ISDIR(mode.st_mode):
        return "folder"
    if stat.S_ISREG(mode.st_mode):
        return "file" if mode.st_nlink == 1 else "a hard link"
    return "a symbolic link" if stat.S_ISLNK(mode.st_mode) else "a special file"


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to be appended to, or make it; never through a link.

    Raises:
        InputError: the path is a symbolic link, has a second hard link, or is no regular file.
        OSError: it cannot be opened.
    """
    kind = _kind(path)
    if kind not in ("absent", "file"):
        raise InputError(f"{path} is {kind}, and hnkit writes through none: take it out of the run folder")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):  # each where the system has it
        flags |= vars(os).get(name, 0)
    descriptor = os.open(path, flags, 0o644)
    opened, there = os.fstat(descriptor), path.lstat()
    plain = stat.S_ISREG(opened.st_mode) and opened.st_nlink == 1
    if not plain or (opened.st_dev, opened.st_ino) != (there.st_dev, there.st_ino):
        os.close(descriptor)
        raise InputError(f"{path} was exchanged for a link while it was opened: take it out of the run folder")
    return os.fdopen(descriptor, "r+b")


@dataclass(frozen=True)
class FolderIdentity:
    """The folder that was opened, to be told from another one that is later found under its name."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FolderIdentity:
        """The identity of a folder that is there now."""
        status = path.stat()
        return cls(path, status.st_dev, status.st_ino)

    def check_for(self, path: Path) -> None:
        """Refuse to write a file inside once the folder is another one; see `check`."""
        if path.absolute().is_relative_to(self.path.absolute()):
            self.check()

    def check(self) -> None:
        """Refuse to go on once the folder is another one.

        Raises:
            InputError: it was removed, renamed or replaced.
        """
        try:
            now = FolderIdentity.of(self.path)
        except FileNotFoundError:
            now = None
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be reached ({error.strerror}): mend that") from error
        if now != self:
            raise InputError(
                f"run folder {self.path} is no longer the folder that this run writes to (it was removed, renamed or "
                "replaced): nothing more is written; move it back if you have it, and resume it"
            )


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the system releases it however the process ends.

    Inside, nothing is written once the folder has been removed, renamed or replaced: the lock is that of the folder
    that was opened, and another run's may lie under its name by then.

    Raises:
        InputError: another process holds it; the message says which.
    """
    require_plain(run, (LOCK, HOLDER))  # opening a lock through a link would empty what it points to
    identity = FolderIdentity.of(run)
    try:
        lock = FileLock(run / LOCK, timeout=0).acquire()
    except Timeout:
        raise InputError(
            f"run folder {run} is in use by another process{_holder(run)}: wait for it or choose another"
        ) from None
    except OSError as error:
        raise InputError(f"run folder {run} cannot be locked ({error.strerror}): make it writable") from error
    with lock:
        me = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        atomic_write(run / HOLDER, json.dumps(me) + "\n")
        try:
            with before_writes(identity.check_for):
                yield
        finally:
            with contextlib.suppress(OSError, InputError):
                identity.check()
                (run / HOLDER).unlink()


def _holder(run: Path) -> str:
    """Who holds a run folder, as far as its file says."""
    try:
        document = json.loads(read_plain(run / HOLDER))
        host, since = str(document["host"])[:60], str(document["since"])[:19]
        return f" (process {int(document['process'])} on {host!r}, since {since!r})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
