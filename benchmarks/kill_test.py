"""Kill `hnkit train` at random moments, resume it each time, and compare the end with a run that was left in peace.

Half of the kills come after a random time, half at a random write of the run's own (a flush, a rename), so that many
fall inside a checkpoint. SIGKILL, SIGTERM and SIGINT alternate at random. Every finished run must equal the undisturbed
one byte for byte: adapter, metrics, report, page, plots and last checkpoint.

    python benchmarks/kill_test.py --kills 60
    python benchmarks/kill_test.py --kills 50 --backend digits --set train.steps=30
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SETTINGS = {
    "steps": 60,
    "batch": 16,
    "checkpoint_every": 4,
    "measure_every": 15,
    "measure_samples": 32,
    "validate_every": 30,
    "ema": 0.9,
    "kl": "second-order",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WRITES = ("fsync", "rename", "replace", "mkdir")
NEVER_COMPARED = {"timings.jsonl", ".lock"}


def spawn(arguments: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """Run the command line in a forked process, which saves the seconds of importing; returns its id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code = 1
    try:
        prepare()
        importlib.import_module("hnkit.cli.app").app(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:  # before the command line could take it
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def signal_at_write(count: int, signum: int) -> Callable[[], None]:
    """Make the process signal itself just before its `count`-th write operation."""

    def prepare() -> None:
        calls = iter(range(1, 10**9))
        for name in WRITES:
            plain = getattr(os, name)

            def watched(*arguments, _plain=plain, **options):
                if next(calls) == count:
                    os.kill(os.getpid(), signum)
                return _plain(*arguments, **options)

            setattr(os, name, watched)

    return prepare


def outcome(folder: Path, steps: int) -> dict[str, bytes]:
    """Everything a run is for: of the checkpoints only the last, since a stop adds some."""
    last = f"step-{steps:08d}"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in NEVER_COMPARED
        and ("checkpoints" not in path.parts or path.parent.name == last)
    }


def exit_code(status: int) -> int:
    """The exit status of a child as a shell would show it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class KillTest:
    """Runs, kills and comparisons, with their counts."""

    def __init__(self, work: Path, backend: str, overrides: list[str], seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        settings = [f"train.{key}={value}" for key, value in SETTINGS.items()] if backend == "toy" else []
        flags = [flag for override in [*settings, *overrides] for flag in ("--set", override)]
        self.train = ["train", "--backend", backend, *flags]
        self.log = work / "log.txt"
        self.counts: Counter[str] = Counter()
        self.runs = 0

    def reference(self) -> tuple[dict[str, bytes], int, float]:
        """The undisturbed run: its files, its steps, and how long it took."""
        begun = time.monotonic()
        status = os.waitpid(spawn([*self.train, "--out", str(self.work / "whole")], self.log, lambda: None), 0)[1]
        if exit_code(status):
            raise SystemExit(f"the undisturbed run failed with {exit_code(status)}:\n{self.log.read_text()}")
        seconds = time.monotonic() - begun
        steps = json.loads((self.work / "whole" / "report.json").read_text())["step"]
        return outcome(self.work / "whole", steps), steps, seconds

    def attempt(self, folder: Path, seconds: float, quiet: bool) -> int:
        """Start or resume the run in `folder`, and kill it unless `quiet`; returns its exit code."""
        started = (folder / "config.toml").exists()
        if not started:
            shutil.rmtree(folder, ignore_errors=True)
        command = ["train", "--resume", str(folder)] if started else [*self.train, "--out", str(folder)]
        signum = self.random.choice(SIGNALS)
        at_write = not quiet and self.random.random() < 0.5
        prepare = signal_at_write(self.random.randint(1, 40), signum) if at_write else lambda: None
        child = spawn(command, self.log, prepare)
        if not quiet and not at_write:
            time.sleep(self.random.uniform(0, 0.4 * seconds))
            # the child is not waited for yet, so its id cannot have been given to another process
            os.kill(child, signum)
        code = exit_code(os.waitpid(child, 0)[1])
        if code == 128 + signum:
            self.counts[signal.Signals(signum).name] += 1
            self.counts["at a write" if at_write else "at a random time"] += 1
            self.counts["before the run began"] += not (folder / "config.toml").exists()
            self.counts["inside a checkpoint or the adapter"] += any(folder.rglob(".*.tmp"))
            if signum != signal.SIGKILL and (folder / "config.toml").exists():
                self.counts["stopped after a checkpoint"] += "stopped at step" in self.log.read_text().splitlines()[-1]
        elif code:
            raise SystemExit(f"exit code {code} after {signal.Signals(signum).name}:\n{self.log.read_text()[-3000:]}")
        return code

    def kills(self) -> int:
        """Kills so far."""
        return sum(self.counts[signum.name] for signum in SIGNALS)

    def run(self, kills: int) -> bool:
        """Kill that often; True if every run ended as the undisturbed one."""
        expected, steps, seconds = self.reference()
        while self.kills() < kills:
            folder = self.work / f"run-{self.runs}"
            while self.attempt(folder, seconds, quiet=self.kills() >= kills):
                continue
            self.runs += 1
            found = outcome(folder, steps)
            different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            if different:
                print(f"{folder} differs from the undisturbed run in {', '.join(different)}")
                return False
            shutil.rmtree(folder)
        if "Traceback" in self.log.read_text():
            print(f"a traceback was printed:\n{self.log.read_text()[-3000:]}")
            return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="toy")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    options = parser.parse_args()
    # imported once, before any fork: numerics run in the children alone
    for module in ("hnkit.cli.train", "hnkit.training.run", "hnkit.toy.backend", "matplotlib.backends.backend_agg"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="hnkit-kill-") as work:
        test = KillTest(Path(work), options.backend, options.set, options.seed)
        begun = time.monotonic()
        whole = test.run(options.kills)
    figures = ", ".join(f"{name} {count}" for name, count in test.counts.items())
    seconds = time.monotonic() - begun
    print(f"{test.kills()} kills ({figures}), {test.runs} finished runs, {seconds:.0f} s, seed {options.seed}")
    print("every finished run is bit-identical to the undisturbed one" if whole else "FAILED")
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
