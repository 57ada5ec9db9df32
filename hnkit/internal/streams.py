"""Output that nobody may be reading any more."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import IO, Any, TextIO, cast


class Droppable:
    """A text stream that drops what cannot be written: the terminal is gone, the reader of a pipe, the room on a disk.

    What is said is worth less than the work it tells of. Everything but writing and flushing is the stream's own.

    Attributes:
        problem: why something was dropped, first of all; a terminal that is gone is none, since nobody reads it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write if possible; the length of the text either way."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._note(error)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._note(error)

    def _note(self, error: OSError | ValueError) -> None:
        if self.problem is None and isinstance(error, OSError) and not (error.errno == errno.EIO and self._device()):
            self.problem = error

    def _device(self) -> bool:
        """Whether it is a terminal; one that is gone is still a device, though `isatty` says no."""
        try:
            return stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop_what_cannot_be_written() -> None:
    """Make the standard streams droppable; those that were closed lead nowhere.

    A descriptor that is closed would be given to the next file that is opened, and what any library prints would be
    written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
        if isinstance(stream, io.TextIOWrapper):  # a report holds symbols that a C locale cannot encode
            stream.reconfigure(errors="replace")
        setattr(sys, name, cast(TextIO, Droppable(stream)))
