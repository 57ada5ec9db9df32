"""The user's cache: digests of large files, kept by the identity of the file. A cache may only cost time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from hnkit.internal.files import file_digest, open_plain, read_sealed, write_sealed

_LARGE = 2**20
"""Bytes of a file whose digest is worth keeping."""
_SETTLED = 2 * 10**9
"""Nanoseconds since the last change after which another one cannot bear the same time stamp."""


def cache_folder(name: str) -> Path | None:
    """`$XDG_CACHE_HOME/hnkit/<name>`, by default under `~/.cache`; `None` for a user without a home.

    The folder need not exist, and need not be writable.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # a user without an entry in the system's list
        return None
    return root / "hnkit" / name


def cached_digest(path: Path) -> str:
    """SHA-256 of a file; one that has been read before and has not changed since is not read again.

    The file is known again by its path, device, inode, size, and the times of its last change and of the last change of
    its inode, which no program can set: a copy that keeps size and time is another file.

    Raises:
        OSError: the file cannot be read.
    """
    folder = cache_folder("digests")
    if folder is None or path.stat().st_size < _LARGE:
        return file_digest(path)
    there = path.resolve()
    place = folder / f"{hashlib.sha256(os.fsencode(there)).hexdigest()[:24]}.json"
    begun = time.time_ns()
    with open_plain(there) as file:
        identity = _identity(there, os.fstat(file.fileno()))
        try:
            kept = read_sealed(place)
        except (OSError, ValueError):
            kept = None
        if isinstance(kept, dict) and kept.get("identity") == identity and isinstance(kept.get("sha256"), str):
            return str(kept["sha256"])
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        status = os.fstat(file.fileno())
    if _identity(there, status) == identity and begun - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_sealed(place, {"identity": identity, "sha256": digest})
    return digest


def _identity(path: Path, status: os.stat_result) -> list[str | int]:
    return [
        str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    ]  # fmt: skip
