"""The example of a distribution with a backend and a reward of its own, installed and used as its page says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-plugin"


def test_its_own_tests_pass():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=.", "-c", "pyproject.toml", ".")
    done = subprocess.run([sys.executable, *command], cwd=EXAMPLE, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example beside what is installed here, by pip, from a copy: nothing is left in the sources."""
    copy = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, copy)
    place = tmp_path_factory.mktemp("place")
    command = ("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(place), str(copy))
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


COMMANDS = """
import json, sys
from hnkit.cli.app import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as ended:
        if ended.code:
            raise
"""


def hnkit(place: Path, folder: Path, *commands: tuple[str, ...]) -> str:
    """What the commands print, one after the other in a process that finds what is installed in `place`."""
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found_trained_and_checked(installed, tmp_path):
    train = ("train", "--backend", "blots", "--reward", "darkness=1", "--steps", "30", "--alpha", "0.01")
    train += ("--out", "run", "--set", "train.measure_samples=16", "--set", "train.lr=0.01")
    check = ("verify-bound", "--backend", "blots", "--adapter", "run", "--samples", "8", "--out", "checked")
    said = hnkit(installed, tmp_path, ("backends",), train, check)
    assert "blots" in said.split("finished")[0]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rewards"] == {"darkness": 1.0}
    assert report["measurement"]["kl"] > 0
