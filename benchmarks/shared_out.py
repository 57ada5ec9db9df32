"""What evaluation by two processes costs against one: `docs/results/shared-out.json`.

Each command is run by one process and by two of torchrun's, on the bundled miniature, one thread each, one after the
other in this run. Figures are seconds of CPU time, user and system, of each process from its start to its end, so that
a busy machine does not change them; and what loading takes is measured beside them, by a command that is refused when
all is loaded. Without loading, 1 / W = 0.5 is the least that the larger share can be, and 1 what both do together.

    python benchmarks/shared_out.py             some minutes
    python benchmarks/shared_out.py frontier    the cases whose name holds the word; the others stay as they are
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "shared-out.json"
PROMPTS = 8
DRIVER = """
import atexit, json, os, time
from pathlib import Path

shared, inside = 0.0, False

def note():
    used = sum(os.times()[:4])  # user and system, its own and of processes that it has waited for
    Path(os.environ["TIMES"], os.environ.get("RANK", "0") + ".json").write_text(json.dumps([used, shared]))

def timed(work):
    def run(*words, **named):
        global shared, inside
        if inside:
            return work(*words, **named)
        inside, begun = True, time.process_time()
        try:
            return work(*words, **named)
        finally:
            inside, shared = False, shared + time.process_time() - begun
    return run

atexit.register(note)
from hnkit.cli.app import main
from hnkit.figures import measured_map
from hnkit.scaled.compare import evaluation, run

# what is shared out of a measurement and of a comparison
all_made = measured_map.all_made
measured_map.all_made = lambda items, workers, work: all_made(items, workers, timed(work))
evaluation.Job.chunk = timed(evaluation.Job.chunk)
run._Session._prompt_diversity = timed(run._Session._prompt_diversity)
main()
"""
MAP = """
import torch

torch.manual_seed(0)
f = torch.nn.Sequential(
    torch.nn.Linear(96, 512), torch.nn.Tanh(), torch.nn.Linear(512, 512), torch.nn.Tanh(), torch.nn.Linear(512, 96)
).double()
"""
COMMON = ("--backend", "digits", "--adapter", "bundled", "--prompts", "prompts.txt")
CASES: dict[str, tuple[str, ...]] = {
    "generate": ("generate", *COMMON, "--count", "48"),
    "frontier": ("frontier", *COMMON, "--reward", "redness=1", "--base-samples", "48", "--samples", "8"),
    "compare": (
        "compare", *COMMON, "--quick", "--seeds", "2", "--methods", "base,hypernoise,reno",
        "--set", "compare.reno_iterations=100",
        "--set", "compare.ranks=[]", "--set", "compare.losses=[]", "--set", "compare.diversity_seeds=2",
        "--set", "compare.measure_samples=2", "--set", "compare.batch=2", "--set", "compare.steps=[1]",
    ),
    "verify-bound, a map": ("verify-bound", "--map", "mymap:f", "--shape", "96", "--samples", "256"),
    "verify-bound, toys": ("verify-bound",),
    "verify-bound, a network": ("verify-bound", *COMMON, "--samples", "16"),
}  # fmt: skip
TIMED = ("compare", "verify-bound, a")
"""Cases whose shared work is all in functions of its own, so that it can be timed."""
EMPTY = ("generate", "--backend", "digits", "--adapter", "bundled", "--prompt", "no digit", "--out", "empty")
"""What loads all and is then refused."""


def seconds(
    place: Path, processes: int, command: tuple[str, ...], status: tuple[int, ...] = (0, 1)
) -> list[tuple[float, float]]:
    """CPU seconds of every process, and those that went into what is shared out."""
    with tempfile.TemporaryDirectory() as times:
        start = (str(place / "driver.py"),)
        if processes > 1:
            start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *start)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TIMES": times, "PYTHONPATH": str(place)}
        done = subprocess.run(
            [sys.executable, *start, *command], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in status:
            raise SystemExit(f"{' '.join(command)} by {processes}: {done.returncode}\n{done.stderr[-2000:]}")
        return [tuple(json.loads(path.read_text())) for path in sorted(Path(times).glob("*.json"))]


def case(place: Path, name: str) -> dict[str, Any]:
    """One command by one process, and by two."""
    kind = name.replace(" ", "-").replace(",", "")
    found = {str(count): seconds(place, count, (*CASES[name], "--out", f"{kind}-{count}")) for count in (1, 2)}
    ((load, _),) = seconds(place, 1, EMPTY, (2,))
    ((alone, shared),) = found["1"]
    both = [used for used, _ in found["2"]]
    work = [used - load for used in both]
    return {
        "seconds": {"1": [alone], "2": both},
        "shared": shared if name.startswith(TIMED) else None,
        "loading": load,
        "ratio": max(both) / alone,
        "largest_share": max(work) / (alone - load),
        "sum_of_shares": sum(work) / (alone - load),
    }


def main() -> None:
    """Run the cases and write."""
    from hnkit.backend import backend_factory

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "driver.py").write_text(DRIVER)
        (place / "mymap.py").write_text(MAP)
        factory = backend_factory("digits")
        prompts, _ = factory.load(factory.options()).prompts()
        (place / "prompts.txt").write_text("\n".join(prompts[:PROMPTS]) + "\n")
        for name in CASES:
            if all(word in name for word in sys.argv[1:]):
                print(name, flush=True)
                found = case(place, name)
                document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
                cases = document["cases"] | {name: found}
                document["cases"] = {known: cases[known] for known in CASES if known in cases}
                RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                print(found, flush=True)


if __name__ == "__main__":
    main()
