"""Checkpoints: whole or absent, every damaged byte found, older ones used, one process to a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hnkit import InputError
from hnkit.internal import folders
from hnkit.internal.files import MARK, new_run_folder, require_run_folder
from hnkit.internal.folders import HOLDER, FolderIdentity, open_to_append, require_plain, run_lock
from hnkit.training import checkpoint as module
from hnkit.training.checkpoint import (
    DamagedCheckpointError,
    JsonLog,
    load_checkpoint,
    newest_checkpoint,
    replace_folder,
    save_checkpoint,
    sweep,
)

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4.0), "empty": torch.zeros(0, 2)}


def save(run: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(run, step, TENSORS, {"step": step, "note": "é"}, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_and_the_newest_are_kept(tmp_path):
    for step in (10, 9, 100_000_000, 20):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-100000000"]
    loaded = newest_checkpoint(tmp_path, pytest.fail)
    assert loaded is not None
    assert loaded.step == 100_000_000
    assert loaded.state["note"] == "é"
    assert loaded.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in TENSORS.items())


def test_equal_content_gives_equal_bytes(tmp_path):
    for run in (tmp_path / "a", tmp_path / "b"):
        run.mkdir()
        save(run, 3)
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        one, two = ((tmp_path / run / "checkpoints/step-00000003" / name).read_bytes() for run in "ab")
        assert one == two


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_every_truncation_is_found(tmp_path, name):
    folder = save(tmp_path, 1)
    whole = (folder / name).read_bytes()
    for size in range(len(whole)):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError):
            load_checkpoint(folder)
    (folder / name).write_bytes(whole + b" ")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(folder)
    (folder / name).write_bytes(whole)
    assert load_checkpoint(folder).step == 1


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_every_flipped_bit_is_found(tmp_path, name):
    folder = save(tmp_path, 1)
    whole = (folder / name).read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError):
            load_checkpoint(folder)


def test_an_older_checkpoint_replaces_a_damaged_one_and_the_damage_is_named(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    with (newest / "tensors.safetensors").open("r+b") as file:
        file.truncate(20)
    warnings: list[str] = []
    loaded = newest_checkpoint(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.step == 1
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert "tensors.safetensors" in warnings[0]


def test_no_checkpoint_yet_and_none_whole(tmp_path):
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    (save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be used: start a new run"):
        newest_checkpoint(tmp_path, lambda _: None)


FAULTS = ["save_file", "file_digest", "_sync", "os.rename"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_older_ones(tmp_path, monkeypatch, fault, code):
    save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code), str(tmp_path))

    target = module.os if fault.startswith("os.") else module
    monkeypatch.setattr(target, fault.removeprefix("os."), fail)
    with pytest.raises(OSError) as raised:
        save(tmp_path, 2)
    assert raised.value.errno == code
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path, pytest.fail).step == 2


def test_a_write_that_really_runs_out_of_room(tmp_path):
    """A limit on file sizes makes the kernel itself refuse the write, inside the tensor library."""
    save(tmp_path, 1)
    script = f"""
import resource, signal, torch
from pathlib import Path
from hnkit.training.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(Path({str(tmp_path)!r}), 2, {{"w": torch.zeros(10**6)}}, {{"step": 2}}, 3)
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "refused:" in done.stdout
    assert names(tmp_path) == ["step-00000001"]


def test_leftovers_of_a_killed_write_are_swept(tmp_path):
    save(tmp_path, 1)
    for leftover in (".step-00000002.tmp", ".step-00000000.old"):
        (tmp_path / "checkpoints" / leftover).mkdir()
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    (tmp_path / "checkpoints" / ".step-00000003.old").mkdir()
    (tmp_path / "samples").mkdir()
    for name in (".report.json.abc.hnkit-tmp", "samples/.step.png.abc.hnkit-tmp", "report.json", ".lock"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "report.json", "samples"]
    assert not list((tmp_path / "samples").iterdir())


def test_rewriting_a_step_replaces_it(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {}, {"step": 1, "note": "new"}, 3)
    assert newest_checkpoint(tmp_path, pytest.fail).state["note"] == "new"
    assert names(tmp_path) == ["step-00000001"]


def test_one_process_to_a_folder(tmp_path):
    script = f"""
from pathlib import Path
from hnkit.internal.folders import run_lock
try:
    with run_lock(Path({str(tmp_path)!r})):
        print("locked")
except ValueError as error:
    print(error)
"""

    def other() -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    with run_lock(tmp_path):
        assert "in use by another process" in other()
        with pytest.raises(InputError, match="in use"), run_lock(tmp_path):
            pass
    assert other() == "locked\n"


