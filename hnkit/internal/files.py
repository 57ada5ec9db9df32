"""Files that are whole or absent: atomic writes, sealed documents, and run folders, marked and never overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hnkit.errors import InputError
from hnkit.internal.stops import Stopped, advised
from hnkit.internal.values import printable, shown
from hnkit.internal.workers import is_first

MARK = ".hnkit-run"
"""The file by which hnkit knows a run folder that it has made."""
_APPLICATION = "hnkit run folder, format 1"
TEMPORARY = ".hnkit-tmp"
"""How the name of a file ends that a write has not finished; the name begins with a dot."""


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk, and replaces `path` in one step.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then untouched and the temporary file removed.
        InputError: what `before_writes` was given refuses.
    """
    for check in _CHECKS:
        check(path)
    data = encoded(content) if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # writing names no file, and the rest would name one that is gone
            error.filename, error.filename2 = str(path), None
        raise


def encoded(text: str) -> bytes:
    r"""Text in UTF-8; bytes of a file's name that are none are spelt `\udcXX`, which JSON reads back as they were."""
    return text.encode("utf-8", "backslashreplace")


_CHECKS: list[Callable[[Path], None]] = []


@contextlib.contextmanager
def before_writes(check: Callable[[Path], None]) -> Iterator[None]:
    """Inside, `atomic_write` asks `check` of every path first, which raises where nothing may be written any more."""
    _CHECKS.append(check)
    try:
        yield
    finally:
        _CHECKS.remove(check)


LARGEST = 2**30
"""Bytes of the largest document that is read: metrics of a million steps are half as long."""


def open_plain(path: Path) -> io.BufferedReader:
    """Open a regular file to be read. Opening a pipe would wait for a writer, and a device may have no end.

    A run folder, an adapter or a model may come from somebody else: whatever lies in one is opened here.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):  # each where the system has it
        flags |= vars(os).get(name, 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, most: float = LARGEST) -> bytes:
    """The content of a regular file of at most so many bytes; a sparse file of any size costs its maker nothing.

    Raises:
        OSError: it is larger, is no regular file, or cannot be read.
    """
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, "File too large to be what it should be", str(path))
        return file.read()


def read_tensor_file(path: Path) -> bytes:
    """The content of a file of safetensors, once its header accounts for every byte of it.

    Raises:
        ValueError: the header does not.
        OSError: the file is no regular one, is larger than this machine's memory, or cannot be read.
    """
    with open_plain(path) as file:
        _require_whole(path, file)
        return file.read()


def require_tensor_file(path: Path) -> None:
    """Refuse, as `read_tensor_file` does, before anything but the header is read."""
    with open_plain(path) as file:
        _require_whole(path, file)


def _require_whole(path: Path, file: io.BufferedReader) -> None:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        entries = json.loads(file.read(length)) if length <= min(size - 8, _LONGEST_HEADER) else {}
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path.name} is not as long as its header says, or has none")
    if size > machine_memory():
        raise OSError(errno.EFBIG, "File larger than this machine's memory", str(path))
    file.seek(0)


_LONGEST_HEADER = 10**8
"""Bytes; the limit of safetensors."""


def machine_memory() -> float:
    """Bytes of memory of this machine; infinity where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def write_json(path: Path, document: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON document atomically. NaN and infinity are refused: use `None` for "not known"."""
    atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON document atomically with the SHA-256 of what it says, for `read_sealed`."""
    write_json(path, sealed(content))


def sealed(content: Mapping[str, Any] | list[Any]) -> dict[str, Any]:
    """The document of `write_sealed`. It shows damage; it does not show who wrote it."""
    return {"sha256": document_digest(content), "content": content}


def read_sealed(path: Path) -> Any:
    """What `write_sealed` was given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or was not written by `write_sealed`.
    """
    try:
        document = json.loads(read_plain(path))
        content = document["content"]
        whole = document["sha256"] == document_digest(content)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has no content with a SHA-256") from error
    if not whole:
        raise ValueError(f"{path}: the SHA-256 of its content does not match: truncated or altered")
    return content


def document_digest(content: Any) -> str:
    """SHA-256 of a JSON document as it is read back: tuples are lists and keys text; their order says nothing."""
    read_back = json.loads(json.dumps(content, allow_nan=False))
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def resumable(*command: str) -> Iterator[None]:
    """Inside, what ends a run early says how it is gone on with: `command`, quoted for a shell.

    Raises:
        InputError: the disk is full, read-only or failing.
        KeyboardInterrupt: with the advice as its text.
        SystemExit: a signal has ended what was done; the advice is printed.
    """
    again = f"go on with {pasted(*command)}"
    try:
        with advised(again):
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    except Stopped as stopped:
        _say_once(str(stopped))
        raise SystemExit(stopped.exit_code) from None
    except SystemExit as stopped:
        if isinstance(stopped.code, int) and stopped.code > 128:
            _say_once(f"stopped; {again}")
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{error.filename or 'a file'}: {reason}: mend that and {again}") from error


def pasted(*command: str) -> str:
    """A command as it is printed to be pasted: quoted for a shell, without what a terminal obeys."""
    return shlex.join(printable(word) for word in command)


def _say_once(text: str) -> None:
    """A line of the command, which one of several processes says."""
    if is_first():
        print(f"hnkit: {text}", file=sys.stderr)


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_run_folder(out: Path | None, kind: str) -> Path:
    """Create the folder a run writes to, and mark it as hnkit's.

    Args:
        out: the folder the user asked for; it must not exist yet. `None`: `runs/<kind>-<time>`, made unique.
        kind: the first word of the default name, e.g. `"verify"`.

    Returns:
        The new folder, empty but for its mark.

    Raises:
        InputError: `out` exists, or cannot be created.
    """
    if out is not None:
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            raise InputError(f"--out {out} exists already and is never overwritten: name a new folder") from None
        except OSError as error:
            raise InputError(f"--out {out} cannot be created ({error.strerror}): name another folder") from None
        return _marked(out, kind)
    stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        candidate = Path("runs") / f"{stem}{suffix}"
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{candidate} cannot be created ({error.strerror}): choose a folder with --out") from None
        return _marked(candidate, kind)
    raise InputError(f"runs/{stem} and 999 numbered variants exist: choose a folder with --out")


def _marked(folder: Path, kind: str) -> Path:
    try:
        atomic_write(folder / MARK, json.dumps({"application": _APPLICATION, "kind": kind}) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise InputError(f"{folder} cannot be written to ({error.strerror}): choose a folder with --out") from None
    return folder


def require_run_folder(folder: Path, kind: str, flag: str = "--resume") -> None:
    """Refuse a folder that hnkit has not marked as a run of this kind.

    Raises:
        InputError: there is no folder, no mark, or the mark of another kind; or it cannot be read.
    """
    try:
        document = json.loads(read_plain(folder / MARK))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{flag} {folder}: no run is there ({MARK} is missing): name a run folder") from None
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be read ({error.strerror}: {error.filename}): mend that and try again"
        ) from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("application") != _APPLICATION:
        raise InputError(f"{flag} {folder}: {MARK} is not the mark of hnkit: name a run folder")
    if document.get("kind") != kind:
        raise InputError(
            f"{flag} {folder} is a run of {shown(document.get('kind'))}, not of {kind!r}: name another folder"
        )
