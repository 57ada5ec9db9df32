"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hnkit.internal import files


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(step, tmp_path, monkeypatch):
    """What the system says of a full disk names no file, or one that is gone."""
    path = tmp_path / "report.json"
    path.write_text("old")

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files.os, "fsync", fails) if step == "fsync" else (files.Path, "replace", fails)))
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.atomic_write(path, "new")
    assert caught.value.filename == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_a_pipe_and_a_device_are_not_read(tmp_path):
    """A pipe that nobody writes to looks empty, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="Not a regular file"):
            files.read_plain(path)
