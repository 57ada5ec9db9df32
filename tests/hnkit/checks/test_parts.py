"""`verify-bound` writes what it has found out as soon as it is known, and a folder that is not finished says so."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal

import pytest
import torch

import hnkit.checks.parts
import hnkit.checks.verify_toys
from hnkit import noise_kl
from hnkit.backend import backend_factory
from hnkit.checks.check import Check
from hnkit.checks.parts import RECORDS, UNFINISHED, Parts
from hnkit.cli import app as cli
from hnkit.internal.files import read_sealed
from hnkit.internal.folders import run_lock
from hnkit.internal.kept import from_document, to_document
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
    checks, figures, *_ = from_document(read_sealed(out / "parts" / "rotation.json")["value"], RECORDS)
    assert {check.group for check in checks} == {"rotation"}
    assert figures
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
    assert document["finished"] is False
    assert document["run_folder"] == (str(out) if "go on with hnkit verify-bound --resume" in err else None)
    assert full_at < 4 or document["run_folder"]
    assert len(document["checks"]) > 20
    assert "no space left on device" in err.lower()
    assert err.strip().splitlines()[-1].startswith("hnkit: ")
    assert not out.exists() or (out / UNFINISHED).exists() or full_at < 2
    assert not (out / "report.html").exists()


MAP = ("verify-bound", "--map", "torch:sin", "--shape", "2", "--samples", "8")


@pytest.fixture
def interrupted_at(monkeypatch):
    """Interrupts a run where it would write its n-th part, by a signal where one is named."""

    def at(count, signum=None):
        plain, calls = hnkit.checks.parts.write_sealed, iter(range(1, 10**6))

        def write(path, content):
            if next(calls) == count + 1:  # the first is the plan
                if signum is None:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signum)
            plain(path, content)

        monkeypatch.setattr(hnkit.checks.parts, "write_sealed", write)

    yield at
    monkeypatch.undo()


def content(folder):
    """The files of a run folder; of times and processes none is written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("count", [1, 5, 21])
