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
    (folder / "one.txt").write_text(prompts[0] + "\n")
    (folder / "mymap.py").write_text(MAP)
    return folder


MAP = """
import os
import torch

def f(x):
    return 0.3 * torch.tanh(x.roll(1, -1)) + 0.1 * x

def killed(x):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), 9)
    return f(x)
"""
"""Maps of a user's own; the second ends one of several processes."""


def ended(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What became of a command of the interpreter in that folder.

    If the test is stopped, torchrun is asked to end, and ends its processes: killed, it would leave them running.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(place)}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said, error = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    return subprocess.CompletedProcess(words, process.returncode, said, error)


def hnkit(place: Path, processes: int, *arguments: str, status: int = 0) -> str:
    """What a command prints, by one process or by several of torchrun's."""
    start = ("-m", "hnkit") if processes == 1 else (*TORCHRUN, str(processes), "-m", "hnkit")
    done = ended(place, *start, *arguments)
    assert done.returncode == status, "\n".join(line for line in done.stderr.splitlines() if line.startswith("hnkit:"))
    return done.stdout if status == 0 else done.stderr


IN_TURN = """
import contextlib, json, os, pathlib, sys
from hnkit.cli.app import main
import torch

rank = os.environ.get("RANK", "0")
for words in json.loads(sys.argv[1]):
    if words[0] == "remove":
        torch.distributed.barrier()
        if rank == "0":
            pathlib.Path(words[1]).unlink()
        torch.distributed.barrier()
        continue
    sys.argv = ["hnkit", *words]
    with open(f"said-{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        try:
            main()
        except SystemExit as end:
            if end.code:
                sys.exit(f"hnkit: {words} ended with {end.code}")
    if rank == "0":
        os.replace("said-0.txt", words[words.index("--out") + 1] + ".json" if "--out" in words else "last.json")
"""
"""Commands of one interpreter, which loads once for all of them; what each says is kept beside its folder."""


def in_turn(place: Path, processes: int, *commands: tuple[str, ...]) -> None:
    (place / "in_turn.py").write_text(IN_TURN)
    start = () if processes == 1 else (*TORCHRUN, str(processes))
    done = ended(place, *start, "in_turn.py", json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]