def test_the_trainer_imports_where_the_system_has_no_posix_names():
    """On Windows there is no `fcntl`, the signals of schedulers and terminals have no names, files no such flags."""
    script = """
import os, sys, signal
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "pthread_kill", "SIGALRM"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("O_NOFOLLOW", "O_DIRECTORY", "fchmod", "getuid", "geteuid", "setsid", "killpg", "statvfs"):
    delattr(os, name)
import hnkit, hnkit.cli, hnkit.training.run, hnkit.training.session, hnkit.scaled.backends, hnkit.toy.backend
from hnkit.training.signals import StopSignals
with StopSignals():
    print("imported")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_log_returns_to_a_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLog(path)
    log.write({"a": 1, "nan": float("nan"), "deep": [{"inf": float("inf")}]})
    position = log.position()
    log.write({"b": 2})
    log.close()
    resumed = JsonLog.resume(path, position, pytest.fail)
    resumed.write({"c": "é"})
    assert resumed.position()["size"] == path.stat().st_size
    resumed.close()
    assert path.read_text() == '{"a": 1, "nan": null, "deep": [{"inf": null}]}\n{"c": "é"}\n'
    with pytest.raises(ValueError, match="not empty"):
        JsonLog(path)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_log_is_named_and_set_aside(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    log = JsonLog(path)
    log.write({"a": 1})
    position = log.position()
    log.close()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b'{"a": 1' if damage == "truncated" else b'{"a": 2}\n')
    warnings: list[str] = []
    resumed = JsonLog.resume(path, position, warnings.append)
    resumed.write({"b": 2})
    resumed.close()
    assert len(warnings) == 1
    assert path.read_text() == '{"b": 2}\n'
    assert (tmp_path / "metrics-damaged-0.jsonl").exists() == (damage != "missing")


def test_a_log_that_is_set_aside_takes_no_name_that_is_taken(tmp_path):
    """Somebody has kept the second of two, and thrown the first away."""
    path, theirs = tmp_path / "metrics.jsonl", tmp_path / "metrics-damaged-1.jsonl"
    theirs.write_text("mine")
    (tmp_path / "metrics-damaged-0.jsonl").symlink_to(tmp_path / "absent")
    path.write_text("other\n")
    said: list[str] = []
    JsonLog.resume(path, {"size": 3, "sha256": "0" * 64}, said.append).close()
    assert theirs.read_text() == "mine"
    assert (tmp_path / "metrics-damaged-2.jsonl").read_text() == "other\n"
    assert said[0].endswith("is now metrics-damaged-2.jsonl")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("content", [[], [{}], 3, None, ["tensors.safetensors", "state.json"], "x", {"a": {}}])
def test_a_manifest_that_lists_no_files_is_damage_whatever_its_sum(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_bytes(module._manifest(content))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is truncated or altered"):
        load_checkpoint(folder)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "adapter"

    def broken(target: Path) -> None:
        (target / "half").touch()
        raise OSError(errno.ENOSPC, "full")

    replace_folder(folder, lambda target: (target / "one").touch())
    with pytest.raises(OSError, match="full"):
        replace_folder(folder, broken)
    assert visible(folder) == ["one"]
    replace_folder(folder, lambda target: (target / "two").touch())
    assert visible(folder) == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_what_somebody_put_into_a_folder_is_kept_when_it_is_replaced(tmp_path):
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    outside.write_text("mine")

    def write(text: str):
        return lambda target: [(target / name).write_text(text) for name in ("weights", "README.md")]

    replace_folder(folder, write("first"))
    (folder / "notes.txt").write_text("a note")
    (folder / "README.md").write_text("edited")
    (folder / "link").symlink_to(outside)
    (folder / "figures").mkdir()
    (folder / "figures" / "one.png").write_text("png")
    for text in ("second", "third"):
        replace_folder(folder, write(text))
        assert visible(folder) == ["README.md", "figures", "kept-README.md", "link", "notes.txt", "weights"]
        assert (folder / "README.md").read_text() == (folder / "weights").read_text() == text
        assert (folder / "kept-README.md").read_text() == "edited"
        assert (folder / "notes.txt").read_text() == "a note"
        assert (folder / "link").is_symlink()
        assert (folder / "figures" / "one.png").read_text() == "png"
    assert outside.read_text() == "mine"


def test_what_has_just_been_written_stays_whatever_claims_to_be_newer(tmp_path):
    for step in (99_999_997, 99_999_998, 99_999_999):
        save(tmp_path, step)
    written = save(tmp_path, 8)
    assert names(tmp_path) == ["step-00000008", "step-99999998", "step-99999999"]
    assert load_checkpoint(written).step == 8


def test_checkpoints_are_ordered_by_number_and_only_hnkit_s_own_are_removed(tmp_path):
    for step in (5, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000006").rename(tmp_path / "checkpoints" / "step-00000006-good")
    (tmp_path / "checkpoints" / "step-00000005" / "why.txt").write_text("the one of the paper")
    (tmp_path / "checkpoints" / "notes").mkdir()
    for step in (99_999_999, 100_000_000, 100_000_001, 100_000_002, 100_000_003):
        save(tmp_path, step)
    assert names(tmp_path) == [
        "notes", "step-00000005", "step-00000006-good", "step-100000001", "step-100000002", "step-100000003",
    ]  # fmt: skip
    assert newest_checkpoint(tmp_path, pytest.fail).step == 100_000_003


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000001/state.json"])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    """As any user but root meets it; a folder that cannot be listed once made the run start at step 0."""
    save(tmp_path, 1)
    denied = tmp_path / name

    def refuse(plain):
        def call(path, *arguments, **options):
            if Path(path) == denied:
                raise PermissionError(errno.EACCES, "Permission denied", str(denied))
            return plain(path, *arguments, **options)

        return call

    monkeypatch.setattr(module.os, "scandir", refuse(os.scandir))
    monkeypatch.setattr(module, "file_digest", refuse(module.file_digest))
    with pytest.raises(InputError, match="Permission denied") as caught:
        newest_checkpoint(tmp_path, pytest.fail)
    assert "damaged" not in str(caught.value)
    assert str(denied) in str(caught.value)


# --- run folders -----------------------------------------------------------------------------------------------


def test_a_run_folder_is_known_by_its_mark(tmp_path):
    folder = new_run_folder(tmp_path / "run", "train")
    require_run_folder(folder, "train")
    with pytest.raises(InputError, match="a run of 'train', not of 'compare'"):
        require_run_folder(folder, "compare")
    with pytest.raises(InputError, match="no run is there"):
        require_run_folder(tmp_path, "train")
    for text in ("", "[]", '{"application": "another", "kind": "train"}', "[" * 10**5):
        (folder / MARK).write_text(text)
        with pytest.raises(InputError, match="not the mark of hnkit"):
            require_run_folder(folder, "train")


def test_nothing_is_written_through_a_link(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    outside.write_text("mine\n")
    (folder / "soft").symlink_to(outside)
    os.link(outside, folder / "hard")
    (folder / "dangling").symlink_to(tmp_path / "new")
    os.mkfifo(folder / "fifo")
    for name, kind in (
        ("soft", "symbolic link"),
        ("hard", "hard link"),
        ("dangling", "symbolic link"),
        ("fifo", "special file"),
    ):
        with pytest.raises(InputError, match=f"{name} is a {kind}"):
            open_to_append(folder / name)
        with pytest.raises(InputError, match=f"{name} is a {kind}"):
            require_plain(folder, [name])
    assert outside.read_text() == "mine\n"
    assert not (tmp_path / "new").exists()
    with open_to_append(folder / "plain") as file:
        file.write(b"1")
    with open_to_append(folder / "plain") as file:
        file.write(b"2")
    assert (folder / "plain").read_text() == "12"
    require_plain(folder, ["plain", "absent"])
    (tmp_path / "run-link").symlink_to(folder)
    with pytest.raises(InputError, match="is a link"):
        require_plain(tmp_path / "run-link", [])


def test_a_link_that_takes_a_file_s_place_while_it_is_opened_is_noticed(tmp_path, monkeypatch):
    """Between looking and opening, another process exchanges the file for a link."""
    outside, path = tmp_path / "outside", tmp_path / "metrics.jsonl"
    outside.write_text("mine\n")
    path.touch()
    plain = os.open

    def exchanged(name, *arguments):
        path.unlink()
        os.link(outside, path)
        return plain(name, *arguments)

    monkeypatch.setattr(folders.os, "open", exchanged)
    with pytest.raises(InputError, match="exchanged for a link"):
        open_to_append(path)
    monkeypatch.undo()
    assert outside.read_text() == "mine\n"


def test_a_folder_that_was_exchanged_is_another_one(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    identity = FolderIdentity.of(run)
    identity.check()
    run.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no longer the folder"):
        identity.check()
    run.mkdir()
    with pytest.raises(InputError, match="no longer the folder"):
        identity.check()


def test_the_lock_names_its_holder(tmp_path):
    with run_lock(tmp_path):
        with (
            pytest.raises(InputError, match=f"in use by another process \\(process {os.getpid()} on '"),
            run_lock(tmp_path),
        ):
            pass
        assert (tmp_path / HOLDER).exists()
        (tmp_path / HOLDER).write_text("{")
        with pytest.raises(InputError, match="in use by another process: wait"), run_lock(tmp_path):
            pass
    assert not (tmp_path / HOLDER).exists()
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="is a symbolic link, and hnkit writes through none"), run_lock(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_a_path_that_is_not_utf8_is_read_again(tmp_path):
    """safetensors writes there and does not open what it wrote."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    run.mkdir()
    save_checkpoint(run, 3, {"w": torch.arange(3.0)}, {"step": 3, "place": str(run)}, keep=1)
    found = newest_checkpoint(run, pytest.fail)
    assert found is not None
    assert found.tensors["w"].tolist() == [0, 1, 2]
    assert found.state["place"] == str(run)


def test_a_sparse_file_of_tensors_is_damage_before_it_is_read(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, 3, {"w": torch.arange(3.0)}, {"step": 3}, keep=1)
    with (folder / "tensors.safetensors").open("r+b") as file:
        file.truncate(300 * 10**9)
    monkeypatch.setattr(module, "file_digest", lambda _: pytest.fail("300 GB were read"))
    with pytest.raises(DamagedCheckpointError, match="not as long as its header says"):
        load_checkpoint(folder)


def test_a_log_of_a_position_that_lies_is_read_in_bounds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    said = []
    log = JsonLog.resume(path, {"size": 10**15, "sha256": "0" * 64}, said.append)
    log.close()
    assert "is not the file its checkpoint knew" in said[0]
