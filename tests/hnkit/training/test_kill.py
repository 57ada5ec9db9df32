"""The short version of `benchmarks/kill_test.py`: a few kills at random moments, resumed to a bit-identical end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kill_test.py"


def test_killed_runs_end_bit_identical():
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--seed", "1", "--set", "train.steps=24"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical" in done.stdout
