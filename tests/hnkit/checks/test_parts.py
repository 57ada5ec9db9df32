"""`verify-bound` writes what it has found out as soon as it is known, and a folder that is not finished says so."""

from __future__ import annotations

import errno
import json

import pytest

import hnkit.checks.parts
import hnkit.checks.verify_toys
from hnkit.checks.parts import UNFINISHED
from hnkit.cli import app as cli
from hnkit.internal.provenance import recorded_provenance
from hnkit.internal.versions import code_digest

COMMAND = ("verify-bound", "--toy", "rotation", "--toy", "linear-gaussian", "--samples", "32")


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_finished_run_is_not_marked_and_says_what_it_was_made_with(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, *COMMAND, "--out", out)[0] == 0
    assert not (out / UNFINISHED).exists()
    assert not (out / "parts").exists()
    (record,) = recorded_provenance(out)
    assert record["code"] == code_digest()
    assert (out / "report.html").exists()


def test_what_is_known_stays_and_is_marked_where_the_rest_is_missing(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hnkit.checks.verify_toys, "problem_quantities", interrupted)
    out = tmp_path / "run"
    assert run(capsys, *COMMAND, "--out", out)[0] == 130
    assert json.loads((out / UNFINISHED).read_text()) == {"finished": False, "parts": ["rotation"]}
    part = json.loads((out / "parts" / "001.json").read_text())
    assert {check["group"] for check in part["checks"]} == {"rotation"}
    assert part["figures"]
    assert not (out / "report.json").exists()


@pytest.mark.parametrize("full_at", range(8))
def test_a_disk_that_fills_up_at_any_write_leaves_the_document_on_stdout(full_at, tmp_path, capsys, monkeypatch):
    plain, writes = hnkit.internal.files.atomic_write, iter(range(100))

    def full(path, content):
        if next(writes) >= full_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, content)

    for module in ("hnkit.internal.files", "hnkit.checks.report"):
        monkeypatch.setattr(f"{module}.atomic_write", full)
    out = tmp_path / "run"
    code, printed, err = run(capsys, *COMMAND, "--json", "--out", out)
    assert code == 2
    document = json.loads(printed)
    assert document["run_folder"] is None
    assert len(document["checks"]) > 20
    assert "no space left on device" in err.lower()
    assert err.strip().splitlines()[-1].startswith("hnkit: ")
    assert not out.exists() or (out / UNFINISHED).exists() or full_at < 2
    assert not (out / "report.html").exists()


def test_a_map_is_written_in_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hnkit.checks.verify_map.map_quantities", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "run"
    assert run(capsys, "verify-bound", "--map", "torch:sin", "--shape", "2", "--samples", "8", "--out", out)[0] == 130
    assert json.loads((out / UNFINISHED).read_text())["parts"] == ["the KL", "the checks"]
    (figure,) = json.loads((out / "parts" / "001.json").read_text())["figures"]
    assert figure["name"] == "KL"
    assert figure["value"] > 0
