"""Bad input over every flag of every command and every key of every table: one line, exit 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnkit.backend import backend_factory
from hnkit.cli import app as cli
from hnkit.config import TrainConfig
from hnkit.scaled.compare.plan import Plan
from tests.robustness.cases import BACKENDS, FLAGS, Case, all_cases, fields, sample, write_files

CASES = all_cases()
QUICK = sample(CASES)
NO_VALUE = {"--private", "--json", "--plan", "--debug", "--certify", "--verbose", "-v", "--quick", "--help", "-h"}
LONGEST_LINE = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory full of bad files; every case leaves it as it is."""
    path = tmp_path_factory.mktemp("here")
    write_files(path)
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def state(folder: Path) -> list[tuple[str, int, int]]:
    """Every path below a folder with its size and time of change."""
    found = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def run(arguments: list[str], capsys, monkeypatch) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["hnkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def require_refused(code: object, out: str, err: str) -> None:
    """Exit 2, one line that says something, no traceback and no error that nobody thought of."""
    assert code == 2, err
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith("hnkit: ")
    assert 15 < len(err) < LONGEST_LINE, err
    assert "internal error" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_refused_in_one_line_and_nothing_written(case: Case, here, tmp_path, capsys, monkeypatch):
    arguments = list(case.arguments)
    if "--config" in arguments:  # the table holds the file's text
        place = arguments.index("--config") + 1
        (tmp_path / "case.toml").write_text(arguments[place])
        arguments[place] = str(tmp_path / "case.toml")
    before = state(here)
    code, out, err = run(arguments, capsys, monkeypatch)
    require_refused(code, out, err)
    assert state(here) == before
    assert (here / "precious.txt").read_text() == "kept\n"


def test_the_table_is_large_and_spoils_every_flag_and_every_key():
    assert len(QUICK) >= 150
    spoilt = {case.spoils for case in QUICK}
    commands = typer.main.get_command(cli.app).commands
    assert {command.split()[0] for command, _, _ in ((" ".join(c), f, v) for c, f, v in FLAGS)} | {"backends"} == set(
        commands
    )
    for name, command in commands.items():
        for parameter in command.params:
            long = next((flag for flag in parameter.opts if flag.startswith("--")), None)
            assert long is None or long in NO_VALUE or f"{name} {long}" in spoilt, f"no bad value for {name} {long}"
    for backend in BACKENDS:
        for item, _ in fields(backend_factory(backend).options):
            assert f"{backend}.{item.name}" in spoilt
    assert {f"train.{item.name}" for item, _ in fields(TrainConfig)} <= spoilt
    free_text = {"proposer", "dino", "lpips"}
    assert {f"compare.{item.name}" for item, _ in fields(Plan) if item.name not in free_text} <= spoilt


def test_values_are_named_even_when_they_are_huge(here, capsys, monkeypatch):
    _, _, err = run(["verify-bound", "--map", "torch:sin", f"--shape={'7' * 5000}"], capsys, monkeypatch)
    assert err.startswith("hnkit: --shape 777")
    assert "write positive integers" in err


def test_a_memory_that_does_not_suffice_is_named(here, capsys, monkeypatch):
    code, _, err = run(
        ["train", "--backend", "toy", "--out", "new", f"--set=backend.width={10**7}", "--set=backend.hypernetwork=mlp"],
        capsys,
        monkeypatch,
    )
    assert code == 2
    assert "out of memory" in err
    assert not (here / "new").exists()


@pytest.mark.parametrize("toy", ["half-space", "folding", "linear-gaussian", "one-dimensional"])
@pytest.mark.parametrize("alpha", ["1e-300", "0.00099", "10001", "1e300", "inf"])
def test_a_temperature_beyond_double_precision_is_named(toy, alpha, here, capsys, monkeypatch):
    code, out, err = run(["verify-bound", "--toy", toy, "--samples", "8", "--alpha", alpha], capsys, monkeypatch)
    assert (code, out) == (2, "")
    assert "--alpha" in err
    assert "internal error" not in err


def test_a_temperature_at_which_a_toy_overflows_is_named(here, capsys, monkeypatch):
    code, out, err = run(["verify-bound", "--toy", "half-space", "--alpha", "0.0015"], capsys, monkeypatch)
    assert (code, out) == (2, "")
    assert "give alpha of 0.00171 or more" in err


@pytest.mark.parametrize("out", ["precious.txt/below", "loop/below", "folder"])
def test_an_impossible_out_is_refused_before_the_work(out, here, capsys, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("hnkit.checks.verify_toys.verify_toys", work)
    code, _, err = run(["verify-bound", "--toy", "extremal", "--out", out], capsys, monkeypatch)
    assert code == 2
    assert out in err


# --- true processes ---------------------------------------------------------------------------------------------

PROCESSES = [
    ("verify-bound", "--samples", "0"),
    ("train", "--backend", "toy", "--config", "binary.toml"),
    ("generate", "--backend", "digits", "--prompts", "latin1.txt"),
    ("backends", "stray"),
]


@pytest.mark.parametrize("arguments", PROCESSES, ids=" ".join)
def test_a_true_process_behaves_the_same(arguments, folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    before = state(folder)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "hnkit", *arguments],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=200,
    )  # fmt: skip
    require_refused(done.returncode, done.stdout, done.stderr)
    assert state(folder) == before


# --- fuzzed flags -----------------------------------------------------------------------------------------------

fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(exclude_characters="\0"), max_size=30)
commands = st.sampled_from(["verify-bound", "train", "generate", "compare", "backends"])
flags = st.sampled_from(sorted({flag for _, flag, _ in FLAGS} | NO_VALUE - {"--help", "-h", "--debug"}))


@fuzz
@given(command=commands, words=st.lists(st.one_of(text, st.builds("{}={}".format, flags, text)), min_size=1))
def test_random_arguments_end_in_one_line(command, words, here, capsys, monkeypatch):
    """Random words never name an installed toy, backend or file, so each of them must be refused."""
    arguments = [command, *words, "--nonesuch"]
    code, out, err = run(arguments, capsys, monkeypatch)
    require_refused(code, out, err)
    json.dumps(err)
