"""`hnkit train` with its network shared out over two processes: the run of one process, to the rounding of its sums."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from hnkit.config import resolve_config
from hnkit.training.run import train
from tests.scaled.test_shared_out import in_turn
from tests.scaled.test_training import adapter, overrides, quiet

SHARD = "backend.shard=true"
RECOMPUTED = ["backend.hypernetwork_checkpointing=true", "backend.generator_checkpointing=true"]


def torchrun(name, lines, *more, command="train"):
    flags = [flag for line in lines for flag in ("--set", line)]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hnkit", command]
    return subprocess.run(
        [sys.executable, *words, "--backend", name, *flags, *more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def command(name, lines, out):
    return ("train", "--backend", name, *(word for line in lines for word in ("--set", line)),
            "--reward", "redness=1.0", "--out", str(out))  # fmt: skip


def trained(name, lines, out, processes=2):
    in_turn(out.parent, processes, command(name, lines, out))


def largest_difference(one, other):
    """Between two adapters, relative to the largest weight that was moved from zero."""
    one, other = adapter(one), adapter(other)
    moved = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
    return max(float((value - other[key]).abs().max()) for key, value in one.items()) / moved


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one, other, rel):
    """Records of two runs: numbers to a relative error, everything else as it is."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same(value, other[key], rel)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, its in zip(one, other, strict=True):
            same(value, its, rel)
    else:
        assert other == (pytest.approx(one, rel=rel, abs=1e-7) if isinstance(one, float) else one)


def settings(checkpoint, tmp_path, name="sana", **changes):
    small = {"steps": 2, "batch": 4, "optimizer": "sgd"}
    return [*overrides(name, checkpoint, tmp_path, **(small | changes)), *RECOMPUTED]


def test_two_sharded_processes_train_measure_and_report_as_one_and_one_goes_on(checkpoint, tmp_path):
    lines = [*settings(checkpoint, tmp_path, measure_method="arnoldi", schedule="constant"), SHARD]
    one = resolve_config(backend="sana", overrides=lines, rewards=["redness=1.0"])
    console = quiet()
    train(one, out=tmp_path / "one", console=console)
    assert "backend.shard: there is one process, which holds the whole network" in console.file.getvalue()
    trained("sana", lines, tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    same(records(tmp_path / "one"), records(tmp_path / "two"), 1e-5)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}

    goes_on(lines, tmp_path, 1)


def goes_on(lines, tmp_path, processes):
    """A run of one process and one of two, both gone on with by this many."""
    folders = [tmp_path / f"longer-{name}-{processes}" for name in ("one", "two")]
    for name, folder in zip(("one", "two"), folders, strict=True):
        shutil.copytree(tmp_path / name, folder)
    if processes == 1:
        for folder in folders:
            longer = resolve_config(resume=folder, overrides=[*lines, "train.steps=3"])
            train(longer, resume=folder, console=quiet())
    else:
        resumed = [("train", "--resume", str(folder), "--set", "train.steps=3") for folder in folders]
        in_turn(tmp_path, processes, *resumed)
    assert largest_difference(*folders) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd-turbo"])
def test_other_networks_and_an_average_go_on_with_two(name, checkpoint, tmp_path):
    lines = [*settings(checkpoint, tmp_path, name, measure_method="lanczos", schedule="constant", ema=0.5), SHARD]
    lines += [line.replace("true", "false") for line in RECOMPUTED]
    lines += ["backend.self_check=true"]
    config = resolve_config(backend=name, overrides=lines, rewards=["redness=1.0"])
    train(config, out=tmp_path / "one", console=quiet())
    trained(name, lines, tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    same(records(tmp_path / "one"), records(tmp_path / "two"), 1e-4)
    goes_on(lines, tmp_path, 2)


@pytest.mark.slow
def test_two_and_four_processes_sharded_or_whole_are_one(checkpoint, tmp_path):
    """Four processes have one row each."""
    lines = settings(checkpoint, tmp_path, measure_every=1, validate_every=1, injection=0.5)
    train(resolve_config(backend="sana", overrides=lines, rewards=["redness=1.0"]), out=tmp_path / "1", console=quiet())
    for processes in (2, 4):
        whole, sharded = tmp_path / f"{processes}", tmp_path / f"{processes}s"
        in_turn(tmp_path, processes, command("sana", lines, whole), command("sana", [*lines, SHARD], sharded))
        for folder in (whole, sharded):
            assert largest_difference(tmp_path / "1", folder) < 1e-6
            same(records(tmp_path / "1"), records(folder), 1e-5)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_one_line(checkpoint, tmp_path):
    lines = [*settings(checkpoint, tmp_path), SHARD]
    reward = ("--reward", "redness=1.0", "--out", str(tmp_path / "out"))
    for wrong, said in (
        ("train.kl=arnoldi", "train.kl = 'arnoldi' with backend.shard: it may need more passes of f in one process"),
        ("train.objective=direct", "backend.shard: direct fine-tuning has no frozen generator beside the twin"),
    ):
        done = torchrun("sana", [*lines, wrong], *reward)
        assert done.returncode != 0
        assert said in done.stderr.replace("\n", " ")
        assert "InputError" not in done.stderr  # the only traceback is torchrun's own
    backend = [line for line in lines if line.startswith("backend.")]
    done = torchrun("sana", backend, "--prompt", "a red fox", "--out", str(tmp_path / "out"), command="generate")
    assert "backend.shard: only hnkit train shares a network out over processes" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
