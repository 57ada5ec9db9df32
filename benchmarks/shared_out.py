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
import atexit, json, os
from pathlib import Path

def note():
    used = sum(os.times()[:4])  # user and system, its own and of processes that it has waited for
    Path(os.environ["TIMES"], os.environ.get("RANK", "0") + ".json").write_text(json.dumps(used))

atexit.register(note)
from hnkit.cli.app import main
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
EMPTY = ("generate", "--backend", "digits", "--adapter", "bundled", "--prompt", "no digit", "--out", "empty")
"""What loads all and is then refused."""


def seconds(place: Path, processes: int, command: tuple[str, ...], status: tuple[int, ...] = (0, 1)) -> list[float]:
    """CPU seconds of every process."""
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
        return [float(json.loads(path.read_text())) for path in sorted(Path(times).glob("*.json"))]


def case(place: Path, name: str) -> dict[str, Any]:
    """One command by one process, and by two."""
    kind = name.replace(" ", "-").replace(",", "")
    found = {str(count): seconds(place, count, (*CASES[name], "--out", f"{kind}-{count}")) for count in (1, 2)}
    (load,) = seconds(place, 1, EMPTY, (2,))
    (alone,), work = found["1"], [used - load for used in found["2"]]
    return {
        "seconds": found,
        "loading": load,
        "ratio": max(found["2"]) / alone,
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
