"""Digests of large files are kept by the identity of the file, and a cache that is wrong or gone costs only time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hnkit.internal.cache
from hnkit.internal.cache import cache_folder, cached_digest
from hnkit.internal.files import file_digest

SIZE = 2**20 + 7


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file whose digest is worth keeping, old enough to be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hnkit.internal.cache, "_SETTLED", -(10**12))
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many files were read as a whole."""
    plain, done = hnkit.internal.cache.hashlib.file_digest, []

    def counted(*arguments):
        done.append(1)
        return plain(*arguments)

    monkeypatch.setattr(hnkit.internal.cache.hashlib, "file_digest", counted)
    return done


def test_a_large_file_is_read_once(large, reads):
    expected = file_digest(large)
    reads.clear()
    assert [cached_digest(large) for _ in range(3)] == [expected] * 3
    assert len(reads) == 1


def test_a_copy_of_the_same_size_and_time_is_another_file(large):
    first, status = cached_digest(large), large.stat()
    other = large.with_name("other")
    other.write_bytes(os.urandom(SIZE))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(large)  # as `cp -p` and archives with times of their own do
    assert large.stat().st_mtime_ns == status.st_mtime_ns
    assert cached_digest(large) == file_digest(large) != first


def test_a_file_that_is_changed_in_place_is_read_again(large):
    first, status = cached_digest(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"0123456789")
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cached_digest(large) == file_digest(large) != first


def test_a_file_that_has_just_been_written_is_not_kept(large, monkeypatch, reads):
    monkeypatch.undo()  # within the resolution of time stamps another change would not show
    monkeypatch.setenv("XDG_CACHE_HOME", str(large.parent / "cache"))
    cached_digest(large)
    assert not (large.parent / "cache").exists()


def test_small_files_are_always_read(large, tmp_path):
    small = tmp_path / "small"
    small.write_text("x")
    assert cached_digest(small) == file_digest(small)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["truncated", "another", "folder", "unsealed"])
def test_a_damaged_entry_is_made_again(damage, large, reads):
    expected = cached_digest(large)
    (entry,) = (large.parent / "cache" / "hnkit" / "digests").iterdir()
    text = entry.read_text()
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_text(
            {"truncated": text[:-9], "another": text.replace(expected, "0" * 64), "unsealed": "[1]"}[damage]
        )
    assert cached_digest(large) == expected
    assert len(reads) == 2


def test_no_cache_folder_is_no_error(large, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(large / "below"))
    assert cached_digest(large) == file_digest(large)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("nobody")))
    assert cache_folder("digests") is None
    assert cached_digest(large) == file_digest(large)
