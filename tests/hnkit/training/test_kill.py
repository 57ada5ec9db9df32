"""The short version of `benchmarks/kill_test.py`: a few kills at random moments, resumed to a bit-identical end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from hnkit.config import resolve_config
from hnkit.training.run import train
from hnkit.training.view import TrainView

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kill_test.py"


def test_killed_runs_end_bit_identical(tmp_path):
    report = tmp_path / "kills.json"
    command = [
        sys.executable, str(SCRIPT), "--kills", "6", "--seed", "1", "--command", "train", "--backend", "toy",
        "--set", "train.steps=24", "--out", str(report),
    ]  # fmt: skip
    with (tmp_path / "stderr.txt").open("w") as errors:  # a file can be sought in, which the forks' own output cannot
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "stderr.txt").read_text()
    assert "bit-identical" in done.stdout
    assert (tmp_path / "stderr.txt").read_text() == ""
    document = json.loads(report.read_text())
    assert document["finished"]
    assert sum(document["commands"]["train"]["kills"].values()) == 6


def test_a_signal_after_the_end_finds_a_finished_run(tmp_path, monkeypatch):
    said = TrainView.say

    def say(view, text, *args, **kwargs):
        said(view, text, *args, **kwargs)
        if text.startswith("finished:"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainView, "say", say)
    overrides = ["train.steps=2", "train.batch=4", "train.measure_samples=2", "train.validate_samples=4"]
    result = train(resolve_config(backend="toy", overrides=overrides), out=tmp_path / "run")
    assert result.finished
    assert result.exit_code == 0