def said(place: Path, out: str) -> dict:
    """The one document of a command, from one process."""
    return json.loads((place / f"{out}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


COMMON = ("--backend", "digits", "--adapter", "adapter", "--prompts", "prompts.txt")


GENERATE = ("generate", *COMMON, "--count", "2", "--json", "--out")
# in 14 blocks, of which two processes take seven
MAP_VERIFIED = ("--map", "mymap:f", "--shape", "6", "--samples", "40")
VERIFY = ("verify-bound", *MAP_VERIFIED, "--json", "--out")
KEPT = "two/prompt-000/base-00.png"


@pytest.fixture(scope="module")
def by_one_and_two(place) -> int:
    """When the file `KEPT` was written by two processes, before a worker that was killed has cost another prompt."""
    in_turn(place, 1, (*GENERATE, "one"), (*VERIFY, "verify-one"))
    in_turn(
        place, 2, (*GENERATE, "two"), (*VERIFY, "verify-two"), ("remove", "two/prompt-001/prompt.txt"),
        ("generate", "--resume", "two", "--json"),
    )  # fmt: skip
    return (place / "two" / "prompt-001" / "prompt.txt").stat().st_mtime_ns


def test_generate_writes_the_same_files_whoever_writes_them(place, by_one_and_two):
    assert said(place, "one") | {"run_folder": "two"} == said(place, "two") == said(place, "last")
    assert files(place / "one") == files(place / "two")
    # what was there is kept, what was not is made by others
    assert (place / KEPT).stat().st_mtime_ns < (place / "verify-two.json").stat().st_mtime_ns < by_one_and_two


def test_verify_bound_of_a_map_has_the_same_figures_and_plots(place, by_one_and_two):
    assert by_one_and_two
    assert said(place, "verify-two") | {"run_folder": 0} == said(place, "verify-one") | {"run_folder": 0}
    same_report(place / "verify-two", place / "verify-one")


def same_report(one: Path, other: Path) -> None:
    one_by_name, others = files(one), files(other)
    assert one_by_name.keys() == others.keys()
    assert all(one_by_name[name] == others[name] for name in others if name.endswith((".png", "report.json")))


@pytest.mark.slow
def test_more_processes_than_prompts_and_another_number_of_them_write_the_same_files(place):
    for name, prompts in (("three", "prompts.txt"), ("single", "one.txt")):
        command = ("generate", *COMMON[:-1], prompts, "--count", "2")
        hnkit(place, 1, *command, "--out", f"{name}-1")
        hnkit(place, 4, *command, "--out", f"{name}-4")  # with prompts for three, or one, of them
        assert files(place / f"{name}-1") == files(place / f"{name}-4")
    (place / "three-4" / "prompt-001" / "prompt.txt").unlink()
    hnkit(place, 1, "generate", "--resume", "three-4")
    assert files(place / "three-1") == files(place / "three-4")


@pytest.mark.slow
def test_the_frontier_of_rewards_has_the_same_figures(place):
    command = ("frontier", *COMMON, "--reward", "redness=1", "--base-samples", "8", "--samples", "2", "--json")
    one, *others = (json.loads(hnkit(place, n, *command, "--out", f"frontier-{n}")) for n in (1, 2, 4))
    one.pop("run_folder")
    for other in others:
        other.pop("run_folder")
        assert one == other


VERIFIED = {
    "map": MAP_VERIFIED,
    "arnoldi": ("--map", "mymap:f", "--shape", "6", "--samples", "24", "--method", "arnoldi", "--probes", "2"),
    "error": ("--map", "mymap:f", "--shape", "6", "--samples", "24", "--method", "lanczos", "--rel-error", "0.2"),
    "budget": ("--map", "mymap:f", "--shape", "6", "--samples", "24", "--method", "arnoldi", "--budget", "3000"),
    "injected": ("--map", "mymap:f", "--shape", "6", "--samples", "24", "--injection", "0.5"),
    "toys": ("--toy", "linear-gaussian", "--toy", "one-dimensional", "--toy", "rotation", "--samples", "64"),
    "backend": (*COMMON, "--samples", "4"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven processes in all, on what may be two busy cores
@pytest.mark.parametrize(
    ("kind", "counts"), [("map", (4, 17)), *((kind, (2, 4)) for kind in VERIFIED if kind != "map")]
)  # 17: more than there are blocks
def test_verify_bound_has_the_same_figures_and_plots(kind, counts, place):
    out = f"verify-{kind}"
    command = ("verify-bound", *VERIFIED[kind], "--json", "--out")
    one = json.loads(hnkit(place, 1, *command, f"{out}-alone"))
    for count in counts:
        found = json.loads(hnkit(place, count, *command, f"{out}-of-{count}"))  # one document, from one process
        assert found | {"run_folder": 0} == one | {"run_folder": 0}
        same_report(place / f"{out}-of-{count}", place / f"{out}-alone")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_leaves_what_is_known(place):
    error = hnkit(place, 2, "verify-bound", "--map", "mymap:killed", "--shape", "6", "--out", "killed", status=1)
    assert "Signal 9" in error or "SIGKILL" in error
    assert "internal error" not in error
    assert "another process has gone" in error or "stopped by SIGTERM" in error  # whichever it is told of first
    assert not (place / "killed" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compare_has_the_same_figures_and_goes_on_by_any_number(place):
    command = ("compare", *COMMON, "--quick", "--seeds", "1", "--methods", "base,hypernoise,best-of-n", "--json",
               "--set", "compare.best_of=2", "--set", "compare.ranks=[]", "--set", "compare.losses=[]",
               "--set", "compare.diversity_seeds=2", "--set", "compare.measure_samples=2",
               "--set", "compare.batch=2", "--set", "compare.steps=[1]")  # fmt: skip
    one, two, four = (json.loads(hnkit(place, n, *command, "--out", f"compare-{n}")) for n in (1, 2, 4))
    assert untimed(one) == untimed(two) == untimed(four)
    parts = sorted((place / "compare-2" / "parts").glob("base-*.json"))
    parts[0].unlink()
    before = parts[1].stat().st_mtime_ns
    again = json.loads(hnkit(place, 1, "compare", "--backend", "digits", "--resume", "compare-2", "--json"))
    assert untimed(again) == untimed(two)
    assert parts[1].stat().st_mtime_ns == before
    # a measurement that was cut short goes on with its blocks
    parts = place / "compare-2" / "parts"
    blocks = sorted((parts / "blocks-of-hypernoise").iterdir())
    others = (place / "compare-4" / "parts" / "blocks-of-hypernoise").iterdir()
    assert {path.name for path in blocks} == {path.name for path in others}
    blocks[-1].unlink()
    before = {path: path.stat().st_mtime_ns for path in blocks[:-1]}
    again = json.loads(hnkit(place, 2, "compare", "--backend", "digits", "--resume", "compare-2", "--json"))
    assert untimed(again) == untimed(two)
    assert blocks[-1].exists()
    assert before == {path: path.stat().st_mtime_ns for path in blocks[:-1]}


def untimed(value):
    """A document without what is a time or a place."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "second" not in k and k not in ("run_folder", "created")}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


DIFFERENT = """
import os, sys
from hnkit.cli.app import main
count = 1 + int(os.environ["RANK"])
{words}
main()
"""
OF_GENERATE = 'sys.argv[1:] = ["generate", "--backend", "digits", "--count", str(count), "--out", "no"]'
OF_VERIFY = 'sys.argv[1:] = ["verify-bound", "--toy", "rotation", "--seed", str(count), "--out", "no"]'
OF_VERSIONS = """
import hnkit.training.processes as processes
known = processes.installation()
processes.installation = lambda: known | {"PACKAGE": f"{count}.0"}
sys.argv[1:] = ["verify-bound", "--toy", "rotation", "--out", "no"]
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (OF_GENERATE, "process 1 has settings = "),
        pytest.param(OF_VERIFY, "process 1 has seed = 2 where process 0 has 1", marks=pytest.mark.slow),
        *(
            pytest.param(
                OF_VERSIONS.replace("PACKAGE", package),
                f"process 1 has {package} = 2.0 where process 0 has 1.0",
                marks=pytest.mark.slow,
            )
            for package in ("hnkit", "torch", "diffusers", "the code of hnkit")
        ),
    ],
)
def test_processes_that_differ_are_refused_in_one_line(words, said, place):
    (place / "differ.py").write_text(DIFFERENT.replace("{words}", words))
    error = ended(place, *TORCHRUN, "2", "differ.py").stderr
    lines = [line for line in error.splitlines() if line.startswith("hnkit:")]
    assert len(lines) == 1  # of all processes together
    assert said in lines[0]
    assert "start all processes with the same settings and the same versions" in lines[0]
    assert not (place / "no").exists()
