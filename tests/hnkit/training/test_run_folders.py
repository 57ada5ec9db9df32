"""Run folders that somebody else has touched, or sent: nothing outside is written, nothing of others is deleted."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

import hnkit.training.checkpoint
from hnkit import InputError
from hnkit.internal.files import file_digest
from hnkit.internal.folders import MANIFEST, STATE, TENSORS
from hnkit.internal.provenance import recorded_provenance
from hnkit.internal.versions import versions
from hnkit.training.checkpoint import _manifest, newest_checkpoint
from tests.hnkit.training.training_runs import fake_config, interrupt_after, records, resume, run, same_outcome, small

LONGER = {"steps": 9}


@pytest.fixture
def interrupted(tmp_path, fake) -> Path:
    """A run that a signal has stopped at step 3, as it might be received."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGTERM)
        run(fake_config(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timings.jsonl", "config.toml", "report.json", "checkpoints", "adapter"]
)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_in_a_received_run_folder_is_refused_and_its_target_untouched(interrupted, tmp_path, name, link):
    target = tmp_path / "profile"
    if name in ("checkpoints", "adapter"):
        if link is os.link:
            return  # folders have no hard links
        target.mkdir()
        (target / "profile").write_text("export A=1\n")
        shutil.rmtree(interrupted / name, ignore_errors=True)
    else:
        target.write_text("export A=1\n")
        (interrupted / name).unlink(missing_ok=True)
    link(target, interrupted / name)
    with pytest.raises(InputError, match=rf"{name} is a (symbolic|hard) link"):
        resume(fake_config(), interrupted)
    inside = target / "profile" if target.is_dir() else target
    assert inside.read_text() == "export A=1\n"


def test_a_link_two_folders_down_is_refused(interrupted, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (interrupted / "samples").mkdir(exist_ok=True)
    (interrupted / "samples" / "step-00000006.png").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"step-00000006\.png is a symbolic link"):
        resume(fake_config(), interrupted)


def test_a_foreign_folder_with_a_configuration_is_no_run(tmp_path, fake):
    folder = tmp_path / "project"
    (folder / "adapter").mkdir(parents=True)
    files = {"config.toml": fake_config().to_toml(), ".env.tmp": "secret", "README.md": "mine", "adapter/a": "b"}
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match="no run is there"):
        resume(fake_config(), folder)
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == files


def test_what_the_user_put_beside_a_run_stays(tmp_path, fake):
    config = fake_config()
    run(config, tmp_path / "run")
    mine = {".notes.tmp": "1", "README.md": "2", "adapter/notes.md": "3", "figures/.a.tmp": "4", "checkpoints/why": "5"}
    for name, text in mine.items():
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run/adapter/README.md").write_text("my own words")
    assert resume(fake_config(**LONGER), tmp_path / "run").step == 9
    for name, text in mine.items():
        assert (tmp_path / "run" / name).read_text() == text
    assert (tmp_path / "run/adapter/kept-README.md").read_text() == "my own words"
    assert "9 steps of 4 samples" in (tmp_path / "run/adapter/README.md").read_text()


def test_an_extended_run_is_the_longer_run(tmp_path, fake):
    run(fake_config(), tmp_path / "run")
    resume(fake_config(**LONGER), tmp_path / "run")
    run(fake_config(**LONGER), tmp_path / "at-once")
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == list(range(1, 10))


def test_a_folder_that_is_replaced_inside_a_write_is_not_named_as_the_way_on(tmp_path, fake, monkeypatch):
    """The write fails with an error of the disk; the run that lies under the name by then is another one."""
    plain = hnkit.training.checkpoint.file_digest

    def exchanged(path):
        if (tmp_path / "run").exists() and "step-" in str(path):
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").mkdir()
            raise OSError(errno.EIO, "Input/output error", str(path))
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(hnkit.training.checkpoint, "file_digest", exchanged)
        with pytest.raises(InputError, match="no longer the folder that this run writes to") as ended:
            run(fake_config(checkpoint_every=2), tmp_path / "run")
    assert "go on with" not in str(ended.value)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("replace", [False, True])
def test_a_run_folder_that_is_removed_or_replaced_under_a_run_is_left_alone(tmp_path, fake, replace):
    """Two runs were once mixed: the lock guards the old folder, the writes went to the new one's name."""
    moved = tmp_path / "moved"

    def prepare(backend):
        def fault(call, scores):
            if call == 3:
                (tmp_path / "run").rename(moved)
                if replace:
                    (tmp_path / "run").mkdir()
                    (tmp_path / "run" / "precious").write_text("of another run")
            return scores

        backend.default_reward.fault = fault

    fake.prepare_backend = prepare
    with pytest.raises(InputError, match="no longer the folder that this run writes to"):
        run(fake_config(checkpoint_every=2), tmp_path / "run")
    if replace:
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]
    moved_step = newest_checkpoint(moved, pytest.fail)
    assert moved_step is not None
    assert moved_step.step == 2
    fake.prepare_backend = lambda _: None
    assert resume(fake_config(checkpoint_every=2), moved).finished


