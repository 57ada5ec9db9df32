"""The one trainer on tiny checkpoints of the real pipelines: resumed to the bit, and two processes like one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hnkit.config import resolve_config
from hnkit.training.run import train
from hnkit.training.signals import StopSignals
from tests.scaled import tiny

NAMES = ("sana", "sd-turbo", "flux")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def overrides(name, checkpoint, tmp_path, **changes):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tree\na boat\na lamp\na green frog\na red house\n")
    options = tiny.options(name, checkpoint(name))
    settings = {
        "prompts": prompts, "steps": 4, "batch": 2, "accumulate": 1, "optimizer": "adamw", "lr": 0.01, "clip": 1.0,
        "warmup": 0, "alpha": 0.001, "reduction": "sum", "checkpoint_every": 1, "measure_samples": 2,
        "validate_samples": 2,
    } | changes  # fmt: skip
    return [
        *(f"backend.{key}={tiny.text(value)}" for key, value in options.items()),
        *(f"train.{key}={value}" for key, value in settings.items()),
    ]


def config(name, checkpoint, tmp_path, **changes):
    return resolve_config(
        backend=name, overrides=overrides(name, checkpoint, tmp_path, **changes), rewards=["redness=1.0"]
    )


def adapter(folder):
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_with_the_same_adapter(name, checkpoint, tmp_path, monkeypatch):
    settings = config(name, checkpoint, tmp_path)
    train(settings, out=tmp_path / "whole", console=quiet())

    asked = 0

    def stop(self, processes, device):
        nonlocal asked
        asked += 1
        return signal.SIGTERM if asked == 2 else 0

    monkeypatch.setattr(StopSignals, "agreed", stop)
    interrupted = train(settings, out=tmp_path / "parts", console=quiet())
    assert (interrupted.step, interrupted.exit_code) == (2, 128 + signal.SIGTERM)
    resumed = train(settings, resume=tmp_path / "parts", console=quiet())
    assert resumed.finished
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert any(float(value.abs().max()) > 0 for key, value in whole.items() if "lora_B" in key)
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kl", ["second-order", "arnoldi"])
def test_the_other_losses_train_the_real_network(kl, checkpoint, tmp_path):
    settings = config("sana", checkpoint, tmp_path, kl=kl, lr=0.001)
    result = train(settings, out=tmp_path / "run", console=quiet())
    assert result.finished
    assert result.skipped == 0
    assert result.report["measurement"]["kl"] > 0


def test_two_processes_and_smaller_batches_end_like_one(checkpoint, tmp_path):
    """The same global batch, split, gives the adapter of one up to the order of float32 sums; so does the noise that
    the sampler adds between its two steps."""
    lines = overrides("sana", checkpoint, tmp_path, steps=3, batch=4, optimizer="sgd", generator_steps=2)
    settings = resolve_config(backend="sana", overrides=lines, rewards=["redness=1.0"])
    train(settings, out=tmp_path / "one", console=quiet())
    split = resolve_config(backend="sana", overrides=[*lines, "train.accumulate=4"], rewards=["redness=1.0"])
    train(split, out=tmp_path / "split", console=quiet())
    flags = [flag for line in lines for flag in ("--set", line)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hnkit"]
    command += ["train", "--backend", "sana", *flags, "--reward", "redness=1.0", "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report:") == 1
    one, losses = adapter(tmp_path / "one"), logged(tmp_path / "one")
    moved = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
    assert moved > 0
    for other in ("two", "split"):
        found = adapter(tmp_path / other)
        for key, value in one.items():
            if "lora_B" in key:
                assert float((value - found[key]).abs().max()) < 1e-3 * moved, key
        assert logged(tmp_path / other) == pytest.approx(losses, rel=1e-5)


def logged(folder):
    """The rewards of the steps, and those of base and steered images in the last validation."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = next(record["validation"]["scores"]["reward"] for record in found if "validation" in record)
    return [*(record["reward"] for record in found if "reward" in record), scores["base"], scores["steered"]]
