"""Output that cannot be written: dropped on a terminal that is gone, else told of; a closed stream leads nowhere."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hnkit.cli import app as cli
from hnkit.internal.streams import Droppable

RUN = ("verify-bound", "--map", "torch:sin", "--shape", "2", "--samples", "4", "--out", "run")
SCORES = "prompt,method,reward\n" + "".join(
    f"{prompt},{method},{number % 7}\n" for prompt in "ab" for method in ("base", "ours") for number in range(20)
)
RUNS = {"verify-bound": RUN, "frontier": ("frontier", "--rewards", "scores.csv", "--out", "run")}


def ended(monkeypatch, tmp_path: Path, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.csv").write_text(SCORES)
    monkeypatch.setattr(sys, "argv", ["hnkit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["text", "json"])
def test_a_run_whose_terminal_is_gone_ends_as_it_would_have(json_flag, monkeypatch, tmp_path):
    """As under `nohup`, with SIGHUP ignored: every write ends in EIO."""
    master, slave = os.openpty()
    with contextlib.suppress(OSError), os.fdopen(slave, "w", buffering=1) as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        os.close(master)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(out.fileno(), b"x")
        code = ended(monkeypatch, tmp_path, *RUN, *json_flag)
    assert code == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["ok"] is True
    assert not (tmp_path / "run" / "unfinished.json").exists()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("where", ["full disk", "unread pipe"])
def test_output_that_cannot_be_written_is_said_after_all_is_written(
    where, json_flag, name, monkeypatch, tmp_path, capsys
):
    if where == "full disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        descriptor, words = os.open("/dev/full", os.O_WRONLY), "standard output cannot be written (no space left on"
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
        words = "the reader of the output has gone"
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        code = ended(monkeypatch, tmp_path, *RUNS[name], *json_flag)
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (2, 1)
    assert said[0].startswith(f"hnkit: {words}")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verdict"]
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "unfinished.json").exists()


def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path):
    """All three standard descriptors are closed; what a library prints does not land in the first file opened."""
    code = (
        "import os, sys\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "from hnkit.internal.streams import drop_what_cannot_be_written as drop\n"
        "drop()\n"
        "number = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "os.write(1, b'x'); os.write(2, b'x'); print('said'); print('said', file=sys.stderr)\n"
        "sys.exit(0 if number > 2 and os.fstat(number).st_size == 0 else 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "opened")])
    assert done.returncode == 0


def test_what_went_wrong_first_is_kept():
    class Broken(io.StringIO):
        failures = iter((errno.ENOSPC, errno.EIO))

        def write(self, _: str) -> int:
            raise OSError(next(self.failures), "no room")

        def flush(self) -> None:
            raise ValueError("closed")

    stream = Droppable(Broken())
    stream.flush()
    assert stream.problem is None
    assert stream.write("abc") == 3
    assert stream.write("d") == 1
    assert stream.problem is not None
    assert stream.problem.errno == errno.ENOSPC


def test_a_failing_disk_is_told_from_a_terminal_that_is_gone(tmp_path):
    class Failing(io.StringIO):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def fileno(self) -> int:
            return self.number

        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with (tmp_path / "out").open("w") as file, Path(os.devnull).open("w") as device:
        disk, terminal = Droppable(Failing(file.fileno())), Droppable(Failing(device.fileno()))
        for stream in (disk, terminal):
            stream.write("abc")
    assert disk.problem is not None
    assert terminal.problem is None
