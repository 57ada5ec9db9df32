"""Output that nobody may be reading any more."""

from __future__ import annotations

from typing import IO, Any


class Droppable:
    """A text stream that drops what cannot be written: the terminal is gone, the reader of a pipe, the room on a disk.

    Progress is worth less than the work it tells of. Everything but writing and flushing is the stream's own.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if possible; the length of the text either way."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
