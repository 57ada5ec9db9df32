"""Soak test: train, check and generate again and again in one process, and watch its memory and open files.

Each round runs `hnkit train` and `hnkit verify-bound` on the toy and the digits backend and `hnkit generate` on the
latter, small, through the command line's own code (`verify-bound` on the digits every fifth round), and then notes the
resident memory (after a garbage collection), the open file descriptors and the threads. Fails, with exit code 1, if
after the warm-up rounds the memory grows by more than the tolerance by a linear fit over them, or if more descriptors
or threads are open at the end than at the warm-up's end.

    python benchmarks/soak.py --minutes 30

Writes docs/results/soak.json and docs/results/soak.png; `--out FOLDER` puts them elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--steps", "3", "--batch", "4", "--set", "train.measure_samples=2", "--set", "train.validate_samples=2"]
EVERY = 5  # rounds from one verify-bound of the digits to the next: it takes most of a round's time
ACCEPTED = {"train": {0}, "verify-bound": {0, 1}, "generate": {0}}  # six steps need not make every check hold


@dataclass(frozen=True)
class Reading:
    """The process after a round."""

    round: int
    seconds: float
    resident_mib: float
    descriptors: int
    threads: int


def read(number: int, begun: float) -> Reading:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    descriptors = len(list(Path("/proc/self/fd").iterdir())) - 1  # the listing's own
    return Reading(number, time.monotonic() - begun, resident, descriptors, threading.active_count())


def command(arguments: list[str], log: Path) -> None:
    """Run one command of `hnkit` in this process; an exit code other than the expected ones ends the test."""
    from hnkit.cli.app import app

    code = 0
    with log.open("a") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            app(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    if code not in ACCEPTED[arguments[0]]:
        raise SystemExit(f"hnkit {' '.join(arguments)}: exit code {code}\n{log.read_text()[-3000:]}")


def one_round(work: Path, number: int) -> None:
    """Both backends once; the run folders go when the round ends."""
    with tempfile.TemporaryDirectory(prefix=f"round-{number}-", dir=work) as folder:
        log = Path(folder) / "log.txt"
        for backend in ("toy", "digits"):
            out = Path(folder) / backend
            chosen = ["--backend", backend, "--seed", str(number)]
            command(["train", *chosen, *SMALL, "--out", str(out / "train")], log)
            chosen += ["--adapter", str(out / "train" / "adapter")]
            if backend == "toy":
                command(["verify-bound", *chosen, "--samples", "4", "--out", str(out / "verify")], log)
            elif number % EVERY == 0:
                few = ["--method", "arnoldi", "--probes", "1", "--steps", "6", "--samples", "2"]
                command(["verify-bound", *chosen, *few, "--out", str(out / "verify")], log)
            if backend == "digits":  # the toy makes vectors, not images
                command(["generate", *chosen, "--count", "2", "--out", str(out / "generate")], log)


def growth(readings: list[Reading]) -> float:
    """Growth of the resident memory from the first to the last of the readings, by a linear fit, in MiB."""
    seconds = np.array([reading.seconds for reading in readings])
    slope = np.polynomial.Polynomial.fit(seconds, [reading.resident_mib for reading in readings], 1).convert().coef[1]
    return float(slope * (seconds[-1] - seconds[0]))


def draw(readings: list[Reading], warm_up: int, grown: float) -> bytes:
    """Memory and descriptors against time."""
    from hnkit.output.plots import BLUE, GREY, VERMILION, new_figure, style, to_png

    minutes = [reading.seconds / 60 for reading in readings]
    with style():
        figure, (memory, files) = new_figure(7.6, 5.2, rows=2)
        memory.plot(minutes, [reading.resident_mib for reading in readings], "o-", color=BLUE, ms=3)
        memory.set(ylabel="resident memory, MiB", ylim=(0, 1.2 * max(reading.resident_mib for reading in readings)))
        memory.set_title(f"{len(readings)} rounds; fitted growth after warm-up {grown:+.1f} MiB")
        files.plot(minutes, [reading.descriptors for reading in readings], "s-", color=VERMILION, ms=3)
        files.set(xlabel="minutes", ylabel="open file descriptors", ylim=(0, None))
        for axis in (memory, files):
            axis.axvspan(0, minutes[max(warm_up - 1, 0)], color=GREY, alpha=0.15, lw=0)
        return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=int, default=5, metavar="ROUNDS", help="rounds left out of the fit")
    parser.add_argument("--tolerance", type=float, default=5.0, help="growth allowed, percent of the mean memory")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    options = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        parser.error("memory and descriptors are read from /proc, which this system does not have")
    options.out.mkdir(parents=True, exist_ok=True)
    readings: list[Reading] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hnkit-soak-") as work:
        while time.monotonic() - begun < 60 * options.minutes or len(readings) < options.warm_up + 3:
            one_round(Path(work), len(readings))
            readings.append(read(len(readings), begun))
            last = readings[-1]
            print(
                f"round {last.round}: {last.seconds:.0f} s, {last.resident_mib:.1f} MiB, "
                f"{last.descriptors} descriptors, {last.threads} threads",
                flush=True,
            )
    kept = readings[options.warm_up :]
    grown, mean = growth(kept), float(np.mean([reading.resident_mib for reading in kept]))
    allowed = options.tolerance / 100 * mean
    failures = []
    if grown > allowed:
        failures.append(f"memory grew by {grown:.1f} MiB, more than {allowed:.1f} MiB")
    for what in ("descriptors", "threads"):
        first, end = getattr(kept[0], what), getattr(kept[-1], what)
        if end > first:
            failures.append(f"open {what} grew from {first} to {end}")
    figures = {
        "minutes": round(readings[-1].seconds / 60, 2),
        "rounds": len(readings),
        "warm_up_rounds": options.warm_up,
        "growth_mib": round(grown, 2),
        "allowed_mib": round(allowed, 2),
        "failures": failures,
        "python": platform.python_version(),
        "readings": [asdict(reading) for reading in readings],
    }
    (options.out / "soak.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (options.out / "soak.png").write_bytes(draw(readings, options.warm_up, grown))
    print(
        f"{figures['minutes']:.1f} minutes, {len(readings)} rounds: memory {grown:+.1f} MiB by linear fit "
        f"(allowed {allowed:.1f}), descriptors {kept[0].descriptors} to {kept[-1].descriptors}"
    )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