def test_a_map_is_written_in_parts_and_gone_on_with_to_the_bit(count, tmp_path, capsys, monkeypatch, interrupted_at):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(capsys, *MAP, "--out", whole)[0] == 0
    interrupted_at(count)
    code, _, err = run(capsys, *MAP, "--out", out)
    assert code == 130
    printed = shlex.split(err.strip().splitlines()[-1].partition("go on with hnkit ")[2])
    assert len(json.loads((out / UNFINISHED).read_text())["parts"]) == count - 1
    monkeypatch.undo()
    known = {path.name for path in (out / "parts").iterdir()}
    made = parts_made(monkeypatch)
    assert run(capsys, *printed)[0] == 0
    assert content(out) == content(whole)
    assert not known & {f"{name.replace(' ', '-').strip('_')}.json" for name in made}
    assert run(capsys, *printed)[1].startswith(f"{out} is finished, nothing to do")
    monkeypatch.setenv("RANK", "1")  # one of several processes speaks
    assert run(capsys, *printed) == (0, "", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_run_with_the_command_that_goes_on(name, tmp_path, capsys, monkeypatch, interrupted_at):
    out, signum = tmp_path / "my run", getattr(signal, name)
    interrupted_at(5, signum)
    code, printed, err = run(capsys, *MAP, "--out", out)
    said = err.strip().splitlines()
    assert (code, printed, len(said)) == (128 + signum, "", 1), err
    assert said[0].startswith(f"hnkit: stopped by {name}; go on with hnkit verify-bound --map torch:sin --resume ")
    assert len(json.loads((out / UNFINISHED).read_text())["parts"]) == 4
    monkeypatch.undo()
    code, printed, err = run(capsys, *shlex.split(said[0].partition("go on with hnkit ")[2]))
    assert code == 0, err
    assert not (out / UNFINISHED).exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_or_replaced_under_a_run_is_left_alone(replaced, tmp_path, capsys, monkeypatch):
    plain, calls, out = hnkit.checks.parts.write_sealed, iter(range(1, 10**6)), tmp_path / "run"
    other = tmp_path / "other"
    (other / "parts").mkdir(parents=True)
    (other / UNFINISHED).write_text("theirs")

    def write(path, content):
        if next(calls) == 4:
            out.rename(tmp_path / "away")
            if replaced:
                other.rename(out)
        plain(path, content)

    monkeypatch.setattr(hnkit.checks.parts, "write_sealed", write)
    code, printed, err = run(capsys, *MAP, "--json", "--out", out)
    assert (code, "is no longer the folder that this run writes to" in err) == (2, True), err
    assert json.loads(printed)["checks"]
    assert out.exists() is replaced
    if replaced:
        found = {str(path.relative_to(out)) for path in out.rglob("*")}
        assert (found, (out / UNFINISHED).read_text()) == ({"parts", UNFINISHED}, "theirs")


def test_a_folder_in_use_names_its_holder(tmp_path, capsys, interrupted_at):
    interrupted_at(3)
    assert run(capsys, *MAP, "--out", tmp_path / "run")[0] == 130
    with run_lock(tmp_path / "run"):
        code, _, err = run(capsys, *MAP[:3], "--resume", tmp_path / "run")
    assert code == 2
    assert f"in use by another process (process {os.getpid()} on" in err


def test_toys_are_gone_on_with_to_the_bit(tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(capsys, *COMMAND, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(hnkit.checks.verify_toys, "problem_quantities", _interrupted)
        assert run(capsys, *COMMAND, "--out", out)[0] == 130
    made = parts_made(monkeypatch)
    assert run(capsys, "verify-bound", "--resume", out)[0] == 0
    assert made == ["linear-gaussian"]
    assert content(out) == content(whole)


def parts_made(monkeypatch):
    """The names of the parts that are made from now on, not taken up."""
    made, plain = [], Parts.keep

    def keep(parts, name, make):
        return plain(parts, name, lambda: (made.append(name), make())[1])

    monkeypatch.setattr(Parts, "keep", keep)
    return made


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_damaged_part_and_parts_of_other_code_are_made_again(tmp_path, capsys, monkeypatch, interrupted_at):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(capsys, *MAP, "--out", whole)[0] == 0
    interrupted_at(21)
    assert run(capsys, *MAP, "--out", out)[0] == 130
    monkeypatch.undo()
    path = out / "parts" / "estimate.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with monkeypatch.context() as patch:
        patch.setattr("hnkit.internal.provenance.code_digest", lambda: "0" * 64)
        patch.setattr(hnkit.checks.parts, "write_json", _interrupted)
        assert run(capsys, *MAP[:3], "--resume", out)[0] == 130
        assert not list((out / "parts").iterdir())
    assert run(capsys, *MAP[:3], "--resume", out)[0] == 0
    assert content(out).keys() == content(whole).keys()
    assert content(out)["report.json"] == content(whole)["report.json"]


def test_parts_of_another_run_are_made_again_and_what_lies_beside_stays(tmp_path, capsys, monkeypatch, interrupted_at):
    """Theirs have the same code, map and versions, are whole and sealed, and bear the names of ours."""
    whole, out, other = tmp_path / "whole", tmp_path / "run", tmp_path / "other"
    assert run(capsys, *MAP, "--out", whole)[0] == 0
    for folder, flags in ((out, ()), (other, ("--seed", "1"))):
        interrupted_at(21)
        assert run(capsys, *MAP, *flags, "--out", folder)[0] == 130
        monkeypatch.undo()
    assert recorded_provenance(out) != recorded_provenance(other)
    for path in (other / "parts").iterdir():
        assert path.read_bytes() != (out / "parts" / path.name).read_bytes()
        (out / "parts" / path.name).write_bytes(path.read_bytes())
    (out / "parts" / "notes.txt").write_text("mine")
    (out / "parts" / "mine.json").write_text("{}")
    assert run(capsys, *MAP[:3], "--resume", out)[0] == 0
    assert content(out) == content(whole)
    assert {path.name for path in (out / "parts").iterdir()} == {"notes.txt", "mine.json"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "add --map torch:sin, for no file may say what is imported"),
        (("--map", "torch:cos"), "it verifies torch:sin"),
        (("--map", "torch:sin", "--backend", "toy"), "it verifies something else"),
        (("--map", "torch:sin", "--samples", "9"), "--samples with --resume"),
        (("--map", "torch:sin", "--adapter", "x"), "it has none"),
    ],
)
def test_a_resumed_run_keeps_its_settings(flags, said, tmp_path, capsys, monkeypatch, interrupted_at):
    out = tmp_path / "run"
    interrupted_at(3)
    assert run(capsys, *MAP, "--out", out)[0] == 130
    monkeypatch.undo()
    before = content(out)
    code, _, err = run(capsys, "verify-bound", "--resume", out, *flags)
    assert (code, said in err) == (2, True), err
    assert content(out) == before


def test_code_of_a_map_that_has_changed_is_refused(tmp_path, capsys, monkeypatch, interrupted_at):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "map_of_mine.py"
    source.write_text("import torch\ndef f(x):\n    return 0.3 * torch.sin(x)\n")
    interrupted_at(3)
    command = ("verify-bound", "--map", "map_of_mine:f", "--shape", "2", "--samples", "8")
    assert run(capsys, *command, "--out", "run")[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    source.write_text(source.read_text().replace("0.3", "0.4"))
    code, _, err = run(capsys, *command[:3], "--resume", "run")
    assert (code, "the code of its map has changed" in err) == (2, True), err


def test_figures_are_kept_to_the_bit():
    estimate = noise_kl(lambda x: 0.3 * x, torch.randn(5, 3).double(), method="exact")
    for value in (
        estimate, (math.nan, -math.inf, 0.1, None, True, "x"), {"a": [1, (2.5,)]}, torch.tensor(3, dtype=torch.int32),
        torch.tensor([[1e-45, math.inf], [math.nan, -0.0]]), torch.randn(3).bfloat16(), torch.zeros(0, 4),
    ):  # fmt: skip
        document = json.loads(json.dumps(to_document(value), allow_nan=False))
        again = from_document(document, RECORDS)
        assert type(again) is type(value)
        assert repr(to_document(again)) == repr(to_document(value))
    for wrong in ({}, {"": "Check"}, {"": "os"}, {"": "tensor", "type": "save", "value": [1], "shape": [1]}, [3]):
        with pytest.raises(ValueError, match="does not hold what was kept"):
            from_document(wrong, RECORDS)
    there = {"": "tensor", "type": "float32", "shape": [1], "value": [1.0]}
    for device in ("cuda" if not torch.cuda.is_available() else "cuda:99", "tpu"):
        with pytest.raises(ValueError, match="does not hold what was kept"):
            from_document({**there, "device": device}, RECORDS)
    with pytest.raises(TypeError, match="kept in no file"):
        to_document(object())


def test_records_hold_what_they_declare():
    """A document that was forged and sealed anew is a damaged part, not an error of the report that is made of it."""
    check = Check("one", "a <= b", "lemma", "toy", 0.5, 1.0, 0.0, "exact", 0.5, "holds")
    estimate = noise_kl(lambda x: 0.3 * x, torch.randn(5, 3).double(), method="exact")
    for record in (check, estimate):
        assert repr(from_document(to_document(record), RECORDS)) == repr(record)
        for name in ("verdict", "measured", "note", "value", "per_sample", "num_jvp"):
            if name in vars(record):
                with pytest.raises(ValueError, match="holds what does not belong there"):
                    from_document({**to_document(record), name: {"": "list", "value": []}}, RECORDS)
    with pytest.raises(ValueError, match="holds what does not belong there"):
        from_document({**to_document(check), "verdict": "true"}, RECORDS)


def test_an_adapter_in_a_folder_that_is_not_utf8_is_gone_on_with(tmp_path, capsys):
    adapter, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "run"
    factory = backend_factory("toy")
    factory.load(factory.options()).save_adapter(adapter)
    asked = ("verify-bound", "--backend", "toy", "--adapter", adapter, "--samples", "2")
    assert run(capsys, *asked, "--out", out)[0] == 0
    (out / "report.json").unlink()
    (out / "parts").mkdir(exist_ok=True)
    code, _, err = run(capsys, "verify-bound", "--resume", out)
    assert code == 0, err
    assert (out / "report.json").exists()
