"""The script that measures a card runs the same parts on a CPU, and keeps what was measured when a part fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ("steps", "log_det", "flux", "tests", "agreement", "exact")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("device")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "device.py"), *words], capture_output=True, text=True, check=False
    )


def test_the_limits_add_up_to_less_than_nine_minutes(script):
    assert script.LOADING + sum(part.limit for part in script.PARTS) < 9 * 60
    assert tuple(part.name for part in script.PARTS) == PARTS


def slow_part(turn):
    turn.keep({"rows": [1]})
    time.sleep(60)


def broken_part(turn):
    turn.keep({"rows": [1]})
    raise KeyError("nonesuch")


def killed_part(turn):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_part_that_fails_or_takes_too_long_is_said_and_what_it_measured_stays(script):
    found = script.measured(script.Part("broken", 60, broken_part), True)
    assert found["failed"] == "KeyError: 'nonesuch'"
    assert found["rows"] == [1]
    assert "in broken_part" in found["output"]
    assert script.measured(script.Part("killed", 60, killed_part), True)["failed"] == "ended by signal 9"
    found = script.measured(script.Part("hangs", 1, slow_part))
    assert found["failed"] == "stopped at its limit of 1 s"
    assert found["rows"] == [1]
    assert found["took"] < 20


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--tiny",), "name another report"),
        (("--parts", "abacus"), "unknown part 'abacus': accepted are steps, log_det"),
        (("--limit", "steps"), "write PART=SECONDS"),
    ],
)
def test_bad_options_are_one_line(words, line, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["device.py", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def test_a_report_keeps_the_parts_that_are_not_run_again_and_leaves_out_what_the_budget_does_not_pay(
    script, tmp_path, monkeypatch
):
    out = tmp_path / "device.json"
    out.write_text(json.dumps({"agreement": {"kept": 1}, "steps": {"kept": 1}}))
    monkeypatch.setattr(sys, "argv", ["device.py", "--tiny", "--parts", "flux,exact", "--out", str(out)])
    assert script.main() == 0
    document = json.loads(out.read_text())
    assert document["tiny"]
    assert [row["options"].rpartition(", ")[2] for row in document["flux"]["rows"]] == [
        "hypernetwork_checkpointing", "lora_autocast", "quantize = fp8"
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 for row in document["flux"]["rows"])
    assert document["exact"]["exact_dim"] == 128
    assert abs(document["exact"]["score"]) < 6  # t-distributed with 3 degrees of freedom: beyond once in 100
    assert document["agreement"] == document["steps"] == {"kept": 1}
    # where the exact log-determinant would take too long, it is said how long, and a smaller one is taken
    found = script.exact(script.Turn(True, time.monotonic(), tmp_path / "part.json"))
    assert found["too_long"]["dim"] == 128
    assert found["too_long"]["seconds"] > 0
    assert found["exact_dim"] == 32


def test_the_tables_say_which_card_and_what_was_not_measured(script, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent / "docs"))
    on_card = import_module("on_card")
    document = {"plan": {"batch": 1, "peak_gib": {"": 25.5, "a_b": 3.25}}}
    assert "Nothing of it has been measured yet" in on_card.steps(document)
    assert "Nothing else has been measured" in on_card.rest(document)
    row = {"batch": 1, "options": "", "images_per_second": 4.0, "peak_gib": 26.0}
    document |= {
        "machine": "A Card",
        "torch": "2.11",
        "steps": {"rows": [row | {"step": "hnkit"}, {"step": "plain", "batch": 1, "options": "", "out_of_memory": 1}]},
        "log_det": {
            "products_per_second": 12.5, "dim": 32768, "samples": 8, "probes": 4, "error": 1.25, "error_stderr": 0.1
        },
        "exact": {
            "too_long": {"dim": 32768, "seconds": 500.0}, "exact_dim": 8192, "exact_seconds": 9.0, "exact_error": 1.0,
            "point_error": 1.1, "point_probe_stderr": 0.2,
        },
        "flux": {"parameters": 11.9e9, "rows": [{"options": "a_b", "seconds": 1.5, "peak_gib": 40.0}]},
        "agreement": {"distances": {"images": 1e-5}},
        "tests": {"failed": "pytest ended with 1"},
    }  # fmt: skip
    steps, rest = (text.replace("\u00a0", " ") for text in (on_card.steps(document), on_card.rest(document)))
    assert "| none | 25.5 | 26.0 | 4.00 | out of memory |" in steps
    assert "differ by 2.0 % at most" in steps
    document["plan"]["roofline_seconds"] = {"": 0.1, "a_b": 0.3}
    document["steps"]["rows"][0]["seconds"] = 0.25
    assert "| none | 25.5 | 26.0 | 4.00 | out of memory | 40 % |" in on_card.steps(document)
    assert "| `a_b` | 3.2 | - | - | - | - |" in on_card.steps(document)
    for words in (
        "A Card",
        "12.5",
        "1.25 ± 0.10",
        "500 s by its pace",
        "9 s",
        "1.50 s, 40.0 GiB",
        "not measured: pytest",
    ):
        assert words in rest


@pytest.mark.slow
def test_the_whole_script_runs_small_on_a_cpu(tmp_path):
    out = tmp_path / "device.json"
    done = run("--tiny", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert not [name for name in PARTS if "failed" in document[name]]
    assert {row["step"] for row in document["steps"]["rows"]} == {"hnkit", "plain"}
    assert all(row["images_per_second"] > 0 for row in document["steps"]["rows"])
    assert document["log_det"]["products_per_second"] > 0
    assert document["log_det"]["error_stderr"] > 0
    assert "passed" in document["tests"]["summary"]
    assert document["agreement"]["agree"]
