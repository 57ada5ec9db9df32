"""The script that measures a card runs the same parts on a CPU, and keeps what was measured when a part fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"


def load():
    spec = importlib.util.spec_from_file_location("device_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_script"] = module
    spec.loader.exec_module(module)
    return module


def test_the_limits_add_up_to_less_than_nine_minutes():
    assert sum(part.limit for part in load().PARTS) < 9 * 60


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


def test_a_part_that_fails_or_takes_too_long_is_said_and_the_others_stay(tmp_path, monkeypatch):
    script = load()
    slow = script.Part("flux", 0, script.flux)
    assert script.measured(slow, True)["failed"] == "stopped at its limit of 0 s"
    missing = script.Part("nonesuch", 60, script.flux)
    assert "KeyError" in script.measured(missing, True)["failed"]
    refused = run("--tiny")
    assert refused.returncode == 2
    assert "name another report" in refused.stderr


@pytest.mark.parametrize(
    "part", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("agreement", "steps", "log_det"))]
)
def test_every_part_runs_small_on_a_cpu(part, tmp_path):
    out = tmp_path / "device.json"
    out.write_text(json.dumps({"agreement": {"kept": 1}, "steps": {"kept": 1}}))
    done = run("--tiny", "--parts", part, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert document["tiny"]
    assert "failed" not in document[part]
    assert {name for name in ("agreement", "steps") if document[name].get("kept")} == {"agreement", "steps"} - {part}
    if part == "flux":
        assert document[part]["seconds"] > 0
    if part == "agreement":
        assert document[part]["agree"]
    if part == "steps":
        assert {row["step"] for row in document[part]["rows"]} == {"hnkit", "plain"}
    if part == "log_det":
        assert document[part]["products_per_second"] > 0
        assert document[part]["exact_error"] is not None
