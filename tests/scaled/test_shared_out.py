"""Evaluation by several processes: the files and figures of one, to the last digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hnkit.backend import backend_factory
from tests.scaled.conftest import perturb

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an adapter of the miniature that moves its noise, and a file of prompts."""
    folder = tmp_path_factory.mktemp("shared")
    factory = backend_factory("digits")
    backend = factory.load(factory.options(rank=4))
    perturb(backend, 0.05)
    backend.save_adapter(folder / "adapter")
    prompts, _ = backend.prompts()
    (folder / "prompts.txt").write_text("\n".join(prompts[:3]) + "\n")
    return folder


def hnkit(place: Path, processes: int, *arguments: str, status: int = 0) -> str:
    """What a command prints, by one process or by several of torchrun's."""
    start = ("-m", "hnkit") if processes == 1 else (*TORCHRUN, str(processes), "-m", "hnkit")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *start, *arguments], cwd=place, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == status, "\n".join(line for line in done.stderr.splitlines() if line.startswith("hnkit:"))
    return done.stdout if status == 0 else done.stderr


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


COMMON = ("--backend", "digits", "--adapter", "adapter", "--prompts", "prompts.txt")


def test_generate_writes_the_same_files_whoever_writes_them(place):
    command = ("generate", *COMMON, "--count", "2")
    one = hnkit(place, 1, *command, "--out", "one", "--json")
    two = hnkit(place, 2, *command, "--out", "two", "--json")
    assert json.loads(one) | {"run_folder": "two"} == json.loads(two)  # one document, from one process
    assert files(place / "one") == files(place / "two")
    # a worker that was killed has cost its own prompt: what is there is kept, what is not is made by others
    kept = place / "two" / "prompt-000" / "base-00.png"
    before = kept.stat().st_mtime_ns
    (place / "two" / "prompt-001" / "prompt.txt").unlink()
    hnkit(place, 2, "generate", "--resume", "two")
    assert files(place / "one") == files(place / "two")
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_frontier_of_rewards_has_the_same_figures(place):
    command = ("frontier", *COMMON, "--reward", "redness=1", "--base-samples", "8", "--samples", "2", "--json")
    one, two = (json.loads(hnkit(place, n, *command, "--out", f"frontier-{n}")) for n in (1, 2))
    assert one.pop("run_folder") != two.pop("run_folder")
    assert one == two


@pytest.mark.slow
def test_compare_has_the_same_figures_and_goes_on_by_any_number(place):
    command = ("compare", *COMMON, "--quick", "--seeds", "1", "--methods", "base,hypernoise,best-of-n", "--json",
               "--set", "compare.best_of=2", "--set", "compare.ranks=[]", "--set", "compare.losses=[]",
               "--set", "compare.diversity_seeds=2", "--set", "compare.measure_samples=2",
               "--set", "compare.batch=2", "--set", "compare.steps=[1]")  # fmt: skip
    one, two = (json.loads(hnkit(place, n, *command, "--out", f"compare-{n}")) for n in (1, 2))
    assert untimed(one) == untimed(two)
    parts = sorted((place / "compare-2" / "parts").glob("base-*.json"))
    parts[0].unlink()
    before = parts[1].stat().st_mtime_ns
    again = json.loads(hnkit(place, 1, "compare", "--backend", "digits", "--resume", "compare-2", "--json"))
    assert untimed(again) == untimed(two)
    assert parts[1].stat().st_mtime_ns == before


def untimed(value):
    """A document without what is a time or a place."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "second" not in k and k not in ("run_folder", "created")}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


DIFFERENT = """
import os, sys
from hnkit.cli.app import main
count = 1 + int(os.environ["RANK"])
sys.argv[1:] = ["generate", "--backend", "digits", "--count", str(count), "--out", "no"]
main()
"""


def test_processes_that_were_given_different_settings_are_refused_in_one_line(place):
    (place / "differ.py").write_text(DIFFERENT)
    error = subprocess.run(
        [sys.executable, *TORCHRUN, "2", "differ.py"], cwd=place, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stderr  # fmt: skip
    assert "start all processes with the same settings" in error
    assert not (place / "no").exists()