@pytest.mark.parametrize("name", [".hnkit-run", "checkpoints", "report.json"])
def test_permission_denied_is_never_damaged(interrupted, monkeypatch, name):
    """As any user but root meets it."""
    denied = interrupted / name

    def refuse(plain):
        def call(path, *arguments, **options):
            if Path(path) == denied:
                raise PermissionError(errno.EACCES, "Permission denied", str(denied))
            return plain(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    monkeypatch.setattr(os, "open", refuse(os.open))
    with pytest.raises(InputError, match="Permission denied") as caught:
        resume(fake_config(), interrupted)
    assert "damaged" not in str(caught.value)
    assert "new run" not in str(caught.value)


def test_run_folders_and_checkpoints_say_what_they_were_made_from(tmp_path, fake):
    class Weighed:
        digest = "a" * 64

    fake.prepare_backend = lambda backend: setattr(backend, "model_digest", lambda: Weighed.digest)
    report = run(fake_config(), tmp_path / "run").report
    state = newest_checkpoint(tmp_path / "run", pytest.fail).state
    provenance = report["provenance"]
    assert provenance["model"] == "a" * 64
    assert set(provenance) == {"code", "model", "prompts", "adapter"}
    assert state["provenance"] == {key: provenance[key] for key in ("code", "model", "prompts")}
    weights = (tmp_path / "run/adapter/adapter.safetensors").read_bytes()
    assert provenance["adapter"]["adapter.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert json.loads((tmp_path / "run/report.json").read_text())["provenance"] == provenance
    (record,) = recorded_provenance(tmp_path / "run")
    assert record == {"versions": versions(), **state["provenance"]}
    Weighed.digest = "b" * 64
    with pytest.raises(InputError, match="base model is not the one of the checkpoint"):
        resume(fake_config(**LONGER), tmp_path / "run")


def test_noise_of_a_step_resumes_too(tmp_path, monkeypatch):
    config = small("noise=step", "measure_every=0")
    run(config, tmp_path / "whole")
    interrupt_after(monkeypatch, 7, signal.SIGTERM)
    assert run(config, tmp_path / "cut").step == 7
    monkeypatch.undo()
    resume(config, tmp_path / "cut")
    assert same_outcome(tmp_path / "whole", tmp_path / "cut", "step-00000020")


@pytest.mark.parametrize(
    "change",
    [
        {"best": {"step": 2, "loss": "low"}},
        {"best": {"step": [], "loss": 1.0}},
        {"best": []},
        {"looked": "x"},
        {"skipped": 0.5},
        {"metrics": {"size": "x", "sha256": 1}},
        {"metrics": {"size": math.inf, "sha256": 1}},
        {"metrics": {"size": -5, "sha256": 1}},
        {"looked": 10**30},
        {"moved": 4},
        {"skipped": -1},
        {"best": {"step": 4, "loss": 1.0}},
        {"provenance": None},
        {"optimizer": {"x/step": 1}},
        {"config": {}},
    ],
    ids=str,
)
def test_a_forged_state_of_a_checkpoint_is_one_line(change, interrupted):
    """The sums of a received checkpoint show damage, and not who wrote it."""
    forge(interrupted / "checkpoints" / "step-00000003", change)
    with pytest.raises(InputError, match="is not one that this version writes"):
        resume(fake_config(), interrupted)


def forge(folder: Path, change: dict) -> None:
    """Change the state of a checkpoint, with sums that are right."""
    state = json.loads((folder / STATE).read_text())
    assert change.keys() <= state.keys()
    (folder / STATE).write_text(json.dumps(state | change))
    (folder / MANIFEST).write_bytes(_manifest({name: file_digest(folder / name) for name in (TENSORS, STATE)}))


@pytest.mark.parametrize("step", [7, 10**30])
def test_a_checkpoint_beyond_the_end_is_no_finished_run(step, interrupted):
    folder = interrupted / "checkpoints" / "step-00000003"
    forge(folder, {"step": step})
    folder.rename(folder.with_name(f"step-{step:08d}"))
    with pytest.raises(InputError, match=f"says step {step} of 6, which no training writes"):
        resume(fake_config(), interrupted)
    assert not (interrupted / "adapter").exists()


@pytest.mark.parametrize("step", [-1, 2, 4, 6])
def test_a_checkpoint_of_another_step_than_its_name_is_passed_over(step, interrupted, tmp_path, fake):
    folder = interrupted / "checkpoints" / "step-00000003"
    forge(folder, {"step": step})
    advice = "start a new run" if step < 0 else "give step-00000003 the name of its step"
    with pytest.raises(InputError, match=f"can be used: {advice}"):
        resume(fake_config(), interrupted)


@pytest.mark.parametrize(
    "place", [".adapter.tmp", ".best.old", "checkpoints/.step-00000006.tmp", "checkpoints/step-00000006"]
)
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_where_a_folder_will_be_written_is_named_before_training(place, kind, interrupted, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = interrupted / place
    path.symlink_to(tmp_path / "elsewhere") if kind == "link" else path.write_text("mine")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} is (a symbolic link|no folder)"):
        resume(fake_config(), interrupted)
    assert newest_checkpoint(interrupted, pytest.fail).step == 3


def test_a_training_that_diverged_in_its_last_step_is_not_finished(tmp_path, fake):
    """Nothing skips a batch after the last one: float32 overflows in the update itself."""
    with pytest.raises(InputError, match=r"is not finite: the training diverged .* lower train\.lr"):
        run(fake_config(steps=1, optimizer="sgd", lr=3e38, alpha=1e-6, clip=0.0), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
